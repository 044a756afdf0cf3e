"""`bevfn data check` of a world in wrong units or conventions, each of which readers take: all are found, and a right one has none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_world

from bevfn.data import check, infos, plausible, t4_check, values

TABLES = "v1.0-trainval"
SHARED = Path(__file__).parents[1] / "../shared"


def edited(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A world in whose table each row is changed in place."""

    def edit(root: Path) -> None:
        path = root / TABLES / f"{name}.json"
        rows = json.loads(path.read_text())
        for row in rows:
            change(row)
        path.write_text(json.dumps(rows))

    return edit


def clouds(change: Callable[[np.ndarray], object], files: slice = slice(None)) -> Callable[[Path], None]:
    """The points [P,5] of scans changed in place."""

    def write(root: Path) -> None:
        for path in sorted(root.glob("*/LIDAR_TOP/*"))[files]:
            cloud = np.fromfile(path, "<f4").reshape(-1, 5)
            change(cloud)
            path.write_bytes(cloud.tobytes())

    return write


def sized(factor: float) -> Callable[[Path], None]:
    return edited("sample_annotation", lambda row: row.update(size=[min(990.0, factor * side) for side in row["size"]]))


def scalar_last(row: dict) -> None:
    w, *xyz = row["rotation"]
    row["rotation"] = [*xyz, w]


def halved(row: dict) -> None:
    if row["camera_intrinsic"]:
        row["camera_intrinsic"] = [*(np.array(row["camera_intrinsic"][:2]) / 2).tolist(), [0, 0, 1]]


def one_image(root: Path) -> None:
    first: dict[str, str] = {}
    edited("sample_data", lambda row: "CAM" in row["filename"] and row.update(
        filename=first.setdefault(row["calibrated_sensor_token"], row["filename"])
    ))(root)  # fmt: skip


def scaled(factor: float, columns: slice) -> Callable[[np.ndarray], object]:
    return lambda cloud: np.multiply(cloud[:, columns], factor, out=cloud[:, columns])


WORLDS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "sizes in centimetres": (sized(100), "suspect", "boxes of car are 4"),
    "sizes in hundreds of metres": (sized(0.01), "suspect", "boxes of car are 0.04"),
    "ego poses as x y z w": (edited("ego_pose", scalar_last), "suspect", "the vehicle does not stand upright in"),
    "annotations as x y z w": (edited("sample_annotation", scalar_last), "suspect", "annotations do not stand upright"),
    "mounts as x y z w": (edited("calibrated_sensor", scalar_last), "suspect", "the LiDAR does not stand upright in"),
    "images twice as large": (edited("calibrated_sensor", halved), "suspect", "CAM_BACK have their centre of projection far"),
    "points in kilometres": (clouds(scaled(0.001, slice(3))), "suspect", "95% of the points are within 0.5 m of the LiDAR"),
    "points in feet": (clouds(scaled(3.28, slice(3))), "suspect", "points in their boxes, which hold"),
    "one image of each camera": (one_image, "note", "images are in the file of another, such as samples/CAM_"),
    "intensities of 0..1 in one scan": (
        clouds(scaled(1 / 255, slice(3, 4)), slice(20, 21)), "note", "not 0 to 255, in 1 of ",
    ),
    "no intensities": (clouds(scaled(0, slice(3, 4))), "note", "all intensities are 0 in "),
}  # fmt: skip


@pytest.mark.parametrize("world", WORLDS)
def test_a_world_in_another_unit_or_convention_is_a_finding(tmp_path, world):
    change, kind, what = WORLDS[world]
    root = tmp_path / "w"
    for part in (TABLES, "maps", "samples", "sweeps"):  # without what other tests prepared of the right world
        shutil.copytree(small_world.index().root / part, root / part)
    change(root)
    report = check.check(root, deep=True)
    found = [one for one in report.findings if one.kind == kind and what in one.what]
    assert found and report.good == (kind == "note"), report.text()
    assert not any(one.kind in ("refused", "left out") for one in report.findings)
    ends = (
        "nothing is missing or damaged" if kind == "note" else "no file is missing or damaged, but values are suspect"
    )
    assert report.text().endswith(ends)


def test_a_right_world_has_none():
    assert check.check(small_world.index().root, deep=True).findings == ()


def test_nor_have_a_real_key_frame_and_t4s_sample():
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    sample = t4_check.check(SHARED / "t4dataset/sample", deep=True)
    assert not [one for one in sample.findings if one.kind == "suspect"]
    real = infos.read(SHARED / "nuscenes_frame/frame.json")
    scan = plausible.key_scan(real.root, real.frames, 0)
    assert scan.counted == pytest.approx(scan.told, rel=0.05) and scan.told > 1000
    assert not [one for one in values.of_frames(real, set(), deep=True)[1] if one.kind == "suspect"]


def test_only_gross_disagreement_of_counts_counts():
    def scan(told: int, counted: int) -> plausible.Scan:
        return plausible.Scan("a", 9, 0, 0.0, 9.0, False, False, False, told, counted)

    for told, counted, odd in ((1000, 120, False), (1000, 90, True), (90, 1000, True), (99, 0, False), (0, 0, False)):
        assert len([*plausible.clouds([scan(told, counted), scan(0, 0)])]) == odd
