"""The synthetic world as T4, and what `bevfn data check` and `prepare` say and make of T4 data sets, and a run on one."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_experiment
from nuscenes.utils.data_classes import Box
from nuscenes.utils.geometry_utils import points_in_box
from pyquaternion import Quaternion

from bevfn import synth
from bevfn.commands import data
from bevfn.data import depth, paste, points, source, t4, t4_check, t4_classes
from bevfn.data.index import Index
from bevfn.data.reading import Cameras, Reading
from bevfn.models import bevfusion
from bevfn.synth import dataset, tables, world
from bevfn.synth import t4 as written
from bevfn.training import run

SMALL = dict(scenes=2, frames_per_scene=3, image_size=(45, 80), azimuths=180, format="t4", workers=1, progress=False)


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A world that nobody changes."""
    return synth.write(tmp_path_factory.mktemp("t4") / "world", **SMALL)


@pytest.fixture
def root(kept, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(kept, tmp_path / "world", ignore=shutil.ignore_patterns(".bevfn")))


@pytest.fixture(scope="module")
def training(kept) -> Index:
    return t4.index(kept, "train")


def change(root: Path, table: str, edit: Callable[[list[dict]], object]) -> None:
    """Edits a table of the first scene in place."""
    path = root / written.home(0, 0) / "annotation" / f"{table}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# --- the world ---


def test_its_lists_are_its_splits_and_frames_come_at_ten_hertz(kept, training):
    opened = source.open(kept, "v1.0-trainval")
    assert source.kind(kept) == "t4" and (opened.training.split, opened.evaluation.split) == ("train", "val")
    assert [len(index) for index in (opened.training, opened.evaluation)] == [3, 3]
    assert not set(opened.training.positions) & set(opened.evaluation.positions)
    np.testing.assert_allclose(np.diff([frame.timestamp for frame in training]), 0.1, atol=1e-6)
    assert [len(frame.sweeps) for frame in training] == [0, 1, 2] and training.class_names == t4_classes.CLASSES


def test_boxes_and_points_are_the_worlds_in_base_link(training):
    made = world.build(0, 0, 3, written.TICKS)
    tokens = {tables.token(0, 0, "annotation", g, k): (g, k) for g in range(len(made.names)) for k in range(3)}
    for k, frame in enumerate(training):
        t = 0.1 * k
        np.testing.assert_allclose(frame.ego_from_lidar, np.eye(4))
        np.testing.assert_allclose(frame.global_from_ego, made.global_from_ego(t), atol=1e-9)
        ego_from_global = np.linalg.inv(made.global_from_ego(t))
        cloud, bad = points.read(training.root / frame.lidar_path)
        assert bad == 0 and (cloud[:, 4] == -1).all() and abs(np.median(cloud[np.abs(cloud[:, 2]) < 0.5, 2])) < 0.1
        for box, token, seen in zip(frame.boxes, frame.annotations, frame.num_lidar_points, strict=True):
            g, of = tokens[token]
            x, y, z, length, width, height, yaw = made.boxes(t)[g].tolist()
            velocity = ego_from_global[:3, :3] @ np.append(made.velocities(t)[g], 0.0)
            np.testing.assert_allclose(box[:3], (ego_from_global @ [x, y, z, 1])[:3], atol=1e-6)
            np.testing.assert_allclose(box[3:6], [length, width, height])
            np.testing.assert_allclose(box[7:], velocity[:2], atol=1e-6)
            turned = Box([x, y, z], [width, length, height], Quaternion(axis=[0, 0, 1], angle=yaw))
            turned.translate(-made.global_from_ego(t)[:3, 3])
            turned.rotate(Quaternion(matrix=ego_from_global[:3, :3]))
            assert of == k and seen == np.count_nonzero(points_in_box(turned, cloud[:, :3].T))


def test_its_categories_and_attributes_are_t4s(kept, training):
    names = {name for frame in training for name in frame.categories}
    assert names <= set(t4_classes.MAPPING) and {"pedestrian.adult", "vehicle.car"} <= names
    assert not any("human" in name for name in names)
    left_out = [
        attribute
        for index in (training, t4.index(kept, "val"))
        for frame in index
        for category, name, attribute in zip(frame.categories, frame.names, frame.attributes)
        if category in ("vehicle.bicycle", "vehicle.motorcycle") and not name
    ]
    assert left_out and set(left_out) == {"cycle_state.without_rider"}
    assert {level for frame in training for level in frame.visibility} <= {"none", "partial", "most", "full"}


def test_cameras_see_the_points_where_the_images_are(training):
    """Depth maps have points in every camera, and each image is of the size that the table says."""
    assert set(training.channels) == set(dataset.CAMERAS)
    for frame in training:
        cloud, _ = points.read(training.root / frame.lidar_path)
        for camera in frame.cameras.values():
            assert camera.size == (45, 80) and -0.05 < camera.timestamp - frame.timestamp < 0
            assert len(depth.project(cloud, camera, camera.size)) > 20


def test_a_world_is_told_from_others_and_is_not_written_twice(kept, tmp_path):
    described = json.loads((kept / "world.json").read_text())
    assert described["format"] == "t4" and synth.write(kept, **SMALL) == kept
    with pytest.raises(ValueError, match="holds another synthetic world"):
        synth.write(kept, **SMALL | {"format": "nuscenes"})
    assert "format" not in dataset.Settings(1, 0, 1, (32, 32), 16).described  # as worlds were before there were two


def test_a_run_trains_on_it_and_is_evaluated(kept, tmp_path, monkeypatch):
    config = tiny_experiment.Config(steps=1, batch_size=1, lr=1e-4, data_root=kept, run_dir=tmp_path / "run")
    head = replace(tiny_experiment.model().head, classes=5, small_classes=(4,))
    model = replace(tiny_experiment.model(), head=head)
    monkeypatch.setattr(tiny_experiment, "model", lambda: model)
    monkeypatch.setattr(tiny_experiment, "Reading", lambda **parts: Reading(**parts, class_names=t4_classes.CLASSES))
    summary = run.main(tiny_experiment.task, config)
    assert summary["steps"] == 1
    assert list((tmp_path / "run" / "evaluations").glob("*/*.png"))
    assert bevfusion.needs(model).classes == 5


def test_a_recipe_of_ten_classes_says_what_t4_lacks(kept, tmp_path):
    config = tiny_experiment.Config(data_root=kept, run_dir=tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"\(T4, split 'val'\) does not annotate construction_vehicle, .*; it annotates car, tr"
    ):
        run.main(tiny_experiment.task, config)


# --- check and prepare ---


@pytest.mark.parametrize("deep", [False, True])
def test_a_whole_world_is_fine(kept, deep):
    report = t4_check.check(kept, deep=deep)
    assert report.good and report.samples == {"train": 3, "val": 3} and report.version == "T4" and not report.findings
    files = {part.name: part.files for part in report.parts}
    assert files == {"tables": 26, "maps": 2, "scans": 6} | {channel: 6 for channel in dataset.CAMERAS}
    text = report.text()
    assert "dropped by attribute" in text and "without LiDAR points" in text and "more than 122.4 m away" in text
    assert not list(kept.glob(".bevfn/*val*")) or "index yes" in text


def test_prepare_makes_what_check_then_finds(root, capsys):
    data.prepare(root, workers=1)
    out = capsys.readouterr().out
    assert "3 key frames of T4 train" in out and "depth ground truth of 18 images" in out
    assert "train: index yes; GT-paste database yes; depth ground truth yes" in t4_check.check(root).text()
    index = t4.index(root, "train")
    database = paste.read(paste.folder(index))
    assert set(database.class_names) == set(t4_classes.CLASSES)
    assert depth.prepared(index).is_dir()
    reading = Reading(cameras=Cameras(image_size=(20, 40)), depth=True, class_names=index.class_names)
    source.check(index, reading, train=True)
    assert data.check(root) == 0 and data.check(root, split="val") == 0


def without(name: str) -> Callable[[Path], None]:
    return lambda root: (root / written.home(0, 0) / name).unlink()


def drop(table: str, kept: Callable[[dict], bool]) -> Callable[[Path], None]:
    return lambda root: change(root, table, lambda rows: rows.__setitem__(slice(None), [r for r in rows if kept(r)]))


def every(table: str, **fields) -> Callable[[Path], None]:
    return lambda root: change(root, table, lambda rows: [row.update(fields) for row in rows])


def no_velocities(root: Path) -> None:
    change(root, "sample_annotation", lambda rows: [row.pop("velocity") for row in rows])


def rename(root: Path) -> None:
    change(root, "category", lambda rows: [row.update(name="drone") for row in rows if row["name"] == "vehicle.car"])


def lose_a_camera(root: Path) -> None:
    def lose(rows: list[dict]) -> None:
        (row,) = [row for row in rows if row["filename"] == "data/CAM_BACK/00001.jpg"]
        row["is_valid"] = False

    change(root, "sample_data", lose)


def four_columns(root: Path) -> None:
    for path in root.glob("**/data/LIDAR_CONCAT/*.bin"):
        cloud = np.random.default_rng(0).normal([0, 0, 0, 90], 20, (1000, 4))
        path.write_bytes(cloud.astype("<f4").tobytes())


def other_version(root: Path) -> None:
    change(root, "sample_data", lambda rows: [row.pop("is_key_frame") for row in rows])


def no_lists(root: Path) -> None:
    (root / "db_bevfn_v1.yaml").unlink()


def one_scan(root: Path) -> None:
    def share(rows: list[dict]) -> None:
        first, second, *_ = (row for row in rows if "LIDAR_CONCAT" in row["filename"])
        second["filename"] = first["filename"]

    change(root, "sample_data", share)


# change, problems, finding, what follows
ODD: dict[str, tuple[Callable[[Path], None], int, str, str]] = {
    "a lost image": (without("data/CAM_BACK/00001.jpg"), 1, "", ""),
    "a lost scan": (without("data/LIDAR_CONCAT/00001.pcd.bin"), 1, "", ""),
    "a lost table": (without("annotation/ego_pose.json"), 1, "", ""),
    "another version": (other_version, 1, "", ""),
    "a lost map": (without("map/lanelet2_map.osm"), 1, "", ""),
    "no map": (every("map", filename=""), 0, "note: 1 missing maps in 1 of 2 scenes", "it needs none"),
    "no velocities": (no_velocities, 0, r"note: \d+ annotations without a velocity of their own", "it measures them"),
    "a foreign category": (rename, 0, r"left out: \d+ of \d+ annotations are of categories that AWML's mapping has not, drone", ""),
    "a camera that lacks": (lose_a_camera, 0, "left out: train: 1 of 3 key frames have no CAM_BACK", "a camera model stops there"),
    "an invalid one": (lose_a_camera, 0, "note: 1 recordings that are marked as invalid", "takes them for missing"),
    "no lists": (no_lists, 0, "note: there are no lists of splits train and val; its splits are all", "--train-split"),
    "one scan": (one_scan, 0, "note: train: 2 key frames have the LiDAR scan of another, such as .*00000.pcd.bin", "it reads the same"),
    "lenses": (every("calibrated_sensor", camera_distortion=[0.1] * 5), 0, "note: 7 cameras whose lenses distort", "undistorted"),
    "other fields": (four_columns, 0, "refused: train: .* which fits four float32 a point", "training stops there"),
    "sizes": (every("sample_annotation", size=[0, 1, 1]), 0, "refused: train: .* has sizes 1 0 1", "refuses the data set"),
    "no quaternion": (every("ego_pose", rotation=[1, 1, 1, 1]), 0, "refused: train: .*no quaternion", "refuses the data set"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_is_said_with_what_follows(root, name):
    edit, problems, finding, then = ODD[name]
    edit(root)
    report = t4_check.check(root)
    text = report.text(50)
    assert len(report.problems) == problems, text
    if finding:
        (line,) = [line for line in text.splitlines() if re.match(f"  {finding}", line)]
        assert then in line
        assert report.good == line.startswith("  note") or name == "an invalid one"
    else:
        assert not report.good and "problem" in text


def test_splits_that_share_scenes_are_found(root, capsys):
    name = Path(written.home(0, 0)).parent.name
    (root / "splits.json").write_text(json.dumps({"mine": [name], "other": [name]}))
    assert t4_check.check(root).good
    report = t4_check.check(root, training="mine", evaluation="other")
    (found,) = report.findings
    assert found.kind == "refused" and f"mine and other share 1 scenes, such as db_bevfn_v1/{name}" in found.what
    assert data.check(root, train_split="mine", eval_split="other") == 1 and found.what in capsys.readouterr().out
    assert data.check(root, train_split="mine", eval_split="mine") == 0
    assert not [f for f in t4_check.check(root, training="mine", evaluation="mine").findings if f.kind == "refused"]


def test_a_list_that_leaves_scenes_out_is_noted(root):
    (root / "db_bevfn_v1.yaml").write_text(f"train:\n  - {Path(written.home(0, 0)).parent.name}/0\nval: []\nmine:\n"
                                           f"  - {Path(written.home(0, 0)).parent.name}\n")  # fmt: skip
    report = t4_check.check(root)
    assert report.samples == {"train": 3, "mine": 3}
    assert any("1 scenes, such as db_bevfn_v1/" in finding.what for finding in report.findings)
    with pytest.raises(ValueError, match=r"has no scene of the split 'val'"):
        t4_check.check(root, split="val")
