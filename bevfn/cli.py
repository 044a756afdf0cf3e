"""The console command `bevfn`: one subcommand per job, each a plain function in `bevfn/commands/`."""

import sys
from collections.abc import Callable
from typing import Annotated

import tyro

from bevfn.commands import bench, checkpoint, parity

CHECKPOINT: dict[str, Callable] = {
    "import": checkpoint.import_,
    "export": checkpoint.export,
    "show": checkpoint.show,
}


def _checkpoint(
    arguments: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="import|export|show …")],
) -> int:
    """Read and write published checkpoints: `bevfn checkpoint import|export|show --help`."""
    return _run(CHECKPOINT, list(arguments), "bevfn checkpoint", _checkpoint.__doc__ or "")


COMMANDS: dict[str, Callable] = {"parity": parity.parity, "checkpoint": _checkpoint, "bench": bench.bench}


def _run(commands: dict[str, Callable], arguments: list[str], prog: str, description: str) -> int:
    code = tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog=prog, description=description)
    return code if isinstance(code, int) else 0


def main() -> None:
    """Runs a subcommand; a user's mistake ends in one sentence and exit code 2, never in a traceback."""
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["checkpoint"]:  # tyro has one level of subcommands
            sys.exit(_checkpoint(tuple(arguments[1:])))
        sys.exit(_run(COMMANDS, arguments, "bevfn", __doc__ or ""))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"bevfn: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
