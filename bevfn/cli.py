"""The console command `bevfn`: one subcommand per job, each a plain function in `bevfn/commands/`."""

import sys

from tyro.extras import SubcommandApp

from bevfn.commands import bench, checkpoint, parity


def main() -> None:
    """Runs a subcommand; a user's mistake ends in one sentence and exit code 2, never in a traceback."""
    app = SubcommandApp()
    app.command(name="parity")(parity.parity)
    app.command(name="bench")(bench.bench)
    for name, command in (("import", checkpoint.import_), ("export", checkpoint.export), ("show", checkpoint.show)):
        app.command(name=f"checkpoint {name}")(command)
    try:
        code = app.cli(prog="bevfn", description=__doc__)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"bevfn: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
