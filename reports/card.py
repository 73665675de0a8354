"""The model card of a run, final/README.md, from its folder and those of the runs before it."""

import dataclasses
import json
from pathlib import Path

from plumbing import hub
from plumbing.config import section
from plumbing.files import read_json
from reports.folders import read

WHAT = {"sft": "Supervised fine-tuning", "dpo": "Direct preference optimisation"}
SETUP = (
    "loss_reduction",
    "clipping",
    "parameter_dtype",
    "warmup_steps",
    "processes",
    "weights",
    "data",
    "hub",
    "versions",
)


def write(run_dir):
    """Write the card of a run that has ended into its final/; returns its path.

    It takes the place of an earlier one.
    """
    path = Path(run_dir) / "final/README.md"
    # not in final/: a file that a kill leaves there is none of an export, and would be refused
    temporary = Path(run_dir) / ".tmp_README.md"
    temporary.write_text(card(Path(run_dir)), encoding="utf-8")
    temporary.rename(path)
    return path


def card(run_dir):
    """The card's text.

    YAML front matter as the hub reads it, what was trained, how it went, every value that decides the
    numbers.
    """
    run = read(run_dir)
    stage, config = run.manifest["stage"], run.config
    decisive = {}
    for field in dataclasses.fields(section(stage)):
        if field.metadata["affects_results"]:
            decisive[field.name] = config[field.name]
    tags = [stage, "lora", "glassbox"] if config["lora_rank"] else [stage, "glassbox"]
    name = "/".join(Path(run_dir).absolute().parts[-2:])
    steps, _ = run.points("loss")
    sources = ", ".join(f"`{source}`" for source in config["data"])
    about = f"{WHAT[stage]} of `{config['model_path']}` on {sources}, "
    about += f"{steps[-1]:,} optimizer steps of {config['global_batch_size']:,} examples with Glassbox. "
    about += "The chat template is the tokenizer's."
    provenance = (
        "`weights` and `data` are hashes of the weights that the run started from and of the token ids "
        "and masks it was trained on."
    )
    about_metrics = f"Of the training steps and, `eval/`, of {_evaluated(run.manifest)}"
    parts = [
        _front_matter(_lineage(Path(run_dir)), tags),
        f"# {name}\n\n{about}",
        f"## Metrics\n\n{about_metrics}; ± is half of a 95 % interval.\n\n{_metrics(run)}",
        f"## Configuration\n\n{_block(decisive)}",
        f"## Provenance\n\n{provenance}\n\n{_block({key: run.manifest[key] for key in SETUP})}",
    ]
    return "\n\n".join(parts) + "\n"


def _lineage(run_dir):
    """[(config, manifest)] of this run, of the run whose final/ it started from, and so on.

    By the hash of the weights: the folder may be another program's, or its run started over since.
    """
    config, manifest = read_json(run_dir / "config.json"), read_json(run_dir / "manifest.json")
    start = Path(config["model_path"]).parent
    about = read_json(start / "manifest.json") if (start / "manifest.json").is_file() else {}
    if about.get("exported") != manifest["weights"]:
        return [(config, manifest)]
    return [(config, manifest), *_lineage(start)]


def _front_matter(lineage, tags):
    """The YAML front matter; JSON is YAML.

    Only what came from the hub is named, as org/name: a folder of this machine is in the configuration below.
    """
    datasets = []
    for config, manifest in reversed(lineage):
        for source in config["data"]:
            name, _, _ = source.partition("[")
            if f"datasets/{name}" in manifest["hub"] and hub.repository(name) not in datasets:
                datasets.append(hub.repository(name))
    first, provenance = lineage[-1]
    lines = ["---", "# license: yours to state; the terms of the base model and of the data apply"]
    lines += ["library_name: transformers", "pipeline_tag: text-generation"]
    if first["model_path"] in provenance["hub"]:
        lines.append(f"base_model: {json.dumps(hub.repository(first['model_path']))}")
    if datasets:
        lines.append(f"datasets: {json.dumps(datasets)}")
    return "\n".join([*lines, f"tags: {json.dumps(tags)}", "---"])


def _evaluated(manifest):
    """What eval/ is of. Older manifests lack the count, and those of runs without held-out data."""
    rows = manifest.get("held_out_rows", {"with_a_trained_prompt": 0})
    if not rows["with_a_trained_prompt"]:
        return "held-out data"
    shared = f"{rows['with_a_trained_prompt']:,} have a prompt that was trained on too and are not held out"
    return f"the {rows['all']:,} rows of `data_eval`, of which {shared}"


def _metrics(run):
    """A table of the first and the last value of every loss, reward and log-prob."""
    names = {}
    for line in run.lines:
        names |= line
    rows = ["| | first | last |", "|---|---|---|"]
    for name in names:
        if name.endswith("_ci95") or ("/" not in name and name != "loss"):
            continue
        _, values = run.points(name)
        _, halves = run.points(f"{name}_ci95")
        first, last = f"{values[0]:.4f}", f"{values[-1]:.4f}"
        if halves:
            first += f" ± {halves[0]:.4f}"
            last += f" ± {halves[-1]:.4f}"
        rows.append(f"| `{name}` | {first} | {last} |")
    return "\n".join(rows)


def _block(values):
    return f"```json\n{json.dumps(values, indent=2)}\n```"
