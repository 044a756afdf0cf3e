"""Aggregation of sweeps: motion, time lag, close points, choice and padding."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from small_frames import labelled

from bevfn.data import points, sweeps
from bevfn.data.index import Frame, Sweep

WORLD = np.array([[10.0, 3.0, -1.0], [-8.0, 20.0, 0.5], [0.5, 0.2, -1.5]])  # the last one close to the key frame


def moved(k: int) -> np.ndarray:
    """lidar_from_sweep of the sweep k steps ago: the vehicle drives 2 m and turns 0.05 rad a step."""
    angle = -0.05 * k
    result = np.eye(4)
    result[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    result[:3, 3] = [0.1 * k, -2.0 * k, 0.01 * k]
    return result


def write(path: Path, xyz: np.ndarray, *, extra: np.ndarray | None = None) -> None:
    cloud = np.column_stack([xyz, np.arange(len(xyz)) + 7.0, np.full(len(xyz), 31.0)])
    np.concatenate([cloud, np.zeros((0, 5)) if extra is None else extra]).astype("<f4").tofile(path)


@pytest.fixture
def frame(tmp_path) -> Frame:
    """A still world seen in a key frame and ten sweeps."""
    write(tmp_path / "key.bin", WORLD)
    earlier = []
    for k in range(1, 11):
        sweep_from_lidar = np.linalg.inv(moved(k))
        write(tmp_path / f"{k}.bin", WORLD @ sweep_from_lidar[:3, :3].T + sweep_from_lidar[:3, 3])
        earlier.append(Sweep(f"{k}.bin", moved(k), 0.05 * k))
    return dataclasses.replace(labelled(()), lidar_path="key.bin", sweeps=tuple(earlier))


def test_a_still_world_comes_to_lie_on_itself_with_the_lags_of_the_newest(frame, tmp_path):
    cloud, bad = sweeps.aggregate(frame, tmp_path)
    assert cloud.shape == (30, 5) and cloud.dtype == np.float32 and bad == 0
    np.testing.assert_allclose(cloud[:, :3].reshape(10, 3, 3), np.broadcast_to(WORLD, (10, 3, 3)), atol=1e-5)
    np.testing.assert_allclose(cloud[:, 4].reshape(10, 3)[:, 0], 0.05 * np.arange(10), rtol=1e-6)
    np.testing.assert_array_equal(cloud[:, 3].reshape(10, 3), [[7, 8, 9]] * 10)


def test_published_sweeps_are_moved_by_what_upstream_takes_for_the_inverse(frame, tmp_path):
    right, published = (sweeps.aggregate(frame, tmp_path, published=how)[0] for how in (False, True))
    np.testing.assert_array_equal(published[:3], right[:3])  # the key frame's own
    np.testing.assert_array_equal(published[:, 3:], right[:, 3:])
    for k in range(1, 10):
        sensor_from_lidar = np.linalg.inv(moved(k))  # mmdetection3d's lidar2sensor
        seen = points.read(tmp_path / f"{k}.bin")[0][:, :3]
        expected = seen @ sensor_from_lidar[:3, :3] - sensor_from_lidar[:3, 3]
        np.testing.assert_allclose(published[3 * k : 3 * k + 3, :3], expected, atol=1e-5)


@pytest.mark.parametrize(("yaw_rate", "off"), [(0.0, 0.0), (0.3, 0.6)])
def test_published_sweeps_lie_off_only_where_the_car_turns(yaw_rate, off):
    """The oldest sweep, 0.5 s ago, at 8 m/s."""
    angle = 0.5 * yaw_rate
    lidar_from_sweep = np.eye(4)
    lidar_from_sweep[:2, :2] = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    lidar_from_sweep[:3, 3] = [0.0, -4.0, 0.0]
    sweep = Sweep("", lidar_from_sweep, 0.5)
    (turn, shift), (same, published) = sweeps.motion(sweep, False), sweeps.motion(sweep, True)
    np.testing.assert_array_equal(turn, same)
    assert np.linalg.norm(published - shift) == pytest.approx(off, abs=0.01)


def test_close_points_go_from_sweeps_in_their_own_frame_and_stay_in_the_key_frame(frame, tmp_path):
    sensor = np.array([[0.99, -0.99, 0.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.5, 1.5, 0.0]])
    write(tmp_path / "1.bin", sensor)
    cloud, _ = sweeps.aggregate(frame, tmp_path, count=1)
    assert len(cloud) == 3 + 3
    np.testing.assert_array_equal(cloud[3:, 3], [8, 9, 10])  # the first is in the square, the limits are not


def test_random_sweeps_are_distinct_and_follow_the_generator(frame, tmp_path):
    def lags(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return sweeps.aggregate(frame, tmp_path, choice="random", generator=rng)[0][::3, 4]

    drawn = [lags(seed) for seed in range(20)]
    assert all(len(set(found.tolist())) == 10 and found[0] == 0 for found in drawn)
    assert len({tuple(sorted(found.tolist())) for found in drawn}) > 3  # one of ten is left out
    np.testing.assert_array_equal(lags(5), drawn[5])
    with pytest.raises(ValueError, match="random choice of sweeps needs a generator"):
        sweeps.aggregate(frame, tmp_path, choice="random")


def test_few_sweeps_are_all_used_and_none_is_padded_with_the_key_frame(frame, tmp_path):
    few = dataclasses.replace(frame, sweeps=frame.sweeps[:2])
    for choice in ("newest", "random"):
        assert len(sweeps.aggregate(few, tmp_path, choice=choice, generator=np.random.default_rng(0))[0]) == 9
    none = dataclasses.replace(frame, sweeps=())
    padded, _ = sweeps.aggregate(none, tmp_path, count=4)
    assert len(padded) == 3 + 4 * 2 and (padded[:, 4] == 0).all()  # copies lack the close point
    assert len(sweeps.aggregate(none, tmp_path, count=4, pad_empty=False)[0]) == 3


def test_nan_points_are_counted_and_a_damaged_sweep_is_named(frame, tmp_path):
    write(tmp_path / "2.bin", WORLD, extra=np.full((4, 5), np.nan))
    assert sweeps.aggregate(frame, tmp_path)[1] == 4
    (tmp_path / "3.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"3.bin: 3 bytes are not a whole number of points"):
        sweeps.aggregate(frame, tmp_path)
    (tmp_path / "3.bin").unlink()
    with pytest.raises(ValueError, match=r"3.bin: the point file does not exist"):
        sweeps.aggregate(frame, tmp_path)


def test_points_on_a_limit_are_outside_and_a_box_is_open():
    cloud = np.array([[0, 0, 0], [1, 0, 0], [-1, 0, 0], [0.9, 0, 2], [0.9, 0.9, 1.9]], dtype=np.float32)
    np.testing.assert_array_equal(points.in_range(cloud, (-1, -1, -2, 1, 1, 2)), [True, False, False, False, True])
    box = np.array([0, 0, 0, 2, 1, 2, np.pi / 2], dtype=np.float32)  # long in y
    inside = np.array([[0.4, 0.9, 1], [0.6, 0, 1], [0, 0, 0], [0, 0, 2], [0, -0.9, 0.1]], dtype=np.float32)
    np.testing.assert_array_equal(points.in_box(np.ascontiguousarray(inside.T), box), [0, 4])
