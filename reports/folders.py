"""What run folders and steering folders hold, for those who look at them later."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from plumbing.files import UserError, read_json, read_verified_json, sha256_of

POOLED = {"last": "last token", "mean": "mean of the tokens"}  # a pooling in words


@dataclass(frozen=True)
class Run:
    """A folder of train_sft.py or train_dpo.py."""

    folder: Path
    config: dict
    manifest: dict
    lines: list  # of metrics.jsonl; an optimizer step has a "loss", an evaluation an "eval/loss"
    samples: list  # of samples.jsonl

    def points(self, metric):
        """([step], [value]) of the lines that have the metric."""
        steps, values = [], []
        for line in self.lines:
            if metric in line:
                steps.append(line["step"])
                values.append(line[metric])
        return steps, values

    def last(self, metric):
        """Its last value; None without any."""
        _, values = self.points(metric)
        return values[-1] if values else None

    def earlier(self, metric):
        """Of which step its last value is, as " (step 20)", where that is not the run's last, else ""."""
        steps, _ = self.points(metric)
        return f" (step {steps[-1]:,})" if steps and steps[-1] < self.lines[-1]["step"] else ""

    def clipped(self):
        """Number of steps whose gradient was longer than max_grad_norm."""
        limit = self.config["max_grad_norm"]
        if limit is None:
            return 0
        _, norms = self.points("grad_norm")
        return sum(norm > limit for norm in norms)


@dataclass(frozen=True)
class Steering:
    """A folder of steer.py."""

    folder: Path
    manifest: dict  # empty for a sweep's own folder
    spectrum: list  # a dict per layer; empty where `spectrum` has not run
    spectrum_of: str  # the states that it is of, which may be others than a sweep's; "" without one
    sweeps: dict  # {folder: what its aqi.json holds}
    outdated: list  # folders of sweeps along a vector that was here before


def read(folder):
    """The Run or the Steering of a folder.

    UserError, naming folder or file, when it is neither, or a file of it is torn.
    """
    if (folder / "metrics.jsonl").is_file():
        return _read_run(folder)
    if (folder / "vector.safetensors").is_file():
        return _read_steering(folder)
    if (folder / "aqi.json").is_file():
        report = read_verified_json(folder / "aqi.json")
        _check_nulls(folder, report)
        return Steering(folder, {}, [], "", {folder: report}, [])
    expected = "a run folder (with metrics.jsonl) or a steering folder (with vector.safetensors or aqi.json)"
    raise UserError(f"{folder}: expected {expected}")


def _read_run(folder):
    config, manifest = read_json(folder / "config.json"), read_json(folder / "manifest.json")
    lines = _json_lines(folder / "metrics.jsonl", manifest)
    if not any("loss" in line for line in lines):
        raise UserError(f"{folder}/metrics.jsonl: no step yet; expected a run that has finished one")
    has_reference = manifest.get("loss", {}).get("needs_reference")  # a run before 2026-11-28 does not say
    for line in lines:
        for name, value in line.items():
            line[name] = math.nan if value is None else value  # files.finite wrote None
        if has_reference and "rewards/chosen" in line:
            for side in ("chosen", "rejected"):
                line[f"logratios/{side}"] = line[f"rewards/{side}"] / config["beta"]
    samples = []
    if (folder / "samples.jsonl").is_file():
        samples = _json_lines(folder / "samples.jsonl", manifest)
    return Run(folder, config, manifest, lines, samples)


def _read_steering(folder):
    spectrum, spectrum_of = [], ""
    if (folder / "spectrum.json").is_file():
        found = read_verified_json(folder / "spectrum.json")
        spectrum_of = f"{found['side']} texts, {POOLED[found['pooling']]}"
        for layer in found["layers"]:
            spectrum.append(layer | {"centred": layer["explained_centred"][0]})
    sweeps, outdated = {}, []
    for sweep, report, is_current in read_sweeps(folder):
        _check_nulls(sweep, report)
        if is_current:
            sweeps[sweep] = report
        else:
            outdated.append(sweep)
    if not sweeps and not spectrum:
        raise UserError(
            f"{folder}: a vector and nothing on it; expected steer.py spectrum or sweep to have run"
        )
    manifest = read_verified_json(folder / "manifest.json")
    return Steering(folder, manifest, spectrum, spectrum_of, sweeps, outdated)


def read_sweeps(folder):
    """[(folder, what its aqi.json holds, whether it is along the vector that is there now)].

    The sweeps below a steering folder, whose vector may have been extracted anew since.
    """
    vector, found = sha256_of(folder / "vector.safetensors"), []
    for path in sorted(folder.glob("*/aqi.json")):
        report = read_verified_json(path)
        is_current = report["inputs"].get("vector") == vector  # older versions did not say
        found.append((path.parent, report, is_current))
    return found


def _json_lines(path, manifest):
    """The objects in a .jsonl file of the run that the manifest is of."""
    mended = "going on with the run mends it"
    if "finished" in manifest:  # the command that trained it trains nothing more, and writes no line again
        mended = "the run is finished, so delete that line"
    lines = []
    for row, text in enumerate(path.read_text().splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {row} is torn; {mended}") from error
    return lines


def short_names(folders):
    """The folders as paths below their common parent, without a last part that all have in common."""
    folders = [Path(folder).resolve() for folder in folders]
    parent = os.path.commonpath([folder.parent for folder in folders])
    names = [folder.relative_to(parent) for folder in folders]
    have_parents = all(len(name.parts) > 1 for name in names)
    if have_parents and len({name.name for name in names}) == 1:
        names = [name.parent for name in names]
    return [str(name) for name in names]


def has_nulls(report):
    """Whether a sweep was compared with random directions; older versions' sweeps were not."""
    return "nulls" in report["verdicts"][0]


def _check_nulls(sweep, report):
    if not has_nulls(report):
        found = f"{sweep}/aqi.json: of an older version, without null directions"
        raise UserError(f"{found}; expected a new sweep")
