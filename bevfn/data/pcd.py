"""Point clouds with a header, `.pcd`, as Autoware writes them: fields of any number type and order, in any of the three
encodings.

Source: Point Cloud Library, "The PCD file format" (v0.7).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

NEEDED = ("x", "y", "z", "intensity")
RINGS = ("ring", "channel")  # of which a file may have one
HEAD = 4096  # bytes, which a header never reaches
LARGEST = 200_000_000  # bytes of all points, as of a file without header (`points.MOST`)
PAGE = 2**16  # bytes of zeros, less than a page of memory, that older PCL writers leave at the end
IDENTITY = ("0", "0", "0", "1", "0", "0", "0")  # VIEWPOINT: a translation, and a quaternion w x y z
KINDS = {"F": "f", "I": "i", "U": "u"}


def read(path: Path, most: int, needed: Sequence[str] = NEEDED) -> np.ndarray:
    """[P,5] float32 x, y, z [m], intensity (0), ring (-1 where the file has none), in file order.

    Raises ValueError, one sentence, for a file without header, without points or with more than `most`, without one of the
    `needed` fields, of another length than its header says, with a VIEWPOINT to move points by, or with a text that
    is no number of its field's type.
    """
    content = path.read_bytes()
    header, data = _header(content, path)
    fields, dtype, count = _layout(header, path)
    if missing := [name for name in needed if name not in fields]:
        raise ValueError(
            f"{path}: the point file has no field {', '.join(missing)}; it has {', '.join(fields)}: write x, y, z [m] and "
            "intensity 0..255 of each point."
        )
    if not count:
        raise ValueError(f"{path}: the point file is empty (0 points); copy it again.")
    if not 0 < count <= most or count * dtype.itemsize > LARGEST:
        raise ValueError(
            f"{path}: the point file's header says {_said(count)} points of {dtype.itemsize:,} bytes, not 1 to {most:,} of at most "
            f"{LARGEST:,} bytes together; copy it again, or write fewer fields."
        )
    rows = _rows(header["DATA"][0], data, dtype, count, path)
    ring = next((rows[name][:, 0] for name in RINGS if name in fields), np.full(count, -1.0))
    none = np.zeros(count)
    return np.column_stack([*(rows[name][:, 0] if name in fields else none for name in NEEDED), ring]).astype("<f4")


def extent(path: Path) -> int:
    """Bytes of a file up to the end of its points: what PCL leaves behind them is not counted. Raises ValueError, one sentence,
    for a file without header or that is shorter than its header says; of a text the file's size."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEAD + 8)
    header, data = _header(head, path)
    _, dtype, count = _layout(header, path)
    kind = header["DATA"][0]
    if kind not in ("binary", "binary_compressed"):
        return size
    packed = kind == "binary_compressed"
    points = 8 + int.from_bytes(data[:4], "little") if packed else count * dtype.itemsize
    _check_length(size - (len(head) - len(data)), points, path)
    return len(head) - len(data) + points


def _header(content: bytes, path: Path) -> tuple[dict[str, list[str]], bytes]:
    """({key: its words}, what follows the header)."""
    found: dict[str, list[str]] = {}
    place = 0
    while "DATA" not in found:
        end = content.find(b"\n", place, HEAD)
        words = content[place:end].decode("ascii", "replace").split() if end >= 0 else []
        if end < 0:
            raise ValueError(
                f"{path}: the point file has no PCD header that ends in DATA; it is damaged, copy it again."
            )
        if words and not words[0].startswith("#"):
            found[words[0].upper()] = words[1:]
        place = end + 1
    return found, content[place:]


def _layout(header: dict[str, list[str]], path: Path) -> tuple[list[str], np.dtype, int]:
    """(names of the fields, dtype of a point, points)."""
    try:
        names = header["FIELDS"]
        sizes, counts = ([int(word) for word in header.get(key, ["1"] * len(names))] for key in ("SIZE", "COUNT"))
        grid = int(header["WIDTH"][0]) * int(header["HEIGHT"][0]) if "WIDTH" in header else None
        count = int(header["POINTS"][0]) if "POINTS" in header or grid is None else grid
        if not len(names) == len(sizes) == len(counts) == len(header["TYPE"]) or not header["DATA"] or min(counts) < 1:
            raise ValueError
        rows = zip(names, header["TYPE"], sizes, counts)
        # several fields may be called "_": padding
        parts = [
            (f"{i} {name}" if name == "_" else name, f"<{KINDS[kind]}{size}", (n,))
            for i, (name, kind, size, n) in enumerate(rows)
        ]
        dtype, view = np.dtype(parts), [float(word) for word in header.get("VIEWPOINT", IDENTITY)]
        if len(view) != len(IDENTITY):
            raise ValueError
    except (KeyError, IndexError, TypeError, ValueError):
        raise ValueError(
            f"{path}: the point file's PCD header does not say FIELDS, SIZE, TYPE, COUNT, POINTS and DATA of its points; it is "
            "damaged, copy it again."
        ) from None
    if grid is not None and grid != count:
        raise ValueError(
            f"{path}: the point file's header says {_said(count)} POINTS, but WIDTH times HEIGHT is {_said(grid)}; it is damaged, copy it "
            "again."
        )
    if any(view[:3]) or any(view[4:]):  # which PCL keeps beside the points, without moving them
        raise ValueError(
            f"{path}: the point file's VIEWPOINT is {' '.join(header['VIEWPOINT'])}, not {' '.join(IDENTITY)}, so it is not "
            "certain in which frame its points are; write them in the LiDAR's frame, with that VIEWPOINT."
        )
    return names, dtype, count


def _said(count: int) -> str:
    """A number of a header, for a sentence."""
    return f"{count:,}" if abs(count) < 10**18 else f"{str(count)[:9]}..."


def _rows(encoding: str, data: bytes, dtype: np.dtype, count: int, path: Path) -> np.ndarray:
    """[P] of the dtype."""
    if encoding == "ascii":
        return _ascii(data, dtype, count, path)
    if encoding == "binary_compressed":
        return _compressed(data, dtype, count, path)
    if encoding != "binary":
        raise ValueError(
            f"{path}: the point file's DATA is {encoding[:40]!r}; write ascii, binary or binary_compressed."
        )
    _check_length(len(data), count * dtype.itemsize, path, data)
    return np.frombuffer(data, dtype, count)


def _ascii(data: bytes, dtype: np.dtype, count: int, path: Path) -> np.ndarray:
    assert dtype.names is not None
    wide = sum(dtype[name].shape[0] for name in dtype.names)
    try:
        values = np.array(data.split(), dtype=np.float64).reshape(count, wide)  # reads nan too
    except ValueError:
        raise ValueError(
            f"{path}: the point file is not {count:,} lines of {wide} numbers, as its header says; it is damaged, copy it again."
        ) from None
    rows = np.zeros(count, dtype)
    place = 0
    for name in dtype.names:
        size = dtype[name].shape[0]
        told = values[:, place : place + size]
        if (odd := ~_fits(told, dtype[name].base)).any():
            raise ValueError(
                f"{path}: {name} of a point is {told[odd][0]:g}, which the field's type in the header, {dtype[name].base.name}, "
                "cannot hold; write another TYPE and SIZE."
            )
        rows[name] = told
        place += size
    return rows


def _fits(values: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Which of some float64 numbers a type holds without wrapping or cutting them; bool of their shape."""
    if kind.kind == "f":
        return ~(np.isfinite(values) & (np.abs(values) > np.finfo(kind).max))
    limits = np.iinfo(kind)
    return (values >= float(limits.min)) & (values < float(limits.max + 1)) & (values == np.floor(values))


def _compressed(data: bytes, dtype: np.dtype, count: int, path: Path) -> np.ndarray:
    """Field after field instead of point after point, in LZF; PCL leaves out padding that the header still names."""
    assert dtype.names is not None
    packed, whole = (int.from_bytes(data[i : i + 4], "little") for i in (0, 4))
    _check_length(len(data), 8 + packed, path, data)
    named = [name for name in dtype.names if not name.endswith(" _")]
    names = named if whole == count * sum(dtype[name].itemsize for name in named) else dtype.names
    if whole != count * sum(dtype[name].itemsize for name in names):
        raise ValueError(
            f"{path}: the point file's points have {whole:,} bytes uncompressed, but its header says {count:,} of "
            f"{dtype.itemsize:,}; it is damaged, copy it again."
        )
    try:
        raw = _unpacked(data[8 : 8 + packed], whole)
    except IndexError:
        raise ValueError(f"{path}: the point file's compressed points are damaged; copy it again.") from None
    rows, place = np.zeros(count, dtype), 0
    for name in names:
        field = dtype[name]
        rows[name] = np.frombuffer(raw, field.base, count * field.shape[0], place).reshape(count, *field.shape)
        place += count * field.itemsize
    return rows


def _unpacked(data: bytes, size: int) -> bytes:
    """LZF: runs of new bytes, and copies of what came before. Raises IndexError for what is none."""
    made, place = bytearray(), 0
    while place < len(data):
        control = data[place]
        place += 1
        if control < 32:
            made += data[place : place + control + 1]
            place += control + 1
            continue
        length = control >> 5
        if length == 7:
            length += data[place]
            place += 1
        back, length = ((control & 31) << 8) + data[place] + 1, length + 2
        place += 1
        if back > len(made):
            raise IndexError
        copied = made[-back:][:length]
        made += (copied * -(-length // back))[:length]  # it may copy what it just wrote
        if len(made) > size:
            raise IndexError
    if len(made) != size:
        raise IndexError
    return bytes(made)


def _check_length(there: int, wanted: int, path: Path, data: bytes = b"") -> None:
    """Raises ValueError unless so many bytes are there; zeros behind them, as far as `data` tells, are PCL's."""
    if there < wanted or there - wanted > PAGE or any(data[wanted:]):
        what = "truncated" if there < wanted else "damaged"
        raise ValueError(
            f"{path}: the point file has {there:,} bytes behind its header, which says {wanted:,}; it is {what}, copy it again."
        )
