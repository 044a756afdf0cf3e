"""Test-time augmentation: a model looks at every key frame several times, mirrored and scaled; the boxes are moved back and merged.

A view is one matrix `augmented_from_base`, as training's augmentation is (`data.augment`). It is applied to the batch on the host,
before anything is computed of it, so the compiled graph is the one of a plain evaluation.

Source: mmdetection3d's MultiScaleFlipAug3D and merge_aug_bboxes_3d (behaviour): per class non-maximum suppression by overlap from
above. Scores are not averaged. Published figures of the catalogue are without it.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import torch

from bevfn.choices import Augmented
from bevfn.data import augment
from bevfn.data.batch import Batch, make
from bevfn.evaluation.results import Detections
from bevfn.heads import suppression

SCALES = (1.0, 0.95, 1.05)
IOU = 0.2
"""seen from above; more is the same object"""
DISTANCE = 0.5
"""m between centres; less is the same object too: two boxes of a pedestrian overlap little"""

Detect = Callable[..., tuple[dict[str, Detections], dict[str, float]]]


def views(kind: Augmented) -> list[np.ndarray]:
    """The matrices augmented_from_base, [4,4] float32, the identity first: mirrors of x, of y and of both, at each scale."""
    scales = SCALES if kind == "flip-scale" else SCALES[:1]
    signs = itertools.product(scales, (1.0, -1.0), (1.0, -1.0))
    return [np.diag([scale * x, scale * y, scale, 1.0]).astype(np.float32) for scale, y, x in signs]


def moved(batch: Batch, matrix: np.ndarray) -> Batch:
    """The batch as if training had augmented it so, too: points and base frame; on the host. What is only learned from (boxes)
    and tables, which were computed of another frame, are left out."""
    view = torch.from_numpy(matrix)
    left_out = ("base", "base_aug", "undo_base_aug", "boxes", "labels", "boxes_valid", "tables")
    given = {f.name: v for f in fields(batch) if f.name not in left_out and (v := getattr(batch, f.name)) is not None}
    if batch.points is not None:
        place = batch.points[..., :3] @ view[:3, :3].T + view[:3, 3]
        given["points"] = torch.cat([place, batch.points[..., 3:]], -1) * given["points_valid"][..., None]
    for inverse in ("undo_image_aug", "base_from_pixel"):  # which `make` computes
        given.pop(inverse, None)
    return make(base=batch.base, base_aug=view @ batch.base_aug, **given)


def moved_back(found: Detections, matrix: np.ndarray) -> Detections:
    """Detections of a `moved` batch, in the frame that it had before."""
    undo = np.linalg.inv(matrix.astype(np.float64)).astype(np.float32)
    return Detections(augment.move_boxes(found.boxes, undo), found.scores, found.labels)


def merged(views: Sequence[Detections]) -> Detections:
    """Of boxes of one class that are the same object the one with the highest score, in falling order of score.

    At most as many as the fullest of the views has: a limit of the model's, and the devkit's 500, holds as before.
    """
    boxes, scores, labels = (np.concatenate([getattr(v, f.name) for v in views]) for f in fields(Detections))
    order = np.argsort(-scores, kind="stable")
    boxes, scores, labels = boxes[order], scores[order], labels[order]
    kept = _suppressed(torch.from_numpy(boxes), labels, max(len(v.boxes) for v in views))
    return Detections(boxes[kept], scores[kept], labels[kept])


def _suppressed(boxes: torch.Tensor, labels: np.ndarray, most: int) -> np.ndarray:
    """Which stay, bool [n]; boxes [n 9] and labels [n] in falling order of score."""
    near = suppression.near(boxes, "rotated", IOU) | suppression.near(boxes, "circle", DISTANCE**2)
    pairs = near & torch.from_numpy(labels[:, None] == labels[None, :])  # n n
    everything = torch.ones(1, 1, len(boxes), dtype=torch.bool)
    return suppression.greedy(pairs[None, None], everything, most)[0, 0].numpy()


def detect(
    over: Detect, *arguments: Any, kind: Augmented, finish: Callable[[Batch], Batch] | None, **settings: Any
) -> tuple[dict[str, Detections], dict[str, float]]:
    """`over(*arguments, finish=..., **settings)`, a function such as `evaluation.detect.detect`, once for each view: (merged
    detections by token, counts of the view that is not moved)."""
    found, counts = over(*arguments, finish=finish, **settings)
    seen = [found]
    for matrix in views(kind)[1:]:
        other = partial(_moved_and_finished, matrix=matrix, finish=finish)
        again, _ = over(*arguments, finish=other, **settings)
        seen.append({token: moved_back(one, matrix) for token, one in again.items()})
    return {token: merged([view[token] for view in seen]) for token in found}, counts


def _moved_and_finished(batch: Batch, matrix: np.ndarray, finish: Callable[[Batch], Batch] | None) -> Batch:
    """Of a name, since processes that read must be able to pickle it."""
    batch = moved(batch, matrix)
    return batch if finish is None else finish(batch)
