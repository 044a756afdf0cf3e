"""What a command's --help prints."""

import contextlib
import io

import pytest
import tyro


def helped(command) -> str:
    """Of a function or a config that tyro makes a command line of."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        tyro.cli(command, args=["--help"])
    return printed.getvalue()
