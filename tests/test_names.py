"""Names from data: printed in one line without commands, and file names that stay where they are put."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bevfn import exits
from bevfn.names import SENTENCE, SHOWN, WORD, file_name, leaves, printable, sentence


def test_what_commands_a_terminal_is_spelled_out():
    assert printable("a\nb\x1b[31mred\x07") == r"a\nb\x1b[31mred\x07"
    assert printable("Straße 見 $x$") == "Straße 見 $x$"
    assert printable("\u202eevil") == r"\u202eevil" and printable("\udc80") == r"\udc80"


@given(st.text() | st.text("a\n \x1b", min_size=5000))
def test_any_text_is_printable_in_one_line_of_some_length(text):
    for shown, most in ((printable(text), SHOWN), (sentence(text), SENTENCE)):
        assert shown.isprintable() and len(shown.splitlines()) <= 1 and len(shown) <= most
    assert all(len(word) <= WORD for word in sentence(text).split())


def test_of_a_very_long_name_both_ends_are_shown_and_sentences_stay_whole(capsys):
    path = "samples/CAM_FRONT_RIGHT/n015-2018-07-24-11-22-45+0800__CAM_FRONT_RIGHT__1532402927612460.jpg"
    assert printable(path) == path
    assert printable("first " + 5000 * "x" + " last") == f"first {54 * 'x'}…{35 * 'x'} last"
    said = f"/data/{200 * 'd'}: 1,234 of {30 * 'many words '}are meant"
    assert sentence(said) == said
    with pytest.raises(SystemExit), exits.one_sentence():
        raise ValueError(f"key frame {9000 * 'k'} is odd")
    assert capsys.readouterr().err == f"bevfn: key frame {150 * 'k'}…{100 * 'k'} is odd\n"


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
