"""Key frames to detect in: what lies at a path, scenes by name, and sentences for what is not there."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_t4_world
import small_world

from bevfn.data import inputs, scene
from bevfn.data.batch import Base
from bevfn.data.reading import Cameras, Points, Reading
from bevfn.synth import key_frame

LIDAR = Reading(points=Points(sweeps=2))
SEEING = Reading(cameras=Cameras(image_size=(64, 176)))


@pytest.fixture(scope="module")
def frame(tmp_path_factory) -> Path:
    return key_frame.write_frame(tmp_path_factory.mktemp("frame"), image_size=(90, 160))


@pytest.fixture
def clouds(frame, tmp_path) -> Path:
    for number in (9, 10, 100):
        shutil.copy(frame / key_frame.LIDAR_FILE, tmp_path / f"scan_{number}.pcd.bin")
    return tmp_path


def test_a_directory_of_clouds_is_key_frames_in_the_order_of_their_numbers(clouds):
    index = inputs.read(clouds)
    assert [f.token for f in index] == ["scan_9", "scan_10", "scan_100"]
    inputs.check(index, LIDAR)
    assert not inputs.placed(index)[1]
    sample = scene.load(index, 1, LIDAR)
    assert sample.points is not None and len(sample.points) > 1000 and not sample.points[:, 4].any()
    assert [f.token for f in inputs.read(clouds / "scan_10.pcd.bin")] == ["scan_10"]


def test_clouds_of_one_stem_keep_their_names(clouds):
    (clouds / "scan_9.pcd").write_bytes(b"")
    assert {"scan_9.pcd", "scan_9.pcd.bin"} < {f.token for f in inputs.read(clouds)}


def test_a_folder_with_one_frame_and_its_info_file_are_the_same(frame):
    assert inputs.read(frame)[0].token == inputs.read(frame / "frame.json")[0].token
    inputs.check(inputs.read(frame), SEEING)


@pytest.mark.parametrize("which", ["nuscenes", "t4"])
def test_a_scene_is_chosen_by_its_name_and_several_are_listed(which):
    root = small_world.index().root if which == "nuscenes" else small_t4_world.root()
    with pytest.raises(ValueError, match=r"has 2 scenes: .*; name one of them \(--scene\), or all"):
        inputs.read(root)
    every = small_world.index() if which == "nuscenes" else small_t4_world.index("val")
    name = every[0].scene
    chosen = inputs.read(root, name)
    assert [f.token for f in chosen] == [f.token for f in every if f.scene == name]
    assert (which == "nuscenes" and {f.scene for f in chosen} == {name}) or len(chosen) == 4
    assert len(inputs.read(root, "val")) == len(every)
    with pytest.raises(ValueError, match=f"has no scene 'scene-x'; it has .*{name}"):
        inputs.read(root, "scene-x")
    inputs.check(chosen, LIDAR)


def test_t4_scenes_are_all_of_them_where_that_is_asked_for():
    assert len(inputs.read(small_t4_world.root(), inputs.ALL)) == 8


@pytest.mark.parametrize(
    "name, says", [("none", "none does not exist; give a nuScenes root, a T4"), ("notes.txt", "notes.txt is a file of no known kind"),
                   ("", "holds no data of a known kind; give a nuScenes")],
)  # fmt: skip
def test_data_of_no_known_kind_are_one_sentence(tmp_path, name, says):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=says):
        inputs.read(tmp_path / name)


def test_what_has_no_scenes_refuses_one(clouds):
    with pytest.raises(ValueError, match="has no scenes; leave out the scene night"):
        inputs.read(clouds, "night")


@pytest.mark.parametrize(
    "reading, says",
    [(SEEING, "has no camera CAM_FRONT, .* which the model reads; it has none: choose a LiDAR model"),
     (replace(SEEING, base=Base.EGO_AT_CAMERAS), "has no camera CAM_FRONT")],
)  # fmt: skip
def test_clouds_have_no_cameras(clouds, reading, says):
    with pytest.raises(ValueError, match=says):
        inputs.check(inputs.read(clouds), reading)


def test_what_the_model_does_not_read_need_not_be_there(frame, tmp_path):
    """Neither images for LiDAR, nor a cloud for cameras, nor classes of its own."""
    blind = Path(shutil.copytree(frame, tmp_path / "blind"))
    for image in blind.glob("*.jpg"):
        image.unlink()
    inputs.check(inputs.read(blind), replace(LIDAR, class_names=("tram",)))
    with pytest.raises(ValueError, match=r"has no CAM_FRONT\.jpg, which the model reads; complete the data"):
        inputs.check(inputs.read(blind), SEEING)
    deaf = Path(shutil.copytree(frame, tmp_path / "deaf"))
    (deaf / key_frame.LIDAR_FILE).unlink()
    inputs.check(inputs.read(deaf), SEEING)
    with pytest.raises(ValueError, match=r"has no LIDAR_TOP\.pcd\.bin, which the model reads"):
        inputs.check(inputs.read(deaf), LIDAR)


def test_unknown_poses_become_the_lidars_frame(frame):
    index = inputs.read(frame)
    unknown = replace(index, frames=(replace(index[0], global_from_ego=np.full((4, 4), np.nan)),))
    made, lost = inputs.placed(unknown)
    assert lost and np.array_equal(made[0].global_from_lidar, np.eye(4))
