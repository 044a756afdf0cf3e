"""The console command `bevfn`: one subcommand per job, each a plain function in `bevfn/commands/`.

A command is imported when it is typed: the help of one does not wait for the libraries of the others.
"""

import ast
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro

from bevfn import commands, exits, waiting
from bevfn.commands import meant
from bevfn.export import runtimes
from bevfn.training import limits


class Commands(Mapping[str, Callable]):
    """Commands by name; places: "file function" of bevfn/commands/, or a function."""

    def __init__(self, places: Mapping[str, str | Callable]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> Callable:
        place = self.places[name]
        if not isinstance(place, str):
            return place
        file, function = place.split()
        return getattr(importlib.import_module(f"bevfn.commands.{file}"), function)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def listed(self, name: str) -> Callable:
        """A stand-in that a list of commands is made of: the docstring's first paragraph, read without importing the file."""
        place = self.places[name]
        if not isinstance(place, str):
            return place
        file, function = place.split()
        parsed = ast.parse((Path(next(iter(commands.__path__))) / f"{file}.py").read_text())
        found = next(node for node in parsed.body if isinstance(node, ast.FunctionDef) and node.name == function)

        def stand_in() -> None:
            pass

        stand_in.__doc__ = (ast.get_docstring(found) or "").partition("\n\n")[0]
        return stand_in


# Name: (what the group is for, its subcommands).
GROUPS: dict[str, tuple[str, Commands]] = {
    "ascend": ("Ask an Ascend NPU what bevfn takes for granted about it", Commands({"probe": "ascend probe"})),
    "bench": (
        "Measure against peers and the machine's limits",
        Commands(
            {
                "ops": "bench ops",
                "step": "bench step",
                "views": "bench views",
                "data": "bench data",
                "world": "bench world",
                "checkpoint": "bench checkpoint",
                "startup": "bench startup",
                "deploy": "bench deploy",
                "scale": "bench scale",
                "cuda": "bench cuda",
                "list": "bench list_",
            }
        ),
    ),
    "checkpoint": (
        "Read and write published checkpoints",
        Commands({"import": "checkpoint import_", "export": "checkpoint export", "show": "checkpoint show"}),
    ),
    "data": (
        "Make, check and prepare data sets",
        Commands({"synth": "data synth", "check": "data check", "prepare": "data prepare"}),
    ),
}


def _group(name: str) -> Callable:
    """A group as one command, which is how it appears in the list of commands: tyro has one level of subcommands."""
    what, inside = GROUPS[name]
    choices = "|".join(inside)

    def run(
        arguments: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar=f"{choices} …")],
    ) -> int:
        return _run(inside, list(arguments), f"bevfn {name}", run.__doc__ or "")

    run.__doc__ = f"{what}: `bevfn {name} {choices} --help`."
    return run


COMMANDS = Commands(
    {
        "train": "train train",
        "parity": "parity parity",
        **{name: _group(name) for name in GROUPS},
        "eval": "evaluate evaluate",
        "predict": "predict predict",
        "export": "export export",
        "view": "view view",
        "compare": "compare compare",
        "graph": "graph graph",
    }
)


ABOUT = "Bird's-eye-view 3D detectors. `bevfn COMMAND --help` explains a command."


def _checked(command: Callable) -> Callable:
    """The command, whose numbers are held against `limits` first."""

    @functools.wraps(command)
    def run(*positional: Any, **named: Any) -> Any:
        flags = inspect.signature(command).bind(*positional, **named).arguments
        limits.check(flags, runtimes.LIMITS if flags.get("to") == "autoware" else {})
        return command(*positional, **named)

    return run


def _run(known: Commands, arguments: list[str], prog: str, description: str) -> int:
    typed = arguments[0] if arguments else ""
    if typed in known:
        limits.check_words(get_type_hints(known[typed]), arguments)
    made = {name: _checked(known[name]) if name == typed else known.listed(name) for name in known}
    code = tyro.extras.subcommand_cli_from_dict(made, args=arguments, prog=prog, description=description)
    return code if isinstance(code, int) else 0


def main() -> None:
    """Runs a subcommand; a user's mistake ends in one sentence and an exit code (see exits.py)."""
    arguments = sys.argv[1:]
    if arguments == ["bench", "--list"]:
        arguments = ["bench", "list"]
    with waiting.from_here():
        if arguments[:1] == ["train"] and arguments[1:] and arguments[1] not in ("-h", "--help"):
            # Its flags are the recipe's, and its errors a run's.
            sys.exit(COMMANDS["train"](arguments[1], tuple(arguments[2:])))
        with exits.one_sentence(RuntimeError), exits.tidy_on_terminate():
            meant.check(arguments, {name: inside for name, (_, inside) in GROUPS.items()}, COMMANDS)
            if arguments[:1] and arguments[0] in GROUPS:
                sys.exit(COMMANDS[arguments[0]](tuple(arguments[1:])))
            sys.exit(_run(COMMANDS, arguments, "bevfn", ABOUT))


if __name__ == "__main__":
    main()
