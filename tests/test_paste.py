"""The GT-paste database: what it holds, that a stopped build goes on, and what sampling from it puts into a frame."""

import dataclasses
import fcntl
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_frames import indexed, labelled
from test_checkpoint import killed_at

from bevfn import boxes as shapes
from bevfn.data import paste, points, sweeps
from bevfn.data.index import Index, Sweep

NAMES = ("car", "truck", "pedestrian")
QUOTAS = paste.Config({"truck": 3, "car": 4, "pedestrian": 2})


def world(root: Path, frames: int = 10, seed: int = 0) -> Index:
    """Frames of boxes that do not touch, each with points inside, on a noisy ground; one sweep each."""
    rng = np.random.default_rng(seed)
    made = []
    for f in range(frames):
        names = tuple(rng.choice([*NAMES, ""], 8).tolist())
        cells = rng.permutation(36)[:8]
        boxes = np.zeros((8, 9))
        boxes[:, 0], boxes[:, 1] = 12.0 * (cells % 6) - 30, 12.0 * (cells // 6) - 30
        boxes[:, 3:6] = rng.uniform([1, 1, 1], [6, 3, 2], (8, 3))
        boxes[:, 6], boxes[:, 7:9] = rng.uniform(-4, 4, 8), rng.normal(0, 5, (8, 2))
        boxes[0, 7] = np.nan
        inside = []
        for box, count in zip(boxes, rng.integers(0, 40, 8)):
            along, across, up = (rng.uniform(-0.49, 0.49, (count, 3)) * box[3:6]).T
            cos, sin = np.cos(box[6]), np.sin(box[6])
            inside.append(np.stack([cos * along - sin * across, sin * along + cos * across, up], axis=1) + box[:3])
        ground = rng.uniform([-40, -40, -3], [40, 40, -2], (200, 3))
        cloud = np.concatenate([*inside, ground])
        cloud = np.column_stack([cloud, rng.integers(0, 255, len(cloud)), np.full(len(cloud), 31.0)])
        for file in ("key", "sweep"):
            cloud.astype("<f4").tofile(root / f"{f}-{file}.bin")
        valid = tuple((rng.random(8) < 0.9).tolist())
        frame = labelled(names, valid)
        sweep = Sweep(f"{f}-sweep.bin", np.eye(4), 0.05)
        made.append(dataclasses.replace(frame, token=f"f{f}", lidar_path=f"{f}-key.bin", sweeps=(sweep,), boxes=boxes))
    return Index(root, "v1.0-mini", "mini_train", tuple(made))


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    return world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def database(index, tmp_path_factory) -> paste.Database:
    return paste.build(index, tmp_path_factory.mktemp("database"), class_names=NAMES, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


# --- building ---


def test_it_holds_every_valid_object_with_the_points_of_all_sweeps(index, database):
    row = 0
    for frame in index:
        for g in range(8):
            if not frame.valid[g] or not frame.names[g]:
                continue
            box = database.boxes[row]
            bottom = frame.boxes[g, 2] - frame.boxes[g, 5] / 2
            np.testing.assert_allclose(box[:3], [*frame.boxes[g, :2], bottom], rtol=1e-5, atol=1e-6)
            assert database.class_names[database.labels[row]] == frame.names[g]
            assert database.tokens[row] == frame.token.encode() and database.difficulty[row] == 0
            cloud = database.points(row)
            assert len(points.in_box(cloud[:, :3].T.copy(), box)) == len(cloud)
            key = cloud[:, 4] == 0
            assert 2 * key.sum() == len(cloud) and (cloud[~key, 4] == np.float32(0.05)).all()
            row += 1
    assert row == len(database) > 40
    assert np.isfinite(database.boxes).all()


def test_it_remembers_how_it_was_made_and_another_run_is_refused(index, database, tmp_path):
    assert database.making == paste.Making(published_sweeps=True, published_paste=True)
    paste.build(index, tmp_path, class_names=NAMES, making=paste.Making(False, True), progress=False)
    assert paste.read(tmp_path, making=paste.Making(False, True)).making.published_sweeps is False
    wanted = r"was made with --no-published-sweeps, but the run has --published-sweeps; make it again with `bevfn data prepare"
    with pytest.raises(ValueError, match=wanted):
        paste.read(tmp_path, making=paste.Making(True, True))
    with pytest.raises(ValueError, match=r"with --published-paste, but the run has --no-published-paste"):
        paste.read(tmp_path, making=paste.Making(False, False))
    again = paste.build(index, tmp_path, class_names=NAMES, progress=False)  # made again
    assert again.making == paste.Making() and len(list(tmp_path.glob("points-*.bin"))) == 1


def test_it_remembers_what_it_was_made_of_and_other_key_frames_are_refused(index, tmp_path):
    made = paste.build(index, tmp_path, class_names=NAMES, progress=False)
    assert paste.read(tmp_path, index=index).key == made.key
    scenes = [dataclasses.replace(frame, scene="a") for frame in index]
    sweeps_moved = [dataclasses.replace(f, sweeps=(Sweep(f.sweeps[0].path, 2 * np.eye(4), 0.05),)) for f in scenes]
    boxes_moved = [dataclasses.replace(f, boxes=f.boxes + 1e-6) for f in scenes]
    for frames, other in ((sweeps_moved, "calib.*"), (boxes_moved, "calib.*"), (scenes[1:], "key frames")):
        wanted = rf"objects.npz was made of other {other} \(10 key frames of v1.0-mini, split 'mini_train'\)"
        with pytest.raises(ValueError, match=wanted):
            paste.read(tmp_path, index=dataclasses.replace(index, frames=tuple(frames)))
    paste.read(tmp_path, index=dataclasses.replace(index, frames=tuple(scenes)))


def test_objects_of_no_class_are_barriers_as_published_or_left_out(index, tmp_path):
    names = (*NAMES, "barrier")
    ignored = sum(int(valid) for frame in index for name, valid in zip(frame.names, frame.valid) if not name)
    assert ignored > 5
    for published in (True, False):
        made = paste.build(
            index, tmp_path / str(published), class_names=names, making=paste.Making(True, published), progress=False
        )
        assert int((made.labels == 3).sum()) == (ignored if published else 0)


def test_sweeps_are_moved_as_it_says(tmp_path):
    index = world(tmp_path, frames=2)
    turned = np.eye(4)
    turned[:2, :2], turned[:2, 3] = [[np.cos(0.02), -np.sin(0.02)], [np.sin(0.02), np.cos(0.02)]], [0.3, -0.4]
    frames = tuple(dataclasses.replace(f, sweeps=(Sweep(f.sweeps[0].path, turned, 0.05),)) for f in index)
    index = dataclasses.replace(index, frames=frames)
    for published in (True, False):
        made = paste.build(
            index, tmp_path / str(published), class_names=NAMES, making=paste.Making(published, True), progress=False
        )
        held = np.concatenate([made.points(i) for i in range(len(made))])
        moved = np.concatenate([sweeps.aggregate(f, tmp_path, published=published)[0] for f in index])
        old = held[held[:, 4] > 0, :3]
        assert len(old) > 20
        distance = np.abs(old[:, None] - moved[None, moved[:, 4] > 0, :3]).max(axis=2).min(axis=1)
        assert distance.max() < 1e-5


def test_only_objects_with_enough_points_are_usable(database):
    counts = np.diff(database.starts)
    assert (counts < 5).any()
    for label, name in enumerate(NAMES):
        expected = np.flatnonzero((database.labels == label) & (counts >= 5))
        np.testing.assert_array_equal(database.usable[name], expected)


def test_the_bytes_do_not_depend_on_the_number_of_processes(index, tmp_path, monkeypatch):
    monkeypatch.setattr(paste, "FRAMES", 3)
    paste.build(index, tmp_path / "one", class_names=NAMES, progress=False)
    paste.build(index, tmp_path / "two", class_names=NAMES, progress=False, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_stopped_build_goes_on_and_never_shows_half_a_database(index, tmp_path, monkeypatch):
    monkeypatch.setattr(paste, "FRAMES", 2)
    paste.build(index, tmp_path / "whole", class_names=NAMES, progress=False)
    real, made, stops = paste._make_part, [], [2, 3]

    def counted(part, *arguments):
        if stops and len(made) == stops[0]:
            raise KeyboardInterrupt
        made.append(part.name)
        return real(part, *arguments)

    monkeypatch.setattr(paste, "_make_part", counted)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            paste.build(index, tmp_path / "stopped", class_names=NAMES, progress=False)
        with pytest.raises(ValueError, match=r"objects.npz does not exist; build .* `bevfn data prepare`"):
            paste.read(tmp_path / "stopped")
        stops.pop(0)
    paste.build(index, tmp_path / "stopped", class_names=NAMES, progress=False)
    assert len(made) == len(set(made)) == 5  # no part was made twice
    assert contents(tmp_path / "whole") == contents(tmp_path / "stopped")
    paste.build(index, tmp_path / "stopped", class_names=NAMES, progress=False)
    assert len(made) == 5  # nothing to do
    assert not (tmp_path / "stopped/parts").exists()


def test_another_data_set_replaces_the_database(index, tmp_path):
    paste.build(index, tmp_path, class_names=NAMES, progress=False)
    fewer = dataclasses.replace(index, frames=index.frames[:4])
    made = paste.build(fewer, tmp_path, class_names=NAMES, progress=False)
    assert set(made.tokens.tolist()) <= {b"f0", b"f1", b"f2", b"f3"}
    assert len(list(tmp_path.glob("points-*.bin"))) == 1


@pytest.mark.parametrize("event", [3, 9, 14])
def test_kill_at_any_moment_loses_nothing(index, tmp_path, monkeypatch, event):
    """A real process, killed at one of its changes of the disk; whatever it left, the next build ends in the same bytes."""
    monkeypatch.setattr(paste, "FRAMES", 1)
    build = functools.partial(paste.build, class_names=NAMES, progress=False)
    assert killed_at(event, lambda: build(index, tmp_path / "out"))
    assert not (tmp_path / "out" / paste.OBJECTS).exists()
    made, clean = build(index, tmp_path / "out"), build(index, tmp_path / "clean")
    assert len(made) == len(clean) and made.points_path.read_bytes() == clean.points_path.read_bytes()


def test_a_damaged_point_file_is_named_and_finished_parts_stay(index, tmp_path, monkeypatch):
    monkeypatch.setattr(paste, "FRAMES", 2)
    index = world(tmp_path)
    (tmp_path / "5-sweep.bin").write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"5-sweep.bin: 5 bytes are not a whole number of points"):
        paste.build(index, tmp_path / "out", class_names=NAMES, progress=False)
    assert len(list((tmp_path / "out/parts").glob("*/*.npz"))) == 2


@pytest.mark.parametrize("column, value", [(0, np.nan), (2, 1e30), (3, -5.0), (3, 300.0), (4, -1.0)])
def test_stored_points_that_cannot_be_are_refused(index, tmp_path, column, value):
    database = paste.build(index, tmp_path, class_names=NAMES, progress=False)
    points = np.fromfile(database.points_path, "<f4").reshape(-1, 5)
    i = int(np.argmax(np.diff(database.starts)))
    points[database.starts[i], column] = value
    points.tofile(database.points_path)
    with pytest.raises(ValueError, match=rf"points-.*.bin is damaged: object {i} has impossible points; build"):
        database.points(i)
    assert "its CRC is not" in paste.damaged(database)
    assert f"object {i} has impossible points" in paste.damaged(dataclasses.replace(database, crc=None))  # of before


def test_damaged_databases_are_named_and_built_again(index, tmp_path):
    made = paste.build(index, tmp_path, class_names=NAMES, progress=False)
    whole = made.points_path.read_bytes()
    made.points_path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"points-.*.bin is missing or truncated"):
        paste.read(tmp_path)
    paste.build(index, tmp_path, class_names=NAMES, progress=False)
    assert made.points_path.read_bytes() == whole
    (tmp_path / paste.OBJECTS).write_bytes((tmp_path / paste.OBJECTS).read_bytes()[:300])
    with pytest.raises(ValueError, match=r"objects.npz is not a GT-paste database .* build it again"):
        paste.read(tmp_path)
    paste.build(index, tmp_path, class_names=NAMES, progress=False)
    assert len(paste.read(tmp_path)) == len(made)


def test_a_database_that_cannot_be_written_is_one_sentence(index, small_disk):
    with pytest.raises(OSError, match=r"^/proc/db could not be written \(.*\); make room there or choose another"):
        paste.build(index, Path("/proc/db"), class_names=NAMES, progress=False)
    (small_disk / "filler").write_bytes(bytes(6 * 2**20 - 2**12))
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\)") as error:
        paste.build(index, small_disk / "db", class_names=NAMES, progress=False)
    assert str(small_disk) in str(error.value) and "[Errno" not in str(error.value)
    (small_disk / "filler").unlink()
    assert len(paste.build(index, small_disk / "db", class_names=NAMES, progress=False)) > 0


def test_two_builds_in_one_folder_and_an_empty_index_are_refused(index, tmp_path):
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another build is writing here"):
            paste.build(index, tmp_path, class_names=NAMES, progress=False)
    with pytest.raises(ValueError, match="has no frames to build a database of"):
        paste.build(indexed([]), tmp_path, class_names=NAMES, progress=False)


# --- sampling ---


def draw(database, seed: int, boxes: int = 8) -> tuple[np.ndarray, np.ndarray, tuple]:
    """A frame's boxes and labels (some of no class), and what is pasted into it."""
    rng = np.random.default_rng(seed)
    scene = np.zeros((boxes, 9), dtype=np.float32)
    scene[:, :2] = rng.uniform(-40, 40, (boxes, 2))
    scene[:, 3:6], scene[:, 6] = rng.uniform(1, 8, (boxes, 3)), rng.uniform(-3, 3, boxes)
    labels = rng.integers(-1, 3, boxes)
    return scene, labels, paste.sample(database, scene, labels, NAMES, QUOTAS, rng)


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(0, 12))
def test_quotas_are_filled_but_for_collisions_and_nothing_overlaps(database, seed, count):
    scene, labels, (boxes, new_labels, cloud) = draw(database, seed, count)
    for name, quota in QUOTAS.quotas.items():
        there, new = (int((found == NAMES.index(name)).sum()) for found in (labels, new_labels))
        assert new <= max(0, quota - there)
    together = torch.from_numpy(np.concatenate([scene, boxes]).astype(np.float64))
    overlap = shapes.rotated_overlap_bev(together[len(scene) :], together).numpy()
    overlap[np.arange(len(boxes)), len(scene) + np.arange(len(boxes))] = 0
    assert overlap.max(initial=0) < 1e-6
    held = [points.in_box(np.ascontiguousarray(cloud[:, :3].T), box) for box in boxes]
    assert sorted(np.concatenate([np.zeros(0, int), *held]).tolist()) == list(range(len(cloud)))  # each in one box
    assert all(len(found) >= 5 for found in held)
    again = draw(database, seed, count)[2]
    assert all((a == b).all() for a, b in zip((boxes, new_labels, cloud), again))


@pytest.mark.parametrize("sweeps_read", [0, 1, 10])
def test_objects_come_with_as_many_sweeps_as_the_frame_and_enough_points_of_them(database, sweeps_read):
    scene, rng = np.zeros((0, 9), np.float32), np.random.default_rng(0)
    boxes, _, cloud = paste.sample(database, scene, np.zeros(0, int), NAMES, QUOTAS, rng, sweeps_read)
    assert len(boxes) and (cloud[:, 4] > 0).any() == (sweeps_read > 0)
    held = [len(points.in_box(np.ascontiguousarray(cloud[:, :3].T), box)) for box in boxes]
    assert min(held) >= 5  # of those scans, not of what is left out
    i = database.usable["car"][0]
    assert (database.points(i, sweeps_read)[:, 4] <= 0.05 * sweeps_read).all()
    assert len(database.points(i, sweeps_read)) == database.scans[i, sweeps_read]


def test_copies_of_a_key_frame_without_sweeps_count_as_its_sweeps(tmp_path):
    index = world(tmp_path, frames=1)
    index = dataclasses.replace(index, frames=(dataclasses.replace(index[0], sweeps=()),))
    made = paste.build(index, tmp_path / "out", class_names=NAMES, progress=False)
    far = np.abs(made.boxes[:, :2]).max(axis=1) > 8  # a box at the vehicle loses its close points in copies
    np.testing.assert_array_equal(made.scans[far], made.scans[far, :1] * np.arange(1, 12))


def test_an_empty_frame_gets_its_quotas(database):
    rng = np.random.default_rng(0)
    total = [
        len(paste.sample(database, np.zeros((0, 9), np.float32), np.zeros(0, int), NAMES, QUOTAS, rng)[0])
        for _ in range(50)
    ]
    assert max(total) == 9 and min(total) >= 5


def test_of_two_colliding_objects_of_a_class_the_later_one_stays():
    box = np.array([0, 0, 0, 2, 2, 2, 0, 0, 0], dtype=np.float32)

    def at(*xs: float) -> np.ndarray:
        return np.stack([box + np.eye(9, dtype=np.float32)[0] * x for x in xs])

    nothing = np.zeros((0, 9), np.float32)
    np.testing.assert_array_equal(paste._free(nothing, at(0, 1, 9), [3]), [False, True, True])
    np.testing.assert_array_equal(paste._free(nothing, at(0, 1, 9), [1, 2]), [True, False, True])  # two classes
    np.testing.assert_array_equal(paste._free(at(9.5), at(0, 1, 9), [1, 2]), [True, False, False])
    np.testing.assert_array_equal(paste._free(nothing, at(0, 2.01), [2]), [True, True])


def test_scene_points_in_pasted_boxes_make_room_and_pasted_points_come_first(database):
    rng = np.random.default_rng(1)
    boxes, _, pasted = paste.sample(database, np.zeros((0, 9), np.float32), np.zeros(0, int), NAMES, QUOTAS, rng)
    scene = rng.uniform([-40, -40, -2, 0, 0], [40, 40, 2, 255, 0.5], (20000, 5)).astype(np.float32)
    merged = paste.insert(scene, boxes, pasted)
    np.testing.assert_array_equal(merged[: len(pasted)], pasted)
    rest = merged[len(pasted) :]
    assert len(rest) < len(scene) and set(map(bytes, rest)) <= set(map(bytes, scene))
    assert not any(len(points.in_box(rest[:, :3].T.copy(), box)) for box in boxes)


def test_a_quota_of_an_unknown_class_is_named(database):
    config = paste.Config({"tram": 2})
    with pytest.raises(ValueError, match=r"a quota for 'tram', which is none of car, truck"):
        paste.sample(database, np.zeros((0, 9)), np.zeros(0, int), NAMES, config, np.random.default_rng(0))
