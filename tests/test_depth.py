"""Depth ground truth: what a camera sees of the LiDAR, as upstream's script has it, and the files made of it."""

import dataclasses
import fcntl
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import small_root
import small_world
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from bevfn.data import check, depth, image, infos, nuscenes, paste, points, scene, source
from bevfn.data.batch import Base
from bevfn.data.index import Camera, Index
from bevfn.data.reading import Cameras, Reading
from bevfn.experiments.bevdepth import CHANNELS

SHARED = Path(__file__).parents[1].parent / "shared"
GOLDEN = SHARED / "goldens/bevdepth_r50_2key/inputs.safetensors"
SIZE = (90, 160)


def camera(path: str = "a.png") -> Camera:
    """Looks along the lidar's z, 100 px focal length, centre of SIZE."""
    intrinsics = np.array([[100.0, 0, 80], [0, 100, 45], [0, 0, 1]])
    return Camera(path, intrinsics, np.eye(4), np.eye(4), np.eye(4), 0.0)


@pytest.fixture(scope="module")
def index() -> Index:
    return small_world.index()


# --- numbers ---


@pytest.mark.skipif(not GOLDEN.is_file(), reason="../shared (real frame and goldens) is not here")
def test_the_golden_depth_maps():
    """Upstream's float32 in global coordinates moves a few points by a pixel; no depth label changes."""
    from bevfn.views.depth_net import depth_labels

    golden = load_file(GOLDEN)
    theirs = np.zeros((6, 256, 704), np.float32)
    theirs[tuple(golden["depth_gt_cam_y_x"].astype(int).T)] = golden["depth_gt_value"]
    one = infos.read(SHARED / "nuscenes_frame/frame.json")
    cloud, _ = points.read(one.root / one[0].lidar_path)
    move = image.matrix(size=(256, 704), resize=0.44, crop=(0, 140))
    seen = [depth.project(cloud, one[0].cameras[channel], (900, 1600)) for channel in CHANNELS]
    ours = np.stack([depth.rasterize(found, move, (256, 704)) for found in seen])
    assert np.count_nonzero(ours) == np.count_nonzero(theirs) == 19582
    assert np.count_nonzero((ours > 0) != (theirs > 0)) < 100
    both = (ours > 0) & (theirs > 0)
    np.testing.assert_allclose(ours[both], theirs[both], rtol=0, atol=2e-4)
    labels = depth_labels(torch.from_numpy(ours), (2.0, 58.0, 0.5), 16).numpy()
    np.testing.assert_array_equal(labels, golden["depth_label_bin"])


@settings(max_examples=50)
@given(st.integers(0, 2**31))
def test_what_is_seen_lies_in_front_and_inside_in_the_clouds_order(seed):
    rng = np.random.default_rng(seed)
    cloud = rng.uniform([-20, -10, -20, 0, 0], [20, 10, 20, 255, 31], (200, 5)).astype(np.float32)
    seen = depth.project(cloud, camera(), SIZE)
    with np.errstate(divide="ignore"):
        u, v = 100 * cloud[:, 0] / cloud[:, 2] + 80, 100 * cloud[:, 1] / cloud[:, 2] + 45
    expected = (cloud[:, 2] > 0) & (u > 1) & (u < 159) & (v > 1) & (v < 89)
    assert abs(len(seen) - expected.sum()) <= 1  # u and v are of float32 here
    assert seen.dtype == np.float32 and set(seen[:, 2]) <= set(cloud[cloud[:, 2] > 0, 2])
    places = [np.flatnonzero(cloud[:, 2] == value)[0] for value in seen[:, 2]]
    assert places == sorted(places)


def test_the_last_point_of_a_pixel_stays_and_positions_truncate_toward_zero():
    seen = np.array([[5.1, 2, 9], [5.9, 2.4, 7], [-0.9, 3, 4], [-1.1, 3, 5], [9.99, 0, 3], [10.0, 0, 2]], np.float32)
    made = depth.rasterize(seen, np.eye(4, dtype=np.float32), (4, 10))
    expected = np.zeros((4, 10), np.float32)
    expected[2, 5], expected[3, 0], expected[0, 9] = 7, 4, 3
    np.testing.assert_array_equal(made, expected)


def test_the_nearest_point_of_a_rounded_pixel_stays_where_the_rule_says_so():
    seen = np.array(
        [[5.4, 2, 9], [4.6, 2.4, 7], [-0.4, 3, 4], [-0.6, 3, 5], [9.4, 0, 3], [9.6, 0, 2], [4.5, 1, 8], [5.5, 1, 6],
         [1, 1, 0.9], [2, 1, 60], [3, 1, 1]], np.float32,
    )  # fmt: skip
    made = depth.nearest(seen, np.eye(4, dtype=np.float32), (4, 10))
    expected = np.zeros((4, 10), np.float32)
    expected[2, 5], expected[3, 0], expected[0, 9], expected[1, 3] = 7, 4, 3, 1
    expected[1, 4], expected[1, 6] = 8, 6  # halves to the even
    np.testing.assert_array_equal(made, expected)


def test_a_mirrored_image_has_the_mirrored_depth(index):
    cloud, _ = points.read(index.root / index[0].lidar_path)
    seen = depth.project(cloud, index[0].cameras["CAM_FRONT"], SIZE)
    seen = seen[np.unique(seen[:, :2].astype(int), axis=0, return_index=True)[1]]  # one a pixel
    seen[:, :2] = np.floor(seen[:, :2]) + 0.5  # at pixel centres, which truncation keeps
    plain, mirrored = (
        depth.rasterize(seen, image.matrix(size=SIZE, resize=1.0, crop=(0, 0), flip=flip), SIZE)
        for flip in (False, True)
    )
    assert np.count_nonzero(plain) > 50
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])


# --- files ---


def test_files_hold_what_is_projected_whatever_the_workers(index, tmp_path):
    files = depth.build(index, tmp_path / "one", progress=False)
    assert depth.folder_of_files(tmp_path / "one") == files
    for frame in index:
        cloud, _ = points.read(index.root / frame.lidar_path)
        for one in frame.cameras.values():
            np.testing.assert_array_equal(depth.read(files, one.path), depth.project(cloud, one, SIZE))
    other = depth.build(index, tmp_path / "two", workers=2, progress=False)
    names, others = ({path.relative_to(folder) for path in folder.rglob("*.bin")} for folder in (files, other))
    assert names == others and len(names) == 6 * len(index)
    assert all((files / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_a_stopped_build_goes_on_and_a_finished_one_stays(index, tmp_path, monkeypatch):
    real, made = depth._make, []

    def stops(frames, root, files):
        if made:
            raise KeyboardInterrupt
        made.append(real(frames, root, files))
        return made[0]

    monkeypatch.setattr(depth, "FRAMES", 1)
    monkeypatch.setattr(depth, "_make", stops)
    with pytest.raises(KeyboardInterrupt):
        depth.build(index, tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"depth.json does not exist; .* `bevfn data prepare`"):
        depth.folder_of_files(tmp_path)
    (folder,) = tmp_path.glob("files-*")
    (folder / ".half").write_bytes(b"1")  # what a kill in the middle of writing leaves
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.bin")}
    assert len(before) == 6
    monkeypatch.setattr(depth, "_make", real)
    files = depth.build(index, tmp_path, progress=False)
    after = {path: path.stat().st_mtime_ns for path in files.rglob("*") if path.is_file()}
    assert len(after) == 6 * len(index) and before.items() <= after.items()
    monkeypatch.setattr(depth, "_make", stops)  # nothing is left to make
    assert depth.build(index, tmp_path, progress=False) == files


def test_another_calibration_makes_other_files_and_removes_the_old_ones(index, tmp_path):
    old = depth.build(index, tmp_path, progress=False)
    front = index[0].cameras["CAM_FRONT"]
    cameras = {**index[0].cameras, "CAM_FRONT": dataclasses.replace(front, intrinsics=front.intrinsics * 1.01)}
    changed = dataclasses.replace(index, frames=(dataclasses.replace(index[0], cameras=cameras),))
    new = depth.build(changed, tmp_path, progress=False)
    assert new != old and new.is_dir() and not old.exists()
    assert depth.folder_of_files(tmp_path) == new


@pytest.mark.parametrize(
    "content", ["{", "[" * 200_000, "[]", "{}", '{"files": 3}', '{"files": "/etc"}', '{"files": "files-/../../x"}']
)
def test_a_damaged_depth_json_is_named_and_made_again(index, tmp_path, content):
    files = depth.build(index, tmp_path, progress=False)
    (tmp_path / "depth.json").write_text(content)
    with pytest.raises(ValueError, match=r"depth.json is damaged .*; delete it"):
        depth.folder_of_files(tmp_path)
    assert depth.build(index, tmp_path, progress=False) == files == depth.folder_of_files(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 1e30])
@pytest.mark.parametrize("column", [0, 2])
def test_a_stored_point_that_no_camera_sees_is_refused(index, tmp_path, column, value):
    files = depth.build(index, tmp_path, progress=False)
    name = index[0].cameras["CAM_BACK"].path
    points = np.array(depth.read(files, name))
    points[3, column] = value
    points.tofile(files / f"{name}.bin")
    with pytest.raises(ValueError, match=r"CAM_BACK.*.bin is damaged: it has points that no camera sees; delete it"):
        depth.read(files, name)


def test_missing_and_truncated_files_are_named(index, tmp_path):
    files = depth.build(index, tmp_path, progress=False)
    name = index[0].cameras["CAM_BACK"].path
    path = files / f"{name}.bin"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"CAM_BACK.*.bin: \d+ bytes are not a whole number of points .* again"):
        depth.read(files, name)
    path.unlink()
    with pytest.raises(ValueError, match=r"CAM_BACK.*.bin does not exist; build .* `bevfn data prepare`"):
        depth.read(files, name)


def test_bad_input_of_a_build_is_one_sentence(index, tmp_path):
    frame = index[0]
    lost = dataclasses.replace(index, frames=(dataclasses.replace(frame, lidar_path="samples/lost.bin"),))
    with pytest.raises(ValueError, match=r"lost.bin: the point file does not exist"):
        depth.build(lost, tmp_path, progress=False)
    blind = dataclasses.replace(index, frames=(dataclasses.replace(frame, cameras={"CAM_FRONT": camera("no.png")}),))
    with pytest.raises(ValueError, match=r"no.png: the image does not exist"):
        depth.build(blind, tmp_path, progress=False)
    bad = dataclasses.replace(index, frames=(dataclasses.replace(frame, cameras={}),))
    with pytest.raises(ValueError, match=r"has no camera images to give depth to"):
        depth.build(bad, tmp_path, progress=False)
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another build is writing here"):
            depth.build(index, tmp_path, progress=False)


def test_training_reads_prepared_files_where_it_looks_for_them_with_the_same_numbers(index, tmp_path):
    root = Path(shutil.copytree(index.root, tmp_path / "world"))
    here = dataclasses.replace(index, root=root)
    reading = Reading(base=Base.EGO_AT_CAMERAS, cameras=Cameras(image_size=(32, 88)), depth=True)

    def read() -> np.ndarray:
        return scene.load(here, 0, reading).depth

    on_the_fly = read()
    assert on_the_fly.any() and depth.prepared(here) is None
    depth.build(here, depth.folder(here), progress=False)
    (root / index[0].lidar_path).unlink()
    np.testing.assert_array_equal(read(), on_the_fly)


def moved(frame, **changes):
    """The key frame with another calibration of one camera."""
    front = frame.cameras["CAM_FRONT"]
    values = {"intrinsics": front.intrinsics + np.diag([1e-9, 0, 0])}
    return dataclasses.replace(
        frame, cameras={**frame.cameras, "CAM_FRONT": dataclasses.replace(front, **values)}, **changes
    )


def test_files_of_other_key_frames_or_calibrations_are_refused_before_the_first_step(index, tmp_path):
    root = Path(shutil.copytree(index.root, tmp_path / "world"))
    here = dataclasses.replace(index, root=root)
    reading = Reading(base=Base.EGO_AT_CAMERAS, cameras=Cameras(image_size=(32, 88)), depth=True)
    depth.build(here, depth.folder(here), progress=False)
    source.check(here, reading, train=True)
    for frames, other in (
        (tuple(map(moved, index)), "calibrations, poses or boxes"), (tuple(index)[:2], "key frames"),
    ):  # fmt: skip
        changed = dataclasses.replace(here, frames=frames)
        for read in (partial(source.check, train=True), lambda index, reading: scene.load(index, 0, reading)):
            with pytest.raises(
                ValueError, match=rf"depth.json was made of other {other} \(3 key frames of v1.0-trainval, "
            ):
                read(changed, reading)
    # An info file says the same with other digits, and no scenes.
    told = dataclasses.replace(here, frames=tuple(moved(frame, scene="") for frame in index))
    np.testing.assert_array_equal(scene.load(told, 0, reading).depth, scene.load(here, 0, reading).depth)


def test_data_check_finds_what_was_made_of_something_else(root):
    from bevfn.commands import data

    data.prepare(root, version=small_root.VERSION, workers=1)
    assert check.check(root, split="mini_train").good
    path = root / small_root.VERSION / "calibrated_sensor.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([row | {"translation": [1.0, 0.0, 0.0]} for row in rows]))
    found = [f for f in check.check(root, split="mini_train").findings if f.kind == "refused"]
    assert [Path(f.what.split()[1]).name for f in found] == ["depth.json", "objects.npz"]
    assert all("was made of other calibrations, poses or boxes (4 key" in f.what for f in found)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("harm", ["deleted", "cut", "points", "bit"])
def test_data_check_finds_a_damaged_file_and_prepare_makes_it_again(root, harm, sealed):
    from bevfn.commands import data

    def prepare() -> None:
        data.prepare(root, version=small_root.VERSION, paste=False, workers=1)

    def refused(deep: bool) -> list[str]:
        return [f.what for f in check.check(root, split="mini_train", deep=deep).findings if f.kind == "refused"]

    prepare()
    made = root / "bevfn_depth" / "mini_train"
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file() and path.name != ".lock"}
    path = max(made.rglob("*.bin"), key=lambda path: path.stat().st_size)
    if not sealed:  # as builds of before
        (made / depth.SEALS).unlink()
    content = bytearray(before[path])
    content[1] ^= 1
    harmed = {"cut": before[path][:-12], "points": np.full(3, np.nan, "<f4").tobytes(), "bit": bytes(content)}
    path.unlink() if harm == "deleted" else path.write_bytes(harmed[harm])
    unseen = not sealed and harm in ("cut", "bit")  # which are points that a camera may see
    found = refused(deep=True)
    assert len(found) == (not unseen) and all("1 files of depth ground truth" in what for what in found)
    assert bool(refused(deep=False)) == (harm == "deleted" or (sealed and harm != "bit"))
    others = {file: file.stat().st_mtime_ns for file in before if file.suffix == ".bin" and file != path}
    prepare()
    assert not refused(deep=True)
    if not unseen:
        assert {file: file.read_bytes() for file in before} == before
        assert sum(file.stat().st_mtime_ns != when for file, when in others.items()) < 6  # of its key frame


def test_data_check_finds_a_damaged_database_and_prepare_makes_it_again(index, tmp_path):
    from bevfn.commands import data

    root = small_world.copy(tmp_path / "world")
    data.prepare(root, depth=False, workers=1)
    (path,) = (root / "bevfn_gt_database").rglob("points-*.bin")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20] + np.full(5, np.nan, "<f4").tobytes())
    refused = [f.what for f in check.check(root, split="train", deep=True).findings if f.kind == "refused"]
    assert len(refused) == 1 and "is damaged: its CRC is not that of what was written" in refused[0]
    assert not [f for f in check.check(root, split="train").findings if f.kind == "refused"]
    data.prepare(root, depth=False, workers=1)
    assert path.read_bytes() == whole


def test_a_build_that_cannot_be_written_is_one_sentence(index, small_disk):
    with pytest.raises(OSError, match=r"^/proc/depth could not be written \(.*\); make room there or choose another"):
        depth.build(index, Path("/proc/depth"), progress=False)
    (small_disk / "filler").write_bytes(bytes(6 * 2**20 - 2**14))
    for workers in (1, 2):
        with pytest.raises(OSError, match=r"could not be written \(No space left on device\)") as error:
            depth.build(index, small_disk / "depth", workers=workers, progress=False)
        assert str(small_disk) in str(error.value) and "[Errno" not in str(error.value)
    (small_disk / "filler").unlink()
    files = depth.build(index, small_disk / "depth", progress=False)  # goes on
    assert len(list(files.rglob("*.bin"))) == 6 * len(index)


def test_images_of_the_same_name_in_two_folders_have_their_own_depth(index, tmp_path):
    """As T4 names them: data/CAM_FRONT/00000.jpg and data/CAM_BACK/00000.jpg."""
    cameras = {
        channel: dataclasses.replace(index[0].cameras[channel], path=f"data/{channel}/0.jpg")
        for channel in ("CAM_FRONT", "CAM_BACK")
    }
    twins = dataclasses.replace(index, frames=(dataclasses.replace(index[0], cameras=cameras),))
    files = depth.build(twins, tmp_path, progress=False)
    cloud, _ = points.read(index.root / index[0].lidar_path)
    for one in cameras.values():
        np.testing.assert_array_equal(depth.read(files, one.path), depth.project(cloud, one, SIZE))


def test_a_folder_of_bevdepths_script_is_read_by_the_images_names(index, tmp_path):
    files = depth.build(index, tmp_path, progress=False)
    (tmp_path / "flat").mkdir()
    for path in files.rglob("*.bin"):
        shutil.copy(path, tmp_path / "flat")
    for one in index[1].cameras.values():
        np.testing.assert_array_equal(depth.read(tmp_path / "flat", one.path), depth.read(files, one.path))


@pytest.mark.parametrize("writable", [True, False])
def test_prepare_makes_what_is_asked_for_where_training_finds_it(index, tmp_path, capsys, monkeypatch, writable):
    from bevfn.commands import data

    root = Path(shutil.copytree(index.root, tmp_path / "world"))
    here = dataclasses.replace(index, root=root)
    nuscenes.index(root, index.version, index.split)
    if not writable:
        monkeypatch.setenv("BEVFN_CACHE", str(tmp_path / "home"))
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    before = sorted(root.iterdir())
    data.prepare(root, split="val", workers=1, paste=False)
    assert f"depth ground truth of {6 * len(index)} images" in capsys.readouterr().out
    assert depth.prepared(here).is_dir() and not paste.folder(here).exists()
    data.prepare(root, split="val", workers=1, depth=False)
    assert len(paste.read(paste.folder(here))) > 0
    assert writable or sorted(root.iterdir()) == before
