"""Several data sets as one: frames, classes and cameras of all in one form, drawn by weights, and what cannot be is refused."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_t4_world
import small_world

from bevfn.data import mixed, points, sampling, scene, source, sweeps
from bevfn.data.index import Share
from bevfn.data.reading import Cameras, Points, Reading
from bevfn.experiments import custom
from bevfn.training import run, tasks

CLASSES = '["car", "truck", "bicycle", "pedestrian"]'
T4 = '{ bus = "truck" }'
NUSCENES = '{ bus = "truck", trailer = "", construction_vehicle = "truck", motorcycle = "bicycle", traffic_cone = "", barrier = "" }'


def write(
    folder: Path, first: str = "weight = 3", second: str = "weight = 1", nuscenes: str = NUSCENES, more: str = ""
) -> Path:
    """A mixture of the small T4 world and the small nuScenes world."""
    path = folder / "both.toml"
    path.write_text(
        f"""classes = {CLASSES}
{more}
[[data]]
root = "{small_t4_world.root()}"
classes = {T4}
{first}
[[data]]
root = "{small_world.index().root}"
classes = {nuscenes}
{second}
"""
    )
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> source.Source:
    return source.open(write(tmp_path_factory.mktemp("mixed")))


# --- one form ---


def test_key_frames_are_those_of_all_with_names_of_their_own(both):
    parts = (small_t4_world.index("train"), small_world.training())
    assert [share.frames for share in both.training.shares] == [4, 3] and len(both.training) == 7
    assert both.training.class_names == ("car", "truck", "bicycle", "pedestrian") and both.training.judge == "t4"
    assert len(both.evaluation) == 7 and both.training.split == "train"
    for frame, before in zip(both.training, [frame for part in parts for frame in part], strict=True):
        assert frame.token.endswith(before.token) and frame.token != before.token
        assert (both.training.root / frame.lidar_path).is_file()
        assert all((both.training.root / camera.path).is_file() for camera in frame.cameras.values())
        assert len(frame.names) == len(before.names) and set(frame.names) <= {*both.training.class_names, ""}
        for name, old in zip(frame.names, before.names):
            assert name == {"bus": "truck", "motorcycle": "bicycle", "construction_vehicle": "truck"}.get(
                old, old if old in both.training.class_names else ""
            )


def test_of_each_all_lies_in_the_vehicles_frame_as_it_did_in_the_lidars(both):
    """Points stay in their boxes and pixels, sweeps over the key frame's points, and T4's frame is the vehicle's already."""
    t4_before, before = small_t4_world.index("train"), small_world.training()
    np.testing.assert_array_equal(both.training[1].boxes, t4_before[1].boxes)
    for k in range(3):
        frame, old = both.training[4 + k], before[k]
        np.testing.assert_allclose(frame.ego_from_lidar, np.eye(4))
        np.testing.assert_allclose(frame.global_from_lidar @ frame.lidar_from_scan, old.global_from_lidar, atol=1e-9)
        (mine, _), (theirs, _) = points.scan(frame, both.training.root), points.scan(old, before.root)
        np.testing.assert_allclose(
            mine[:, :3], theirs[:, :3] @ old.ego_from_lidar[:3, :3].T + old.ego_from_lidar[:3, 3], atol=1e-4
        )
        for channel, camera in frame.cameras.items():
            seen = mine[:, :3] @ camera.camera_from_lidar[:3, :3].T + camera.camera_from_lidar[:3, 3]
            other = old.cameras[channel].camera_from_lidar
            np.testing.assert_allclose(seen, theirs[:, :3] @ other[:3, :3].T + other[:3, 3], atol=1e-3)
        bottom, was = frame.boxes.copy(), old.boxes.copy()
        bottom[:, 2] -= bottom[:, 5] / 2
        was[:, 2] -= was[:, 5] / 2
        counts = [
            [len(points.in_box(np.ascontiguousarray(cloud[:, :3].T), box)) for box in boxes]
            for cloud, boxes in ((mine, bottom), (theirs, was))
        ]
        assert sum(counts[1]) > 100 and np.abs(np.subtract(*counts)).sum() < 0.05 * sum(
            counts[1]
        )  # LiDARs stand a bit askew
        speeds = [np.hypot(*boxes[:, 7:9].T) for boxes in (frame.boxes, old.boxes)]
        np.testing.assert_allclose(*speeds, atol=1e-2)
        (mine, _), (theirs, _) = (sweeps.aggregate(f, i.root) for f, i in ((frame, both.training), (old, before)))
        moved = theirs[:, :3] @ old.ego_from_lidar[:3, :3].T + old.ego_from_lidar[:3, 3]
        kept = np.abs(mine[:, :3] - moved).max(axis=1) < 1e-3 if len(mine) == len(moved) else np.zeros(1)
        assert kept.mean() == 1


def test_a_batch_may_hold_samples_of_each(both):
    reading = Reading(
        points=Points(sweeps=1), cameras=Cameras(channels=("CAM_FRONT", "CAM_BACK"), image_size=(64, 96)),
        class_names=both.training.class_names, range=(-50.0, -50.0, -3.0, 50.0, 50.0, 5.0),
    )  # fmt: skip
    source.check(both.training, reading, train=True)
    samples = [scene.load(both.training, place, reading) for place in (0, 6)]
    ground = [np.median(s.points[np.abs(s.points[:, 2]) < 0.6, 2]) for s in samples]
    assert max(map(abs, ground)) < 0.15, "the road is at the vehicle's height in both"


# --- the draw ---


SHARES = (Share("a", 40, 3.0), Share("b", 10, 1.0), Share("c", 5, 1.0))


def test_an_epoch_has_its_shares_whole_passes_and_a_rest_that_changes():
    items = np.arange(55)
    epochs = [sampling.mixed(items, SHARES, 0, epoch) for epoch in range(40)]
    assert sampling.counts(55, SHARES) == [33, 11, 11]
    for drawn in epochs:
        counts = np.bincount(drawn, minlength=55)
        assert len(drawn) == 55 and counts[:40].sum() == 33 and counts[40:50].sum() == 11 and counts[50:].sum() == 11
        assert set(counts[:40]) == {0, 1} and set(counts[40:50]) == {1, 2} and set(counts[50:]) == {2, 3}
    assert len({drawn.tobytes() for drawn in epochs}) == 40 and np.bincount(np.concatenate(epochs))[:40].min() > 20
    np.testing.assert_array_equal(epochs[3], sampling.mixed(items, SHARES, 0, 3))
    assert not np.array_equal(epochs[3], sampling.mixed(items, SHARES, 1, 3))
    np.testing.assert_array_equal(sampling.mixed(items, (), 0, 3), items)
    plain = tuple(replace(share, weight=float(share.frames)) for share in SHARES)
    np.testing.assert_array_equal(np.sort(sampling.mixed(items, plain, 0, 3)), items)


def test_class_balanced_items_are_drawn_by_the_same_shares():
    items = np.array([0, 0, 0, 39, 40, 41, 41, 54])
    drawn = sampling.mixed(items, SHARES, 0, 0)
    assert len(drawn) == 8 and set(drawn) <= set(items) and (drawn < 40).sum() == 5
    with pytest.raises(ValueError, match="data set b has no key frame to draw"):
        sampling.mixed(items[(items < 40) | (items > 49)], SHARES, 0, 0)


def task_of(path: Path, **changes) -> tasks.Run:
    """A run of the recipe on a mixture; nothing is computed."""
    config = custom.Config(
        data_root=path, scale="mini", sweeps=0, batch_size=2, workers=0, epochs=3, bounds_m=(-48.0, -48.0, -3.0, 48.0, 48.0, 5.0),
        voxel_m=(0.25, 0.25, 0.2), scan_points=9_000, **changes,
    ).completed()  # fmt: skip
    task = custom.task(config)
    made = tasks.Run(task, config, tasks.plan(config, task.data.items), None)
    return replace(made, facts=run.facts(made))


def test_a_resumed_run_reads_what_the_whole_one_did_on_any_number_of_processes(tmp_path):
    made = task_of(write(tmp_path))
    steps = [[token for item in loaded for token in item.tokens] for _, loaded in run.microbatches(made, 0)]
    assert len(steps) == made.plan.total_steps == 12
    again = [[token for item in loaded for token in item.tokens] for _, loaded in run.microbatches(made, 5)]
    assert again == steps[5:]
    first = [token for step in steps[:4] for token in step][:7]
    of_t4 = sum(both.startswith(made.task.data.training.shares[0].root) for both in first)
    assert of_t4 == sampling.counts(7, made.task.data.training.shares)[0] == 5


def test_the_weights_are_among_what_a_resumed_run_must_have(tmp_path):
    three, two = (task_of(write(tmp_path, first=f"weight = {weight}")) for weight in (3, 2))
    assert three.facts["weights"] != two.facts["weights"] and three.facts["data"] == two.facts["data"]
    assert [text.rpartition(" ")[2] for text in three.facts["weights"]] == ["3", "1"]
    assert "(5 of " in run.shares(three.task.data) and "2 of " in run.shares(three.task.data)
    assert three.config.classes == ("car", "truck", "bicycle", "pedestrian")


# --- what is refused ---

WRONG = {
    "a weight that lacks": ({"second": ""}, r"has 2 data sets, but 1 of them a weight; give one to each, or to none"),
    "a weight of nothing": ({"first": "weight = 0"}, r"\[\[data\]\] 1: weight is 0, which must be above 0"),
    "a weight of text": ({"first": 'weight = "3"'}, r"\[\[data\]\] 1: weight is no number"),
    "a class that the map misses": (
        {"nuscenes": NUSCENES.replace('barrier = ""', 'bus = "truck"').replace('{ bus = "truck", ', "{ ")},
        r"annotates barrier, of which the file does not say what they are; map each to one of car, truck, bicycle, pedestrian, or",
    ),
    "a class that is not there": ({"nuscenes": NUSCENES.replace("barrier", 'barrier = "", tram')}, "annotates no tram, which its"),
    "a class of no mixture": (
        {"nuscenes": NUSCENES.replace('trailer = ""', 'trailer = "lorry"')}, r"classes has 'lorry', which is none of the mixture's"
    ),
    "an unknown key": ({"first": "weigth = 3"}, r"\[\[data\]\] 1 has the key 'weigth'; it may have root, weight, classes"),
    "an unknown key above": ({"more": "seed = 1"}, "has the key 'seed'; a mixture has classes and"),
    "no TOML": ({"more": "[["}, "is no TOML file"),
    "no evaluation": ({"first": "evaluate = false", "second": "evaluate = false"}, "evaluates none of its data sets"),
    "a split that is not there": ({"first": 'weight = 1\ntrain = "streets"'}, "streets"),
    "one split for both": ({"second": 'weight = 1\ntrain = "val"\nval = "val"'}, "would be evaluated on what is trained on, val"),
    "a camera twice": ({"first": 'weight = 1\ncameras = { CAM_BACK = "CAM_FRONT" }'}, "give each a name of its own in cameras"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_no_mixture_is_refused_in_a_sentence(tmp_path, name):
    changes, says = WRONG[name]
    with pytest.raises(ValueError, match=says) as error:
        source.open(write(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_roots_of_no_kind_mixtures_of_mixtures_and_splits_by_flags_are_refused(tmp_path):
    path = write(tmp_path)
    with pytest.raises(ValueError, match="says of which splits it is"):
        source.open(path, training="train")
    outer = tmp_path / "outer.toml"
    outer.write_text('classes = ["car"]\n[[data]]\nroot = "both.toml"\n')
    with pytest.raises(ValueError, match=r"names the mixture \S+both.toml; name its data sets instead"):
        source.open(outer)
    (tmp_path / "nothing").mkdir()
    outer.write_text('classes = ["car"]\n[[data]]\nroot = "nothing"\n')
    with pytest.raises(ValueError, match=r"nothing has no v1.0-\*; extract .* data of one's own frames.json"):
        source.open(outer)
    with pytest.raises(ValueError, match="does not exist; give the TOML file of a mixture"):
        source.open(tmp_path / "none.toml")
    with pytest.raises(ValueError, match="is a mixture; name one of its data sets"):
        source.training(path, None, None)


def test_cameras_that_one_data_set_lacks_are_refused(tmp_path):
    made = source.open(write(tmp_path, first='weight = 1\ncameras = { CAM_FRONT = "front" }'))
    reading = Reading(cameras=Cameras(channels=("CAM_FRONT",)), class_names=made.training.class_names)
    with pytest.raises(
        ValueError, match=rf"have different cameras, and {re.escape(made.training.shares[0].root)} has no CAM_FRONT"
    ):
        source.check(made.training, reading, train=True)


def test_a_lidar_whose_place_is_not_told_is_refused():
    frames = small_world.training()
    packed = mixed.pack([replace(frames[0], ego_from_lidar=np.full((4, 4), np.nan))])
    with pytest.raises(ValueError, match="does not tell where the LiDAR is on the vehicle"):
        mixed.to_vehicle(packed, "here")
