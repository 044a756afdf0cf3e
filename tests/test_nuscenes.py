"""The index of a nuScenes root against nuscenes-devkit itself, its cache, and every way a root is wrong."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_root
from test_index import assert_same

from bevfn.data import nuscenes, tables
from bevfn.data.index import Index

VERSION = small_root.VERSION


@pytest.fixture(scope="module")
def devkit(kept):
    from nuscenes import NuScenes

    return NuScenes(version=VERSION, dataroot=str(kept), verbose=False)


@pytest.fixture(scope="module")
def index(kept) -> Index:
    return nuscenes.index(kept, VERSION, "mini_train")


# --- against the devkit ---


def test_the_split_is_the_devkits_in_table_order(index, devkit):
    tokens = [s["token"] for s in devkit.sample if s["token"].startswith("scene-0061")]
    assert [frame.token for frame in index] == tokens
    assert [frame.previous for frame in index] == ["", *tokens[:-1]]
    assert {frame.scene for frame in index} == {"scene-0061"}


def test_boxes_are_those_of_get_sample_data(index, devkit):
    for frame in index:
        sample = devkit.get("sample", frame.token)
        path, boxes, _ = devkit.get_sample_data(sample["data"]["LIDAR_TOP"])
        assert str(index.root / frame.lidar_path) == path and len(boxes) == len(frame.boxes)
        assert list(frame.annotations) == sample["anns"]
        for i, box in enumerate(boxes):
            row = devkit.get("sample_annotation", box.token)
            velocity = frame.global_from_lidar[:3, :3].T @ [*devkit.box_velocity(box.token)[:2], 0.0]
            wanted = [*box.center, *box.wlh[[1, 0, 2]], box.orientation.yaw_pitch_roll[0], *velocity[:2]]
            np.testing.assert_allclose(frame.boxes[i], wanted, atol=1e-9)
            seen = row["num_lidar_pts"], row["num_radar_pts"]
            assert frame.num_lidar_points[i] == seen[0] and frame.valid[i] == (sum(seen) > 0)
            assert frame.visibility[i] == devkit.get("visibility", row["visibility_token"])["level"]
            assert frame.categories[i] == row["category_name"]
            assert frame.attributes[i] == ("vehicle.moving" if row["attribute_tokens"] else "")
    first = index[0]
    assert first.names == ("car", "pedestrian", "", "barrier", "car")
    # annotated once: no velocity; seen by radar only: valid
    assert np.isnan(first.boxes[0, 7:]).all() and np.isfinite(first.boxes[1, 7:]).all() and first.valid[1]


def test_sweeps_are_those_of_from_file_multisweep(index, devkit):
    from nuscenes.utils.data_classes import LidarPointCloud

    for frame, count in zip(index, (3, 7, 10, 10)):  # what came before the frame, at most 10
        assert len(frame.sweeps) == count
        cloud, lags = LidarPointCloud.from_file_multisweep(
            devkit, devkit.get("sample", frame.token), "LIDAR_TOP", "LIDAR_TOP", nsweeps=count + 1, min_distance=0.0
        )
        ours = [np.fromfile(index.root / frame.lidar_path, "<f4").reshape(-1, 5)[:, :3]]
        for sweep in frame.sweeps:
            points = np.fromfile(index.root / sweep.path, "<f4").reshape(-1, 5)[:, :3].astype(np.float64)
            ours.append(points @ sweep.lidar_from_sweep[:3, :3].T + sweep.lidar_from_sweep[:3, 3])
        np.testing.assert_allclose(np.concatenate(ours), cloud.points[:3].T, atol=1e-4)  # the devkit's are float32
        np.testing.assert_allclose(np.repeat([0, *(s.lag for s in frame.sweeps)], 10), lags[0], atol=1e-6)
        assert (np.diff([s.lag for s in frame.sweeps]) > 0).all()


def test_a_point_projects_where_the_devkit_projects_it(index, devkit):
    """The chain of devkit's map_pointcloud_to_image: sensor, ego, global, ego at the camera's time, camera."""
    from nuscenes.utils.data_classes import LidarPointCloud
    from nuscenes.utils.geometry_utils import view_points
    from pyquaternion import Quaternion

    frame = index[1]
    points = np.random.default_rng(0).normal(size=(4, 50)) * 20
    for channel, camera in frame.cameras.items():
        data = devkit.get("sample", frame.token)["data"]
        lidar, image = (devkit.get("sample_data", data[name]) for name in ("LIDAR_TOP", channel))
        cloud = LidarPointCloud(points.copy())
        for table, row in (("calibrated_sensor", lidar), ("ego_pose", lidar)):
            pose = devkit.get(table, row[f"{table}_token"])
            cloud.rotate(Quaternion(pose["rotation"]).rotation_matrix)
            cloud.translate(np.array(pose["translation"]))
        for table, row in (("ego_pose", image), ("calibrated_sensor", image)):
            pose = devkit.get(table, row[f"{table}_token"])
            cloud.translate(-np.array(pose["translation"]))
            cloud.rotate(Quaternion(pose["rotation"]).rotation_matrix.T)
        wanted = view_points(cloud.points[:3], np.array(pose["camera_intrinsic"]), normalize=True)
        ours = camera.intrinsics @ (camera.camera_from_lidar[:3, :3] @ points[:3] + camera.camera_from_lidar[:3, 3:])
        np.testing.assert_allclose(ours / ours[2:], wanted, rtol=1e-6)
        through_poses = camera.global_from_ego @ camera.ego_from_camera @ camera.camera_from_lidar
        np.testing.assert_allclose(through_poses, frame.global_from_lidar, atol=1e-9)
        assert str(index.root / camera.path) == devkit.get_sample_data_path(data[channel])
        assert camera.timestamp == pytest.approx(1e-6 * image["timestamp"], abs=1e-6)
    assert list(frame.cameras) == list(nuscenes.CAMERAS)


def test_the_test_split_has_no_boxes(tmp_path):
    root = small_root.write(tmp_path / "d", version="v1.0-test", scenes=("scene-0077",), samples=2, annotated=False)
    index = nuscenes.index(root, "v1.0-test", "test")
    assert len(index) == 2
    assert all(frame.boxes.shape == (0, 9) and frame.valid.shape == (0,) and frame.names == () for frame in index)


def test_a_split_of_splits_json(root):
    (root / VERSION / "splits.json").write_text(json.dumps({"mine": ["scene-0103"]}))
    assert {frame.scene for frame in nuscenes.index(root, VERSION, "mine")} == {"scene-0103"}


# --- the cache ---


def no_build(*_):
    raise AssertionError("the index was built again")


def assert_equal_frames(a: Index, b: Index) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert_same(x, y)


def test_the_second_time_reads_one_file(root, index, monkeypatch):
    nuscenes.index(root, VERSION, "mini_train")
    monkeypatch.setattr(nuscenes, "_build", no_build)
    assert_equal_frames(nuscenes.index(root, VERSION, "mini_train"), index)


def test_a_changed_table_makes_a_new_index(root):
    assert nuscenes.index(root, VERSION, "mini_train")[0].valid[1]
    table = root / VERSION / "sample_annotation.json"
    table.write_text(table.read_text().replace('"num_radar_pts": 1', '"num_radar_pts": 0'))
    assert not nuscenes.index(root, VERSION, "mini_train")[0].valid[1]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_a_damaged_cache_is_built_again_with_a_sentence(root, index, damage):
    nuscenes.index(root, VERSION, "mini_train")
    (file,) = (root / ".bevfn").glob("*.npz")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 255
    file.write_bytes({"cut": raw[: len(raw) // 2], "flip": raw, "empty": b"", "text": b"no archive"}[damage])
    with pytest.warns(UserWarning, match=r"index-v1.0-mini-mini_train.npz is damaged \(.*built again"):
        assert_equal_frames(nuscenes.index(root, VERSION, "mini_train"), index)
    nuscenes.index(root, VERSION, "mini_train")  # no warning now


def test_a_cache_that_lacks_a_column_is_built_again_with_a_sentence(root, index):
    nuscenes.index(root, VERSION, "mini_train")
    (file,) = (root / ".bevfn").glob("*.npz")
    with np.load(file) as stored:
        kept = {name: stored[name] for name in stored.files if name != "sweep_lag"}
    np.savez(file, **kept)
    with pytest.warns(UserWarning, match=r"npz is damaged \(.*sweep_lag.*built again"):
        assert_equal_frames(nuscenes.index(root, VERSION, "mini_train"), index)


def test_a_root_that_cannot_be_written_is_cached_at_home(root, tmp_path, monkeypatch):
    monkeypatch.setenv("BEVFN_CACHE", str(tmp_path / "home"))
    (root / ".bevfn").write_text("in the way, as root ignores permissions")
    nuscenes.index(root, VERSION, "mini_train")
    assert list((tmp_path / "home" / "data").glob("*/index-v1.0-mini-mini_train.npz"))
    monkeypatch.setattr(nuscenes, "_build", no_build)
    nuscenes.index(root, VERSION, "mini_train")


def test_an_index_that_cannot_be_kept_is_used_with_a_warning(root, index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"the index cannot be kept \(.*file: "):
        again = nuscenes.index(root, VERSION, "mini_train", cache=tmp_path / "file")
    assert_equal_frames(again, index)


def _rank(root: Path, log: Path, barrier) -> None:
    build = nuscenes._build

    def counted(*arguments):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return build(*arguments)

    nuscenes._build = counted
    barrier.wait()
    assert len(nuscenes.index(root, VERSION, "mini_train")) == 4


def test_of_several_processes_one_builds(root, devkit, tmp_path):
    context = multiprocessing.get_context("fork")  # the devkit is imported already
    barrier = context.Barrier(4)
    ranks = [context.Process(target=_rank, args=(root, tmp_path / "log", barrier)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert len((tmp_path / "log").read_text().split()) == 1


# --- wrong roots, versions, splits and tables ---


@pytest.mark.parametrize(
    ("below", "version", "match"),
    [
        ("nowhere", VERSION, r"nowhere does not exist; give the folder that holds samples/"),
        (f"nuscenes/{VERSION}/scene.json", VERSION, r"scene.json is a file; give the folder"),
        (f"nuscenes/{VERSION}", VERSION, r"is inside the data set; give the folder above it as root: .*/nuscenes\."),
        ("nuscenes/samples", VERSION, r"is inside the data set; .*/nuscenes\."),
        ("nuscenes/samples/CAM_FRONT", VERSION, r"is inside the data set; .*/nuscenes\."),
        (".", VERSION, r"is above the data set; give the folder inside it as root: .*nuscenes\."),
        ("nuscenes", "v1.0-trainval", r"nuscenes has no v1.0-trainval; it has v1.0-mini: choose one of these"),
        ("empty", VERSION, r"empty has no v1.0-mini; extract nuScenes' metadata archive there"),
    ],
)
def test_wrong_roots_say_what_to_give(root, below, version, match):
    (root.parent / "empty").mkdir()
    with pytest.raises(ValueError, match=match):
        nuscenes.index(root.parent / below, version, "mini_train")


def test_a_folder_of_one_key_frame_is_no_data_set(tmp_path):
    (tmp_path / "frame.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a single key frame \(frame\.json\), no nuScenes data set"):
        tables.check_root(tmp_path, "v1.0-mini")


@pytest.mark.parametrize("split", ["train", "test", "mini-train"])
def test_a_split_without_scenes_names_those_that_have_some(root, split):
    with pytest.raises(ValueError, match=rf"no scene of the split '{split}'; .* are mini_train, mini_val\."):
        nuscenes.index(root, VERSION, split)


def test_an_empty_split_of_a_known_version(tmp_path):
    root = small_root.write(tmp_path / "d", scenes=("scene-0061",), samples=1)
    with pytest.raises(ValueError, match=r"no scene of the split 'mini_val'; .* are mini_train\."):
        nuscenes.index(root, VERSION, "mini_val")


@pytest.mark.parametrize("table", tables.TABLES)
def test_a_missing_table_is_named(root, table):
    (root / VERSION / f"{table}.json").unlink()
    with pytest.raises(ValueError, match=rf"/{table}.json does not exist; extract nuScenes' metadata archive again\."):
        nuscenes.index(root, VERSION, "mini_train")


@pytest.mark.parametrize("table", ["scene", "sample_data", "ego_pose"])
def test_a_truncated_table_is_named(root, table):
    path = root / VERSION / f"{table}.json"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"/{table}.json is truncated or damaged"):
        nuscenes.index(root, VERSION, "mini_train")


def test_tables_of_two_versions_are_named(root, tmp_path):
    other = small_root.write(tmp_path / "other", scenes=("scene-0077",))
    shutil.copy(other / VERSION / "ego_pose.json", root / VERSION / "ego_pose.json")
    with pytest.raises(ValueError, match=r"sample_data.json: ego_pose_token of 88 of 88 rows names no row of ego_pose"):
        nuscenes.index(root, VERSION, "mini_train")


def test_a_missing_map_is_named(root):
    (root / "maps" / "plan.png").unlink()
    with pytest.raises(ValueError, match=r"maps/plan.png does not exist but v1.0-mini/map.json names it"):
        nuscenes.index(root, VERSION, "mini_train")


def test_nothing_is_left_behind_by_a_failed_build(root):
    (root / VERSION / "log.json").unlink()
    with pytest.raises(ValueError, match=r"log.json"):
        nuscenes.index(root, VERSION, "mini_train")
    assert not list(root.glob(".bevfn/*.npz"))
