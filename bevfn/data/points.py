"""LiDAR points: files in nuScenes form (`.pcd.bin`, little-endian float32, five numbers a point, no header), and which
points lie in a range or in a box."""

from pathlib import Path

import numpy as np

COLUMNS = 5  # x, y, z [m, lidar frame], intensity 0..255, ring 0..31
BYTES = 4 * COLUMNS
Range = tuple[float, float, float, float, float, float]  # lower x, y, z, upper x, y, z [m]


def read(path: Path) -> tuple[np.ndarray, int]:
    """(points [P,5] float32 in file order, number of points dropped because a column is NaN or infinite).

    A lidar driver marks a missing return with NaN, so such points are no error of the file: they are dropped and
    counted (`bad/points` in a sample's counts), and the training report warns.

    Raises ValueError if the file is missing, empty or not a whole number of points.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: the point file does not exist; check the data folder and the file that names it.")
    values = np.fromfile(path, dtype=np.uint8)
    if not len(values):
        raise ValueError(f"{path}: the point file is empty (0 bytes); copy it again.")
    if len(values) % BYTES:
        raise ValueError(
            f"{path}: {len(values)} bytes are not a whole number of points ({COLUMNS} float32 = {BYTES} bytes each); "
            "the file is truncated or of another format, copy it again."
        )
    points = values.view("<f4").reshape(-1, COLUMNS)  # P 5
    finite = np.isfinite(points)  # P 5
    if finite.all():  # nearly always, and it saves a copy
        return points, 0
    kept = points[finite.all(axis=1)]
    return kept, len(points) - len(kept)


def in_range(points: np.ndarray, limits: Range) -> np.ndarray:
    """[P] bool: which points [P,3+] lie strictly inside lower x, y, z, upper x, y, z."""
    inside = np.ones(len(points), dtype=bool)
    for column, (lower, upper) in enumerate(zip(limits[:3], limits[3:])):
        values = np.ascontiguousarray(points[:, column])
        inside &= values > np.float32(lower)
        inside &= values < np.float32(upper)
    return inside


def in_box(xyz: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Which points lie strictly inside a box: ascending positions, int64.

    xyz [3,P] float32, a row per coordinate; box [7+]: x, y, z of the BOTTOM centre, dx, dy, dz, yaw.
    """
    near = np.flatnonzero(np.abs(xyz[0] - box[0]) < 0.5 * np.hypot(box[3], box[4]))  # most points end here
    x, y, z = xyz[:, near] - box[:3, None]
    cos, sin = np.cos(box[6]), np.sin(box[6])
    along, across = cos * x + sin * y, cos * y - sin * x
    inside = (np.abs(along) < 0.5 * box[3]) & (np.abs(across) < 0.5 * box[4]) & (z > 0) & (z < box[5])
    return near[inside]
