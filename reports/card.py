"""The model card of a run, final/README.md: made from the run folder and, for what came before it, from the run that it started from."""

import dataclasses
import json
from pathlib import Path

from plumbing import hub
from plumbing.config import section
from reports.folders import read

WHAT = {"sft": "Supervised fine-tuning", "dpo": "Direct preference optimisation"}
SETUP = ("loss_reduction", "clipping", "parameter_dtype", "warmup_steps", "processes", "weights", "data", "hub", "versions")


def write(run_dir):
    """Write the card of a run that has ended into its final/, in place of an earlier one. Returns its path."""
    path = Path(run_dir) / "final/README.md"
    temporary = Path(run_dir) / ".tmp_README.md"  # not in final/: what a kill leaves there would be no file of an export, which is refused
    temporary.write_text(card(Path(run_dir)), encoding="utf-8")
    temporary.rename(path)
    return path


def card(run_dir):
    """The card's text: YAML front matter as the hub reads it, then what was trained, how it went, every value that decides the numbers."""
    run = read(run_dir)
    stage = run.manifest["stage"]
    lineage = _lineage(Path(run_dir))
    decisive = {field.name: run.config[field.name] for field in dataclasses.fields(section(stage)) if field.metadata["affects_results"]}
    name = "/".join(Path(run_dir).absolute().parts[-2:])
    steps = run.points("loss")[0][-1]
    parts = [
        _front_matter(lineage, [stage, *(["lora"] if run.config["lora_rank"] else []), "glassbox"]),
        f"# {name}\n\n{WHAT[stage]} of `{run.config['model_path']}` on {', '.join(f'`{source}`' for source in run.config['data'])}, "
        f"{steps:,} optimizer steps of {run.config['global_batch_size']:,} examples with Glassbox. The chat template is the tokenizer's.",
        f"## Metrics\n\nOf the training steps and, `eval/`, of held-out data; ± is half of a 95 % interval.\n\n{_metrics(run)}",
        f"## Configuration\n\n{_block(decisive)}",
        "## Provenance\n\n`weights` and `data` are hashes of the weights that the run started from and of the token ids and masks it was "
        f"trained on.\n\n{_block({key: run.manifest[key] for key in SETUP})}",
    ]
    return "\n\n".join(parts) + "\n"


def _lineage(run_dir):
    """[(config, manifest)] of this run, of the run whose final/ it started from, and so on."""
    config, manifest = (json.loads((run_dir / f"{name}.json").read_text()) for name in ("config", "manifest"))
    before = Path(config["model_path"]).parent
    if Path(config["model_path"]).name != "final" or not (before / "config.json").is_file():
        return [(config, manifest)]
    return [(config, manifest), *_lineage(before)]


def _front_matter(lineage, tags):
    """Only what came from the hub is named, as org/name: a folder of this machine is in the configuration below. JSON is YAML."""
    sources = [(name.partition("[")[0], manifest["hub"]) for config, manifest in reversed(lineage) for name in config["data"]]
    datasets = dict.fromkeys(hub.repository(name) for name, commits in sources if f"datasets/{name}" in commits)
    base, commits = lineage[-1][0]["model_path"], lineage[-1][1]["hub"]
    lines = ["---", "# license: yours to state; the terms of the base model and of the data apply", "library_name: transformers"]
    lines += ["pipeline_tag: text-generation"]
    lines += [f"base_model: {json.dumps(hub.repository(base))}"] if base in commits else []
    lines += [f"datasets: {json.dumps(list(datasets))}"] if datasets else []
    return "\n".join([*lines, f"tags: {json.dumps(tags)}", "---"])


def _metrics(run):
    """A table of the first and the last value of every loss, reward and log-prob."""
    names = dict.fromkeys(name for line in run.lines for name in line if not name.endswith("_ci95"))
    shown = [name for name in names if "/" in name or name == "loss"]
    rows = ["| | first | last |", "|---|---|---|"]
    for name in shown:
        halves = [f" ± {half:.4f}" for half in run.points(f"{name}_ci95")[1]] or [""]
        values = run.points(name)[1]
        rows.append(f"| `{name}` | {values[0]:.4f}{halves[0]} | {values[-1]:.4f}{halves[-1]} |")
    return "\n".join(rows)


def _block(values):
    return f"```json\n{json.dumps(values, indent=2)}\n```"
