"""`bevfn data check`'s section about values: each odd world is a finding that says what training does with it."""

import json
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_root
from PIL import Image

from bevfn import cli
from bevfn.data import check

VERSION = small_root.VERSION


def edited(name: str, change: Callable[[list[dict]], object], version: str = VERSION) -> Callable[[Path], None]:
    """A world whose table is changed in place."""

    def edit(root: Path) -> None:
        path = root / version / f"{name}.json"
        rows = json.loads(path.read_text())
        change(rows)
        path.write_text(json.dumps(rows))

    return edit


def every(**values) -> Callable[[list[dict]], object]:
    """The fields of all rows."""
    return lambda rows: [row.update(values) for row in rows]


def clouds(columns: int, points: int) -> Callable[[Path], None]:
    """Points of another number of columns, in files that are whole numbers of five."""
    random = np.random.default_rng(0)

    def write(root: Path) -> None:
        for path in root.glob("*/LIDAR_TOP/*"):
            cloud = np.concatenate(
                [30 * random.normal(size=(points, 3)), 255 * random.random((points, columns - 3))], axis=1
            )
            path.write_bytes(cloud.astype("<f4").tobytes())
            assert path.stat().st_size % 20 == 0

    return write


def rescaled(change: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    """The points [P,5] of every scan changed in place."""

    def write(root: Path) -> None:
        for path in root.glob("*/LIDAR_TOP/*"):
            cloud = np.fromfile(path, "<f4").reshape(-1, 5)
            change(cloud)
            path.write_bytes(cloud.tobytes())

    return write


def nanoseconds(root: Path) -> None:
    for name in ("sample", "sample_data", "ego_pose"):
        edited(name, lambda rows: [row.update(timestamp=1000 * row["timestamp"]) for row in rows])(root)


def binary_pcd(root: Path) -> None:
    head = b"# .PCD v0.7\nFIELDS x y z intensity\nSIZE 4 4 4 4\nTYPE F F F F\nWIDTH 20\nDATA binary\n"
    for path in root.glob("*/LIDAR_TOP/*"):
        path.write_bytes(head + bytes(-len(head) % 20) + struct.pack("<100f", *range(100)))


def own_version(root: Path) -> None:
    (root / VERSION).rename(root / "v2-ours")
    edited("scene", lambda rows: [row.update(name=f"ours {i}") for i, row in enumerate(rows)], "v2-ours")(root)
    (root / "v2-ours" / "splits.json").write_text(json.dumps({"a": ["ours 0"], "b": ["ours 1"]}))


def own_splits(root: Path) -> None:
    (root / VERSION / "splits.json").write_text(json.dumps({"ours": ["scene-0061"]}))


def sixteen_bits(root: Path) -> None:
    path = root / "samples/CAM_BACK/scene-0061__CAM_BACK__0.jpg"
    Image.fromarray(np.full((9, 16), 40_000, np.uint16)).save(path.with_suffix(".png"))
    old, new = (str(p.relative_to(root)) for p in (path, path.with_suffix(".png")))
    edited("sample_data", lambda rows: [row.update(filename=row["filename"].replace(old, new)) for row in rows])(root)


def without_a_camera(rows: list[dict]) -> None:
    rows[:] = [row for row in rows if row["token"] != "scene-0061 CAM_BACK 4"]
    for row in rows:
        for link in ("prev", "next"):
            row[link] = "" if row[link] == "scene-0061 CAM_BACK 4" else row[link]


def one_scan(rows: list[dict]) -> None:
    first, second, *_ = (row for row in rows if row["is_key_frame"] and "LIDAR_TOP" in row["filename"])
    second["filename"] = first["filename"]


WORLDS: dict[str, tuple[Callable[[Path], None], str, str, str]] = {
    "four columns": (clouds(4, 50), "refused", "which fits four float32 a point", "training stops there"),
    "six columns": (clouds(6, 50), "refused", "which fits six float32 a point", "training stops there"),
    "intensities of 0..1": (
        rescaled(lambda cloud: np.divide(cloud[:, 3], 255, out=cloud[:, 3])), "note",
        r"the points' intensities are 0 to 0.188235, not 0 to 255, in 4 of 4 scans", "published weights, which know 0 to 255, take all for dark",
    ),
    "half of a cloud": (
        rescaled(lambda cloud: cloud[5:].fill(0)), "refused", "5 of 10 points are at 0 0 0, as where an interrupted copy",
        "training stops there",
    ),
    "missing returns": (
        rescaled(lambda cloud: cloud[3:5].fill(np.nan)), "note", "8 of 40 points that were opened are NaN or beyond what",
        "drops and counts them",
    ),
    "nanoseconds": (nanoseconds, "refused", "is of the time 1.5324e.12 s, not from 0", "refuses the data set"),
    "zero sizes": (
        edited("sample_annotation", lambda rows: rows[3].update(size=[0.0, 4.0, 1.5])), "refused",
        r"\(annotation scene-0061 object 2 0\), has sizes 4 0 1.5, which must be from 0.001 to 1000 m", "refuses the data set",
    ),
    "no point counts": (
        edited("sample_annotation", every(num_lidar_pts=0, num_radar_pts=0)), "left out",
        "boxes are without LiDAR or radar points", "learns of no object",
    ),
    "foreign categories": (
        edited("category", lambda rows: [row.update(name=row["name"].split(".")[-1].upper()) for row in rows]), "refused",
        "28 of 28 annotations are of categories that nuScenes has not, CAR", "refuses the data set",
    ),
    "a foreign category": (
        edited("category", lambda rows: rows[0].update(name="tram")), "left out",
        "10 of 28 annotations are of categories that nuScenes has not, tram", "leaves them out",
    ),
    "a missing camera row": (
        edited("sample_data", without_a_camera), "left out",
        r"1 of 4 key frames have no CAM_BACK \(the first is scene-0061 1\)", "--on-damaged skip leaves them out",
    ),
    "a renamed channel": (
        edited("sensor", lambda rows: [row.update(channel="CAM_REAR") for row in rows if row["channel"] == "CAM_BACK"]),
        "refused", "sensor.json has no CAM_BACK", "refuses models that read them",
    ),
    "own splits": (own_splits, "note", "splits.json has the splits ours", "need --train-split and --eval-split"),
    "own version": (own_version, "note", "none of nuScenes' versions; its splits are a, b", "needs --train-split"),
    "binary PCD": (binary_pcd, "refused", "has the header of a PCD file", "training stops there"),
    "16 bits": (sixteen_bits, "refused", "of more than 8 bits a channel", "training stops there"),
    "a centre outside": (
        edited("calibrated_sensor", lambda rows: [
            row.update(camera_intrinsic=[[12, 0, 20], [0, 12, 4.5], [0, 0, 1]]) for row in rows if "CAM_BACK_LEFT" in row["token"]
        ]), "suspect",
        r"the 4 images of CAM_BACK_LEFT have their centre of projection far from their middle \(the first at 20 4 in 16x9\)",
        "of images that were resized the intrinsics must be too",
    ),
    "a link to itself": (
        edited("sample_data", lambda rows: rows[5].update(prev=rows[5]["token"])), "refused",
        "links of sample_data.json lead to the row itself", "refuses those that it follows",
    ),
    "one scan of two key frames": (
        edited("sample_data", one_scan), "note",
        "2 key frames have the LiDAR scan of another, such as samples/LIDAR_TOP/.*pcd.bin", "it reads the same points for each",
    ),
    "a link that does not lead back": (
        edited("sample_data", lambda rows: next(row for row in rows if row["prev"]).update(prev="")), "note",
        "1 links of sample_data.json lead to a row that does not lead back", "follows them as they are",
    ),
    "an object twice": (
        edited("sample_annotation", lambda rows: rows.append(rows[3] | {"token": "again"})), "refused",
        "annotations scene-0061 object .* and again are of one object in one key frame", "refuses the data set",
    ),
    "no annotation": (
        edited("sample_annotation", lambda rows: rows.clear()), "refused", "no key frame is annotated", "refuses to train on",
    ),
    "milliseconds": (
        lambda root: [
            edited(name, lambda rows: [row.update(timestamp=row["timestamp"] // 1000) for row in rows])(root)
            for name in ("sample", "sample_data", "ego_pose")
        ] and None,
        "refused", "so timestamps are not in microseconds", "in a wrong unit",
    ),
    "a scene of no split": (
        edited("scene", lambda rows: rows[1].update(name="another")), "left out", "1 scenes, such as another, are of no split",
        "never reads them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("world", WORLDS)
def test_an_odd_world_is_a_finding_that_says_what_training_does(root, world):
    change, kind, what, then = WORLDS[world]
    change(root)
    report = check.check(root)
    found = [f for f in report.findings if f.kind == kind and re.search(what, f.what)]
    assert found and any(then in f.then for f in found), report.text()
    assert report.good == (kind == "note")
    assert f"  {kind}: " in report.text() and found[0].then in report.text()


def test_a_whole_world_has_facts_and_no_findings(root):
    report = check.check(root, split="mini_train")
    assert report.findings == () and report.good
    for fact in (
        "mini_train: 3 to 10 sweeps a key frame, 0.1 to 1 s before it",
        "mini_train: 14 boxes of 1.02 to 3.86 m, speeds up to 151 m/s, 1 of unknown speed", "boxes dropped: 1 without LiDAR or radar points, ",
        "mini_train: 6 cameras a key frame, images 16x9",
        "mini_train: point files .pcd.bin: 5 columns of float32, 10 points, intensities ",
        "mini_train: image files .jpg (24 opened)",
    ):  # fmt: skip
        assert any(fact in line for line in report.facts), (fact, report.facts)
    assert not (root / ".bevfn").exists()  # nothing is written


def test_the_command_fails_for_findings_and_not_for_notes(root, monkeypatch, capsys):
    def run() -> int:
        monkeypatch.setattr(sys, "argv", ["bevfn", "data", "check", str(root), "--json", str(root.parent / "out.json")])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code

    own_splits(root)
    assert run() == 0 and "note: splits.json has the splits ours" in capsys.readouterr().out
    edited("sample_annotation", lambda rows: rows[0].update(size=[float("nan"), 1.0, 1.0]))(root)
    assert run() == 1 and "has sizes 1 nan 1, which must be" in capsys.readouterr().out
    assert len(json.loads((root.parent / "out.json").read_text())["findings"]) == 3  # in two splits


@pytest.mark.parametrize("table, where", [("map", "maps"), ("sample_data", "LIDAR_TOP")])
def test_a_name_that_no_file_can_have_is_missing_and_shown_in_part(root, table, where):
    edited(table, lambda rows: rows[3 if table == "sample_data" else 0].update(filename="samples/" + 900 * "x "))(root)
    report = check.check(root)
    assert [p.what for p in report.problems] == ["does not exist"] and max(map(len, report.text().splitlines())) < 300


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside.bin"])
def test_files_outside_of_the_root_are_not_opened(root, path):
    (root.parent / "outside.bin").write_bytes(bytes(20))
    edited("sample_data", lambda rows: rows[3].update(filename=path))(root)
    report = check.check(root)
    assert [p.what for p in report.problems if p.path == path] == ["is not below the data set's root"]
    assert any("has the file " + path in f.what for f in report.findings)
