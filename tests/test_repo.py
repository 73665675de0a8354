"""House rules that a machine can check: who may import what, nothing unpickled, nothing partly loaded, short functions, living links."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUMBING = sorted(ROOT.glob("plumbing/*.py"))
SCIENCE = sorted(ROOT.glob("*.py"))
SOURCES = SCIENCE + PLUMBING + sorted(path for folder in ("configs", "demo", "bench", "tools") for path in ROOT.glob(f"{folder}/**/*.py"))
SCRIPTS = {"train_sft", "train_dpo", "steer", "aqi", "report"}
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}


def per_file(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def imports(path):
    """Dotted names of everything that the file imports, at any depth: `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def functions(path):
    return [node for node in ast.walk(TREES[path]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@per_file([path for path in SCIENCE + PLUMBING if path.stem not in SCRIPTS])
def test_modules_never_import_scripts(path):
    assert not {name.split(".")[0] for name in imports(path)} & SCRIPTS


@per_file([path for path in SOURCES if path.parent.name not in ("plumbing", "bench")])
def test_only_plumbing_knows_torch_distributed(path):
    assert not [name for name in imports(path) if name.startswith("torch.distributed")]
    assert not [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"]


@per_file(SOURCES)
def test_nothing_is_pickled_and_nothing_partly_loaded(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "dill", "cloudpickle", "joblib"}
    for call in [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]:
        name = ast.unparse(call.func)
        assert name not in ("torch.load", "torch.save"), f"line {call.lineno}: {name} pickles"
        assert not name.endswith(("_object", "_object_list")), f"line {call.lineno}: {name} pickles"
        strict = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}.get("strict")
        assert name == "zip" or strict != "False", f"line {call.lineno}: {name}(strict=False)"


@per_file(SCIENCE + PLUMBING)
def test_public_functions_say_what_they_do(path):
    """The file's docstring is main's too."""
    public = [node for node in TREES[path].body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert ast.get_docstring(TREES[path]) or not TREES[path].body, "no docstring of the file"
    assert not [f"{node.name} (line {node.lineno})" for node in public if node.name != "main" and not ast.get_docstring(node)]


@per_file(SOURCES)
def test_functions_fit_a_screen(path):
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions(path)}
    assert not {name: lines for name, lines in lengths.items() if lines > (150 if name == "main" else 70)}


@per_file(sorted([*ROOT.glob("*.md"), *ROOT.glob("bench/**/*.md"), *ROOT.glob("docs/**/*.md")]))
def test_paths_in_documents_exist(path):
    """Link targets, and every file of the repository that the text names; runs/ is what the commands make."""
    text = path.read_text()
    links = [target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if not re.match(r"[a-z]+:", target)]
    named = re.findall(r"(?<![\w./-])(?:(?:configs|demo|plumbing|tests|bench|tools|docs)/[\w./-]*\w|\w+\.py)\b(?!\()", text)
    assert not [link for link in links if not (path.parent / link).exists()]
    assert not [name for name in named if not (ROOT / name).exists()]


def test_requirements_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "exact versions only: no build suffix, no index"
    pinned = {line.split("==")[0].lower().replace("-", "_") for line in lines}
    assert {re.split(r"[<>=]", name)[0].replace("-", "_") for name in wanted} <= pinned
    assert not [name for name in pinned if name.startswith("nvidia")], "pip takes these with the build of torch it finds"
