"""The console command `bevfn`: one subcommand per job, each a plain function in `bevfn/commands/`."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any

import tyro

from bevfn import exits
from bevfn.commands import bench, checkpoint, data, evaluate, graph, parity, predict
from bevfn.training import limits

# Name: (what the group is for, its subcommands).
GROUPS: dict[str, tuple[str, dict[str, Callable]]] = {
    "bench": (
        "Measure against peers and the machine's limits",
        {
            "ops": bench.ops,
            "step": bench.step,
            "views": bench.views,
            "data": bench.data,
            "world": bench.world,
            "checkpoint": bench.checkpoint,
            "startup": bench.startup,
            "cuda": bench.cuda,
            "list": bench.list_,
        },
    ),
    "checkpoint": (
        "Read and write published checkpoints",
        {"import": checkpoint.import_, "export": checkpoint.export, "show": checkpoint.show},
    ),
    "data": (
        "Make, check and prepare data sets",
        {"synth": data.synth, "check": data.check, "prepare": data.prepare},
    ),
}


def _group(name: str) -> Callable:
    """A group as one command, which is how it appears in the list of commands: tyro has one level of subcommands."""
    what, commands = GROUPS[name]
    choices = "|".join(commands)

    def run(
        arguments: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar=f"{choices} …")],
    ) -> int:
        return _run(commands, list(arguments), f"bevfn {name}", run.__doc__ or "")

    run.__doc__ = f"{what}: `bevfn {name} {choices} --help`."
    return run


COMMANDS: dict[str, Callable] = {
    "parity": parity.parity,
    **{name: _group(name) for name in GROUPS},
    "eval": evaluate.evaluate,
    "predict": predict.predict,
    "graph": graph.graph,
}


def _checked(command: Callable) -> Callable:
    """The command, whose numbers are held against `limits` first."""

    @functools.wraps(command)
    def run(*positional: Any, **named: Any) -> Any:
        limits.check(inspect.signature(command).bind(*positional, **named).arguments)
        return command(*positional, **named)

    return run


def _run(commands: dict[str, Callable], arguments: list[str], prog: str, description: str) -> int:
    commands = {name: _checked(command) for name, command in commands.items()}
    code = tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog=prog, description=description)
    return code if isinstance(code, int) else 0


def main() -> None:
    """Runs a subcommand; a user's mistake ends in one sentence and an exit code (see exits.py)."""
    arguments = sys.argv[1:]
    if arguments == ["bench", "--list"]:
        arguments = ["bench", "list"]
    with exits.one_sentence(RuntimeError):
        if arguments[:1] and arguments[0] in GROUPS:
            sys.exit(COMMANDS[arguments[0]](tuple(arguments[1:])))
        sys.exit(_run(COMMANDS, arguments, "bevfn", __doc__ or ""))


if __name__ == "__main__":
    main()
