"""How near or how alike two upright boxes are: every measure by which autoware's perception evaluation matches.

All take boxes [P,7] and [G,7] float64 (x y z of the GRAVITY centre, length along yaw, width, height, yaw [m, rad], ego
frame, whose origin plane distance looks from; further columns are ignored) and return [P,G] float64. The first are the
detections, the second the annotations, which matters to plane distance.

Source: tier4/autoware_perception_evaluation, evaluation/matching/object_matching.py, by its definition.
"""

from typing import Literal

import numpy as np
import shapely

Pairing = Literal["aligned", "indexed"]


def centre_distance_bev(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Metres in x and y."""
    return _distance(first[:, :2], second[:, :2])


def centre_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Metres in x, y and z."""
    return _distance(first[:, :3], second[:, :3])


def plane_distance(first: np.ndarray, second: np.ndarray, pairing: Pairing = "aligned") -> np.ndarray:
    """Root mean square distance [m] of the two corners of `second` nearest to the origin and their partners of `first`.

    pairing: "aligned": the partners are those of the turn of `first` by quarters that lies nearest to `second`, of any
    heading; "indexed": the same corners of the boxes as built, after half a turn where the headings differ by more than
    a quarter.
    """
    ours, theirs = corners(first), corners(second)
    turned = (_aligned if pairing == "aligned" else _indexed)(first, second, ours, theirs)  # P G 4 2
    nearest = np.argsort(np.linalg.norm(theirs, axis=-1), axis=-1, kind="stable")[:, :2]  # G 2
    partners = np.take_along_axis(turned, nearest[None, :, :, None], axis=2)
    seen = np.take_along_axis(theirs, nearest[:, :, None], axis=1)
    squared = ((partners - seen) ** 2).sum(axis=-1)  # P G 2
    return np.round(np.sqrt(0.5 * squared.sum(axis=-1)), 10)


def iou_bev(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of the footprints, 0..1; 0 of two boxes without area."""
    shared = overlap(first, second)
    areas = first[:, 3] * first[:, 4], second[:, 3] * second[:, 4]
    return _share(shared, areas[0][:, None] + areas[1] - shared)


def iou_3d(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of the volumes, 0..1; 0 of two boxes without volume."""
    tops = first[:, None, 2] + first[:, None, 5] / 2, second[:, 2] + second[:, 5] / 2
    floors = first[:, None, 2] - first[:, None, 5] / 2, second[:, 2] - second[:, 5] / 2
    heights = np.maximum(0.0, np.minimum(*tops) - np.maximum(*floors))
    shared = overlap(first, second) * heights
    volumes = first[:, 3] * first[:, 4] * first[:, 5], second[:, 3] * second[:, 4] * second[:, 5]
    return _share(shared, volumes[0][:, None] + volumes[1] - shared)


def overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Area [m2] that the footprints share. Only pairs whose circumscribed circles meet are cut."""
    shared = np.zeros((len(first), len(second)))
    reach = np.hypot(first[:, None, 3], first[:, None, 4]) / 2 + np.hypot(second[:, 3], second[:, 4]) / 2
    i, j = np.nonzero(centre_distance_bev(first, second) < reach)
    if len(i):
        ours, theirs = shapely.polygons(corners(first)), shapely.polygons(corners(second))
        shared[i, j] = shapely.area(shapely.intersection(ours[i], theirs[j]))
    return shared


def corners(boxes: np.ndarray) -> np.ndarray:
    """[n,4,2]: footprint corners front left, rear left, rear right, front right: counter-clockwise."""
    along, across = np.array([1.0, -1.0, -1.0, 1.0]), np.array([1.0, 1.0, -1.0, -1.0])
    x, y = boxes[:, 3:4] / 2 * along, boxes[:, 4:5] / 2 * across  # n 4
    cos, sin = np.cos(boxes[:, 6:7]), np.sin(boxes[:, 6:7])
    return np.stack([boxes[:, 0:1] + cos * x - sin * y, boxes[:, 1:2] + sin * x + cos * y], axis=-1)


def wrap(angle: np.ndarray) -> np.ndarray:
    """Radians to [-pi, pi]."""
    return angle - 2 * np.pi * np.round(angle / (2 * np.pi))


def _aligned(_: np.ndarray, __: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Of the four cyclic shifts of our corners the first one with the least sum of distances to theirs: P G 4 2."""
    offset = ours - ours.mean(axis=1, keepdims=True)
    order = np.argsort(np.arctan2(offset[..., 1], offset[..., 0]), axis=1, kind="stable")
    ours = np.take_along_axis(ours, order[..., None], axis=1)
    shifts = np.stack([np.roll(ours, shift, axis=1) for shift in range(4)], axis=1)  # P 4 4 2
    sums = np.linalg.norm(shifts[:, None] - theirs[None, :, None], axis=-1).sum(axis=-1)  # P G 4
    return shifts[np.arange(len(ours))[:, None], np.argmin(sums, axis=-1)]


def _indexed(first: np.ndarray, second: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Our corners as built, half a turn on where the headings differ by more than a quarter: P G 4 2."""
    opposed = np.abs(wrap(wrap(first[:, None, 6]) - wrap(second[None, :, 6]))) > np.pi / 2  # P G
    ours = np.broadcast_to(ours[:, None], (*opposed.shape, 4, 2))
    return np.where(opposed[..., None, None], np.roll(ours, 2, axis=2), ours)


def _distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.linalg.norm(first[:, None] - second[None], axis=-1)


def _share(shared: np.ndarray, union: np.ndarray) -> np.ndarray:
    """shared / union, not above 1 by rounding."""
    return np.minimum(1.0, np.divide(shared, union, out=np.zeros_like(shared), where=union > 0))
