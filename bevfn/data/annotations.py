"""A key frame's annotations as models have them: those with LiDAR or radar points, in the base frame that is asked for."""

import numpy as np
import scipy  # whose rooms are imported when they are entered
import torch

from bevfn.boxes import limit_yaw
from bevfn.data.batch import Base
from bevfn.data.index import Frame, inverse
from bevfn.data.points import Range


def boxes(
    frame: Frame, base: Base, channels: tuple[str, ...], class_names: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """(boxes [G,9] float32 in the base of these cameras' batch, labels [G] int64) of the annotations with LiDAR or radar points.

    Boxes have their BOTTOM centre, and velocity 0 where it is unknown. A label indexes class_names; -1: none of
    them (they are in the way of pasted objects, `in_range` drops them).
    """
    return valid(frame, class_names) if base is Base.LIDAR else ego_boxes(frame, base.clocks(channels), class_names)


def valid(frame: Frame, class_names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(boxes [G,9] float32, labels [G] int64) of the annotations with LiDAR or radar points, in the frame's order.

    Boxes have their BOTTOM centre, in the LiDAR's frame, and velocity 0 where it is unknown. A label indexes class_names;
    -1: none of them.
    """
    found = frame.boxes[frame.valid].astype(np.float32)
    found[:, 2] -= 0.5 * found[:, 5]  # an index has the gravity centre
    found[:, 7:9] = np.where(np.isfinite(found[:, 7:9]), found[:, 7:9], 0.0)
    return found, _labels(frame, class_names)


def ego_boxes(frame: Frame, channels: tuple[str, ...], class_names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(boxes [G,9] float32, labels [G] int64) of the annotations with LiDAR or radar points of these classes.

    BOTTOM centre, in the frame of `ego_pose`; velocity 0 where it is unknown. Boxes are taken as upright in the LiDAR's
    frame, which at its tilt of a degree or two against the road differs from upstream by less than 1e-3 rad.
    """
    ego_from_lidar = inverse(ego_pose(frame, channels)) @ frame.global_from_lidar
    labels = _labels(frame, class_names)
    found, labels = frame.boxes[frame.valid][labels >= 0], labels[labels >= 0]
    turn = ego_from_lidar[:3, :3]
    cos, sin = np.cos(found[:, 6]), np.sin(found[:, 6])
    moved = found.copy()
    moved[:, :3] = found[:, :3] @ turn.T + ego_from_lidar[:3, 3]
    moved[:, 2] -= 0.5 * found[:, 5]
    # of turn @ Rz: the yaw of pyquaternion's yaw_pitch_roll, which upstream takes (see data.nuscenes)
    moved[:, 6] = np.arctan2(turn[0, 0] * sin - turn[0, 1] * cos, turn[0, 0] * cos + turn[0, 1] * sin)
    moved[:, 7:9] = np.nan_to_num(found[:, 7:9], nan=0.0) @ turn[:2, :2].T
    return moved.astype(np.float32), labels


def ego_pose(frame: Frame, channels: tuple[str, ...]) -> np.ndarray:
    """global_from_ego [4,4] float64 of the frame in which boxes lie whose base has these `clocks`: the mean over the cameras'
    vehicle poses of translation and of quaternion."""
    poses = frame.ego_poses(channels)
    quaternions = scipy.spatial.transform.Rotation.from_matrix(poses[:, :3, :3]).as_quat()  # N 4, whose sign is free
    quaternions *= np.where(quaternions @ quaternions[:1].T < 0, -1.0, 1.0)
    mean = np.eye(4)
    mean[:3, :3] = scipy.spatial.transform.Rotation.from_quat(quaternions.mean(axis=0)).as_matrix()
    mean[:3, 3] = poses[:, :3, 3].mean(axis=0)
    return mean


def lidar_from_base(frame: Frame, base: Base, channels: tuple[str, ...]) -> np.ndarray:
    """[4,4] float64: the key frame's LiDAR frame from the one in which boxes and detections lie."""
    if base is Base.LIDAR:
        return np.eye(4)
    return inverse(frame.global_from_lidar) @ ego_pose(frame, base.clocks(channels))


def in_range(
    found: np.ndarray, labels: np.ndarray, limits: Range | None, reach: tuple[float, ...] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of known classes with their centre strictly inside the BEV range, and their labels; yaw in [-pi, pi).

    Without limits all boxes of known classes stay as they are. reach: m of each class in x and y, see `Reading.class_reach`.
    """
    if reach:
        near = np.hypot(found[:, 0], found[:, 1]) < np.array([*reach, 0.0])[labels]  # -1, of no class, is the last
        found, labels = found[near], labels[near]
    if limits is None:
        return found[labels >= 0], labels[labels >= 0]
    lower_x, lower_y, _, upper_x, upper_y, _ = limits
    x, y = found[:, 0], found[:, 1]
    kept = (x > lower_x) & (x < upper_x) & (y > lower_y) & (y < upper_y) & (labels >= 0)
    found = found[kept]
    found[:, 6] = limit_yaw(torch.from_numpy(found[:, 6])).numpy()
    return found, labels[kept]


def _labels(frame: Frame, class_names: tuple[str, ...]) -> np.ndarray:
    """[G] int64 of the annotations with points; -1 for other classes."""
    numbers = {name: label for label, name in enumerate(class_names)}
    return np.array([numbers.get(name, -1) for name, good in zip(frame.names, frame.valid) if good], dtype=np.int64)
