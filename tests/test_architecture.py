"""Imports point one way: experiments -> bevfn -> kernels, room upon room, and no file imports itself by a detour.

Every import counts, also one inside a function or under TYPE_CHECKING, and one by name: what is given to `import_module`
and its like, and what follows "-m" in a command line.
"""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
BY_NAME = ("import_module", "__import__", "find_spec", "run_module", "reload")

# The rooms from the ground up: a room imports what stands below it, not what stands beside or above. A file that lies in
# bevfn/ itself is a room too, named by its stem. docs/architecture.md draws the same.
FLOORS = (
    ("files", "kernels", "names"),
    ("bevfn", "boxes", "catalogue", "choices", "exits", "geometry", "host", "metrics", "rng", "tree"),
    ("ascend", "distributed", "precision", "provenance", "synth"),
    ("compile", "data", "layers", "losses"),
    ("backbones", "draw", "heads", "necks"),
    ("evaluation", "views"),
    ("models",),
    ("upstream",),
    ("parity", "training"),
    ("experiments",),
    ("recipes",),
    ("bench",),
    ("commands",),
    ("cli",),
)


def _files() -> dict[str, Path]:
    """{module: file} of the package; kernels and experiments by the folders themselves, not their links."""
    found = {}
    for top, name in (("bevfn", "bevfn"), ("kernels", "bevfn.kernels"), ("experiments", "bevfn.experiments")):
        for path in (REPO / top).rglob("*.py"):
            inner = path.relative_to(REPO / top).with_suffix("").parts
            if top == "bevfn" and inner[0] in ("kernels", "experiments"):
                continue  # the links, where a Python follows them
            found[".".join([name, *inner]).removesuffix(".__init__")] = path
    return found


FILES = _files()


def _module(name: str) -> list[str]:
    """The modules that `name` stands for: the longest known beginning, or all below a name that ends in a dot."""
    if name.endswith("."):
        return [module for module in FILES if module.startswith(name)]
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return [name] if name else []


def _start(node: ast.expr) -> str | None:
    """The constant beginning of a string expression; None if it has none."""
    if isinstance(node, ast.JoinedStr) and node.values:
        return _start(node.values[0])
    if isinstance(node, ast.BinOp):
        return _start(node.left)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _names(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that the file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called in BY_NAME and (name := _start(node.args[0])):
                yield name
        elif isinstance(node, ast.List | ast.Tuple):
            for flag, following in zip(node.elts, node.elts[1:]):
                if _start(flag) == "-m" and (name := _start(following)):
                    yield name


def imports(source: str, module: str) -> set[str]:
    """Modules of the package that a file with this text would import, its own packages left out."""
    package = module if FILES.get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]
    names = [name for name in _names(ast.parse(source), package) if name.split(".")[0] == "bevfn"]
    return {found for name in names for found in _module(name)} - {module, "bevfn"}


IMPORTS = {module: imports(path.read_text(), module) for module, path in FILES.items()}


def room(module: str) -> str:
    """The folder below bevfn/, or the file in it."""
    return module.split(".")[1] if "." in module else "bevfn"


def test_every_room_has_its_floor():
    assert sorted({room(module) for module in FILES}) == sorted(name for floor in FLOORS for name in floor)


def test_rooms_import_only_what_stands_below_them():
    height = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    wrong = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in sorted(targets)
        if room(target) != room(module) and height[room(target)] >= height[room(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_training_loop_knows_no_model():
    assert not [module for module in IMPORTS if room(module) == "training" and "models" in map(room, IMPORTS[module])]


def test_no_files_import_each_other_in_a_circle():
    graphlib.TopologicalSorter(IMPORTS).prepare()  # a CycleError names the files


LOWERINGS = {f"bevfn.kernels.voxelize.{name}" for name in ("ascend", "cpu", "reference")}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import bevfn.tree", {"bevfn.tree"}),
        ("from bevfn import rng, tree as t", {"bevfn.rng", "bevfn.tree"}),
        ("from bevfn.layers.conv import apply", {"bevfn.layers.conv"}),
        ("from .conv import apply", {"bevfn.layers.conv"}),
        ("from . import conv", {"bevfn.layers.conv"}),
        ("def f():\n    from bevfn import cli", {"bevfn.cli"}),
        ("if TYPE_CHECKING:\n    from bevfn import cli", {"bevfn.cli"}),
        ("importlib.import_module('bevfn.cli')", {"bevfn.cli"}),
        ("run([sys.executable, '-m', 'bevfn.bench.sparse'])", {"bevfn.bench.sparse"}),
        ("import_module(f'bevfn.kernels.voxelize.{name}')", LOWERINGS),
        ("import_module('bevfn.kernels.voxelize.' + name)", LOWERINGS),
        ("import torch; text = 'bevfn.cli'; find_spec('torchair')", set()),
    ],
)
def test_an_import_is_seen(line, found):
    assert imports(line, "bevfn.layers.branch") - {"bevfn.layers", "bevfn.kernels"} == found
