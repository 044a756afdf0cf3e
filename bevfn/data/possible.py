"""What a value of a data set can be, kind by kind: the one place that says it.

Readers hold an index against it (`faults`), the loader its batches, and `bevfn data check` lists what breaks it. A limit
is far outside of what any sensor or road user gives, so that what lies beyond it is a fault of the data: another unit, a
damaged file, a number that stands for "unknown".
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Kind:
    """Numbers from `low` to `high`, both included; no NaN unless that says "unknown"."""

    low: float
    high: float
    unit: str
    unknown: bool = False
    """NaN is possible."""

    def impossible(self, values: np.ndarray) -> np.ndarray:
        """Which values are not: bool of their shape."""
        values = np.asarray(values)
        inside = (values >= self.low) & (values <= self.high)  # no NaN is
        return ~(inside | np.isnan(values)) if self.unknown else ~inside

    def __str__(self) -> str:
        """For sentences: what must be."""
        return f"from {self.low:g} to {self.high:g}{f' {self.unit}' if self.unit else ''}"


SIZE = Kind(1e-3, 1e3, "m")  # length, width or height of an annotated box
POSITION = Kind(-1e4, 1e4, "m")  # of a box or an earlier scan, relative to the key frame's sensors
POINT = Kind(-1e3, 1e3, "m")  # of a LiDAR's return
PLACE = Kind(-1e8, 1e8, "m")  # in a map's frame, UTM and MGRS included
MOUNT = Kind(-100.0, 100.0, "m")  # of a sensor, relative to the vehicle or another sensor
YAW = Kind(-1e3, 1e3, "rad")
VELOCITY = Kind(-1e3, 1e3, "m/s", unknown=True)
TIME = Kind(0.0, 4_102_444_800.0, "s")  # to the year 2100; simulators begin at 0
LAG = Kind(1e-6, 30.0, "s")  # of an earlier scan: ten of 1 Hz fit, 20 Hz counted in a wrong unit does not
LAGS = Kind(0.0, LAG.high, "s")  # of points, those of the key frame's own scan included
DEPTH = Kind(0.0, POSITION.high, "m")  # of a pixel, 0 without a point
OFFSET = Kind(-30.0, 30.0, "s")  # between a camera's exposure and the scan
FOCAL = Kind(1.0, 1e6, "px")
CENTRE = Kind(-1e5, 1e5, "px")  # of projection
OUTSIDE = Kind(0.0, 1.0, "sides of the image")  # by which that may lie outside, of a cropped image
SIDE = Kind(1, 20_000, "px")  # of an image
DISTANCE = Kind(0.0, 2e3, "m")  # from a camera to a point
POINTS = Kind(0, 1e9, "")  # in a box
INTENSITY = Kind(0.0, 255.0, "")  # of a return; to 255 on nuScenes, for which weights are published
DIM = 1.0  # the highest intensity of data sets that count from 0 to 1

ROTATION = 1e-3  # by which R Rᵀ may differ from 1: float32 and files of six digits
QUATERNION = 1e-2  # by which a length may differ from 1


def no_rotation(turns: np.ndarray) -> np.ndarray:
    """Which of [...,3,3] matrices are no proper rotations (a mirrored or scaled one, NaN): bool [...]."""
    product = turns @ np.swapaxes(turns, -1, -2)
    off = np.abs(product - np.eye(3)).max(axis=(-2, -1))
    return ~((off <= ROTATION) & (_determinant(turns) > 0))


def no_intrinsics(matrices: np.ndarray) -> np.ndarray:
    """Which of [...,3,3] matrices are no intrinsics (focal lengths, centre, and 0 0 1 below, as in a transposed one there is
    not): bool [...]."""
    focal = np.stack([matrices[..., 0, 0], matrices[..., 1, 1]], axis=-1)
    bad = FOCAL.impossible(focal).any(axis=-1) | CENTRE.impossible(matrices[..., :2, 2]).any(axis=-1)
    skew = ~(np.abs(np.stack([matrices[..., 0, 1], matrices[..., 1, 0]], axis=-1)) <= focal).all(axis=-1)
    return bad | skew | ~(np.abs(matrices[..., 2, :] - [0.0, 0.0, 1.0]) <= 1e-6).all(axis=-1)


def outside(centres: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """By how many sides of the image, [...], centres [...,2] (x, y) lie outside of images of sizes [...,2] (H, W)."""
    sides = np.asarray(sizes, dtype=np.float64)[..., ::-1]
    return (np.maximum(np.maximum(-centres, centres - sides), 0.0) / sides).max(axis=-1)


def _determinant(turns: np.ndarray) -> np.ndarray:
    """np.linalg.det without its dtype conversions."""
    return np.sum(turns[..., 0, :] * np.cross(turns[..., 1, :], turns[..., 2, :]), axis=-1)
