"""How commands end: one sentence, one line, one code."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bevfn import exits


@pytest.fixture(autouse=True)
def ctrl_c():
    """That of the tests themselves stays as it is."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "error, also, code, said",
    [
        (ValueError("a.json is damaged"), (), 2, "bevfn: a.json is damaged\n"),
        (FileNotFoundError("no g++"), (), 2, "bevfn: no g++\n"),
        (OSError(36, "File name too long", "/a " + 3000 * "b "), (), 2,
         f"bevfn: /a {73 * 'b '}b…{50 * 'b '}: File name too long\n"),
        (PermissionError(13, "Permission denied", "/a"), (), 2, "bevfn: /a: Permission denied\n"),
        (ValueError("a\nb\x1b[31m\ud800"), (), 2, "bevfn: a\\nb\\x1b[31m\\ud800\n"),
        (RuntimeError("no such op"), (RuntimeError,), 2, "bevfn: no such op\n"),
        (KeyboardInterrupt(), (), 130, "bevfn: stopped by Ctrl-C; what was written before is whole\n"),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_is_one_line_and_a_code(capsys, error, also, code, said):
    with pytest.raises(SystemExit) as end, exits.one_sentence(*also):
        raise error
    assert end.value.code == code and capsys.readouterr().err == said


@pytest.mark.parametrize("printer", ["print", "rich.print"])
def test_a_reader_that_is_gone_is_141_and_nothing_said(printer):
    lines = f"import rich\nfrom bevfn import exits\nwith exits.one_sentence():\n  for _ in range(99999): {printer}('a line')"
    with subprocess.Popen([sys.executable, "-c", lines], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", exits.UNHEARD)


def test_a_command_without_standard_output_ends_well(monkeypatch):
    monkeypatch.setattr(exits.sys, "stdout", None)
    with exits.one_sentence():
        print("nobody hears it")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="no such op"), exits.one_sentence():
        raise RuntimeError("no such op")
    with pytest.raises(KeyError), exits.one_sentence(RuntimeError):
        raise KeyError("x")


def test_the_first_sigterm_is_an_exit_that_tidies_and_the_next_wait(capfd):
    before, tidied = signal.signal(signal.SIGTERM, signal.SIG_DFL), []  # whatever the tests before left
    with pytest.raises(SystemExit) as end, exits.tidy_on_terminate():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            tidied.append(True)
    assert end.value.code == 143 and tidied and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert capfd.readouterr().err == "bevfn: stopped by SIGTERM; what was written before is whole\n"
    with (
        pytest.raises(SystemExit) as end,
        exits.tidy_on_terminate(),
    ):  # as pybind11's modules do while they are imported
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except SystemExit:
            raise ImportError("initialization failed") from None
    assert end.value.code == 143
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever called it wants none
    try:
        with exits.tidy_on_terminate():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
