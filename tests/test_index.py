"""Frames as columns: what goes in comes out, lazily, through pickle too."""

import pickle
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bevfn.data.index import CAMERAS, Camera, Frame, Index, Sweep, inverse, pack


def rigid(random: np.random.Generator) -> np.ndarray:
    turn, _ = np.linalg.qr(random.normal(size=(3, 3)))
    result = np.eye(4)
    result[:3, :3], result[:3, 3] = turn, 1e3 * random.normal(size=3)
    return result


def frame(random: np.random.Generator, token: str, sweeps: int, cameras: int, boxes: int) -> Frame:
    values = random.normal(size=(boxes, 9))
    values[::2, 7:] = np.nan
    return Frame(
        token=token, scene=str(random.choice(["scene-0001", "Straße"])), previous="", timestamp=1.5e9 + random.random(),
        lidar_path=f"samples/LIDAR_TOP/{token}.pcd.bin", ego_from_lidar=rigid(random), global_from_ego=rigid(random),
        sweeps=tuple(Sweep(f"sweeps/{i}.bin", rigid(random), 0.05 * i) for i in range(1, sweeps + 1)),
        cameras={
            name: Camera(f"{name}.jpg", random.normal(size=(3, 3)), rigid(random), rigid(random), rigid(random), 1.0)
            for name in CAMERAS[:cameras]
        },
        boxes=values, names=tuple(random.choice(["car", "", "bus"], boxes).tolist()),
        valid=random.random(boxes) > 0.5, num_lidar_points=random.integers(-1, 100, boxes),
        attributes=("",) * boxes, visibility=("v0-40",) * boxes, annotations=tuple(f"{token}{i}" for i in range(boxes)),
    )  # fmt: skip


def assert_same(a, b, where: str = "") -> None:
    """Exactly, NaN equal to NaN, through dataclasses, dicts and tuples."""
    assert type(a) is type(b), where
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype, where
        np.testing.assert_array_equal(a, b, err_msg=where)
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, Frame | Camera | Sweep):
        for f in fields(a):
            assert_same(getattr(a, f.name), getattr(b, f.name), f"{where}.{f.name}")
    else:
        assert a == b, where


@pytest.mark.parametrize(
    ("token", "what"), [("a" * 5000, "more than 4,096 bytes"), ("é" * 2100, "more"), ("a\0", "a NUL"), ("\ud800", "half of a letter")],
    ids=["long", "long in bytes", "NUL", "surrogate"],
)  # fmt: skip
def test_a_token_that_would_not_come_back_is_refused(token, what):
    with pytest.raises(ValueError, match=rf"^token '.{{,130}}' has {what}"):
        pack([frame(np.random.default_rng(0), token, 0, 0, 0)])


counts = st.lists(st.tuples(st.integers(0, 10), st.integers(0, 6), st.integers(0, 5)), max_size=5)


@settings(max_examples=30)
@given(counts, st.integers(0, 2**31))
def test_columns_give_back_the_frames(sizes, seed):
    random = np.random.default_rng(seed)
    frames = [frame(random, f"token{i}", *size) for i, size in enumerate(sizes)]
    packed = pickle.loads(pickle.dumps(pack(frames)))
    assert len(packed) == len(frames)
    for i, wanted in enumerate(frames):
        assert_same(packed[i], wanted, f"frame {i}")


def test_index_counts_finds_and_ends():
    random = np.random.default_rng(0)
    frames = [frame(random, f"token{i}", 1, 2, 3) for i in range(4)]
    for kept in (tuple(frames), pack(frames)):
        index = Index(Path("root"), "v1.0-mini", "mini_train", kept)
        assert len(index) == 4 and [f.token for f in index] == [f.token for f in frames]
        assert index[-1].token == "token3" and index.position("token2") == 2
        with pytest.raises(IndexError):
            index[4]
        with pytest.raises(ValueError, match=r"no key frame lost in root \(v1.0-mini, split 'mini_train'\)"):
            index.position("lost")


def test_a_frame_is_a_copy():
    packed = pack([frame(np.random.default_rng(0), "a", 0, 1, 2)])
    packed[0].boxes[:] = 0
    packed[0].cameras["CAM_FRONT"].intrinsics[:] = 0
    assert packed[0].boxes[:, :7].all() and packed[0].cameras["CAM_FRONT"].intrinsics.all()


def test_a_frame_of_usual_size_takes_ten_kilobytes():
    """28,130 training frames of nuScenes: 10 sweeps, 6 cameras, 34 boxes, file names of 90 letters."""
    random = np.random.default_rng(0)
    frames = [frame(random, f"{i:032d}", 10, 6, 34) for i in range(50)]
    long = [Frame(**{**vars(f), "lidar_path": "x" * 90, "annotations": ("t" * 32,) * 34}) for f in frames]
    assert pack(long).nbytes / 50 < 10_000


def test_inverse_undoes_a_rigid_motion():
    transform = rigid(np.random.default_rng(3))
    np.testing.assert_allclose(inverse(transform) @ transform, np.eye(4), atol=1e-12)
