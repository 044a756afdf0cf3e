"""`bevfn data check`: a whole root is fine, and every kind of damage is found, counted and named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_root

from bevfn.commands import data
from bevfn.data import check, nuscenes, tables, values
from bevfn.files import read_json

VERSION = small_root.VERSION


def cut(path: Path, size: int = -5) -> None:
    path.write_bytes(path.read_bytes()[:size])


def garble(path: Path) -> None:
    """Damage in the middle, with both ends as they were."""
    raw = path.read_bytes()
    path.write_bytes(raw[:20] + b"\0" * (len(raw) - 40) + raw[-20:])


@pytest.mark.parametrize("deep", [False, True])
def test_a_whole_root_is_fine(root, deep):
    report = check.check(root, deep=deep)
    assert report.problems == () and report.affected == 0
    assert report.samples == {"mini_train": 4, "mini_val": 4} and report.version == VERSION
    files = {part.name: part.files for part in report.parts}
    assert files.pop("tables") == 13 and files.pop("maps") == 1 and files.pop("sweeps") == 2 * (3 * 4)
    assert set(files.values()) == {8} and len(files) == 7
    assert report.text().endswith("nothing is missing or damaged")
    odd = replace(report, findings=(values.Finding("a box is odd", "it refuses the data set", "refused"),))
    assert odd.text().endswith("no file is missing or damaged, and training refuses the data")
    assert check.check(root, VERSION, "mini_val").samples == {"mini_val": 4}


def test_every_file_that_the_index_needs_is_looked_at(root):
    rows, _ = tables.read_tables(root, VERSION)
    index = nuscenes.index(root, VERSION, "mini_train")
    wanted: dict[str, set[str]] = {}
    for frame in index:
        for path in (frame.lidar_path, *(s.path for s in frame.sweeps), *(c.path for c in frame.cameras.values())):
            wanted.setdefault(path, set()).add(frame.token)
    found = check.files_needed(rows, {frame.token for frame in index})
    assert {path: tokens for files in found.values() for path, tokens in files.items()} == wanted


@pytest.mark.parametrize(
    ("file", "damage", "deep", "kind", "what", "samples"),
    [
        ("samples/CAM_BACK/scene-0061__CAM_BACK__4.jpg", Path.unlink, False, "missing", "does not exist", 1),
        ("samples/CAM_BACK/scene-0061__CAM_BACK__4.jpg", cut, False, "damaged", "no end-of-image marker", 1),
        ("samples/CAM_BACK/scene-0061__CAM_BACK__4.jpg", lambda p: p.write_bytes(b"<html>"), False, "damaged", "no JPEG", 1),
        ("samples/CAM_BACK/scene-0061__CAM_BACK__4.jpg", garble, True, "damaged", "cannot be decoded", 1),
        ("samples/LIDAR_TOP/scene-0061__LIDAR_TOP__4.pcd.bin", cut, False, "damaged", "195 bytes are no whole number", 3),
        ("samples/LIDAR_TOP/scene-0103__LIDAR_TOP__12.pcd.bin", lambda p: cut(p, 0), False, "damaged", "is empty", 1),
        ("sweeps/LIDAR_TOP/scene-0061__LIDAR_TOP__1.pcd.bin", Path.unlink, False, "missing", "does not exist", 2),
        ("sweeps/LIDAR_TOP/scene-0061__LIDAR_TOP__1.pcd.bin", lambda p: p.write_bytes(bytes(200)), False, "damaged", "ends in zeros", 2),
        ("sweeps/LIDAR_TOP/scene-0061__LIDAR_TOP__1.pcd.bin",
         lambda p: p.write_bytes(p.read_bytes()[:80] + bytes(100) + p.read_bytes()[:20]), True, "damaged", "5 of 10 points are at 0", 2),
        ("sweeps/LIDAR_TOP/scene-0061__LIDAR_TOP__1.pcd.bin",
         lambda p: p.write_bytes(np.full(50, np.nan, "<f4").tobytes()), True, "damaged", "10 of 10 points are NaN, so that there is no cloud", 2),
    ],
)  # fmt: skip
def test_damage_is_found_and_counted(root, file, damage, deep, kind, what, samples):
    damage(root / file)
    if deep:
        assert not check.check(root).problems  # not seen from outside
    report = check.check(root, deep=deep)
    (problem,) = report.problems
    assert (problem.path, problem.kind, problem.samples) == (file, kind, samples)
    assert what in problem.what and report.affected == samples
    assert [p.name for p in report.parts if p.missing + p.damaged] == [file.split("/")[1 if file[1] == "a" else 0]]
    assert f"1 problem; samples affected: {samples} of 8" in report.text()


def test_samples_that_miss_two_files_count_once(root):
    for channel in ("CAM_BACK", "CAM_FRONT"):
        (root / f"samples/{channel}/scene-0061__{channel}__8.jpg").unlink()
    report = check.check(root)
    assert len(report.problems) == 2 and report.affected == 1


def test_the_text_shows_some_and_the_json_all(root):
    for file in (root / "sweeps/LIDAR_TOP").glob("*"):
        file.unlink()
    report = check.check(root)
    lines = report.text(shown=5).splitlines()
    assert len(report.problems) == 24 and sum("does not exist" in line for line in lines) == 5
    assert "and 19 more; --json FILE" in lines[-1] and "24 missing" in report.text()
    document = read_json(report.json())
    assert len(document["problems"]) == 24 and document["problems"][0]["kind"] == "missing"


@pytest.mark.parametrize("kind", ["missing", "truncated"])
def test_tables_are_named_first(root, kind):
    table = root / VERSION / "ego_pose.json"
    table.unlink() if kind == "missing" else cut(table)
    (problem,) = check.check(root).problems
    assert problem.path == "v1.0-mini/ego_pose.json"
    assert problem.kind == ("missing" if kind == "missing" else "damaged")
    assert ("does not exist" if kind == "missing" else "truncated or damaged") in problem.what
    assert "1 problem; no sample can be read" in check.check(root).text()


def test_a_missing_map_affects_all(root):
    (root / "maps/plan.png").unlink()
    report = check.check(root)
    assert [p.path for p in report.problems] == ["maps/plan.png"] and report.affected == 8


def test_what_prepare_makes_is_said(root):
    absent = "mini_train: index not yet (made on first use); GT-paste database not there; depth ground truth not there"
    assert absent in check.check(root).text()
    data.prepare(root, version=VERSION, workers=1)
    text = check.check(root).text()
    assert "mini_train: index yes; GT-paste database yes; depth ground truth yes" in text
    assert "\n  mini_val: index not yet (made on first use)\n" in text  # nothing else is made of it


def test_roots_to_which_the_question_does_not_apply(root, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        check.check(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no scene of the split 'train'"):
        check.check(root, VERSION, "train")
    (root / "v1.0-test").mkdir()
    (root / "v1.0-test" / "sample.json").write_text("[]")
    with pytest.raises(ValueError, match=r"has v1.0-mini, v1.0-test: choose one of these as version"):
        check.check(root)
