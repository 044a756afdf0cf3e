"""LiDAR point files in nuScenes form: `.pcd.bin`, little-endian float32, five numbers a point, no header."""

from pathlib import Path

import numpy as np

COLUMNS = 5  # x, y, z [m, lidar frame], intensity 0..255, ring 0..31
BYTES = 4 * COLUMNS


def read(path: Path) -> tuple[np.ndarray, int]:
    """(points [P,5] float32 in file order, number of points dropped because a column is NaN or infinite).

    A lidar driver marks a missing return with NaN, so such points are no error of the file: they are dropped and
    counted (`bad/points` in a sample's counts), and the training report warns.

    Raises ValueError if the file is missing, empty or not a whole number of points.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: the point file does not exist; check lidar_path in frame.json and the data folder.")
    raw = path.read_bytes()
    if not raw:
        raise ValueError(f"{path}: the point file is empty (0 bytes); copy it again.")
    if len(raw) % BYTES:
        raise ValueError(
            f"{path}: {len(raw)} bytes are not a whole number of points ({COLUMNS} float32 = {BYTES} bytes each); "
            "the file is truncated or of another format, copy it again."
        )
    points = np.frombuffer(raw, dtype="<f4").reshape(-1, COLUMNS).astype(np.float32)  # P 5, a writable copy
    finite = np.isfinite(points).all(axis=1)  # P
    return points[finite], int(len(points) - finite.sum())
