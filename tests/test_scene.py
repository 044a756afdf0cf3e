"""A key frame to a Sample in the published order: consistent, deterministic, filtered."""

import dataclasses
import shutil

import numpy as np
import pytest
import small_world
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bevfn import boxes as shapes
from bevfn.data import augment, infos, paste, points, sampling, scene, source
from bevfn.data.batch import collate
from bevfn.data.index import Index, Sweep, pack
from bevfn.data.reading import CLASS_NAMES, Reading
from bevfn.experiments import bevdepth, bevfusion, bevfusion_lidar
from bevfn.synth import key_frame

IMAGES = augment.Images(resize=(0.42, 0.55))  # always covers 64 x 176 in height
CAMERAS = dataclasses.replace(bevfusion.CAMERAS, image_size=(64, 176))
PLAIN = dataclasses.replace(bevfusion.EVAL, cameras=CAMERAS)
TRAIN = dataclasses.replace(bevfusion.TRAIN, cameras=dataclasses.replace(CAMERAS, augmentation=IMAGES))
LIDAR = bevfusion_lidar.TRAIN


def points_as(reading: Reading, **changes) -> Reading:
    return dataclasses.replace(reading, points=dataclasses.replace(reading.points, **changes))


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    """A generated key frame with eleven sweeps: the same scan, seen again 0.3 m further back each time."""
    root = tmp_path_factory.mktemp("frame")
    key_frame.write_frame(root, seed=1, image_size=(225, 400))
    one = infos.read(root / "frame.json")
    sweeps = []
    for k in range(1, 12):
        shutil.copy(root / key_frame.LIDAR_FILE, root / f"{k}.bin")
        lidar_from_sweep = np.eye(4)
        lidar_from_sweep[1, 3] = -0.3 * k
        sweeps.append(Sweep(f"{k}.bin", lidar_from_sweep, 0.05 * k))
    return dataclasses.replace(one, frames=(dataclasses.replace(one[0], sweeps=tuple(sweeps)),))


@pytest.fixture(scope="module")
def database(index, tmp_path_factory) -> paste.Database:
    out = tmp_path_factory.mktemp("database")
    return paste.build(index, out, class_names=CLASS_NAMES, progress=False)


def load(index: Index, config: Reading, seed: int = 0, **extra):
    return scene.load(index, 0, config, sampling.generator(seed, 0, 0), **extra)


def corners(sample) -> np.ndarray:
    return shapes.corners(torch.from_numpy(sample.boxes.astype(np.float64))).numpy().reshape(-1, 3)


def source_pixels(sample, xyz: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(pixels [N,P,2] of the original image, and of the sample's) of points in the sample's (augmented) lidar frame."""
    undo = np.linalg.inv(sample.base_aug.astype(np.float64))
    original = xyz @ undo[:3, :3].T + undo[:3, 3]
    seen = np.einsum("nij,pj->npi", sample.image_from_base[0].astype(np.float64)[:, :3, :3], original)
    seen += sample.image_from_base[0, :, None, :3, 3]
    source = seen[..., :2] / seen[..., 2:]
    moved = np.einsum("nij,npj->npi", sample.image_aug[0, :, :2, :2], source) + sample.image_aug[0, :, None, :2, 3]
    moved[seen[..., 2] < 1.0] = -1  # behind the camera, or nearly
    return source, moved


# --- consistency ---


@settings(max_examples=15)
@given(st.integers(0, 2**31))
def test_a_projected_box_corner_keeps_its_source_pixel(index, seed):
    """Whatever was drawn: a corner of the augmented box, through the sample's matrices, is where it was before."""
    wide = (-99.0, -99.0, -9.0, 99.0, 99.0, 9.0)  # the same boxes in both
    before, after = (
        load(index, dataclasses.replace(points_as(config, sweeps=0), range=wide), seed) for config in (PLAIN, TRAIN)
    )
    first, _ = source_pixels(before, corners(before))
    second, _ = source_pixels(after, corners(after))
    first, second = (found.reshape(6, -1, 8, 2) for found in (first, second))
    near = np.abs(first).max(axis=(2, 3)) < 2000  # corners near a camera's plane project to anywhere
    assert near.sum() > 20
    distance = np.linalg.norm(first[near][:, :, None] - second[near][:, None], axis=-1)  # mirrors permute corners
    assert distance.min(axis=2).max() < 0.05 and distance.min(axis=1).max() < 0.05


@pytest.mark.parametrize("seed", range(4))
def test_image_content_lies_where_the_matrices_say(index, seed):
    """At the pixels of lidar points, the augmented images show what the original images show there."""
    sample = load(index, TRAIN, seed)
    source, moved = source_pixels(sample, sample.points[:4000, :3].astype(np.float64))
    agree, seen = 0, 0
    for n, path in enumerate(sample.image_paths):
        picture = np.asarray(Image.open(path))
        inside = ((moved[n] > 1) & (moved[n] < [174, 62])).all(axis=1)
        u, v = np.floor(moved[n][inside]).astype(int).T
        x, y = np.clip(np.floor(source[n][inside]).astype(int), 0, [399, 224]).T
        found = np.abs(sample.images[0, n, v, u].astype(int) - picture[y, x]).max(axis=1) < 25
        agree, seen = agree + found.sum(), seen + len(found)
    assert seen > 1000 and agree / seen > 0.9


@pytest.mark.parametrize("config", ["camera", "lidar"])
def test_points_and_boxes_are_base_aug_of_the_unaugmented(index, database, config):
    wide = (-150.0, -150.0, -19.0, 150.0, 150.0, 19.0)
    train = TRAIN if config == "camera" else dataclasses.replace(LIDAR, paste=None)
    train = dataclasses.replace(points_as(train, shuffle=False, sweep_choice="newest"), range=wide)
    before = load(index, dataclasses.replace(PLAIN, range=wide))
    after = load(index, train, 3)
    moved = before.points[:, :3] @ after.base_aug[:3, :3].T + after.base_aug[:3, 3]
    np.testing.assert_allclose(after.points[:, :3], moved, atol=1e-4)
    np.testing.assert_array_equal(after.points[:, 3:], before.points[:, 3:])
    centres = before.boxes[:, :3] @ after.base_aug[:3, :3].T + after.base_aug[:3, 3]
    np.testing.assert_allclose(after.boxes[:, :3], centres, atol=1e-4)
    np.testing.assert_array_equal(after.labels, before.labels)


def test_the_shuffle_is_a_permutation_of_the_filtered_points(index):
    ordered = load(index, points_as(TRAIN, shuffle=False), 5).points
    shuffled = load(index, TRAIN, 5).points
    assert (ordered != shuffled).any()
    np.testing.assert_array_equal(ordered[np.lexsort(ordered.T)], shuffled[np.lexsort(shuffled.T)])
    lower, upper = np.split(np.array(TRAIN.range), 2)
    assert ((shuffled[:, :3] > lower) & (shuffled[:, :3] < upper)).all()


@pytest.mark.parametrize("size", [(300, 400), (225, 400), (120, 400), (400, 300)])
def test_cameras_of_any_aspect_fill_the_model_s_image(size, tmp_path):
    one = infos.read(key_frame.write_frame(tmp_path, seed=1, image_size=size) / "frame.json")
    sample = scene.load(one, 0, dataclasses.replace(PLAIN, points=dataclasses.replace(PLAIN.points, sweeps=0)))
    assert (sample.images.max(axis=-1) == 0).mean() < 0.01  # of 4:3, evaluation had crashed
    narrow = sample.image_aug[0, 0, 0, 0] * np.array(size) / (64, 176)  # sides of the resized image over the crop's
    assert narrow.min() == pytest.approx(0.48 / 0.44, rel=0.02)  # as nuScenes' images are by the published factor


def test_nuscenes_images_are_resized_by_the_published_factors_bit_for_bit():
    published = bevfusion.EVAL.cameras
    assert published.image_size == (256, 704) and published.relative((900, 1600)) == 1.0


# --- determinism ---


def test_a_sample_is_a_function_of_seed_epoch_and_position(index, database):
    config = dataclasses.replace(LIDAR, cameras=TRAIN.cameras)

    def made(*numbers: int):
        return scene.load(index, 0, config, sampling.generator(*numbers), database=database)

    first, again = made(1, 2, 3), made(1, 2, 3)
    for name in ("points", "boxes", "labels", "base_aug", "images", "image_aug"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name), err_msg=name)
    for numbers in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert (made(*numbers).base_aug != first.base_aug).any()
    collate([first], capacities=config.capacities)[0].validate()


def test_evaluation_needs_no_generator_and_takes_the_newest_sweeps(index):
    sample = scene.load(index, 0, PLAIN)
    lags = np.unique(sample.points[:, 4])
    np.testing.assert_allclose(lags, 0.05 * np.arange(10), rtol=1e-6)
    np.testing.assert_array_equal(sample.base_aug, np.eye(4))
    np.testing.assert_array_equal(sample.points, load(index, PLAIN, 9).points)
    random = points_as(PLAIN, sweep_choice="random")
    assert {tuple(np.unique(load(index, random, seed).points[:, 4])) for seed in range(8)} != {tuple(lags)}
    for config in (random, TRAIN, points_as(PLAIN, shuffle=True)):
        with pytest.raises(ValueError, match="a random augmentation needs a generator"):
            scene.load(index, 0, config)


# --- paste, filters, masks ---


def test_pasted_objects_are_added_with_their_points_and_time_lags(index, database):
    still = dataclasses.replace(points_as(LIDAR, shuffle=False), augmentation=None)
    frame = dataclasses.replace(index[0], boxes=index[0].boxes[:3], names=index[0].names[:3], valid=index[0].valid[:3])
    few = dataclasses.replace(index, frames=(frame,))
    plain = load(few, dataclasses.replace(still, paste=None))
    pasted = load(few, still, database=database)
    assert len(pasted.boxes) > len(plain.boxes) + 5
    np.testing.assert_array_equal(pasted.boxes[: len(plain.boxes)], plain.boxes)  # the scene's own come first
    for label, name in enumerate(CLASS_NAMES):
        own, all_of_them = (int((found.labels == label).sum()) for found in (plain, pasted))
        assert all_of_them <= max(own, LIDAR.paste.quotas[name])
    assert len(np.unique(pasted.points[:200, 4])) > 3
    with pytest.raises(ValueError, match=r"GT paste needs a database; build one with `bevfn data prepare`"):
        load(index, LIDAR)


@pytest.mark.parametrize(
    ("changes", "oldest"),
    [({"sweeps": 0}, 0.0), ({"sweeps": 4, "sweep_choice": "newest"}, 0.2), ({}, 0.5), ({"sweeps": 4}, 0.5)],
)
def test_pasted_points_are_no_older_than_the_sweeps_that_may_be_read(index, database, changes, oldest):
    """Published: nine of ten sweeps at random, so all ten of an object."""
    still = dataclasses.replace(points_as(LIDAR, shuffle=False, **changes), augmentation=None)
    frame = dataclasses.replace(index[0], boxes=index[0].boxes[:0], names=(), valid=index[0].valid[:0], sweeps=())
    few = dataclasses.replace(index, frames=(frame,))
    pasted = load(few, still, database=database).points
    assert len(load(few, still, database=database).boxes) > 5
    np.testing.assert_allclose(pasted[:, 4].max(), oldest, rtol=1e-6)


def test_boxes_of_other_classes_and_out_of_range_go_after_the_augmentation(index):
    far = dataclasses.replace(TRAIN, range=(-20.0, -20.0, -5.0, 20.0, 20.0, 3.0))
    assert 0 < len(load(index, far, 1).boxes) < len(load(index, TRAIN, 1).boxes)
    cars = dataclasses.replace(TRAIN, class_names=("car",))
    sample = load(index, cars, 1)
    assert len(sample.boxes) and (sample.labels == 0).all()


def test_a_key_frame_without_boxes_is_replaced_by_another_where_the_reading_says_so():
    world = small_world.index()
    empty = dataclasses.replace(world[0], valid=np.zeros(len(world[0].valid), dtype=bool))
    index = dataclasses.replace(world, frames=(empty, empty, empty, world[1]))
    config = dataclasses.replace(PLAIN, redraw=True)
    assert config.random and not PLAIN.random
    made = [scene.load(index, 0, config, sampling.generator(seed, 0, 0)) for seed in range(12)]
    assert {sample.token for sample in made} == {world[1].token} and all(len(sample.boxes) for sample in made)
    redrawn = [sample.counts["empty/redrawn"] for sample in made]
    assert min(redrawn) >= 1 and max(redrawn) > 1 and not any(sample.counts["empty/boxes"] for sample in made)
    again = scene.load(index, 0, config, sampling.generator(3, 0, 0))
    assert again.counts == made[3].counts
    full = scene.load(index, 3, config, sampling.generator(0, 0, 0))
    assert full.token == world[1].token and full.counts["empty/redrawn"] == 0
    assert len(scene.load(index, 0, PLAIN).boxes) == 0
    with pytest.raises(ValueError, match=r"20 key frames in a row, drawn of 1, have no annotated box .*--no-redraw"):
        scene.load(index.select([0]), 0, config, sampling.generator(0, 0, 0))
    with pytest.raises(ValueError, match="needs a generator"):
        scene.load(index, 0, config)


def test_a_frame_without_sweeps_is_padded_with_its_own_points(index):
    alone = dataclasses.replace(index, frames=(dataclasses.replace(index[0], sweeps=()),))
    padded, plain = (load(alone, points_as(PLAIN, pad_empty_sweeps=pad)).points for pad in (True, False))
    assert len(padded) > 9 * len(plain)


def test_published_readings_are_the_fact_sheet():
    camera = bevfusion.TRAIN
    assert LIDAR.paste is not None and camera.paste is None
    assert not LIDAR.augmentation.scale_translation and camera.augmentation.scale_translation
    assert LIDAR.cameras is None and camera.cameras.augmentation == augment.Images((0.38, 0.55), True, (-5.4, 5.4))
    assert LIDAR.points == camera.points and camera.points.sweeps == 9
    assert camera.points.pad_empty_sweeps and camera.points.shuffle
    assert camera.points.published_sweeps and bevfusion.EVAL.points.published_sweeps
    assert sum(LIDAR.paste.quotas.values()) == 40 and LIDAR.paste.quotas["construction_vehicle"] == 7
    assert not bevfusion.EVAL.random and bevfusion.EVAL.cameras.resize == 0.48


# --- data that are there in part ---


def test_frames_whose_files_are_all_there_are_found_and_the_others_named_once(tmp_path):
    root = small_world.copy(tmp_path / "world")
    first, second, third = small_world.index()
    blind = dataclasses.replace(first, cameras={k: c for k, c in first.cameras.items() if k != "CAM_BACK"})
    index = dataclasses.replace(small_world.index(), root=root, frames=(blind, second, third))
    (root / third.cameras["CAM_FRONT"].path).unlink()
    (root / third.sweeps[4].path).unlink()
    places = np.array([2, 0, 1, 0, 2, 1, 1])
    cases = [  # what is read, the places that stay, whose sentences
        (
            PLAIN,
            [1, 1, 1],
            [f"key frame {first.token} has no CAM_BACK", f"{third.token} has no {third.sweeps[4].path}"],
        ),
        (points_as(LIDAR, sweeps=4, sweep_choice="newest"), places.tolist(), []),
        (points_as(LIDAR, sweeps=4), [0, 1, 0, 1, 1], [third.sweeps[4].path]),  # of which it draws any
        (bevdepth.EVAL, [], [first.token, first.token, third.cameras["CAM_FRONT"].path]),  # the second's earlier frame
    ]
    for reading, left, said in cases:
        found, sentences = scene.whole(index, places, reading)
        assert found.tolist() == left and len(sentences) == len(said)
        assert all(part in sentence for part, sentence in zip(said, sentences))
    source.check(index, PLAIN, train=True, whole=False)  # what is missing at one frame is not in the data set
    with pytest.raises(ValueError, match=r"has no image of CAM_BACK at 1 of its 3 key frames; .*--on-damaged skip"):
        source.check(index, PLAIN, train=True)
    packed = dataclasses.replace(index, frames=pack(index.frames))
    assert [packed.lacking(channel) for channel in ("CAM_BACK", "CAM_FRONT", "CAM_UP")] == [1, 0, 3]
    assert packed.image_files == index.image_files and packed.channels == index.channels == CAMERAS.channels
    chosen = index.select([2, 0])
    assert [frame.token for frame in chosen] == [third.token, first.token] and list(chosen.positions.values()) == [0, 1]


# --- the synthetic world, in nuScenes' format ---

# 90 x 160 pixels become 32 x 88
SMALL = dataclasses.replace(CAMERAS, image_size=(32, 88), augmentation=augment.Images(resize=(0.4, 0.48)))


def test_points_of_moving_objects_follow_velocity_and_time_lag_through_every_augmentation():
    """A point seen `lag` ago on an object lies in its box once it is moved on by velocity * lag, and not if moved back."""
    index = small_world.index()
    config = dataclasses.replace(bevfusion.TRAIN, cameras=SMALL)
    count = {1: 0, -1: 0}
    for seed, position in enumerate((1, 2, 1, 2)):  # the first frame of a scene has no sweeps
        sample = scene.load(index, position, config, sampling.generator(seed, 0, 0))
        lag, speed = sample.points[:, 4], np.linalg.norm(sample.boxes[:, 7:9], axis=1)
        assert len(np.unique(lag)) == 10
        for box in sample.boxes[(speed > 2) & (speed * 0.5 > sample.boxes[:, 3])]:  # leave their place in half a second
            xy = sample.points[:, :2].T
            for sign in (1, -1):
                moved = np.stack([*(xy + sign * lag * box[7:9, None]), sample.points[:, 2]])
                found = lag[points.in_box(moved, box)]
                count[sign] += int((found > 0.25).sum())  # a wrong sign moves a whole object away then
    assert count[1] > 100 and count[-1] < 0.2 * count[1]


def test_a_nuscenes_world_goes_through_both_published_readings(tmp_path):
    index = small_world.index()
    database = paste.build(index, tmp_path, class_names=CLASS_NAMES, progress=False)
    items = sampling.order(sampling.cbgs(index, CLASS_NAMES, seed=0), 0, 0, shuffle=True)
    camera = dataclasses.replace(bevfusion.TRAIN, cameras=SMALL)
    for config in (camera, LIDAR):
        samples = [
            scene.load(index, i, config, sampling.generator(0, 0, position), database=database)
            for position, i in enumerate(items[:3])
        ]
        batch, counts = collate(samples, capacities=config.capacities)
        batch.validate()
        assert counts["overflow/points"] == counts["overflow/boxes"] == counts["empty/boxes"] == 0
