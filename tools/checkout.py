"""Single functions out of a source checkout that is not installed.

A module's statements run only when a name of theirs is asked for.

Importing open-instruct's files would need its whole environment (DeepSpeed, Ray, OLMo-core). A function needs
only what it names, and Python looks a global up when it is used: each name's statement runs at that moment,
and what is never used is never imported.
"""

import __future__

import ast
import importlib
import os
import subprocess
from pathlib import Path

from plumbing.files import UserError

IMPORT = ast.Import | ast.ImportFrom


class NotFound(LookupError):
    """A name that none of the files defines, or a part of `main` that is not written as expected."""


class Checkout:
    """A folder with the package `package`.

    `find(name, *files)` returns one function, class or constant of it.
    """

    def __init__(self, root, package="open_instruct"):
        self.root, self.package, self.modules = Path(root), package, {}
        if not (self.root / package).is_dir():
            raise UserError(
                f"--checkout {root}: no folder {package}/ in it; expected a checkout of the repository"
            )

    @property
    def commit(self):
        """The commit of the checkout, or that git knows none."""
        return self._git_log("%h (%as)") or "unknown (git knows no commit there)"

    @property
    def date(self):
        """Day of the commit, YYYY-MM-DD. UserError where git knows none."""
        if day := self._git_log("%cs"):
            return day
        raise UserError(f"--checkout {self.root}: git knows no commit there; expected a clone, or --date")

    def _git_log(self, form):
        """The last commit in git's format `form`; "" where there is none."""
        # not the commit of a repository around it
        outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(self.root.resolve().parent)}
        command = ["git", "-C", str(self.root), "log", "-1", f"--format={form}"]
        return subprocess.run(command, capture_output=True, text=True, env=outside).stdout.strip()

    def module(self, name):
        """The lazy module package/name.py. NotFound when there is no such file."""
        if name not in self.modules:
            path = self.root / self.package / f"{name}.py"
            if not path.is_file():
                raise NotFound(f"{self.package}/{name}.py is not in this checkout")
            self.modules[name] = Module(self, path)
        return self.modules[name]

    def find(self, names, files):
        """The first of `names` that one of the files (module names) defines. NotFound names all of them."""
        for file in files:
            for name in names:
                if (self.root / self.package / f"{file}.py").is_file() and name in self.module(
                    file
                ).statements:
                    return self.module(file)[name]
        raise NotFound(
            f"not found in this checkout: looked for {' or '.join(names)} in "
            f"{', '.join(f'{file}.py' for file in files)}"
        )

    def main_part(self, file, what, pick):
        """(module, the first node of its main() that `pick` accepts). NotFound when there is none."""
        for main in self.module(file).statements.get("main", []):
            for node in ast.walk(main):
                if pick(node):
                    return self.module(file), node
        raise NotFound(f"not found in this checkout: looked for {what} in main() of {file}.py")


class Module(dict):
    """Globals of one source file. A missing name runs the one top-level statement that binds it."""

    def __init__(self, checkout, path):
        # dataclasses looks the name up in sys.modules.
        super().__init__(__name__=__name__, __file__=str(path))
        self.checkout, self.statements, self.source = checkout, {}, path.read_text()
        for statement in ast.parse(self.source).body:
            for name in _bound(statement):
                self.statements.setdefault(name, []).append(statement)

    def __missing__(self, name):
        if name not in self.statements:
            raise KeyError(name)  # the interpreter goes on to the builtins
        needed = list(self.statements[name])
        for statement in (
            needed
        ):  # grows: what else these bind may be bound again further down; an import's names come one by one
            names = () if isinstance(statement, IMPORT) else _bound(statement)
            needed += [other for bound in names for other in self.statements[bound] if other not in needed]
        for statement in sorted(needed, key=lambda statement: statement.lineno):
            if not isinstance(statement, IMPORT):
                self.run([statement])
            elif name in _bound(statement):
                self[name] = self._imported(statement, name)
        return self[name]

    def run(self, statements, **names):
        """Execute statements here, with `names` bound first."""
        self.update(names)
        for node in statements:
            for used in _used_by_class(node) if isinstance(node, ast.ClassDef) else ():
                if used in self.statements and used != node.name:
                    self[used]  # a class body looks globals up without __missing__
        flags = __future__.annotations.compiler_flag  # annotations stay text: their types need not exist here
        exec(compile(ast.Module(statements, []), self["__file__"], "exec", flags), self)

    def _imported(self, statement, name):
        """What `import a.b as name` or `from a import name` binds: of the package itself, lazily too."""
        alias = next(alias for alias in statement.names if (alias.asname or alias.name.split(".")[0]) == name)
        if isinstance(statement, ast.Import):
            return importlib.import_module(alias.name if alias.asname else name)
        package, _, file = statement.module.partition(".")
        if package != self.checkout.package:
            return getattr(importlib.import_module(statement.module), alias.name)
        return (
            self.checkout.module(file)[alias.name] if file else Attributes(self.checkout.module(alias.name))
        )


class Attributes:
    """A lazy module under the name that another file imported it by: attributes are its globals."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        try:
            return self._module[name]
        except KeyError as error:
            raise AttributeError(name) from error


def _used_by_class(node):
    """Names that running a class statement looks up: not those in its methods, and no annotation."""
    parts = [*node.bases, *node.decorator_list]
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            parts += [*item.decorator_list, *item.args.defaults, *filter(None, item.args.kw_defaults)]
        elif isinstance(item, ast.AnnAssign):
            parts += [item.value] if item.value else []
        else:
            parts.append(item)
    names = set()
    for part in parts:
        for node in ast.walk(part):
            if isinstance(node, ast.Name):
                names.add(node.id)
    return names


def _bound(node):
    """Names that a top-level statement binds, or changes an item of."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, IMPORT):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return set()  # their variables are their own
    if isinstance(node, ast.Name):
        return {node.id} if isinstance(node.ctx, ast.Store) else set()
    changed = (
        {node.value.id}
        if isinstance(node, ast.Subscript)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        else set()
    )
    return changed.union(*map(_bound, ast.iter_child_nodes(node)))
