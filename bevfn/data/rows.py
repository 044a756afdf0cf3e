"""Rows of nuScenes' and T4's tables as parts of a Frame, checked as they are read: what is no number, pose, count, time or
link is named by its row."""

import math
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import numpy as np
import scipy  # whose rooms are imported when they are entered

from bevfn.data import possible
from bevfn.data.index import Camera, Sweep, inverse
from bevfn.names import printable

Row = dict[str, Any]
Get = Callable[[str, str], Row]  # (table, token) to the row
MAX_SWEEPS = 10


class Impossible(ValueError):
    """What a row says that cannot be; the sentence names it, without the data set's folder and a full stop."""


def numbers(table: str, rows: list[dict], field: str, shape: tuple[int, ...]) -> np.ndarray:
    """That field of the rows, [n, *shape] float64. Raises Impossible for a row that has no such numbers; text, true and null,
    which NumPy would take for some, are none."""
    try:
        told = [row[field] for row in rows]
        if not _are_numbers(told, len(shape)):
            raise TypeError
        values = np.array(told, dtype=np.float64).reshape(len(rows), *shape)
    except (KeyError, TypeError, ValueError, OverflowError):
        for row in rows if len(rows) > 1 else ():
            numbers(table, [row], field, shape)
        what = "number" if not shape else f"{' x '.join(map(str, shape))} numbers"
        raise Impossible(f"{table} {printable(rows[0]['token'])} has no {field} of {what}") from None
    return values


def _are_numbers(told: Iterable, deep: int) -> bool:
    """Whether lists of that many levels hold JSON's numbers alone. Raises TypeError for fewer levels."""
    for _ in range(deep):
        told = chain.from_iterable(told)
    return {*map(type, told)} <= {int, float}


def quaternions(table: str, rows: list[dict]) -> np.ndarray:
    """[n,4], w x y z, of unit length. Raises Impossible."""
    values = numbers(table, rows, "rotation", (4,))
    bad = ~(np.abs(np.linalg.norm(values, axis=1) - 1) <= possible.QUATERNION)
    if bad.any():
        row = rows[int(np.argmax(bad))]
        raise Impossible(f"{table} {printable(row['token'])} has a rotation that is no quaternion of length 1")
    return values


def counts(table: str, rows: list[dict], field: str) -> np.ndarray:
    """[n] int64 of points in annotated boxes. Raises Impossible."""
    values = numbers(table, rows, field, ())
    if (bad := possible.POINTS.impossible(values) | (values % 1 != 0)).any():
        i = int(np.argmax(bad))
        what = table.removeprefix("sample_")
        raise Impossible(
            f"{what} {printable(rows[i]['token'])} has {field} {values[i]:g}, which must be {possible.POINTS}"
        )
    return values.astype(np.int64)


def boxes_of(table: str, rows: list[dict], velocities: np.ndarray, lidar_from_global: np.ndarray) -> np.ndarray:
    """[G,9] float64, see `index.Frame.boxes`, of rows with global centres and rotations, and widths before lengths; velocities:
    [G,3] m/s, global. Raises Impossible."""
    turn = lidar_from_global[:3, :3]
    boxes = np.zeros((len(rows), 9))
    boxes[:, :3] = numbers(table, rows, "translation", (3,)) @ turn.T + lidar_from_global[:3, 3]
    turns = scipy.spatial.transform.Rotation.from_quat(quaternions(table, rows)[:, [1, 2, 3, 0]])
    lidar_from_box = turn @ turns.as_matrix()  # G 3 3
    boxes[:, 3:6] = numbers(table, rows, "size", (3,))[:, [1, 0, 2]]  # width length height -> dx dy dz
    # The yaw of pyquaternion's yaw_pitch_roll, which upstream takes; atan2(R10, R00) differs where the car tilts.
    boxes[:, 6] = np.arctan2(-lidar_from_box[:, 0, 1], lidar_from_box[:, 0, 0])
    boxes[:, 7:9] = (velocities @ turn.T)[:, :2]
    return boxes


def check_links(get: Get, table: str, rows: list[dict]) -> None:
    """Raises Impossible unless a key frame's annotations are of an object each, and their prev and next, between which
    velocities are measured, are others of the same object."""
    objects: dict[str, str] = {}
    for row in rows:
        token = objects.setdefault(row["instance_token"], row["token"])
        if token != row["token"]:
            raise Impossible(
                f"annotations {printable(token)} and {printable(row['token'])} are of one object in one key frame"
            )
        for name in ("prev", "next"):
            if not row.get(name):
                continue
            other = get(table, row[name])
            if other is row or other["instance_token"] != row["instance_token"]:
                whose = "itself" if other is row else "of another object"
                raise Impossible(f"annotation {printable(row['token'])} has a `{name}` that is {whose}")


def check_times(get: Get, sample: Row, lidar: Row) -> None:
    """Raises Impossible unless a key frame's own time, by which velocities are divided, is about that of its scan, and after
    the one before it."""
    offset, token = 1e-6 * (sample["timestamp"] - lidar["timestamp"]), printable(sample["token"])
    if possible.OFFSET.impossible(np.array(offset)):
        raise Impossible(f"key frame {token} is {offset:g} s after its LiDAR scan, which must be {possible.OFFSET}")
    if not sample.get("prev"):
        return
    before = get("sample", sample["prev"])
    if before["scene_token"] != sample["scene_token"]:
        raise Impossible(f"key frame {token} has its `prev` in another scene")
    if before["timestamp"] >= sample["timestamp"]:
        raise Impossible(f"key frame {token} is not later than its `prev`, by timestamp of sample.json")


def sweeps(
    get: Get, lidar: Row, lidar_from_global: np.ndarray, previous: Callable[[Row], Row | None]
) -> tuple[Sweep, ...]:
    """The scans before a row of sample_data, newest first. previous: the row before, None for the first."""
    found: list[Sweep] = []
    scan = previous(lidar)
    while scan is not None and len(found) < MAX_SWEEPS:
        ego_from_scan, global_from_then = poses(get, scan)
        lag = 1e-6 * (lidar["timestamp"] - scan["timestamp"])
        found.append(Sweep(scan["filename"], lidar_from_global @ global_from_then @ ego_from_scan, lag))
        scan = previous(scan) if len(found) < MAX_SWEEPS else None
    return tuple(found)


def camera(get: Get, image: Row, lidar_from_global: np.ndarray) -> Camera:
    """The exposure of a row of sample_data. Raises Impossible."""
    ego_from_camera, global_from_then = poses(get, image)
    calibration = get("calibrated_sensor", image["calibrated_sensor_token"])
    return Camera(
        path=image["filename"],
        intrinsics=numbers("calibrated_sensor", [calibration], "camera_intrinsic", (3, 3))[0],
        camera_from_lidar=inverse(lidar_from_global @ global_from_then @ ego_from_camera),
        ego_from_camera=ego_from_camera,
        global_from_ego=global_from_then,
        timestamp=1e-6 * image["timestamp"],
        size=_size(image),
    )


def _size(image: Row) -> tuple[int, int] | None:
    """(H, W) of an image, None where both are missing or 0. Whether they are possible is asked later, of all at once."""
    height, width = image.get("height") or 0, image.get("width") or 0
    if not all(isinstance(side, int | float) and not abs(side) >= 1e300 for side in (height, width)):
        raise Impossible(f"sample_data {printable(image['token'])} has no height and width of numbers")
    return (height, width) if height or width else None


def poses(get: Get, data: Row) -> tuple[np.ndarray, np.ndarray]:
    """(ego_from_sensor, global_from_ego), both [4,4] float64, of a row of sample_data. Raises Impossible."""
    tokens = {table: data[f"{table}_token"] for table in ("calibrated_sensor", "ego_pose")}
    mounted, moved = (pose(table, get(table, token)) for table, token in tokens.items())
    return mounted, moved


def pose(table: str, row: dict[str, Any]) -> np.ndarray:
    """[4,4] float64 of a row's rotation and translation. Raises Impossible."""
    from pyquaternion import Quaternion

    if not _is_pose(row):  # then one of these says why
        quaternions(table, [row])
        numbers(table, [row], "translation", (3,))
    matrix = np.eye(4)
    matrix[:3, :3] = Quaternion(row["rotation"]).rotation_matrix
    matrix[:3, 3] = row["translation"]
    return matrix


def _is_pose(row: dict) -> bool:
    """Cheap, as every sweep asks for it twice."""
    try:
        turn, moved = row["rotation"], row["translation"]
        if not _are_numbers((turn, moved), 1):
            return False
        return len(turn) == 4 and len(moved) == 3 and abs(math.hypot(*turn) - 1) <= possible.QUATERNION
    except (KeyError, TypeError, OverflowError):
        return False
