"""Modules import each other in one direction, use only each other's public names, and name each class apart.

Every module of the package is parsed, not imported: an import inside a function counts as one at the top of the file,
and one under `if TYPE_CHECKING:`, which nothing executes, does not.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: The packages and the folders that hold them; the last two lie beside fused_inr and install inside it.
FOLDERS = {"fused_inr": "fused_inr", "fused_inr.kernels": "kernels", "fused_inr.bench": "bench"}


def module_files(folders: dict[str, Path]) -> dict[str, Path]:
    """The file of every module below these folders, by the module's full name; a package is its __init__.py."""
    found = {}
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = list(path.relative_to(folder).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join([package, *parts])] = path
    return found


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below this one, without what stands under `if TYPE_CHECKING:` (the other branch of it counts)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).removeprefix("typing.") == "TYPE_CHECKING":
            for other in child.orelse:
                yield other
                yield from executed(other)
            continue
        yield child
        yield from executed(child)


class Module:
    """One parsed module: which modules it imports, and which private names of theirs it uses.

    Attributes:
        name: its full name.
        imports: full names of the modules of the package that it imports. `from package import name` imports the
            submodule of that name where there is one, else the package. The packages around an imported module, which
            Python runs as well, do not count: every module would be in a circle with its own package.
        private: the private names of those modules that it imports or reads, as "module._name".
    """

    def __init__(self, name: str, path: Path, known: set[str]):
        self.name = name
        self._package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        self._known = known
        self.imports: set[str] = set()
        self.private: set[str] = set()
        #: what a name in this file refers to, where that is a module of the package
        self._modules: dict[str, str] = {}
        tree = ast.parse(path.read_text(), str(path))
        nodes = list(executed(tree))
        for node in nodes:
            if isinstance(node, ast.Import):
                self._import(node)
            elif isinstance(node, ast.ImportFrom):
                self._import_from(node)
        for node in nodes:
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                self._read(node)
        self.imports.discard(name)

    def _import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name in self._known:
                self.imports.add(alias.name)
                first = alias.name.partition(".")[0]
                self._modules[alias.asname or first] = alias.name if alias.asname else first

    def _import_from(self, node: ast.ImportFrom) -> None:
        source = node.module or ""
        if node.level:
            parts = self._package.split(".")
            base = parts[: len(parts) - node.level + 1]
            source = ".".join([*base, *([source] if source else [])])
        for alias in node.names:
            if (submodule := f"{source}.{alias.name}") in self._known:
                self.imports.add(submodule)
                self._modules[alias.asname or alias.name] = submodule
            elif source in self._known:
                self.imports.add(source)
                if is_private(alias.name) and source != self.name:
                    self.private.add(submodule)

    def _read(self, node: ast.Attribute) -> None:
        """Note `module._name`, where module is a name of this file or a dotted path that begins with one."""
        first, *rest = ast.unparse(node.value).split(".")
        if first in self._modules:
            source = ".".join([self._modules[first], *rest])
            if source in self._known and source != self.name and f"{source}.{node.attr}" not in self._known:
                self.private.add(f"{source}.{node.attr}")


def is_private(name: str) -> bool:
    """Whether a name begins with an underscore and is none of Python's own, such as __version__."""
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def parsed(folders: dict[str, Path]) -> dict[str, Module]:
    """All modules below these folders, by name."""
    files = module_files(folders)
    return {name: Module(name, path, set(files)) for name, path in files.items()}


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules in which each reaches each other by imports (strongly connected components), sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(imports[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = []
            while not group or group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(imports):
        if name not in index:
            visit(name)
    return sorted(found)


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return parsed({package: ROOT / folder for package, folder in FOLDERS.items() if (ROOT / folder).is_dir()})


def test_no_circle_of_imports(modules):
    found = circles({n: m.imports for n, m in modules.items()})
    described = [
        "; ".join(f"{name} imports {', '.join(sorted(modules[name].imports & set(group)))}" for name in group)
        for group in found
    ]
    assert not found, "modules import each other in a circle: " + " | ".join(described)


def test_no_private_name_of_another_file(modules):
    found = [f"{name} uses {', '.join(sorted(module.private))}" for name, module in modules.items() if module.private]
    assert not found, "\n".join(found)


def package(folder: Path, **files: str) -> dict[str, Module]:
    """A package `p` of modules with these texts, parsed."""
    for name, text in {"__init__": "", **files}.items():
        (folder / f"{name}.py").write_text(text)
    return parsed({"p": folder})


@pytest.mark.parametrize(
    ("a", "b", "circle"),
    [
        ("from . import b", "from . import a", True),
        ("from .b import f", "from .a import g", True),
        ("import p.b", "from p import a", True),
        ("def f():\n    from .b import g", "class C:\n    def f(self):\n        import p.a", True),
        ("try:\n    from . import b\nexcept ImportError:\n    pass", "from . import a", True),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import b", "from . import a", False),
        ("import typing\nif typing.TYPE_CHECKING:\n    from . import b\nelse:\n    b = 1", "from . import a", False),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from . import b", "import p.a", True),
        ("from . import b", "import math", False),
        ("from . import b", "from . import nothing", False),
    ],
)
def test_circles_are_found(tmp_path, a, b, circle):
    found = circles({n: m.imports for n, m in package(tmp_path, a=a, b=b).items()})
    assert found == ([["p.a", "p.b"]] if circle else [])


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("from .b import _f", {"p.b._f"}),
        ("def f():\n    from .b import _g as g", {"p.b._g"}),
        ("from . import b\nb._f()", {"p.b._f"}),
        ("from . import b as c\nc._f.g", {"p.b._f"}),
        ("import p.b\np.b._f", {"p.b._f"}),
        ("from . import b\nb.f._g", set()),
        ("from .b import f\nself._f = f", set()),
        ("from .b import __version__", set()),
        ("from . import _c", set()),
        ("import torch\ntorch._C", set()),
    ],
)
def test_private_names_are_found(tmp_path, text, private):
    assert package(tmp_path, a=text, b="", _c="")["p.a"].private == private


def test_a_class_has_a_name_of_its_own():
    """No two classes of the project share a public name: a name has one meaning. (What a function defines is known to
    it alone.)"""
    places: dict[str, list[str]] = {}
    for path in sorted(p for folder in (*FOLDERS.values(), "tests") for p in (ROOT / folder).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_no_test_imports_another():
    """What several files of tests use stands in a module that is none of them (tests/suite, ..)."""
    found = []
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            source = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if isinstance(node, ast.Import) or source in ("", "ptx", "tests"):
                found += [f"{path.name}: {name}" for name in names if name.rpartition(".")[2].startswith("test_")]
            if source.rpartition(".")[2].startswith("test_"):
                found.append(f"{path.name}: {source}")
    assert not found, found
