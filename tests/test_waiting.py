"""Lines while something takes its time, and none where it does not."""

import contextlib
import json
import sys
import time

import pytest
import small_world

from bevfn import cli, waiting
from bevfn.commands import bench


def test_what_takes_its_time_is_said_again_and_again():
    said = []
    with waiting.told(lambda: f"reading {len(said)}", said.append, every=0.05):
        time.sleep(0.4)
    assert len(said) >= 3 and said[1].startswith("reading 1: 0 s so far")
    before = len(said)
    time.sleep(0.15)
    assert len(said) == before  # and no more when it is done


def test_what_is_short_is_not_said(capsys):
    with waiting.told("reading"):
        pass
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("short, told", [(0.05, ["reading"]), (9.0, [])])
def test_short_blocks_one_after_another_are_a_long_silence(short, told, monkeypatch):
    monkeypatch.setattr(waiting, "SHORT_S", short)
    said: list[str] = []
    with waiting.from_here():
        for part in ("imports", "reading"):
            with waiting.told(part, said.append, every=0.6):
                time.sleep(0.4)
    assert [line.split(":")[0] for line in said] == told


def test_who_does_not_listen_ends_the_telling_and_not_the_work(capfd):
    def unheard(text):
        raise BrokenPipeError

    with waiting.told("reading", unheard, every=0.02):
        time.sleep(0.1)
    assert capfd.readouterr().err == ""


def test_batches_are_counted(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "EVERY_S", 0.05)
    with waiting.batches("evaluating", 6) as progress:
        time.sleep(0.2)
        progress(2, 3)
        time.sleep(0.2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("evaluating, 6 key frames, the first: 0 s")
    assert lines[-1].startswith("evaluating, 6 key frames, 2 of 3 batches: 0 s")
    with waiting.batches("evaluating", 6, quiet=True):
        time.sleep(0.2)
    assert capsys.readouterr().out == ""


def test_of_blocks_inside_each_other_the_innermost_speaks_where_the_others_do(monkeypatch):
    monkeypatch.setattr(waiting, "EVERY_S", 0.05)
    said: list[str] = []
    with waiting.told("checking", said.append):
        time.sleep(0.2)
        with waiting.counted("files", 1_000, "files", done=10) as advance:
            advance(2)
            outer = len(said)
            time.sleep(0.2)
        inner = len(said)
        time.sleep(0.2)
    assert outer and all(line.startswith("checking: ") for line in said[:outer])
    assert inner > outer and all(line.startswith("files, 12 of 1,000 files: ") for line in said[outer:inner])
    assert len(said) > inner and all(line.startswith("checking: ") for line in said[inner:])


def test_a_block_that_failed_says_no_more(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "EVERY_S", 0.02)
    try:
        with waiting.counted("index", 5):
            raise ValueError("no such token")
    except ValueError as error:  # which holds the frames of what it went through
        capsys.readouterr()
        time.sleep(0.1)
        assert error.__traceback__ is not None and capsys.readouterr().out == ""


@contextlib.contextmanager
def longer(block):
    """A phase of milliseconds takes as long as it must to be told on any machine."""
    with block as made:
        yield made
        time.sleep(0.1)


@pytest.mark.parametrize(
    "words, phases, on",
    [
        ("data check ROOT", ["looking at tables and values"], "err"),
        ("data prepare ROOT --workers 1", ["GT-paste database, ", "depth ground truth, "], "out"),
        ("view ROOT --scene val --samples 2 --out OUT", ["reading the data set", "drawing, "], "out"),
    ],
)
def test_no_command_is_silent_while_it_works(tmp_path, monkeypatch, capfd, words, phases, on):
    """What a report is printed of is left to it: lines about the time go to standard error there."""
    root = small_world.copy(tmp_path / "world")
    capfd.readouterr()  # of making that world
    monkeypatch.setattr(waiting, "EVERY_S", 0.001)
    for name in ("told", "counted", "batches"):
        begin = getattr(waiting, name)
        monkeypatch.setattr(waiting, name, lambda *words, begin=begin, **named: longer(begin(*words, **named)))
    typed = words.replace("ROOT", str(root)).replace("OUT", str(tmp_path / "out")).split()
    monkeypatch.setattr(sys, "argv", ["bevfn", *typed])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capfd.readouterr()._asdict()
    lines = [line for line in told[on].splitlines() if line.endswith("s so far")]
    assert end.value.code in (0, 1) and all(any(line.startswith(phase) for line in lines) for phase in phases)
    assert "so far" not in told["out" if on == "err" else "err"]


def test_the_figures_of_a_benchmark_stay_json(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "EVERY_S", 0.02)
    bench._report("naps", lambda: {"slept": time.sleep(0.1)}, None)
    told = capsys.readouterr()
    assert json.loads(told.out)["figures"] == {"slept": None} and "measuring naps: 0 s so far" in told.err
