"""Test-time augmentation: what moves comes back, the best of duplicates stays, and mirrors of a scene are detected alike."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bevfn import tree
from bevfn.data.batch import Base, make
from bevfn.evaluation import tta
from bevfn.evaluation.results import Detections

random = np.random.default_rng(0)


def found(boxes, scores=None, labels=None) -> Detections:
    boxes = np.array(boxes, np.float32).reshape(-1, 9)
    scores = np.linspace(0.9, 0.1, len(boxes)) if scores is None else np.array(scores)
    labels = np.zeros(len(boxes), np.int64) if labels is None else np.array(labels)
    return Detections(boxes, scores.astype(np.float32), labels)


def apart(n: int = 6) -> np.ndarray:
    """Boxes [n 9] 10 m from each other, with all else random."""
    boxes = random.uniform(0.5, 3.0, (n, 9)).astype(np.float32)
    boxes[:, 0] += 10 * np.arange(n) - 25
    return boxes


def cloud(boxes: np.ndarray):
    """A batch of one sample whose points are the boxes' centres and two others of their heads, and one of padding."""
    heading = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6]), np.zeros(len(boxes))], 1)
    points = np.concatenate([boxes[:, :3], boxes[:, :3] + heading, np.zeros((1, 3))]).astype(np.float32)
    rest = np.concatenate([random.random((len(points) - 1, 2)), np.zeros((1, 2))])
    valid = torch.tensor([True] * (len(points) - 1) + [False])
    whole = torch.from_numpy(np.concatenate([points, rest], 1).astype(np.float32))
    return make(base=Base.LIDAR, base_aug=torch.eye(4)[None], points=whole[None], points_valid=valid[None])


def seen(batch) -> Detections:
    """What a detector sees that is no friend of mirrors: boxes beside their place, scores and sizes that depend on the side."""
    points = batch.points[0][batch.points_valid[0]].numpy()
    place, head = np.split(points[:, :3], 2)
    boxes = np.zeros((len(place), 9), np.float32)
    boxes[:, :3], boxes[:, 3:6] = place + np.array([0.1, 0.05, 0.0]), 2.0
    boxes[:, 6] = np.arctan2(head[:, 1] - place[:, 1], head[:, 0] - place[:, 0])
    return found(boxes, scores=1 / (1 + np.exp(0.05 * place[:, 0] + 0.02 * place[:, 1])))


def over(batch, *, finish, **_):
    return {"frame": seen(batch if finish is None else finish(batch))}, {"points": 1}


def same(a: Detections, b: Detections) -> None:
    """Equal but for yaw's turns and rounding."""
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-6)
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_allclose(np.delete(a.boxes, 6, 1), np.delete(b.boxes, 6, 1), atol=1e-4)
    assert np.abs((a.boxes[:, 6] - b.boxes[:, 6] + math.pi) % (2 * math.pi) - math.pi).max(initial=0) < 1e-4


@pytest.mark.parametrize(("kind", "count"), [("flip", 4), ("flip-scale", 12)])
def test_views_are_all_different_and_the_first_is_the_identity(kind, count):
    matrices = tta.views(kind)
    assert len({m.tobytes() for m in matrices}) == count and np.array_equal(matrices[0], np.eye(4))


def test_what_is_moved_comes_back():
    there = found(apart())
    for matrix in tta.views("flip-scale"):
        same(tta.moved_back(tta.moved_back(there, np.linalg.inv(matrix)), matrix), there)


def test_a_moved_batch_is_valid_and_says_how_it_was_moved():
    batch = cloud(apart())
    for matrix in tta.views("flip-scale"):
        other = tta.moved(batch, matrix)
        other.validate()
        assert torch.equal(other.base_aug[0], torch.from_numpy(matrix))
        back = other.points[0, :, :3] @ other.undo_base_aug[0].T
        assert torch.allclose(back, batch.points[0, :, :3], atol=1e-5)
        assert torch.equal(other.points[..., 3:], batch.points[..., 3:])


def test_of_a_batch_of_cameras_the_base_frame_alone_is_moved():
    eye = torch.eye(4).expand(1, 1, 2, 4, 4).contiguous()
    names = ("intrinsics", "image_aug", "base_from_camera", "image_from_base")
    images = torch.full((1, 1, 2, 4, 6, 3), 7, dtype=torch.uint8)
    batch = make(base=Base.EGO_AT_CAMERAS, base_aug=torch.eye(4)[None], images=images, **dict.fromkeys(names, eye))
    for matrix in tta.views("flip-scale"):
        other = tta.moved(replace(batch, tables={"of another frame": eye}), matrix)
        other.validate()
        assert other.base == batch.base and other.tables is None and other.points is None
        changed = {n for n, value in tree.flatten(other).items() if not torch.equal(value, tree.flatten(batch)[n])}
        assert changed == (set() if matrix[0, 0] == matrix[1, 1] == 1 else {"base_aug", "undo_base_aug"})


def test_the_identity_alone_changes_no_box():
    one = found(apart(), labels=[0, 1, 0, 2, 1, 0])
    same(tta.merged([one]), one)
    same(tta.merged([one, one]), one)


def test_the_best_of_duplicates_stays_and_other_classes_are_left_alone():
    boxes = apart(3)
    near = boxes + np.eye(9, dtype=np.float32)[0] * 0.3
    low, high = found(boxes, [0.5, 0.4, 0.3]), found(near, [0.2, 0.6, 0.1])
    merged = tta.merged([low, high])
    np.testing.assert_allclose(merged.scores, [0.6, 0.5, 0.3], atol=1e-6)
    np.testing.assert_array_equal(merged.boxes, np.stack([near[1], boxes[0], boxes[2]]))
    both = tta.merged([found(boxes[:2], labels=[0, 1]), found(boxes[:2], [0.3, 0.2], labels=[1, 1])])
    np.testing.assert_array_equal(both.labels, [0, 1])  # two a view: the limit
    np.testing.assert_allclose(both.scores, [0.9, 0.3], atol=1e-6)


def test_nothing_found_is_nothing_merged():
    nothing = found([])
    assert tta.merged([nothing, nothing]).boxes.shape == (0, 9)


def test_a_mirrored_scene_is_detected_as_the_mirror_of_the_scene():
    """The mirrors are a group: what a scene's mirror is looked at as are the scene's views in another order."""
    batch = cloud(apart())
    plain, counts = tta.detect(over, batch, kind="flip", finish=None)
    assert counts == {"points": 1} and len(plain["frame"].boxes) == 6
    assert np.abs(plain["frame"].scores - np.sort(seen(batch).scores)[::-1]).max() > 0.01  # another view's was better
    for matrix in tta.views("flip")[1:]:
        mirrored, _ = tta.detect(over, tta.moved(batch, matrix), kind="flip", finish=None)
        assert np.abs(seen(tta.moved(batch, matrix)).scores - seen(batch).scores).max() > 0.01  # and alone it is not
        same(tta.moved_back(mirrored["frame"], matrix), plain["frame"])


def test_a_batch_is_moved_before_it_is_finished():
    told = []
    batch = cloud(apart())
    tta.detect(over, batch, kind="flip", finish=lambda one: told.append(one.base_aug[0]) or one)
    assert {tuple(m.diagonal()[:2].tolist()) for m in told} == {(1, 1), (-1, 1), (1, -1), (-1, -1)}
