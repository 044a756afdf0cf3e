"""What a run reads, held against what its model takes and its data has: one sentence that names both sides."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_world

from bevfn.data import batch, scene, source
from bevfn.data.batch import Base, Capacities
from bevfn.data.index import Index, pack
from bevfn.data.reading import Cameras, Points, Reading
from bevfn.experiments import bevdepth, bevfusion, bevfusion_lidar
from bevfn.models import bevdepth as camera_model
from bevfn.models import bevfusion as lidar_model
from bevfn.synth import key_frame
from bevfn.training import assembly, run

CASES = {"bevfusion": (bevfusion, lidar_model), "bevdepth": (bevdepth, camera_model)}


@pytest.fixture(scope="module")
def index() -> Index:
    return small_world.index()


def changed(index: Index, change, **fields) -> Index:
    """The index with all frames changed."""
    return replace(index, frames=pack([change(frame) for frame in index]), **fields)


# --- what is there ---


def test_a_world_and_a_frame_know_their_parts_and_sizes(index, tmp_path):
    assert index.channels == Cameras().channels and index.judge == "nuscenes"
    assert {camera.size for frame in index for camera in frame.cameras.values()} == {(90, 160)}
    assert index.has("lidar") and index.has("ego poses") and index.has("velocity")
    key_frame.write_frame(tmp_path, image_size=(90, 160))
    for root in (tmp_path, tmp_path / "frame.json"):  # a folder, or the info file itself
        opened = source.open(root, "v1.0-trainval")
        assert opened.training is opened.evaluation and opened.training.judge == "recall"
        assert opened.training[0].cameras["CAM_FRONT"].size == (90, 160)
    opened = source.open(index.root, "v1.0-trainval")
    assert (opened.training.split, opened.evaluation.split) == ("train", "val")
    assert source.open(index.root, "v1.0-trainval", "val", "val").training.split == "val"


def test_an_image_of_unknown_size_has_its_files_unless_the_calibration_is_of_another(index):
    def forget(frame, focus=None):
        cameras = {
            name: replace(c, size=None, intrinsics=c.intrinsics if focus is None else focus * c.intrinsics)
            for name, c in frame.cameras.items()
        }
        return replace(frame, cameras=cameras)

    reading = Reading(cameras=Cameras(image_size=(32, 88)))
    known, unknown = (scene.load(each, 1, reading) for each in (index, changed(index, forget)))
    np.testing.assert_array_equal(known.images, unknown.images)
    with pytest.raises(
        ValueError, match=r"the image is 160x90 but the calibration's optical axis is at pixel \(\d+, \d+\)"
    ):
        scene.load(changed(index, lambda frame: forget(frame, 4.0)), 1, reading)


def test_cameras_of_different_sizes_are_read_together(index, tmp_path):
    from PIL import Image

    def halved(frame):
        camera = frame.cameras["CAM_BACK"]
        path = tmp_path / Path(camera.path).name
        Image.open(index.root / camera.path).resize((80, 45)).save(path)
        intrinsics = np.diag([0.5, 0.5, 1.0]) @ camera.intrinsics
        smaller = replace(camera, path=str(path), size=(45, 80), intrinsics=intrinsics)
        return replace(frame, cameras={**frame.cameras, "CAM_BACK": smaller})

    reading = Reading(cameras=Cameras(image_size=(32, 88)))
    whole, mixed = (scene.load(each, 1, reading) for each in (index, changed(index, halved)))
    for name in ("image_aug", "intrinsics"):  # what it sees where in the model's image is the same
        assert not np.array_equal(getattr(whole, name), getattr(mixed, name))
    seen = [sample.image_aug[..., :2, :2] @ sample.intrinsics[..., :2, :2] for sample in (whole, mixed)]
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-5)
    assert np.abs(whole.images[0, 3].astype(int) - mixed.images[0, 3]).mean() < 8
    np.testing.assert_array_equal(whole.images[0, :3], mixed.images[0, :3])


# --- bad input ---


def test_a_source_without_a_needed_part_is_named_with_what_needs_it(index):
    blind = changed(index, lambda frame: replace(frame, lidar_path=""))
    five = changed(index, lambda f: replace(f, cameras={n: c for n, c in f.cameras.items() if n != "CAM_BACK"}))
    none = changed(index, lambda frame: replace(frame, cameras={}))
    still = changed(index, lambda frame: replace(frame, boxes=np.where(np.arange(9) < 7, frame.boxes, np.nan)))
    lost = np.full((4, 4), np.nan)
    adrift = changed(
        index,
        lambda f: replace(f, cameras={name: replace(c, global_from_ego=lost) for name, c in f.cameras.items()}),
    )
    bare = changed(index, lambda frame: replace(frame, names=("",) * len(frame.names)))
    other = replace(index, class_names=("car", "bus"))
    cases = [
        (
            blind,
            bevfusion_lidar.TRAIN,
            r"world \(v1.0-trainval, split 'val'\) has no LiDAR scans, but the model reads LiDAR",
        ),
        (blind, bevdepth.TRAIN, r"has no LiDAR scans, but the model reads depth maps, which are made of LiDAR points"),
        (five, bevdepth.TRAIN, r"has no camera CAM_BACK, which the model reads; it has CAM_FRONT, "),
        (none, bevfusion.TRAIN, r"has no camera CAM_FRONT, .*; it has none: choose a LiDAR model"),
        (adrift, bevdepth.TRAIN, r"has no ego poses, but the model's base frame is the ego at the cameras' exposures"),
        (still, bevdepth.TRAIN, r"has no velocities of objects, but the model learns them"),
        (
            bare,
            bevfusion_lidar.TRAIN,
            r"has no annotations of the classes car, .*, so nothing can be learned there; train on",
        ),
        (other, bevdepth.TRAIN, r"does not annotate truck, .*, which the model detects; it annotates car, bus"),
    ]
    for there, reading, message in cases:
        with pytest.raises(ValueError, match=message):
            source.check(there, reading, train=True)
        source.check(index, reading, train=True)
    source.check(blind, bevdepth.EVAL, train=False)  # needs no LiDAR
    small = replace(bevfusion.EVAL, cameras=replace(bevfusion.EVAL.cameras, resize=0.4))
    with pytest.raises(ValueError, match=r"samples/CAM_FRONT/.*, CAM_FRONT: resize .* smaller than image_size 704x256"):
        source.check(index, small, train=False)
    source.check(still, bevdepth.EVAL, train=False)
    source.check(bare, bevdepth.EVAL, train=False)
    source.check(none, bevfusion_lidar.TRAIN, train=True)


def test_two_splits_of_different_classes_are_refused(index):
    with pytest.raises(ValueError, match=r"annotates car, bus, but .* differ in barrier, .*take both from"):
        source.Source(replace(index, class_names=("car", "bus")), index)


@pytest.mark.parametrize("name", CASES)
def test_a_model_and_a_reading_that_do_not_fit_name_both(name):
    recipe, model = CASES[name]
    needs = model.needs(model.lidar_camera() if name == "bevfusion" else model.two_key())
    needs.check(recipe.TRAIN, train=True)
    needs.check(recipe.EVAL, train=False)
    good = recipe.TRAIN
    cases = [
        (
            replace(good, cameras=replace(good.cameras, image_size=(128, 352))),
            "images of 128 x 352 pixels, not 256 x 704",
        ),
        (replace(good, class_names=("car",)), "1 classes, not 10"),
        (replace(good, capacities=Capacities(points=9, boxes=0)), r"room for no boxes \(capacities.boxes is 0\)"),
    ]
    if name == "bevdepth":
        cases += [
            (replace(good, cameras=replace(good.cameras, frames=1)), "1 key frames, not 2"),
            (replace(good, depth=False), "no depth maps"),
            (replace(good, base=Base.LIDAR), "base frame .lidar., not .ego at the cameras. exposures."),
        ]
    else:
        cases += [
            (replace(good, points=None), "no points"),
            (replace(good, cameras=None), "no images"),
            (replace(good, capacities=Capacities(points=0)), r"room for no points \(capacities.points is 0\)"),
        ]
    for reading, message in cases:
        with pytest.raises(
            ValueError, match=f"the training reading does not fit BEV(Fusion|Depth): it gives {message}; change"
        ):
            needs.check(reading, train=True)


def test_a_model_refuses_a_batch_in_another_base_frame():
    import small_cameras

    made = small_cameras.make()
    with pytest.raises(ValueError, match=r"BEVFusion takes batches in the base frame 'lidar', not .*ego at"):
        batch.check_base(made, Base.LIDAR, "BEVFusion")
    with pytest.raises(ValueError, match=r"BEVDepth takes batches in the base frame .*ego at.*, not 'lidar'"):
        camera_model.apply({}, {}, replace(made, base=Base.LIDAR), config=camera_model.two_key(), train=False)


def test_a_run_is_checked_before_its_first_step(index, monkeypatch, tmp_path):
    blind = changed(index, lambda frame: replace(frame, lidar_path=""))
    config = replace(
        bevfusion_lidar.DEFAULTS["bevfusion-lidar"]["nuscenes"],
        data_root=index.root,
        scale="mini",
        paste=False,
        run_dir=tmp_path / "run",
    )
    monkeypatch.setattr(source, "open", lambda *_: source.Source(blind, blind))
    monkeypatch.setattr(assembly, "build", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(ValueError, match="has no LiDAR scans, but the model reads LiDAR points"):
        run.main(bevfusion_lidar.task, config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"depth": True}, "a reading without cameras has no depth maps"),
        (
            {"base": Base.EGO_AT_CAMERAS},
            "a reading without cameras has no base frame of the ego at the cameras. exposures",
        ),
        (
            {"base": Base.EGO_AT_CAMERAS, "cameras": Cameras(), "points": Points()},
            "points are read in the LiDAR's frame",
        ),
        ({"paste": bevfusion_lidar.TRAIN.paste}, "GT paste adds points and boxes"),
    ],
)
def test_parts_of_a_reading_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Reading(**fields)


def test_a_batch_cannot_mix_base_frames(index):
    reading = bevdepth.fitted(bevdepth.Config(), camera_model.mini(camera_model.two_key()), bevdepth.EVAL)
    ego = scene.load(index, 1, reading)
    lidar = scene.load(index, 1, replace(reading, base=Base.LIDAR))
    with pytest.raises(ValueError, match="collate got samples in the bases"):
        batch.collate([ego, lidar], capacities=reading.capacities)


def test_earlier_frames_stand_in_the_lidars_base_as_in_the_egos(index):
    """From one frame's camera to the other's: the motion of a camera does not depend on the base."""
    cameras = Cameras(frames=2, image_size=(32, 88))
    ego, lidar = (
        scene.load(index, 2, Reading(base=base, cameras=cameras)) for base in (Base.EGO_AT_CAMERAS, Base.LIDAR)
    )
    moved = []
    for sample in (ego, lidar):
        key, before = sample.base_from_camera.astype(np.float64)
        moved.append(np.linalg.inv(key) @ before)
        there = sample.image_from_base @ sample.base_from_camera
        np.testing.assert_allclose(there, sample.intrinsics, atol=2e-3)
    assert np.abs(moved[0] - np.eye(4)).max() > 0.5
    np.testing.assert_allclose(moved[0], moved[1], atol=2e-4)
