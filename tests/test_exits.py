"""How commands end: one sentence, one line, one code."""

import signal

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


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="no such op"), exits.one_sentence():
        raise RuntimeError("no such op")
    with pytest.raises(KeyError), exits.one_sentence(RuntimeError):
        raise KeyError("x")
