"""LiDAR points: files in nuScenes' and T4's form (`.pcd.bin`, little-endian float32, five numbers a point, no header), of
other numbers (`columns`), or with a header (`.pcd`, `.npy`), and which points lie in a range or in a box."""

from pathlib import Path

import numpy as np

from bevfn.data import columns as told
from bevfn.data import pcd, possible
from bevfn.data.columns import Columns
from bevfn.data.index import Frame

COLUMNS = 5  # x, y, z [m, lidar frame], intensity 0..255, ring 0..31, or -1 where several lidars are one cloud
BYTES = 4 * COLUMNS
Range = tuple[float, float, float, float, float, float]  # lower x, y, z, upper x, y, z [m]

MOST = 10_000_000  # points of a file: 200 MB, where a scan has some 100,000
BLANK = 64  # points at a file's end
FEW = 0.01  # share of a file's points, or two, that may be impossible; with more the file is not of such points
MIXED = 0.1  # share of a file's points that may have NaN in some of their numbers
TINY = float(np.finfo(np.float32).tiny)  # of a normal number; integers up to 8 million look smaller
HEADS = {
    b"\x93NUMPY": "has the header of an .npy file",
    b"# .PCD": "has the header of a PCD file",
    b"VERSION": "has the header of a PCD file",
    b"ply": "has the header of a PLY file",
    b"PK\x03\x04": "is a zip or .npz file",
    b"\x1f\x8b\x08": "is compressed",
}
FORMS = {
    "four float32": ("<f4", 4),
    "six float32": ("<f4", 6),
    "big-endian float32": (">f4", COLUMNS),
    "float64": ("<f8", COLUMNS),
    "four float64": ("<f8", 4),
    "five float32": ("<f4", COLUMNS),
}
WANTED = "little-endian float32 x, y, z [m], intensity 0..255, ring"


def scan(frame: Frame, root: Path) -> tuple[np.ndarray, int]:
    """`read` of a key frame's own cloud, moved to the lidar frame."""
    cloud, bad = read(Path(root) / frame.lidar_path, frame.columns)
    turn, shift = frame.lidar_from_scan[:3, :3], frame.lidar_from_scan[:3, 3]
    if not (np.array_equal(turn, np.eye(3)) and not shift.any()):
        cloud[:, :3] = cloud[:, :3] @ turn.T + shift
    return cloud, bad


def read(path: Path, columns: str = "") -> tuple[np.ndarray, int]:
    """(points [P,5] float32 in file order: x, y, z, intensity 0..255, ring, number of points dropped because one of their
    numbers cannot be). columns: of the file, see `columns.parse`.

    A lidar driver marks a missing return with NaN in x, y and z, so such points are no error of the file: they are dropped
    and counted (`bad/points` in a sample's counts), and reports warn. So are a FEW points of impossible position or
    intensity, or with NaN in some of their numbers alone.

    Raises ValueError if the file is missing, empty, huge or not a whole number of points, or holds something else than such
    points: a header, numbers of another kind or number, zeros where an interrupted copy wrote nothing, next to nothing but NaN.
    """
    path, what = Path(path), told.parse(columns)
    if not path.is_file():
        raise ValueError(f"{path}: the point file does not exist; check the data folder and the file that names it.")
    largest = MOST * max(BYTES, what.dtype.itemsize)
    if path.stat().st_size > largest:
        raise ValueError(
            f"{path}: the point file has {path.stat().st_size:,} bytes, more than {MOST:,} points; copy it again."
        )
    values = None
    if path.suffix == ".pcd":
        points = pcd.read(path, MOST, [name for name in pcd.NEEDED if not columns or name in what.names])
        points[:, 3] *= told.HIGHEST / what.highest
    elif path.suffix == ".npy":
        points = _array(path, what)
    else:
        values, points = _bare(path, what)
    good = _good(points)
    kept = points if good.all() else points[good]  # nearly always all, and it saves a copy
    if wrong := _wrong(values, points, kept):
        wanted = WANTED if what == told.parse("") else f"{what}, as its columns are said to be, or say others,"
        raise ValueError(f"{path}: {wrong}; write {wanted} of each point.")
    return kept, len(points) - len(kept)


def _bare(path: Path, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """(bytes [n] uint8, points [P,5] float32 made of them) of a file without header."""
    values = np.fromfile(path, dtype=np.uint8)
    if not len(values):
        raise ValueError(f"{path}: the point file is empty (0 bytes); copy it again.")
    start = values[:8].tobytes()
    for head, what in HEADS.items():
        if start.startswith(head):
            raise ValueError(f"{path}: the point file {what}; write bare {WANTED} of each point.")
    usual, dtype = columns == told.parse(""), columns.dtype
    if len(values) % dtype.itemsize:
        of = f"{COLUMNS} float32" if usual else str(columns)
        raise ValueError(
            f"{path}: {len(values)} bytes are not a whole number of points ({of} = {dtype.itemsize} bytes each); "
            "the file is truncated or of another format, copy it again."
        )
    if usual:
        return values, values.view("<f4").reshape(-1, COLUMNS)
    return values, told.five(values.view(dtype), columns)


def _array(path: Path, columns: Columns) -> np.ndarray:
    """[P,5] float32 of a .npy file: [P,C] numbers in the order of the columns, or [P] with fields of their names."""
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: the point file is no array that numpy can read ({error}); write it again.") from None
    fields = rows.dtype.names
    if fields is None and (rows.ndim != 2 or rows.shape[1] != len(columns.names) or rows.dtype.kind not in "fiu"):
        raise ValueError(
            f"{path}: the point file is an array {list(rows.shape)} of {rows.dtype}, not [points, {len(columns.names)}] numbers "
            f"({columns}); say which columns it has, or write these."
        )
    if fields is not None and (missing := [name for name in ("x", "y", "z") if name not in fields]):
        raise ValueError(f"{path}: the point file has no field {', '.join(missing)}; it has {', '.join(fields)}.")
    if not len(rows):
        raise ValueError(f"{path}: the point file is empty (0 points); copy it again.")
    return told.five(rows, columns)


def _good(points: np.ndarray) -> np.ndarray:
    """[P] bool: which points [P,4+] a lidar can have seen."""
    rows = np.ascontiguousarray(points.T)  # which is three times as fast to look at
    kinds = (possible.POINT, possible.POINT, possible.POINT, possible.INTENSITY)
    if len(points) and all(kind.low <= row.min() and row.max() <= kind.high for row, kind in zip(rows, kinds)):
        return np.isfinite(rows[-1])  # nearly always, and NaN is no minimum
    good = np.isfinite(rows[-1])
    for row, kind in zip(rows, kinds):
        good &= ~kind.impossible(row)
    return good


def dim(points: np.ndarray) -> bool:
    """Whether intensities of points [P,4+] are counted from 0 to 1, where published weights know 0..255."""
    highest = points[:, 3].max(initial=0.0)
    return bool(0 < highest <= possible.DIM and (points[:, 3] % 1 != 0).any())


def ends_in_zeros(path: Path) -> bool:
    """Whether the last bytes of a file's points, of BLANK points, are nothing but zeros, as an interrupted copy leaves them.

    Raises ValueError for a `.pcd` without header or that is shorter than it says."""
    end = pcd.extent(path) if path.suffix == ".pcd" else path.stat().st_size
    few = min(BLANK * BYTES, end)
    with open(path, "rb") as file:
        file.seek(end - few)
        return not any(file.read(few))


def _wrong(values: np.ndarray | None, points: np.ndarray, kept: np.ndarray) -> str:
    """What else the bytes of a file (None where a header says what they are) seem to be than the points [P,5], of which some
    are kept; empty if nothing."""
    xyz = np.abs(np.ascontiguousarray(points[:, :3].T))  # 3 P
    integers = zeros = 0
    if not xyz.min() >= TINY:
        integers = int(((xyz > 0) & (xyz < TINY)).any(axis=0).sum())
        zeros = int((xyz == 0).all(axis=0).sum())
    if integers > len(points) // 4:
        return f"{integers:,} of {len(points):,} points have coordinates below 1e-38, as integers look in a file of float32"
    if zeros > max(2, FEW * len(points)):
        return (
            f"{zeros:,} of {len(points):,} points are at 0 0 0, as where an interrupted copy wrote nothing; copy it again, or "
            "mark missing returns with NaN"
        )
    if len(kept) == len(points):
        return ""
    finite = np.isfinite(points)
    missing = int((~finite[:, :3]).all(axis=1).sum())
    bad = int(finite.all(axis=1).sum()) - len(kept)
    mixed = len(points) - len(kept) - bad - missing
    if mixed > max(2, MIXED * len(points)):
        return f"{mixed:,} of {len(points):,} points have NaN in some of their numbers alone, so that these are of another kind"
    if bad > max(2, FEW * len(points)):
        return (
            f"{bad:,} of {len(points):,} points have coordinates or an intensity that must be {possible.POINT}, "
            f"{possible.INTENSITY}{'' if values is None else _fitting(values)}"
        )
    if len(kept) <= FEW * len(points):
        return f"{missing:,} of {len(points):,} points are NaN, so that there is no cloud; copy it again"
    return ""


def _fitting(values: np.ndarray) -> str:
    """In which form the bytes of a file would make sense, for a sentence."""
    for name, (dtype, columns) in FORMS.items():
        numbers = values[: len(values) // 8 * 8].view(dtype)
        with np.errstate(invalid="ignore"):
            found = _good(numbers[: len(numbers) // columns * columns].reshape(-1, columns))
        if len(values) % (columns * np.dtype(dtype).itemsize) == 0 and found.mean() > 1 - FEW:
            return f", which fits {name} a point" if columns != COLUMNS else f", which fits {name}"
    return ""


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
