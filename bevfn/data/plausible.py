"""What values of a data set should be about, if they are in the units and conventions that readers take them to be in.

`possible` says what no sensor gives, which readers refuse; what is here may be meant, so that `bevfn data check` alone says it.
Each function gives (what is odd, what training does with it).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bevfn.data import points
from bevfn.data.columns import parse
from bevfn.data.index import Packed
from bevfn.names import printable

Odd = tuple[str, str]

# m: the longest side of a class' median box, from and to; wide, as data sets draw their classes otherwise and small ones have
# few boxes: another unit is off by a hundred or a thousand.
LONGEST = {
    "car": (0.5, 20.0),
    "truck": (1.0, 60.0),
    "bus": (1.0, 60.0),
    "trailer": (0.5, 80.0),
    "construction_vehicle": (0.5, 80.0),
    "bicycle": (0.2, 10.0),
    "motorcycle": (0.2, 10.0),
    "pedestrian": (0.1, 10.0),
    "traffic_cone": (0.05, 10.0),
    "barrier": (0.05, 40.0),
}
ANYTHING = 0.02, 100.0  # m, of other classes
UPRIGHT = 0.5  # of an up axis, along that of the frame around it: 60 degrees
SOME = 0.1  # share of poses that may lie: of a wrong convention those of some headings do
# Of its sides an image has its centre of projection; above and below some are cropped.
MIDDLE_X, MIDDLE_Y = (0.3, 0.7), (0.2, 0.8)
QUATERNION = "rotations are w x y z"
NEAR = 0.5  # m, within which no cloud has MOST of its points
MOST = 0.95
ENOUGH = 100  # points in boxes, to compare counts
TIMES = 10.0  # between counts of points


def sizes(packed: Packed) -> Iterator[Odd]:
    """Boxes in another unit, class by class."""
    column = packed.columns
    longest = column["boxes"][:, 3:6].max(axis=1, initial=0.0)
    for code, word in enumerate(column["names_words"]):
        name, of_class = word.decode(), longest[(column["names"] == code) & np.isfinite(longest)]
        low, high = LONGEST.get(name, ANYTHING)
        if len(of_class) and not low <= (middle := float(np.median(of_class))) <= high:
            kind = printable(name) if name else "no class"
            yield (
                f"the {len(of_class):,} boxes of {kind} are {middle:.3g} m long in the median, not {low:g} to {high:g} m",
                "it learns them so; sizes are in metres",
            )


def poses(packed: Packed) -> Iterator[Odd]:
    """Vehicles and LiDARs that do not stand upright."""
    for name, what in (("global_from_ego", "vehicle"), ("ego_from_lidar", "LiDAR")):
        if count := _lying(packed.columns[name][:, 2, 2]):  # NaN where unknown
            yield (
                f"the {what} does not stand upright in {count:,} of {len(packed):,} key frames ({name})",
                f"it moves sweeps, images and boxes so; {QUATERNION}",
            )


def lying(rows: list[dict]) -> int:
    """How many annotations [n rows with a quaternion] do not stand upright, if more than a few; readers refuse other rows."""
    try:
        turns = np.array([row["rotation"] for row in rows], dtype=np.float64).reshape(len(rows), 4)
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0
    return _lying(1 - 2 * (turns[:, 1] ** 2 + turns[:, 2] ** 2))


def rotations(rows: list[dict]) -> Iterator[Odd]:
    """Annotations that do not stand upright."""
    if count := lying(rows):
        yield (
            f"{count:,} of {len(rows):,} annotations do not stand upright",
            f"it takes another yaw for theirs; {QUATERNION}",
        )


def _lying(up: np.ndarray) -> int:
    """How many of up axes, of which `up` says how far they point up (1 to -1), do not, if more than SOME."""
    count = int((up < UPRIGHT).sum())
    return count if count > SOME * len(up) else 0


def centres(packed: Packed) -> Iterator[Odd]:
    """Images that do not fit their intrinsics, camera by camera."""
    column = packed.columns
    sides = column["camera_size"][:, ::-1].astype(np.float64)  # x y
    known = (sides > 0).all(axis=1)
    for code, word in enumerate(column["channel_words"]):
        of_camera = known & (column["channel"] == code)
        if not of_camera.any():
            continue
        centre, side = column["intrinsics"][of_camera, :2, 2], sides[of_camera]
        x, y = np.median(centre / side, axis=0)
        if not (MIDDLE_X[0] <= x <= MIDDLE_X[1] and MIDDLE_Y[0] <= y <= MIDDLE_Y[1]):
            where = f"the first at {centre[0, 0]:.0f} {centre[0, 1]:.0f} in {side[0, 0]:.0f}x{side[0, 1]:.0f}"
            yield (
                f"the {int(of_camera.sum()):,} images of {printable(word.decode())} have their centre of projection far from their "
                f"middle ({where})",
                "it takes them as cropped; of images that were resized the intrinsics must be too",
            )


def repeated(packed: Packed) -> Iterator[Odd]:
    """Files that several key frames have for their own."""
    for name, what, reads in (
        (
            "lidar_path",
            "key frames have the LiDAR scan",
            "it reads the same points for each, whatever their boxes and images are",
        ),
        (
            "camera_path",
            "images are in the file",
            "it reads the same image for each, whatever their boxes and points are",
        ),
    ):
        files, counts = np.unique(packed.columns[name], return_counts=True)
        if len(again := np.flatnonzero((counts > 1) & (files != b""))):
            yield f"{counts[again].sum():,} {what} of another, such as {printable(files[again[0]].decode())}", reads


@dataclass(frozen=True)
class Scan:
    """What is kept of a point file that was read."""

    path: str
    points: int
    bad: int
    """dropped, as they cannot be"""
    darkest: float
    brightest: float
    dim: bool
    """intensities are counted from 0 to 1"""
    dark: bool
    """all are 0, although the file has some"""
    near: bool
    """MOST points are within NEAR"""
    told: int
    """points in boxes, as annotations say"""
    counted: int
    """points in these boxes"""


def key_scan(root: Path, packed: Packed, place: int) -> Scan:
    """That of a key frame. Raises ValueError and OSError as `points.read`."""
    frame = packed[place]
    cloud, bad = points.scan(frame, root)
    known = frame.num_lidar_points > 0
    boxes, xyz = frame.boxes[known], np.ascontiguousarray(cloud[:, :3].T)
    boxes[:, 2] -= 0.5 * boxes[:, 5]  # the bottom's centre
    told = int(frame.num_lidar_points[known].sum())
    if told > len(cloud):  # then they were counted in other clouds
        return _scan(frame.lidar_path, frame.columns, cloud, bad)
    counted = sum(len(points.in_box(xyz, box)) for box in boxes)
    return _scan(frame.lidar_path, frame.columns, cloud, bad, told, counted)


def sweep_scan(root: Path, path: str, columns: str) -> Scan:
    """That of an earlier scan's file, of these columns. Raises ValueError and OSError as `points.read`."""
    return _scan(path, columns, *points.read(root / path, columns))


def _scan(path: str, columns: str, cloud: np.ndarray, bad: int, told: int = 0, counted: int = 0) -> Scan:
    near = (np.linalg.norm(cloud[:, :3], axis=1) < NEAR).mean() if len(cloud) else 0.0
    darkest, brightest = float(cloud[:, 3].min(initial=np.inf)), float(cloud[:, 3].max(initial=0.0))
    dark = brightest == 0 and "intensity" in parse(columns).names
    return Scan(path, len(cloud), bad, darkest, brightest, points.dim(cloud), dark, bool(near >= MOST), told, counted)


def clouds(scans: list[Scan]) -> Iterator[Odd]:
    """Points in another unit or frame than boxes."""
    if near := [scan for scan in scans if scan.near]:
        yield (
            f"{MOST:.0%} of the points are within {NEAR:g} m of the LiDAR in {_which(near, scans)}",
            "it learns of no other points; coordinates are in metres",
        )
    told, counted = sum(scan.told for scan in scans), sum(scan.counted for scan in scans)
    if max(told, counted) >= ENOUGH and not counted / TIMES <= told <= counted * TIMES:
        yield (
            f"annotations count {told:,} points in their boxes, which hold {counted:,}, in {len(scans):,} scans that were opened",
            "it learns objects where none are seen, if sizes, poses or calibrations are in another unit or convention",
        )


def intensities(scans: list[Scan]) -> Iterator[Odd]:
    """Intensities that published weights do not know."""
    if dim := [scan for scan in scans if scan.dim]:
        low, high = min(scan.darkest for scan in dim), max(scan.brightest for scan in dim)
        yield (
            f"the points' intensities are {low:g} to {high:g}, not 0 to 255, in {_which(dim, scans)}",
            "it reads them so and counts it (bad/intensities); published weights, which know 0 to 255, take all for dark: multiply",
        )
    if dark := [scan for scan in scans if scan.dark]:
        what = f"all intensities are 0 in {_which(dark, scans)}"
        yield what, "it reads them so; published weights, which know 0 to 255, take all for dark"


def _which(some: list[Scan], scans: list[Scan]) -> str:
    return f"{len(some):,} of {len(scans):,} scans that were opened, such as {printable(some[0].path)}"
