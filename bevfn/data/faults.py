"""Key frames of an index held against what is `possible`: all columns at once, a second for nuScenes' training split."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from bevfn.data import possible
from bevfn.data.index import Packed
from bevfn.names import leaves, printable


@dataclass(frozen=True)
class Fault:
    """One kind of value that cannot be, as often as it was found."""

    what: str
    """The kind: "box sizes"."""
    count: int
    first: str
    """A sentence about the first one, which names the key frame, what is there and what must be."""


def refuse(packed: Packed, where: str) -> Packed:
    """The frames as they are. Raises ValueError, a sentence that begins with `where`, for the first kind of impossible value."""
    for fault in find(packed):
        more = f" ({fault.count - 1:,} more like it)" if fault.count > 1 else ""
        raise ValueError(f"{where}: {fault.first}{more}; repair or remove it.")
    return packed


def find(packed: Packed) -> Iterator[Fault]:
    """Every kind of impossible value among the frames."""
    for rule in (_names, _paths, _times, _poses, _sweeps, _cameras, _boxes):
        yield from rule(packed)


def _fault(what: str, bad: np.ndarray, sentence: Callable[[int], str]) -> Iterator[Fault]:
    """bad [n] bool; sentence(i): about row i."""
    if bad.any():
        yield Fault(what, int(bad.sum()), sentence(int(np.argmax(bad))))


def _owner(packed: Packed, table: str, row: int) -> str:
    """The key frame of a row, for a sentence."""
    frame = int(np.searchsorted(packed.columns[f"{table}_start"], row, side="right")) - 1
    return _frame(packed, frame)


def _frame(packed: Packed, i: int) -> str:
    return f"key frame {_text(packed, 'token', i)}"


def _text(packed: Packed, column: str, i: int) -> str:
    return printable(packed.columns[column][i].decode())


def _names(packed: Packed) -> Iterator[Fault]:
    """A key frame is found by its token, and the one before it lies in the same scene, earlier."""
    column = packed.columns
    tokens, times = column["token"], column["timestamp"]
    _, first = np.unique(tokens, return_index=True)
    again = np.ones(len(tokens), dtype=bool)
    again[first] = False
    yield from _fault("tokens", again, lambda i: f"{_frame(packed, i)} is there more than once")
    order = np.argsort(tokens, kind="stable")
    place = np.searchsorted(tokens, column["previous"], sorter=order).clip(max=max(0, len(tokens) - 1))
    before = order[place] if len(tokens) else order
    known = (tokens[before] == column["previous"]) & (column["previous"] != b"")
    other = known & (column["scene"][before] != column["scene"])
    yield from _fault("previous key frames", other, lambda i: f"{_frame(packed, i)} has its `prev` in another scene")
    late = known & ~(times[before] < times)
    yield from _fault("previous key frames", late, lambda i: f"{_frame(packed, i)} is not later than its `prev`")


def _paths(packed: Packed) -> Iterator[Fault]:
    for name, table in (("lidar_path", ""), ("sweep_path", "sweep"), ("camera_path", "camera")):
        paths = packed.columns[name]
        # few are looked at one by one
        odd = np.char.startswith(paths, (b"/")) | (np.char.find(paths, b"..") >= 0) | (np.char.find(paths, b":") == 1)
        odd |= np.char.find(paths, b"\\") >= 0
        odd[odd] = [leaves(path.decode()) for path in paths[odd]]

        def sentence(i: int, name: str = name, table: str = table) -> str:
            owner = _owner(packed, table, i) if table else _frame(packed, i)
            return f"{owner} has the file {_text(packed, name, i)}, which is not below the data set's root"

        yield from _fault("file names", odd, sentence)


def _times(packed: Packed) -> Iterator[Fault]:
    column = packed.columns
    times = column["timestamp"]
    bad = possible.TIME.impossible(times)
    yield from _fault(
        "timestamps", bad, lambda i: f"{_frame(packed, i)} is of the time {times[i]:g} s, not {possible.TIME}"
    )
    owners = np.repeat(np.arange(len(times)), np.diff(column["camera_start"]))
    offsets = column["camera_timestamp"] - times[owners]

    def sentence(i: int) -> str:
        return (
            f"{_camera(packed, i)} was exposed {offsets[i]:g} s after the LiDAR scan, which must be {possible.OFFSET}"
        )

    yield from _fault("camera times", possible.OFFSET.impossible(offsets), sentence)


def _poses(packed: Packed) -> Iterator[Fault]:
    where = (("ego_from_lidar", possible.MOUNT), ("global_from_ego", possible.PLACE))
    for name, limit in where:
        yield from _transforms(packed, name, "", limit, unknown=True)


def _transforms(
    packed: Packed, name: str, table: str, limit: possible.Kind, *, unknown: bool = False
) -> Iterator[Fault]:
    """[n,3,4] transforms: a proper rotation and a translation within the limit; `unknown`: all NaN is possible."""
    values = packed.columns[name]
    told = ~np.isnan(values).all(axis=(1, 2)) if unknown else np.ones(len(values), dtype=bool)
    turned = told & possible.no_rotation(values[:, :, :3])
    moved = told & ~turned & limit.impossible(values[:, :, 3]).any(axis=1)

    def owner(i: int) -> str:
        return _camera(packed, i) if table == "camera" else _owner(packed, table, i) if table else _frame(packed, i)

    yield from _fault(
        "rotations", turned, lambda i: f"{owner(i)}: {name} is no proper rotation (mirrored, scaled or not finite)"
    )
    yield from _fault(
        "translations",
        moved,
        lambda i: f"{owner(i)}: {name} moves by {_list(values[i, :, 3])} m, which must be {limit}",
    )


def _sweeps(packed: Packed) -> Iterator[Fault]:
    lags = packed.columns["sweep_lag"]

    def sentence(i: int) -> str:
        return f"{_owner(packed, 'sweep', i)} has a sweep {lags[i]:g} s before it, which must be {possible.LAG}"

    yield from _fault("sweep lags", possible.LAG.impossible(lags), sentence)
    later = np.append(False, np.diff(lags) <= 0)
    starts = packed.columns["sweep_start"]
    later[starts[starts < len(lags)]] = False

    def order(i: int) -> str:
        pair = f"{lags[i - 1]:g} s and then {lags[i]:g} s before it"
        return f"{_owner(packed, 'sweep', i)} has sweeps {pair}, which must be newest first and each once"

    yield from _fault("order of sweeps", later[: len(lags)], order)
    yield from _transforms(packed, "sweep_transform", "sweep", possible.POSITION)


def _cameras(packed: Packed) -> Iterator[Fault]:
    column = packed.columns
    matrices, sizes = column["intrinsics"], column["camera_size"]

    def intrinsics(i: int) -> str:
        told = f"focal lengths {possible.FOCAL}, a centre {possible.CENTRE} and a last row 0 0 1"
        return f"{_camera(packed, i)} has the intrinsics {_list(matrices[i])}, which must be {told}"

    def size(i: int) -> str:
        return f"{_camera(packed, i)} has images of {_list(sizes[i])} pixels, which must be {possible.SIDE}"

    yield from _fault("intrinsics", possible.no_intrinsics(matrices), intrinsics)
    unknown = (sizes == 0).all(axis=1)
    yield from _fault("image sizes", ~unknown & possible.SIDE.impossible(sizes).any(axis=1), size)
    off = np.zeros(len(sizes))
    off[~unknown] = possible.outside(matrices[~unknown, :2, 2], sizes[~unknown].clip(min=1))

    def centre(i: int) -> str:
        x_y, size = _list(matrices[i, :2, 2]), _list(sizes[i, ::-1])
        return (
            f"{_camera(packed, i)} has its centre of projection at {x_y} in images of {size} pixels (width, height), so that its "
            f"intrinsics are of another size: it may lie outside {possible.OUTSIDE}"
        )

    yield from _fault("centres of projection", possible.OUTSIDE.impossible(off), centre)
    yield from _transforms(packed, "camera_from_lidar", "camera", possible.POSITION)
    yield from _transforms(packed, "ego_from_camera", "camera", possible.MOUNT, unknown=True)
    yield from _transforms(packed, "camera_global_from_ego", "camera", possible.PLACE, unknown=True)


def _camera(packed: Packed, i: int) -> str:
    channel = packed.columns["channel_words"][packed.columns["channel"][i]].decode()
    return f"{_owner(packed, 'camera', i)}, {printable(channel)},"


def _boxes(packed: Packed) -> Iterator[Fault]:
    boxes, points = packed.columns["boxes"], packed.columns["num_lidar_points"]
    rules = (
        ("box sizes", possible.SIZE.impossible(boxes[:, 3:6]).any(axis=1), slice(3, 6), possible.SIZE),
        ("box positions", possible.POSITION.impossible(boxes[:, :3]).any(axis=1), slice(0, 3), possible.POSITION),
        ("box angles", possible.YAW.impossible(boxes[:, 6]), slice(6, 7), possible.YAW),
        ("box velocities", possible.VELOCITY.impossible(boxes[:, 7:9]).any(axis=1), slice(7, 9), possible.VELOCITY),
        ("points in boxes", (points < -1) | (points > possible.POINTS.high), None, possible.POINTS),
    )
    for what, bad, part, limit in rules:

        def sentence(i: int, what: str = what, part: slice | None = part, limit: possible.Kind = limit) -> str:
            value = str(points[i]) if part is None else _list(boxes[i, part])
            return f"{_box(packed, i)} has {what.replace('box ', '')} {value}, which must be {limit}"

        yield from _fault(what, bad, sentence)


def _box(packed: Packed, i: int) -> str:
    """Its key frame, its number there, and its annotation's token where the source has one."""
    start = packed.columns["box_start"]
    frame = int(np.searchsorted(start, i, side="right")) - 1
    token = _text(packed, "annotation", i)
    return f"{_frame(packed, frame)}, box {i - int(start[frame])}{f' (annotation {token})' if token else ''},"


def _list(values: np.ndarray) -> str:
    return " ".join(f"{value:g}" for value in np.asarray(values, dtype=np.float64).ravel())
