"""Lines while something takes its time, and none where it does not."""

import time

from bevfn import waiting


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
