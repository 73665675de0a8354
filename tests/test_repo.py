"""House rules that a machine can check: who may import what, nothing unpickled, nothing partly loaded, short
functions; and documents whose links, names, commands, examples and tables are those of the code."""

import argparse
import ast
import dataclasses
import doctest
import functools
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

import kernels
from planner import plan
from planner.budget import find_gpu
from plumbing import config
from plumbing.config import SECTIONS, load

ROOT = Path(__file__).parent.parent
# The floors, top to bottom. A file imports from its own floor and from those below it, never upward.
FLOORS = (
    ("demo", "bench", "tools"),
    ("train_sft", "train_dpo", "steer", "aqi"),
    ("training", "reports", "planner", "analysis"),
    ("data", "formats", "packing", "optim"),
    ("model", "families"),
    ("plumbing",),
    ("kernels",),
)
ROOMS = {room: level for level, floor in enumerate(FLOORS) for room in floor}
# The house: what is not a demo, a measurement, a tool or a test.
HOUSE = sorted(
    path for room in ROOMS if ROOMS[room] for path in [*ROOT.glob(f"{room}.py"), *ROOT.glob(f"{room}/*.py")]
)
SOURCES = HOUSE + sorted(
    path for folder in ("configs", "demo", "bench", "tools") for path in ROOT.glob(f"{folder}/**/*.py")
)


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


@functools.cache
def nodes_of(path):
    """Every node of the file: a dozen tests walk the same 123 trees."""
    return tuple(ast.walk(tree_of(path)))


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def per_file(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


@functools.cache
def imports(path):
    """Dotted names of everything that the file imports, at any depth: `from a import b` gives a and a.b."""
    names = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def functions(path):
    return [node for node in nodes_of(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_every_file_has_a_floor():
    """Nine files on the top level, and no room that FLOORS does not name."""
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(
        room for room in ROOMS if (ROOT / f"{room}.py").exists()
    )
    assert len(list(ROOT.glob("*.py"))) == 9
    rooms = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("[!.]*/*.py")}
    assert rooms - set(ROOMS) == {"configs", "tests"}


@per_file(SOURCES)
def test_no_import_runs_upward(path):
    if room_of(path) == "configs":
        return
    imported = {name.split(".")[0] for name in imports(path)} & set(ROOMS)
    above = {room for room in imported if ROOMS[room] < ROOMS[room_of(path)]}
    assert not above, f"{room_of(path)} is below {', '.join(sorted(above))}"


@per_file(sorted(ROOT.glob("kernels/*.py")))
def test_kernels_know_torch_and_each_other_only(path):
    known = {"torch", "triton", "kernels", "flash_attn", *sys.stdlib_module_names}
    assert not {name.split(".")[0] for name in imports(path)} - known


def test_the_specification_is_plain():
    """kernels/reference.py can be read by itself: it imports nothing of ours and never asks where a tensor
    is.
    """
    path = ROOT / "kernels/reference.py"
    assert not {name for name in imports(path) if name.split(".")[0] in ROOMS}
    assert not [
        node
        for node in nodes_of(path)
        if isinstance(node, ast.Attribute) and node.attr in ("is_cuda", "cuda")
    ]


@per_file([path for path in SOURCES if room_of(path) not in ("plumbing", "bench")])
def test_only_plumbing_knows_torch_distributed(path):
    assert not [name for name in imports(path) if name.startswith("torch.distributed")]
    assert not [
        node
        for node in nodes_of(path)
        if isinstance(node, ast.Attribute)
        and node.attr == "distributed"
        and ast.unparse(node) == "torch.distributed"
    ]


@per_file(SOURCES)
def test_nothing_is_pickled_and_nothing_partly_loaded(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "dill", "cloudpickle", "joblib"}
    for call in [node for node in nodes_of(path) if isinstance(node, ast.Call)]:
        name = ast.unparse(call.func)
        assert name not in ("torch.load", "torch.save"), f"line {call.lineno}: {name} pickles"
        assert not name.endswith(("_object", "_object_list")), f"line {call.lineno}: {name} pickles"
        strict = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}.get("strict")
        assert name == "zip" or strict != "False", f"line {call.lineno}: {name}(strict=False)"


@per_file(HOUSE)
def test_public_functions_say_what_they_do(path):
    """The file's docstring is main's too."""
    public = [
        node
        for node in tree_of(path).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    assert ast.get_docstring(tree_of(path)) or not tree_of(path).body, "no docstring of the file"
    assert not [
        f"{node.name} (line {node.lineno})"
        for node in public
        if node.name != "main" and not ast.get_docstring(node)
    ]


@per_file(SOURCES)
def test_functions_fit_a_screen(path):
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions(path)}
    assert not {name: lines for name, lines in lengths.items() if lines > (150 if name == "main" else 70)}


# ---------------------------------------------------------------- documents

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
KEYS = {}  # {key: the types that it has in some stage}
for section in SECTIONS:
    for field in dataclasses.fields(config.section(section)):
        KEYS.setdefault(field.name, []).append(field.type)
ENDINGS = {"py", "csv", "diff", "html", "json", "jsonl", "md", "txt", "parquet", "safetensors"}  # of files
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"(python|torchrun|make|ls|rm|pip|hf|lm_eval) ")


@functools.cache  # not at the top: both workers import this file, and so does test_commands.py
def constants():
    """All strings in the code."""
    found = set()
    for path in SOURCES:
        for node in nodes_of(path):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


@functools.cache
def flags():
    return (
        {name for name in constants() if name.startswith("--")}
        | {f"--{key}" for key in KEYS}
        | {"--key", "--nproc-per-node"}
    )


@per_file(sorted([*PAGES, *ROOT.glob("bench/**/*.md")]))
def test_paths_in_documents_exist(path):
    """Link targets, and every file of the repository that the text names; runs/ is what the commands make."""
    text = path.read_text()
    links = [
        target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if not re.match(r"[a-z]+:", target)
    ]
    rooms = "configs|demo|kernels|analysis|families|plumbing|planner|reports|formats|tests|bench|tools|docs"
    named = re.findall(rf"(?<![\w./-])(?:(?:{rooms})/[\w./-]*\w|\w+\.py)\b(?!\()", text)
    assert not [link for link in links if not (path.parent / link).exists()]
    assert not [name for name in named if not (ROOT / name).exists()]


def code_spans(path):
    """Inline code, and each line of the fenced blocks."""
    text = path.read_text()
    lines = [line.strip().removeprefix("$ ") for block in FENCE.findall(text) for line in block.splitlines()]
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text)), lines


def commands(path):
    """[(command, [line of the output that stands below "$ command"])] of a page's code blocks and inline
    code, in its order.
    """
    found, text = [], path.read_text().replace("\\\n", "")
    for block, span in re.findall(rf"{FENCE.pattern}|`([^`\n]+)`", text, re.M | re.S):
        for line in (block or span).splitlines():
            if block.startswith("$ ") and not line.startswith("$ "):
                found[-1][1].append(line)
            else:
                parts = re.sub(r"\s+# .*", "", line.removeprefix("$ ")).split(" && ")
                found += [(part, []) for part in parts if COMMAND.match(part)]
    return found


def defined(tree):
    """Names that a file or class binds at its top: functions, classes and their members, constants,
    fields.
    """
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{member}" for member in defined(node)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {
                name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
            }
    return names


@functools.cache
def names_in(path):
    return defined(tree_of(path))


@per_file(PAGES)
def test_names_in_documents_exist(path):
    """`module.name` and `plumbing.module.name` are in that file, `tests/file.py::test` is a test, `key=value`
    is a key with a value of it, `--flag ..` a flag of some script."""
    spans, _ = code_spans(path)
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): names_in(file) for file in HOUSE}
    modules["kernels"] = set(kernels.__all__)
    for span in spans:
        room = r"(?:kernels|analysis|families|plumbing|planner|reports)\.\w+"
        if found := re.fullmatch(rf"({room}|\w+)\.([A-Za-z_]\w*(?:\.\w+)?)(?:\(.*\))?", span):
            module, name = found.groups()
            assert name in ENDINGS | modules.get(module, set()), f"{span}: no such name"
        if found := re.fullmatch(r"(tests/\w+\.py)::(\w+)", span):
            assert found[2] in names_in(ROOT / found[1]), f"{span}: no such test"
        found = re.fullmatch(r"(?:--)?([a-z]\w*)=(\"\w+\"|[\w.-]+)", span)
        if found and span != "--key=value":
            value, kinds = found[2].strip('"'), KEYS.get(found[1], [])
            choices = {
                choice
                for kind in kinds
                for choice in (get_args(kind) if get_origin(kind) is Literal else [value])
            }
            assert value in choices, f"{span}: no such key, or no value of it"
        if span.startswith("--"):
            assert set(re.findall(r"--[\w-]+", span)) <= flags(), f"{span}: no such flag"


class Parsed(Exception):
    """Raised instead of going on once the arguments were accepted."""


def check_command(words, monkeypatch):
    """python SCRIPT .. or python -m MODULE .. takes its arguments; nothing is run."""
    if words[0] == "torchrun":
        run = importlib.import_module("torch.distributed.run")
        launched = run.get_args_parser().parse_args(words[1:])
        return check_command(
            ["python", launched.training_script, *launched.training_script_args], monkeypatch
        )
    name, *args = (
        words[2:] if words[1] == "-m" else [words[1].removesuffix(".py").replace("/", "."), *words[2:]]
    )
    module, stage = importlib.import_module(name), name.removeprefix("train_")
    if "--gpu" in args:
        options, args = plan._options(args)
        find_gpu(options.gpu)
    if hasattr(module, "parse"):  # steer.py and aqi.py
        return module.parse(args)
    if stage in SECTIONS:
        return load(stage, args)
    if module is plan:
        assert all(list(ROOT.glob(path)) for path in args), words
        return None
    if "argparse" not in vars(module):  # positional arguments only
        return inspect.signature(module.main).bind(*args)
    parse = argparse.ArgumentParser.parse_args

    def accept(parser, argv):
        raise Parsed(parse(parser, argv))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", accept)
    with pytest.raises(Parsed):  # SystemExit: an argument is wrong
        module.main(args)
    monkeypatch.undo()


@per_file(PAGES)
def test_commands_in_documents_parse(path, monkeypatch):
    """Scripts, configs, keys with their values, flags, targets; also of what test_commands.py cannot run, or
    runs with other values.
    """
    targets = re.findall(r"^([\w-]+)[\w -]*:", (ROOT / "Makefile").read_text(), re.M)
    for words in [shlex.split(command) for command, _ in commands(path)]:
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[0] in ("python", "torchrun") and words[1] != "-c":
            monkeypatch.chdir(ROOT)
            check_command(words, monkeypatch)


@per_file(sorted(ROOT.glob("docs/*.md")))
def test_examples_in_documents(path):
    """What begins with >>> prints what stands below it."""
    text = re.sub(r"^```\w*$", "", path.read_text(), flags=re.M)  # a fence would count as output
    examples = doctest.DocTestParser().get_doctest(text, {}, path.name, str(path), 0)
    report = []
    doctest.DocTestRunner(verbose=False).run(examples, out=report.append)
    assert not report, "".join(report)


def test_messages_of_troubleshooting_are_the_codes():
    table = (ROOT / "docs/troubleshooting.md").read_text().split("## While training")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    assert len(messages) > 20
    assert not [message for message in messages if not any(message in text for text in constants())]


def test_table_of_recipes_is_the_configs():
    rows = re.findall(
        r"^\| `(configs/\w+\.py)` \| (sft|dpo) \| (.+) \|$", (ROOT / "docs/recipes.md").read_text(), re.M
    )
    configs = {str(path.relative_to(ROOT)) for path in ROOT.glob("configs/*.py")} - {"configs/pairs.py"}
    assert sorted((path, stage) for path, stage, _ in rows) == sorted(
        (path, stage) for path in configs for stage in ("sft", "dpo")
    )
    for path, stage, cells in rows:
        config = load(stage, [str(ROOT / path)])
        data, tokens, batch, length, lr, loss, rank = cells.split(" | ")
        (amount,) = config.data.values()
        assert data.startswith(f"{amount} x ") or amount == 1.0
        run = (
            f"{config.max_steps} steps"
            if config.max_steps
            else f"{config.num_epochs} epoch{'s' * (config.num_epochs > 1)}"
        )
        expected = (
            config.max_seq_len,
            config.global_batch_size,
            run,
            config.lr,
            config.loss,
            config.lora_rank,
        )
        assert (int(tokens), int(batch), length, float(lr), loss, int(rank)) == expected, (path, stage)


def test_requirements_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    del extras["fast"]  # kernels for some GPUs, which `make` does not install
    wanted = project["dependencies"] + [name for extra in extras.values() for name in extra]
    lines = [
        line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")
    ]
    lines = [
        line.split("; platform_")[0] for line in lines
    ]  # Triton has no build for others than Linux on x86-64
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), (
        "exact versions only: no build suffix, no index"
    )
    pinned = {line.split("==")[0].lower().replace("-", "_") for line in lines}
    assert {re.split(r"[<>=]", name)[0].replace("-", "_") for name in wanted} <= pinned
    assert not [name for name in pinned if name.startswith("nvidia")], (
        "pip takes these with the build of torch it finds"
    )


def test_nothing_names_the_machine_it_was_written_on():
    """Neither its folders nor where its packages came from: both are another's on every other machine."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    places = [
        "/wor" + "k/",
        "share" + "d/(?:design|tools|cases)",
        "pypi" + r"\.org",
        "pythonho" + "sted",
        "/opt/py" + "pi",
    ]
    places = re.compile("|".join(places))
    found = []
    for name in listed:
        try:
            text = (ROOT / name).read_text()
        except (UnicodeDecodeError, FileNotFoundError):  # a picture; or deleted and not yet committed
            continue
        found += [f"{name}: {place}" for place in places.findall(text)]
    assert not found
