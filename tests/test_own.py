"""Data of one's own: what is read of clouds, images and frames.json is what was put in, and what cannot be is refused."""

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_own
import small_world
from PIL import Image

from bevfn import cli
from bevfn.data import cameras, depth, inputs, own, own_check, paste, points, scene, source
from bevfn.data.reading import Cameras, Points, Reading
from bevfn.experiments import custom


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """drives/, as docs/custom_data.md makes it, which nobody changes."""
    folder = tmp_path_factory.mktemp("own")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        return small_own.convert(folder, patch)


@pytest.fixture
def root(kept, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(kept, tmp_path / "drives", ignore=shutil.ignore_patterns(".bevfn")))


def change(root: Path, edit: Callable[[dict], object], drive: str = "monday") -> None:
    """Edits a drive's frames.json."""
    path = root / drive / own.FILE
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def each(edit: Callable[[dict], object]) -> Callable[[dict], None]:
    """An edit of every entry."""
    return lambda document: [edit(entry) for entry in document["data_list"]] and None


# --- what is read ---


def test_a_drive_is_chosen_by_its_name_to_detect_in(kept):
    with pytest.raises(ValueError, match=r"scenes: .*monday.*; name one of them \(--scene\), or all"):
        inputs.read(kept)
    monday, every = inputs.read(kept, "monday"), inputs.read(kept, "all")
    assert len({frame.scene for frame in every}) > len({frame.scene for frame in monday}) == 1
    assert len(every) > len(monday) == len(inputs.read(kept / "monday"))


def test_clouds_without_a_data_set_may_have_other_columns(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1, 2, 3, 0.5]], dtype=np.float32))
    index = inputs.read(tmp_path, columns="x y z intensity/1")
    np.testing.assert_allclose(points.scan(index[0], tmp_path)[0], [[1, 2, 3, 127.5, -1]])
    with pytest.raises(ValueError, match="is no column of a point file"):
        inputs.read(tmp_path, columns="x, y, z")


def test_boxes_clouds_poses_and_sweeps_are_those_that_were_put_in(kept):
    opened, wanted = source.open(kept), small_world.training()
    assert source.kind(kept) == "own" and (opened.training.split, opened.evaluation.split) == ("train", "val")
    assert opened.training.class_names == ("car", "person", "cone") and opened.training.judge == "t4"
    for i, (frame, truth) in enumerate(zip(opened.training, wanted, strict=True)):
        taken = [k for k, name in enumerate(truth.names) if name in small_own.CLASSES and truth.valid[k]]
        np.testing.assert_allclose(frame.boxes[:, :7], truth.boxes[taken, :7], atol=1e-9)
        assert frame.names == tuple(small_own.CLASSES[truth.names[k]] for k in taken) and frame.valid.all()
        both = np.isfinite(frame.boxes[:, 7:]).all(axis=1) & np.isfinite(truth.boxes[taken, 7:]).all(axis=1)
        assert both.sum() > 8  # measured over the same neighbours, half a second away
        np.testing.assert_allclose(frame.boxes[both, 7:], truth.boxes[taken][both, 7:], atol=1e-3)
        cloud, _ = points.scan(frame, kept)
        np.testing.assert_allclose(cloud[:, :4], points.scan(truth, wanted.root)[0][:, :4], rtol=1e-5, atol=1e-4)
        assert frame.scene == "monday" and frame.token == f"monday/{i:06d}" and len(frame.sweeps) == i
        np.testing.assert_allclose(frame.global_from_lidar, truth.global_from_lidar, atol=1e-6)
        for back, sweep in enumerate(frame.sweeps, start=1):
            moved = np.linalg.inv(truth.global_from_lidar) @ wanted[i - back].global_from_lidar
            np.testing.assert_allclose(sweep.lidar_from_sweep, moved, atol=1e-6)
            assert sweep.lag == pytest.approx(truth.timestamp - wanted[i - back].timestamp, abs=1e-6)
    assert [frame.previous for frame in opened.training] == ["", "monday/000000", "monday/000001"]


def test_cameras_of_two_sizes_see_the_cloud_and_become_the_networks_images(kept):
    index = own.index(kept, "train")
    assert {channel: size for channel, size in index.image_files} == {"front": (90, 160), "left": (120, 180)}
    frame = index[1]
    cloud, _ = points.scan(frame, kept)
    for camera in frame.cameras.values():
        assert len(depth.project(cloud, camera, camera.size)) > 20
        np.testing.assert_allclose(camera.global_from_ego, frame.global_from_ego, atol=1e-9)
    reading = Reading(
        points=Points(sweeps=1),
        cameras=Cameras(channels=("left", "front"), image_size=(64, 96)),
        class_names=("person", "car"),
    )
    sample = scene.load(index, 1, reading)
    assert sample.images.shape == (1, 2, 64, 96, 3) and set(sample.labels) <= {0, 1} and len(sample.boxes) > 5
    np.testing.assert_allclose(np.unique(sample.points[:, 4]), [0.0, 0.5], atol=1e-3)
    source.check(index, reading, train=True)


def test_without_poses_and_times_there_are_no_sweeps_and_velocities_are_not_learned(root):
    for drive in ("monday", "tuesday"):
        change(root, each(lambda entry: [entry.pop(name) for name in ("timestamp", "ego2global")]), drive)
    index = own.index(root, "train")
    assert all(frame.previous == "" and not frame.sweeps for frame in index) and not index.has("velocity")
    assert not index.has("ego poses") and np.array_equal(index[2].global_from_ego, np.eye(4))
    task = custom.task(custom.Config(data_root=root, scale="mini", sweeps=0))
    assert task.loss.keywords["config"].head.code_weights[8:] == (0.0, 0.0)
    report = own_check.check(root)
    assert report.good and "train: no box has a velocity" in [finding.what for finding in report.findings]
    source.check(task.data.training, task.data.reading(0), train=True)
    with pytest.raises(ValueError, match="has no velocities of objects, but the model learns them"):
        source.check(index, Reading(points=Points(sweeps=0), class_names=index.class_names), train=True)


def test_an_index_is_read_again_from_its_file_until_a_scene_changes(root):
    own_check.check(root)
    assert not (root / ".bevfn/index-own-train.npz").exists()
    first, again = own.index(root, "train"), own.index(root, "train")
    assert (root / ".bevfn/index-own-train.npz").is_file() and first.digests == again.digests
    assert again.class_names == first.class_names and own.scenes(root) == ["monday", "tuesday"]
    change(root, lambda document: document["data_list"].pop())
    assert len(own.index(root, "train")) == 2


def test_scans_without_instances_are_sweeps_of_key_frames(root):
    change(root, lambda document: document["data_list"][1].pop("instances"))
    index = own.index(root, "train")
    assert [frame.token for frame in index] == ["monday/000000", "monday/000002"]
    assert [sweep.path for sweep in index[1].sweeps] == ["monday/clouds/000001.bin", "monday/clouds/000000.bin"]
    assert index[1].previous == "monday/000000"


def test_a_split_without_annotations_is_for_detection_alone(root):
    change(root, each(lambda entry: entry.pop("instances")), "tuesday")
    opened = source.open(root)
    reading = Reading(points=Points(), class_names=opened.training.class_names)
    assert len(opened.evaluation) == 3 and not opened.evaluation.annotated
    source.check(opened.evaluation, reading, train=False)
    with pytest.raises(
        ValueError, match="has no annotations of the classes car, person, cone, so nothing can be learned"
    ):
        source.check(opened.evaluation, reading, train=True)
    with pytest.raises(
        ValueError, match="has no annotations of the classes car, person, cone, so nothing can be scored"
    ):
        source.check_scored(opened.evaluation, {""})


def test_a_root_of_one_drive_is_both_splits(root):
    only = source.open(root / "monday")
    assert only.training is only.evaluation and only.training[0].token == "000000"
    cloud, _ = points.scan(only.training[0], only.training.root)
    assert cloud[:, 3].max() > 1


def test_pasted_objects_are_made_of_it(root, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        ["bevfn", "data", "prepare", str(root), "--no-published-sweeps", "--no-published-paste", "--workers", "1"],
    )
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    task = custom.task(custom.Config(data_root=root, paste=True, epochs=20, sweeps=2))
    assert (
        task.data.database.class_names == ("car", "person", "cone") and task.data.reading(0).paste.quotas["cone"] == 2
    )
    sample = scene.load(
        task.data.training, 0, task.data.reading(0), np.random.default_rng(0), database=task.data.database
    )
    assert len(sample.boxes) and paste.folder(task.data.training).is_relative_to(root)


# --- what is refused ---


def rename(document: dict) -> None:
    document["metainfo"]["categories"] = {"car": 0, "walker": 1, "cone": 2}


def same_track(entry: dict) -> None:
    for instance in entry["instances"]:
        instance["track"] = "1"


def elsewhere(entry: dict) -> None:
    entry["lidar_points"]["lidar_path"] = "../../cloud.bin"


WRONG: dict[str, tuple[Callable[[dict], object], str]] = {
    "classes of another drive": (rename, r"tuesday/frames.json|monday/frames.json has the classes .* walker"),
    "columns": (lambda d: d["metainfo"].update(points="x y i"), r"metainfo.points: .*'x y i' have no z"),
    "columns as a list": (lambda d: d["metainfo"].update(points=["x", "y", "z"]), "metainfo.points|points must be a str"),
    "no class": (lambda d: d["metainfo"].update(categories={}), "metainfo.categories names no class"),
    "a class without a name": (lambda d: d["metainfo"].update(categories={"": 0}), "metainfo.categories: the name '' is empty"),
    "a label of none": (
        lambda d: d["data_list"][0]["instances"][0].update(bbox_label_3d=7), r"data_list\[0\].instances\[0\]: bbox_label_3d 7 is neither"
    ),
    "times that fall": (lambda d: d["data_list"][2].update(timestamp=1.0), r"data_list\[2\] is of the time 1 s, not after"),
    "a time that lacks": (lambda d: d["data_list"][1].pop("timestamp"), r"data_list\[1\] has no timestamp, which others have"),
    "a track twice": (each(same_track), r"data_list\[0\]: two instances have the track 1"),
    "a cloud elsewhere": (each(elsewhere), "has the file ../../cloud.bin, which is not below the data set's root"),
    "no list": (lambda d: d.pop("data_list"), "data_list is missing"),
    "no entry": (lambda d: d["data_list"].insert(0, "cloud"), r"data_list\[0\] is a str, not an object"),
    "a box of no size": (
        lambda d: d["data_list"][0]["instances"][0]["bbox_3d"].__setitem__(3, 0), "box 0, has sizes 0 .*, which must be from 0.001"
    ),
    "a mirrored camera": (
        lambda d: d["data_list"][0]["images"]["left"].update(lidar2cam=np.diag([-1.0, 1, 1, 1]).tolist()), "images.left: lidar2cam is no rotation"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_a_frames_json_cannot_mean_is_refused_with_file_and_field(root, name):
    edit, says = WRONG[name]
    change(root, edit)
    with pytest.raises(ValueError, match=says) as error:
        own.index(root, "all")
    assert str(error.value).startswith(str(root)) and "\n" not in str(error.value)


def test_images_of_another_size_than_told_are_refused(root):
    reading = Reading(cameras=Cameras(channels=("left",), image_size=(64, 96)), class_names=("car",))
    Image.new("RGB", (90, 60)).save(root / "monday/images/left/000000.jpg")
    with pytest.raises(ValueError, match=r"left/000000.jpg.*90x60.*180x120"):
        scene.load(own.index(root, "train"), 0, reading)
    change(root, each(lambda entry: [entry["images"]["left"].pop(side) for side in ("height", "width")]))
    with pytest.raises(ValueError, match="the image is 90x60 but the calibration's optical axis is at pixel"):
        cameras.image_size(own.index(root, "train")[0].cameras["left"], root)


def test_a_cloud_of_other_columns_is_found_by_data_check(root):
    change(root, lambda document: document["metainfo"].update(points="x y z"))
    report = own_check.check(root)
    assert not report.good and "bytes are no whole number of points (12 bytes each)" in report.text()
    change(root, lambda document: document["metainfo"].update(points="x y z intensity/1"))
    (root / "tuesday/clouds/000001.bin").unlink()
    report = own_check.check(root)
    assert [(problem.path, problem.kind) for problem in report.problems] == [("tuesday/clouds/000001.bin", "missing")]
    assert own_check.check(root, split="train").good
    with pytest.raises(ValueError, match="has no split 'test'; it has train, val, all"):
        own_check.check(root, split="test")


def test_splits_must_be_named_where_there_are_none_and_name_what_is_there(root):
    (root / "splits.json").write_text(json.dumps({"train": ["monday", "friday"]}))
    with pytest.raises(ValueError, match=r"splits.json: train names the scene .?friday.?, which frames.json has not"):
        source.open(root)
    (root / "splits.json").unlink()
    with pytest.raises(
        ValueError, match=r'has no splits train and val; write lists .*"monday".*of all \(all: every scene'
    ):
        source.open(root)
    assert len(source.open(root, training="all", evaluation="all").training) == 6
    (root / "splits.json").write_text(json.dumps({"train": ["monday", "tuesday"], "val": ["tuesday"]}))
    with pytest.raises(
        ValueError, match="3 of the 3 key frames of the evaluation split 'val' are in the training split"
    ):
        source.open(root)


def test_a_root_of_no_known_kind_and_a_recipe_for_other_data_are_refused(root, tmp_path):
    with pytest.raises(ValueError, match=r"has no v1.0-trainval; .*frames.json: docs/custom_data.md"):
        source.open(tmp_path / "drives/monday/clouds")
    with pytest.raises(ValueError, match=r"is data of one's own \(frames.json\), but a is trained on nuScenes roots"):
        source.of_kind({"nuscenes": type("Recipe", (), {"model": "a"})}, root)
