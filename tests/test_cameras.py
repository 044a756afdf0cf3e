"""Key frames to a Sample: the golden inputs, frames that align, augmentations that agree, each way data is wrong."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_world
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file
from scipy.spatial.transform import Rotation

from bevfn import geometry, tree
from bevfn.data import annotations, augment, cameras, depth, infos, loader, points, reading, sampling, scene, source
from bevfn.data.batch import Base, Capacities, Sample, collate
from bevfn.data.index import Frame, Index, inverse
from bevfn.data.reading import Cameras, Reading
from bevfn.experiments import bevdepth
from bevfn.experiments.bevdepth import CHANNELS

SHARED = Path(__file__).parents[1].parent / "shared"
CASE = SHARED / "goldens/bevdepth_r50_2key"
needs_shared = pytest.mark.skipif(not CASE.is_dir(), reason="../shared (real frame and goldens) is not here")
SMALL = {"frames": 3, "image_size": (32, 96)}  # of 90 x 160


def cameras_as(reading: Reading, **changes) -> Reading:
    return dataclasses.replace(reading, cameras=dataclasses.replace(reading.cameras, **changes))


EVAL = dataclasses.replace(cameras_as(bevdepth.EVAL, **SMALL), depth=True)
TRAIN = cameras_as(bevdepth.TRAIN, **SMALL)


@pytest.fixture(scope="module")
def index() -> Index:
    return small_world.index()


@functools.cache
def load(place: int, config: Reading, seed: int = 0) -> Sample:
    return scene.load(small_world.index(), place, config, sampling.generator(seed, 0, 0))


def changed(index: Index, place: int, **fields) -> Index:
    """The index with another frame at a place."""
    frames = list(index)
    frames[place] = dataclasses.replace(frames[place], **fields)
    return dataclasses.replace(index, frames=tuple(frames))


def with_camera(frame: Frame, channel: str, **fields) -> dict:
    return {**frame.cameras, channel: dataclasses.replace(frame.cameras[channel], **fields)}


def move(matrix: np.ndarray, xyz: np.ndarray) -> np.ndarray:
    return xyz @ matrix[..., :3, :3].swapaxes(-1, -2) + matrix[..., None, :3, 3]


def lift(sample: Sample, t: int, n: int, pixels: np.ndarray, far: np.ndarray) -> np.ndarray:
    """Pixels [P,2] of a sample's image with depths [P] to its ego frame, not augmented: what the models do."""
    batch, _ = collate([sample], capacities=Capacities(boxes=200))
    there = np.concatenate([pixels, np.zeros((len(pixels), 1))], 1) - sample.image_aug[t, n, :3, 3]
    there = there @ batch.undo_image_aug[0, t, n].numpy().T
    there = np.concatenate([there[:, :2], np.ones((len(pixels), 1))], 1) * far[:, None]
    return there @ batch.base_from_pixel[0, t, n].numpy().T + sample.base_from_camera[t, n, :3, 3]


# --- the golden inputs ---


def golden_index() -> Index:
    """The real frame, and before it one that the golden's README describes: the same data, the car elsewhere."""
    one = infos.read(SHARED / "nuscenes_frame/frame.json")
    motion = json.loads((CASE / "augmentation.json").read_text())["sweep_motion"]
    moved = np.eye(4)
    moved[:3, :3] = Rotation.from_euler("z", motion["yaw_deg"], degrees=True).as_matrix()
    moved[0, 3] = motion["dx"]
    key = one[0]
    cameras = {
        name: dataclasses.replace(camera, global_from_ego=camera.global_from_ego @ moved)
        for name, camera in key.cameras.items()
    }
    before = dataclasses.replace(key, token="before", previous="", cameras=cameras)
    return dataclasses.replace(one, frames=(before, dataclasses.replace(key, previous="before")))


@needs_shared
def test_the_golden_inputs():
    golden = load_file(CASE / "inputs.safetensors")
    found = golden_index()
    config = dataclasses.replace(bevdepth.EVAL, depth=True)
    sample = scene.load(found, 1, config)
    np.testing.assert_array_equal(sample.images[0], golden["imgs_u8_rgb"])
    np.testing.assert_allclose(sample.intrinsics, golden["intrin_mats"], rtol=1e-7)
    np.testing.assert_allclose(sample.image_aug, golden["ida_mats"], rtol=1e-6)
    np.testing.assert_array_equal(sample.base_aug, golden["bda_mat"])
    # upstream's float32 in global coordinates has 1e-4 m of noise
    np.testing.assert_allclose(sample.base_from_camera, golden["sensor2ego_mats"], rtol=0, atol=2e-4)
    boxes = golden["gt_boxes"].copy()
    boxes[:, 2] -= 0.5 * boxes[:, 5]
    np.testing.assert_array_equal(sample.labels, golden["gt_labels"])
    np.testing.assert_allclose(np.sin(sample.boxes[:, 6] - boxes[:, 6]), 0, atol=1e-6)
    np.testing.assert_allclose(np.delete(sample.boxes, 6, 1), np.delete(boxes, 6, 1), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(np.cos(sample.boxes[:, 6] - boxes[:, 6]), 1, atol=1e-6)
    pose = annotations.ego_pose(found[1], CHANNELS)
    np.testing.assert_allclose(pose[:3, 3], golden["ego2global_translation"], atol=1e-6)
    turn = Rotation.from_quat(golden["ego2global_rotation"][[1, 2, 3, 0]]).as_matrix()
    np.testing.assert_allclose(pose[:3, :3], turn, atol=1e-9)
    assert sample.depth is not None and np.count_nonzero(sample.depth) == len(golden["depth_gt_value"])
    made, _ = collate([sample], capacities=config.capacities)
    made.validate()


# --- boxes ---


def test_boxes_are_those_that_the_devkit_and_pyquaternion_make_of_the_annotations(index):
    """In upstream's steps: the mean pose of the cameras, Box.translate, Box.rotate."""
    from nuscenes.utils.data_classes import Box
    from pyquaternion import Quaternion

    tables, frame = small_world.tables(), index[1]
    poses = []
    for channel in CHANNELS:
        data = tables.get("sample_data", tables.get("sample", frame.token)["data"][channel])
        poses.append(tables.get("ego_pose", data["ego_pose_token"]))
    mean = {key: np.mean([pose[key] for pose in poses], 0) for key in ("translation", "rotation")}
    rows = []
    for token, name, valid in zip(frame.annotations, frame.names, frame.valid):
        if name and valid:
            row = tables.get("sample_annotation", token)
            velocity = np.nan_to_num(tables.box_velocity(token))
            box = Box(row["translation"], row["size"], Quaternion(row["rotation"]), velocity=velocity)
            box.translate(-mean["translation"])
            box.rotate(Quaternion(mean["rotation"]).inverse)
            rows.append([*box.center, *box.wlh[[1, 0, 2]], box.orientation.yaw_pitch_roll[0], *box.velocity[:2]])
    expected = np.array(rows)
    expected[:, 2] -= 0.5 * expected[:, 5]
    boxes, labels = annotations.ego_boxes(frame, CHANNELS, EVAL.class_names)
    assert len(boxes) > 5 and [EVAL.class_names[i] for i in labels] == [
        name for name, valid in zip(frame.names, frame.valid) if name and valid
    ]
    np.testing.assert_allclose(boxes[:, :6], expected[:, :6], atol=1e-3)
    np.testing.assert_allclose(np.angle(np.exp(1j * (boxes[:, 6] - expected[:, 6]))), 0, atol=2e-3)
    np.testing.assert_allclose(boxes[:, 7:], expected[:, 7:], atol=2e-2)


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_boxes_move_as_base_aug_says(seed):
    index = small_world.index()
    config = dataclasses.replace(cameras_as(TRAIN, frames=1), depth=False)
    before, labels = annotations.ego_boxes(index[1], CHANNELS, config.class_names)
    sample = load(1, config, seed)
    linear = sample.base_aug[:3, :3]
    scale = abs(float(linear[2, 2]))
    assert 0.95 <= scale <= 1.05 and not sample.base_aug[:3, 3].any()
    np.testing.assert_allclose(linear @ linear.T, scale**2 * np.eye(3), atol=1e-6)
    angle = np.degrees(np.arctan2(*(linear[:2, 0] * [1, np.sign(linear[0, 0])])[::-1]))
    assert min(abs(angle), 180 - abs(angle)) <= 22.5 + 1e-3
    np.testing.assert_array_equal(sample.labels, labels)
    np.testing.assert_allclose(sample.boxes[:, :3], before[:, :3] @ linear.T, atol=1e-4)
    np.testing.assert_allclose(sample.boxes[:, 3:6], before[:, 3:6] * scale, rtol=1e-5)
    np.testing.assert_allclose(sample.boxes[:, 7:9], before[:, 7:9] @ linear[:2, :2].T, atol=1e-4)
    arrows = [np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1) for boxes in (before, sample.boxes)]
    np.testing.assert_allclose(arrows[1] * scale, arrows[0] @ linear[:2, :2].T, atol=1e-5)


# --- frames that align ---


@pytest.mark.parametrize("config, seed", [(EVAL, 0), (TRAIN, 1), (TRAIN, 2)])
def test_a_static_object_lies_at_one_place_whichever_frame_and_camera_sees_it(index, config, seed):
    """Where an object's centre is seen, lifted with the object's depth, is where the key frame has it."""
    frames, sample = cameras.key_frames(index, 2, 3), load(2, config, seed)
    assert [frame.token for frame in frames] == [index[2].token, index[1].token, index[0].token]
    assert sample.counts["missing/frames"] == 0
    key = frames[0]
    kept = key.valid & np.array([name != "" for name in key.names])
    still = np.linalg.norm(np.nan_to_num(key.boxes[kept, 7:9], nan=9.0), axis=1) < 0.05
    centres = move(key.global_from_lidar, key.boxes[kept][still, :3])
    boxes = sample.boxes[still, :3] + 0.5 * sample.boxes[still, 5:6] * [0, 0, 1]
    seen = np.zeros((3, len(centres)), bool)
    for t, frame in enumerate(frames):
        for n, channel in enumerate(CHANNELS):
            camera = frame.cameras[channel]
            there = move(inverse(camera.global_from_ego @ camera.ego_from_camera), centres)
            front = there[:, 2] > 1
            pixels = there[front] @ camera.intrinsics.T / there[front, 2:]
            inside = ((pixels[:, :2] > 0) & (pixels[:, :2] < [160, 90])).all(1)
            pixels, far, which = pixels[inside], there[front][inside, 2], np.flatnonzero(front)[inside]
            pixels = move(sample.image_aug[t, n], pixels - [0, 0, 1])[:, :2]
            lifted = lift(sample, t, n, pixels, far)
            expected = move(inverse(key.cameras[channel].global_from_ego), centres[which])
            np.testing.assert_allclose(lifted, expected, atol=0.01)
            moved = lifted @ sample.base_aug[:3, :3].T
            assert np.abs(moved - boxes[which]).max(initial=0) < 0.7  # the boxes' ego frame is a mean over the cameras
            seen[t, which] = True
    assert seen.all(axis=0).sum() >= 3


def test_a_missing_previous_key_frame_is_the_current_one(index):
    first, second = load(0, EVAL), load(1, EVAL)
    assert first.counts["missing/frames"] == 2 and second.counts["missing/frames"] == 1
    for t in (1, 2):
        np.testing.assert_array_equal(first.images[t], first.images[0])
        np.testing.assert_allclose(first.base_from_camera[t], first.base_from_camera[0], atol=1e-6)
    np.testing.assert_array_equal(second.images[2], second.images[0])  # not the one before, as upstream
    np.testing.assert_array_equal(second.images[1], first.images[0])
    assert np.abs(second.images[1].astype(int) - second.images[0]).max() > 20
    alone = dataclasses.replace(index, frames=(index[2],))  # the one before is not in the index
    assert scene.load(alone, 0, EVAL).counts["missing/frames"] == 2


@pytest.mark.parametrize("history", ["scene", "time"])
def test_frames_in_order_of_time_are_those_of_the_scene_where_scenes_do_not_meet(index, history):
    """One scene: they differ where the scene begins, which by time is the first one of all and stands for what is missing."""
    third, second = (load(place, cameras_as(EVAL, history=history)) for place in (2, 1))
    np.testing.assert_array_equal(third.images, load(2, EVAL).images)
    place = 1 if history == "time" else 0
    np.testing.assert_array_equal(second.images[2], second.images[place])
    assert (third.counts["missing/frames"], second.counts["missing/frames"]) == (0, 1)


def test_a_key_frame_that_is_missing_in_the_middle_is_skipped_by_time_and_ends_the_history_of_the_scene(index):
    """As published, the one before takes its place; scene by scene nothing says which one that is."""
    holed = dataclasses.replace(index, frames=(index[0], index[2]))
    first, last = load(0, EVAL), load(2, EVAL)
    for history, expected in (("time", first.images[0]), ("scene", last.images[0])):
        sample = scene.load(holed, 1, cameras_as(EVAL, history=history))
        np.testing.assert_array_equal(sample.images[1], expected)
        np.testing.assert_array_equal(sample.images[2], expected)
        assert sample.counts["missing/frames"] == (1 if history == "time" else 2)


def test_frames_of_another_scene_or_of_none_do_not_count(index):
    other = changed(index, 1, scene="another")
    by_time = cameras_as(EVAL, history="time")
    tokens = [frame.token for frame in cameras.key_frames(other, 2, 3, "time")]
    assert tokens == [index[2].token, index[2].token, index[0].token]
    nowhere = dataclasses.replace(index, frames=tuple(dataclasses.replace(frame, scene="") for frame in index))
    assert {frame.token for frame in cameras.key_frames(nowhere, 2, 3, "time")} == {index[2].token}
    with pytest.raises(ValueError, match=r"does not say of which scene its key frames are, .*--no-published-history"):
        source.check(nowhere, by_time, train=False)
    source.check(nowhere, EVAL, train=False)
    source.check(dataclasses.replace(nowhere, frames=nowhere.frames[:1]), by_time, train=False)


def test_in_the_front_cameras_base_all_cameras_and_boxes_are_relative_to_one_pose(index):
    front, mean = (load(2, dataclasses.replace(EVAL, base=base)) for base in (Base.EGO_AT_FRONT, Base.EGO_AT_CAMERAS))
    key, n = index[2], CHANNELS.index("CAM_FRONT")
    pose = key.cameras["CAM_FRONT"].global_from_ego
    for k, channel in enumerate(CHANNELS):
        camera = key.cameras[channel]
        expected = inverse(pose) @ camera.global_from_ego @ camera.ego_from_camera
        np.testing.assert_allclose(front.base_from_camera[0, k], expected, atol=1e-6)
    np.testing.assert_array_equal(front.base_from_camera[:, n], mean.base_from_camera[:, n])
    assert np.abs(front.base_from_camera - mean.base_from_camera).max() > 1e-3
    centres = move(inverse(pose), move(key.global_from_lidar, key.boxes[key.valid, :3]))
    kept = [name in EVAL.class_names for name, good in zip(key.names, key.valid) if good]
    boxes = front.boxes[:, :3] + 0.5 * front.boxes[:, 5:6] * [0, 0, 1]
    np.testing.assert_allclose(boxes, centres[kept], atol=1e-4)
    back = annotations.lidar_from_base(key, Base.EGO_AT_FRONT, CHANNELS)
    np.testing.assert_allclose(move(back, boxes), key.boxes[key.valid][kept, :3], atol=1e-4)


# --- images and depth ---


@pytest.mark.parametrize("seed", range(3))
def test_depth_pixels_lift_to_lidar_points(index, seed):
    """At augmented pixels: the depth map, image_aug, intrinsics and poses speak of the same points."""
    sample, frame = load(1, TRAIN, seed), index[1]
    cloud, _ = points.read(index.root / frame.lidar_path)
    assert sample.depth is not None
    for n, channel in enumerate(CHANNELS):
        rows, columns = np.nonzero(sample.depth[n])
        rows, columns = (values[(rows > 0) & (columns > 0)] for values in (rows, columns))  # truncated: see `rasterize`
        far = sample.depth[n, rows, columns]
        assert len(far) > 20
        lifted = lift(sample, 0, n, np.stack([columns, rows], 1) + 0.5, far)
        camera = frame.cameras[channel]
        here = move(camera.ego_from_camera @ camera.camera_from_lidar, cloud[:, :3].astype(np.float64))
        nearest = np.linalg.norm(lifted[:, None] - here[None], axis=-1).min(axis=1)
        focal = camera.intrinsics[0, 0] * np.sqrt(abs(np.linalg.det(sample.image_aug[0, n, :2, :2])))
        assert (nearest < 0.75 * far / focal + 0.01).all()  # half a pixel's diagonal


@pytest.mark.parametrize("seed", range(3))
def test_image_content_lies_where_image_aug_says_in_every_frame(index, seed):
    sample = load(2, TRAIN, seed)
    agree = total = 0
    for t, frame in enumerate(cameras.key_frames(index, 2, 3)):
        for n, channel in enumerate(CHANNELS):
            picture = np.asarray(Image.open(index.root / frame.cameras[channel].path).convert("RGB")).astype(int)
            rows, columns = np.mgrid[2:30, 2:94].reshape(2, -1)
            undo = geometry.invert(torch.from_numpy(sample.image_aug[t, n, :3, :3])).numpy()
            there = np.stack([columns + 0.5, rows + 0.5, 0 * rows], 1) - sample.image_aug[t, n, :3, 3]
            x, y = np.floor(there @ undo.T)[:, :2].astype(int).T
            inside = (x >= 2) & (x < 158) & (y >= 2) & (y < 88)
            rows, columns, x, y = (values[inside] for values in (rows, columns, x, y))
            difference = np.abs(sample.images[t, n, rows, columns].astype(int) - picture[y, x])
            agree, total = agree + (difference.max(1) < 40).sum(), total + inside.sum()
    assert agree / total > 0.8


def test_a_cameras_frames_share_one_draw_and_cameras_do_not():
    sample = load(2, TRAIN)
    assert (sample.image_aug == sample.image_aug[:1]).all()
    assert len(np.unique(sample.image_aug[0].reshape(6, -1), axis=0)) == 6
    assert TRAIN.cameras.relative((90, 160)) == pytest.approx(0.6 / 0.44)
    assert bevdepth.TRAIN.cameras.augmentation.resize == (0.386, 0.55)


def test_a_seed_is_a_sample_and_evaluation_draws_nothing(index):
    again = scene.load(index, 1, TRAIN, sampling.generator(3, 0, 0))
    first, other = load(1, TRAIN, 3), load(1, TRAIN, 4)
    for name in ("images", "image_aug", "base_aug", "boxes", "depth"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))
    np.testing.assert_array_equal(scene.load(index, 1, EVAL).images, load(1, EVAL, 5).images)
    with pytest.raises(ValueError, match="a random augmentation needs a generator"):
        scene.load(index, 1, TRAIN)


def test_stored_depth_is_the_same(index, monkeypatch, tmp_path):
    files = depth.build(index, tmp_path, progress=False)
    monkeypatch.setattr(depth, "prepared", lambda index: files)
    stored = scene.load(index, 1, TRAIN, sampling.generator(0, 0, 0))
    np.testing.assert_array_equal(stored.depth, load(1, TRAIN).depth)


# --- batches ---


def test_samples_collate_pad_and_count(index):
    samples = [load(place, TRAIN) for place in range(3)]
    made, counts = collate(samples, capacities=Capacities(boxes=4))
    made.validate()
    assert tuple(made.images.shape) == (3, 3, 6, 32, 96, 3) and made.depth is not None and made.boxes is not None
    assert counts["overflow/boxes"] == sum(len(sample.boxes) - 4 for sample in samples)
    assert counts["missing/frames"] == 3 and counts["empty/depth"] == counts["empty/boxes"] == 0
    np.testing.assert_array_equal(made.boxes[1], samples[1].boxes[:4])
    plain, _ = collate([load(0, dataclasses.replace(EVAL, depth=False))], capacities=Capacities())
    plain.validate()
    assert plain.depth is None
    with pytest.raises(ValueError, match="with and without depth"):
        collate([samples[0], dataclasses.replace(samples[1], depth=None)], capacities=Capacities())
    with pytest.raises(ValueError, match="images differ in shape"):
        cut = dataclasses.replace(samples[1], images=samples[1].images[..., :64, :])
        collate([samples[0], cut], capacities=Capacities())
    with pytest.raises(ValueError, match="no samples"):
        collate([], capacities=Capacities())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_makes_camera_batches(index, workers):
    stream = loader.batches(
        functools.partial(_load, index), np.array([2, 0, 1, 2]), loader.Config(batch_size=2, workers=workers),
        seed=7, epoch=1, capacities=TRAIN.capacities,
    )  # fmt: skip
    items = list(stream)
    assert [item.tokens for item in items] == [[index[2].token, index[0].token], [index[1].token, index[2].token]]
    expected, _ = collate(
        [_load(index, place, sampling.generator(7, 1, position)) for position, place in ((2, 1), (3, 2))],
        capacities=TRAIN.capacities,
    )
    pairs = zip(tree.leaves(items[1].batch), tree.leaves(expected), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    items[1].batch.validate()


def _load(index: Index, place: int, generator: np.random.Generator) -> Sample:
    return scene.load(index, place, TRAIN, generator)


# --- bad input ---


def test_images_of_mixed_sizes_are_named_also_in_an_earlier_frame(index, tmp_path):
    Image.new("RGB", (80, 45)).save(tmp_path / "small.jpg")
    cameras = with_camera(index[0], "CAM_BACK", path=str(tmp_path / "small.jpg"))
    with pytest.raises(ValueError, match=r"small.jpg: the image is 80x45 but the calibration is for 160x90"):
        scene.load(changed(index, 0, cameras=cameras), 1, EVAL)


def test_frames_of_a_camera_of_different_sizes_are_named(index, tmp_path):
    """Each by its own data: they would be cropped as one."""
    Image.new("RGB", (80, 45)).save(tmp_path / "small.jpg")
    cameras = with_camera(index[0], "CAM_BACK", path=str(tmp_path / "small.jpg"), size=(45, 80))
    mixed = changed(index, 0, cameras=cameras)
    with pytest.raises(
        ValueError, match=r"small.jpg: the image of this earlier key frame is 80x45, that of the current one 160x90"
    ):
        scene.load(mixed, 1, EVAL)
    assert scene.load(mixed, 0, EVAL).images.shape == (3, 6, 32, 96, 3)  # cameras of one key frame may differ


def test_depth_maps_without_points(index):
    """One camera that sees no point is counted; none that sees any is an error, unless no depth is asked for."""
    away = np.diag([1.0, 1.0, 1.0, 1.0])
    away[2, 3] = -1000.0
    one = changed(index, 1, cameras=with_camera(index[1], "CAM_BACK", camera_from_lidar=away))
    sample = scene.load(one, 1, EVAL)
    assert sample.counts["empty/depth"] == 1 and not sample.depth[CHANNELS.index("CAM_BACK")].any()
    blind = {name: dataclasses.replace(c, camera_from_lidar=away) for name, c in index[1].cameras.items()}
    every = changed(index, 1, cameras=blind)
    with pytest.raises(ValueError, match=r"no point falls into an image of key frame .*; check the calibration"):
        scene.load(every, 1, EVAL)
    assert scene.load(every, 1, dataclasses.replace(EVAL, depth=False)).depth is None


def test_missing_cameras_poses_and_frames_are_named(index):
    fewer = {name: camera for name, camera in index[0].cameras.items() if name != "CAM_BACK"}
    with pytest.raises(
        ValueError, match=r"has no CAM_BACK, which the reading's Cameras.channels name; it has CAM_FRONT, "
    ):
        scene.load(changed(index, 0, cameras=fewer), 1, EVAL)
    lost = with_camera(index[1], "CAM_FRONT", global_from_ego=np.full((4, 4), np.nan))
    with pytest.raises(ValueError, match=r"has cameras without ego pose"):
        scene.load(changed(index, 1, cameras=lost), 1, EVAL)
    with pytest.raises(ValueError, match=r"frames 0 must be at least 1"):
        Cameras(frames=0)


def test_a_frame_without_boxes_is_counted(index):
    none = changed(index, 1, valid=np.zeros(len(index[1].valid), bool))
    sample = scene.load(none, 1, TRAIN, sampling.generator(0, 0, 0))
    assert sample.boxes.shape == (0, 9) and sample.counts["empty/boxes"] == 1
    made, _ = collate([sample], capacities=TRAIN.capacities)
    made.validate()


def huge(jpeg: bytes) -> bytes:
    """The file with a head that says 65,500 x 65,500 pixels, for which a decoder makes room."""
    place = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:place] + b"\xff\xdc\xff\xdc" + jpeg[place + 4 :]


@pytest.mark.parametrize(
    ("damage", "what"), [(lambda jpeg: jpeg[:200], "cannot be decoded"), (huge, "has more than 67,108,864 pixels")]
)
def test_a_damaged_image_can_be_skipped(index, tmp_path, damage, what):
    root = Path(shutil.copytree(index.root, tmp_path / "world"))
    path = root / index[0].cameras["CAM_FRONT"].path
    path.write_bytes(damage(path.read_bytes()))
    broken = dataclasses.replace(index, root=root)
    config = loader.Config(batch_size=1, on_damaged="skip")
    items = list(
        loader.batches(
            functools.partial(_load_one, broken), np.array([0, 2]), config, seed=0, epoch=0,
            capacities=TRAIN.capacities,
        )
    )  # fmt: skip
    assert [item.tokens[0] for item in items] == [index[2].token] * 2
    assert items[0].counts["bad/samples"] == 1 and what in items[0].problems[0]


def _load_one(index: Index, place: int, generator: np.random.Generator) -> Sample:
    return scene.load(index, place, cameras_as(TRAIN, frames=1), generator)


def test_bevdepth_training_is_the_published_one():
    assert bevdepth.EVAL.cameras.resize is None and reading.cover((900, 1600), (256, 704)) == 0.44
    bev = bevdepth.TRAIN.augmentation
    assert bev.scale == (0.95, 1.05) and np.degrees(bev.rotation) == pytest.approx(22.5)
    drawn = [augment.draw_matrix(bev, np.random.default_rng(seed)) for seed in range(200)]
    assert 0.3 < np.mean([np.linalg.det(matrix[:2, :2]) < 0 for matrix in drawn]) < 0.7
    large = cameras_as(bevdepth.TRAIN, image_size=(512, 1408)).cameras
    assert large.relative((900, 1600)) == 2.0
