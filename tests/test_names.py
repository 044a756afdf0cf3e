"""Names from data: printed in one line without commands, and file names that stay where they are put."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bevfn.names import file_name, leaves, printable


def test_what_commands_a_terminal_is_spelled_out():
    assert printable("a\nb\x1b[31mred\x07") == r"a\nb\x1b[31mred\x07"
    assert printable("Straße 見 $x$") == "Straße 見 $x$"
    assert printable("\u202eevil") == r"\u202eevil" and printable("\udc80") == r"\udc80"


@given(st.text())
def test_any_text_is_printable_in_one_line(text):
    shown = printable(text)
    assert shown.isprintable() and len(shown.splitlines()) <= 1


@given(st.text(), st.text())
def test_a_name_becomes_one_file_in_its_folder_and_no_other_names(name, other):
    file = file_name(name)
    assert Path("out", file).parent == Path("out") and file not in ("", ".", "..") and "\0" not in file
    assert len(file.encode()) < 200 and (name == other) == (file == file_name(other))


def test_tokens_keep_their_letters():
    assert file_name("ca9a282c9e77460f8360f564131a8af5") == "ca9a282c9e77460f8360f564131a8af5"
    assert file_name("../x") == "%2E.%2Fx" and file_name(300 * "a") != file_name(301 * "a")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "samples/../../x", "C:\\x", "\\\\host\\x", "a\\..\\b"])
def test_paths_that_leave_a_root(path):
    assert leaves(path)


@pytest.mark.parametrize(
    "path", ["samples/LIDAR_TOP/a.pcd.bin", "a..b/c...", "n015__1532402927612460.jpg", "data/0.png"]
)
def test_paths_that_stay(path):
    assert not leaves(path)
