"""Imports point one way: experiments -> bevfn -> kernels, room upon room, and no file imports itself by a detour.

Every import counts, also one inside a function or under TYPE_CHECKING. One by name counts wherever the name is written:
every string that begins with `bevfn.`, or has it behind "-m", "import" or "from", docstrings and other prose left out. A
name that only the running program knows is for `recipes` and for ascend/, which loads torchair.
"""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
BY_NAME = {"import_module", "__import__", "find_spec", "run_module", "reload", "resolve_name"}
WRITTEN = re.compile(r"(?:^|-m\s*|\b(?:import|from)\s+)(bevfn\.[\w.]*)")

# The rooms from the ground up: a room imports what stands below it, not what stands beside or above. A file that lies in
# bevfn/ itself is a room too, named by its stem. docs/architecture.md draws the same.
FLOORS = (
    ("catalogue", "files", "kernels", "memory", "names"),
    ("bevfn", "boxes", "choices", "exits", "fused_kernels", "geometry", "host", "metrics", "rng", "tree", "waiting"),
    ("ascend", "distributed", "precision", "provenance", "synth"),
    ("compile", "data", "layers", "losses"),
    ("backbones", "draw", "heads", "necks"),
    ("evaluation", "views"),
    ("models",),
    ("upstream",),
    ("parity", "training"),
    ("experiments",),
    ("recipes",),
    ("bench", "detector"),
    ("export",),
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


def _names(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names that the file imports."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield from WRITTEN.findall(node.value)


def unreadable(source: str) -> list[int]:
    """Lines that import by name without writing the whole name out, or that hand such a function on."""
    tree = ast.parse(source)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            wrong = any(alias.name in BY_NAME and alias.asname for alias in node.names)
        elif isinstance(node, ast.Constant):
            wrong = node.value in BY_NAME  # of getattr
        else:
            wrong = getattr(node, "attr", getattr(node, "id", None)) in BY_NAME and not _constant(called.get(id(node)))
        lines += [node.lineno] if wrong else []
    return lines


def _constant(call: ast.Call | None) -> bool:
    """Whether a call is given a whole name as a constant."""
    given = [] if call is None else [*call.args, *(word.value for word in call.keywords if word.arg == "name")]
    name = given[0] if given else None
    return isinstance(name, ast.Constant) and isinstance(name.value, str) and not name.value.startswith(".")


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


def test_the_picture_of_the_rooms_shows_these_floors():
    text = (REPO / "docs" / "rooms.svg").read_text()
    shown = re.findall(r'y="(\d+)"[^>]*text-anchor="middle" font-weight="bold">([a-z][^<]*)<', text)
    floor_of = {name: int(y) // 46 for y, names in shown for name in names.split(" · ")}  # 46 px a floor
    assert floor_of == {
        name: len(FLOORS) - 1 - i for i, floor in enumerate(FLOORS) for name in floor if name != "bevfn"
    }


DOOR = ("bevfn", "bevfn.detector")  # `bevfn.load`, which imports when it is called


def test_rooms_import_only_what_stands_below_them():
    height = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    wrong = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in sorted(targets)
        if room(target) != room(module) and height[room(target)] >= height[room(module)] and (module, target) != DOOR
    ]
    assert not wrong, "\n".join(wrong)


def test_the_training_loop_knows_no_model():
    assert not [module for module in IMPORTS if room(module) == "training" and "models" in map(room, IMPORTS[module])]


def test_only_recipes_ascend_and_the_list_of_commands_import_a_name_that_they_do_not_write():
    allowed = ("recipes", "ascend", "cli")
    texts = {module: path.read_text() for module, path in FILES.items() if room(module) not in allowed}
    assert not {module: lines for module, text in texts.items() if (lines := unreadable(text))}


def test_the_formatter_leaves_no_code_out():
    assert not [module for module, path in FILES.items() if "# fmt: " in path.read_text()]


def test_no_files_import_each_other_in_a_circle():
    graphlib.TopologicalSorter(IMPORTS).prepare()  # a CycleError names the files


LOWERINGS = {f"bevfn.kernels.voxelize.{name}" for name in ("ascend", "cpu", "cuda", "reference")}


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
        ("import_module(name='bevfn.cli')", {"bevfn.cli"}),
        ("import_module('bevfn.kernels.voxelize.' + name)", LOWERINGS),
        ("import_module(f'bevfn.kernels.voxelize.{name}')", LOWERINGS),
        ("import_module('bevfn.kernels.voxelize.%s' % name)", LOWERINGS),
        ("import_module('bevfn.kernels.voxelize.{}'.format(name))", LOWERINGS),
        ("pkgutil.resolve_name('bevfn.cli:main')", {"bevfn.cli"}),
        ("CLI = 'bevfn.cli'", {"bevfn.cli"}),
        ("run([sys.executable, '-m', 'bevfn.bench.sparse'])", {"bevfn.bench.sparse"}),
        ("run([sys.executable, '-mbevfn.cli'])", {"bevfn.cli"}),
        ("run([sys.executable, '-c', 'import bevfn.cli'])", {"bevfn.cli"}),
        ("run([sys.executable, '-c', 'from bevfn.tree import map'])", {"bevfn.tree"}),
        ("os.system('cd / && python -m bevfn.cli parity')", {"bevfn.cli"}),
        ("def f():\n    'bevfn.cli is told.'\n    raise ValueError('see bevfn.cli'); find_spec('torchair')", set()),
    ],
)
def test_an_import_is_seen(line, found):
    assert imports(line, "bevfn.layers.branch") - {"bevfn.layers", "bevfn.kernels"} == found


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("importlib.import_module('bevfn.cli')", True),
        ("importlib.import_module(name='bevfn.cli')", True),
        ("import_module('.cli', 'bevfn')", False),
        ("import_module(name)", False),
        ("import_module(name=name)", False),
        ("import_module(f'{package}.cli')", False),
        ("import_module('bevfn.' + name)", False),
        ("from importlib import import_module as load", False),
        ("load = importlib.import_module", False),
        ("getattr(importlib, 'import_module')('bevfn.cli')", False),
        ("pkgutil.resolve_name(name)", False),
    ],
)
def test_an_import_by_name_is_read_only_where_the_name_is_written(line, read):
    assert unreadable(line) == ([] if read else [1])
