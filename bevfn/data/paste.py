"""GT paste: a database of annotated objects with their points, and objects of it put into other frames.

The database is a folder: `objects.npz` (arrays, a row per object) and the one file of all points that it names. Objects
are stored relative to their box's bottom centre, with ten sweeps and their time lag, and are pasted where they were, with
as many sweeps as the frame is read with.

Source: SECOND (Yan et al. 2018); mmdetection3d create_gt_database, DataBaseSampler, ObjectSample.
"""

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from bevfn import boxes as overlap
from bevfn import host, waiting
from bevfn.data import annotations, building, points, possible, sweeps
from bevfn.data.index import Frame, Index
from bevfn.files import checksum, write_atomically, writing
from bevfn.names import file_name, sentence

OBJECTS = "objects.npz"
SWEEPS = 10  # besides the key frame
IGNORED = "barrier"  # the last of upstream's classes
FRAMES = 32  # of one part, the unit of work that a stopped build does not lose
FORMAT = 3  # raise it when the files' meaning changes


def _quotas() -> dict[str, int]:
    return {
        "car": 2,
        "truck": 3,
        "construction_vehicle": 7,
        "bus": 4,
        "trailer": 6,
        "barrier": 2,
        "motorcycle": 6,
        "bicycle": 6,
        "pedestrian": 2,
        "traffic_cone": 2,
    }


@dataclass(frozen=True)
class Config:
    """What is pasted. Defaults: mmdetection3d's on nuScenes."""

    quotas: dict[str, int] = field(default_factory=_quotas)
    """Objects of a class that a frame should have: as many are pasted as its valid boxes fall short of it."""


@dataclass(frozen=True)
class Making:
    """How a database is made, which it remembers. Defaults: as the published recipe's was."""

    published_sweeps: bool = True
    """Sweeps are moved as upstream does (`sweeps.motion`)."""
    published_paste: bool = True
    """Objects of no class (police cars, debris, bicycle racks) are stored as barriers where that is a class: upstream takes
    their label, -1, for an index into its classes, of which barrier is the last."""

    def __str__(self) -> str:
        """The flags of `bevfn data prepare` that make one so."""
        return " ".join(_flag(name, value) for name, value in asdict(self).items())


def _flag(name: str, value: bool) -> str:
    return f"--{'' if value else 'no-'}{name.replace('_', '-')}"


@dataclass(frozen=True)
class Database:
    """N objects; small enough to send to other processes, the points stay in their file."""

    points_path: Path
    """Little-endian float32, 5 numbers a point: x, y, z relative to the box's bottom centre (not turned), intensity,
    time lag [s]."""
    boxes: np.ndarray
    """N 9 float32, bottom centre, in the LiDAR frame of the frame it comes from."""
    labels: np.ndarray
    """N int16, into class_names."""
    starts: np.ndarray
    """N + 1 int64: object i has the points [starts[i], starts[i + 1]), those of newer scans first."""
    scans: np.ndarray
    """N SWEEPS + 1 int32: object i's points of the key frame and of its k newest sweeps are the first scans[i, k]."""
    difficulty: np.ndarray
    """N int32; 0 on nuScenes."""
    tokens: np.ndarray
    """N bytes, the frames that they come from."""
    class_names: tuple[str, ...]
    making: Making
    key: str
    """Of everything that decides what it holds, but for the point files' contents."""
    min_points: int
    """What is pasted has as many points."""
    usable: dict[str, np.ndarray]
    """Class name to the objects that may be pasted: enough points, difficulty not -1."""
    crc: int | None = None
    """CRC-32 of the points' file; None of a database of an older bevfn."""

    def __len__(self) -> int:
        return len(self.boxes)

    def points(self, i: int, sweeps: int = SWEEPS) -> np.ndarray:
        """Points [P,5] float32 of object i where it was, in the LiDAR frame, seen by the key frame and the newest `sweeps`
        sweeps. ValueError if the file is truncated or damaged."""
        count = int(self.scans[i, min(sweeps, SWEEPS)])
        offset = int(self.starts[i]) * points.BYTES
        values = np.fromfile(self.points_path, dtype="<f4", count=count * points.COLUMNS, offset=offset)
        if len(values) != count * points.COLUMNS:
            raise ValueError(f"{self.points_path}: object {i} is cut off; build the database again.")
        cloud = values.reshape(count, points.COLUMNS)
        limits = (possible.POINT, possible.POINT, possible.POINT, possible.INTENSITY, possible.LAGS)
        if any(limit.impossible(column).any() for limit, column in zip(limits, cloud.T)):
            raise ValueError(
                f"{self.points_path} is damaged: object {i} has impossible points; build the database again."
            )
        cloud[:, :3] += self.boxes[i, :3]
        return cloud


def folder(index: Index) -> Path:
    """Where `bevfn data prepare` puts the GT-paste database of a split."""
    return building.place(index.root, "bevfn_gt_database") / index.split


def read(folder: Path, *, min_points: int = 5, making: Making | None = None, index: Index | None = None) -> Database:
    """The database that `build` made in `folder`; objects with fewer points than `min_points` are not pasted.

    Raises ValueError if there is none, if it is damaged, or if it was made otherwise than `making` says, or of other key
    frames than those of `index`.
    """
    path = Path(folder) / OBJECTS
    if not path.is_file():
        raise ValueError(f"{path} does not exist; build the GT-paste database with `bevfn data prepare`.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        points_path = path.parent / file_name(str(arrays["points_file"]))  # beside it, whatever it says
        boxes, labels, starts, scans = (arrays[name] for name in ("boxes", "labels", "starts", "scans"))
        made, key = Making(**json.loads(str(arrays["making"]))), str(arrays["key"])
        origin = building.Origin(**json.loads(str(arrays["made_of"])))
        difficulty, tokens = arrays["difficulty"], arrays["tokens"]
        class_names = tuple(arrays["class_names"].tolist())
        crc = int(arrays["crc"]) if "crc" in arrays else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a GT-paste database ({error}); delete it and build it again.") from error
    size = points_path.stat().st_size if points_path.is_file() else -1
    if size != int(starts[-1]) * points.BYTES:
        raise ValueError(f"{points_path} is missing or truncated; delete {path} and build the database again.")
    if making is not None:
        _check_making(path.parent, made, making)
    if index is not None:
        origin.check(path, index, made_of(index))
    good = (np.diff(starts) >= min_points) & (difficulty != -1)
    usable = {name: np.flatnonzero(good & (labels == label)) for label, name in enumerate(class_names)}
    return Database(
        points_path, boxes, labels, starts, scans, difficulty, tokens, class_names, made, key, min_points, usable, crc
    )


def damaged(database: Database) -> str:
    """What is wrong with the points of a database that was read, by their checksum, or without one object by object; empty if
    nothing."""
    if database.crc is not None:
        same = checksum(database.points_path)[1] == database.crc
        return "" if same else f"{database.points_path} is damaged: its CRC is not that of what was written"
    for i in range(len(database)):
        try:
            database.points(i)
        except ValueError as error:
            return sentence(error)
    return ""


def _check_making(folder: Path, made: Making, wanted: Making) -> None:
    for name, was in asdict(made).items():
        if was != getattr(wanted, name):
            have, want = _flag(name, was), _flag(name, not was)
            raise ValueError(
                f"the GT-paste database {folder} was made with {have}, but the run has {want}; make it again with "
                f"`bevfn data prepare ROOT {want}`, or train with {have}."
            )


# ------------------------------------------------------------------------------------------------------------- pasting


def sample(
    database: Database,
    boxes: np.ndarray,
    labels: np.ndarray,
    class_names: tuple[str, ...],
    config: Config,
    generator: np.random.Generator,
    sweeps: int = SWEEPS,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Objects for a frame with boxes [G,9] and labels [G]: (boxes [S,9], labels [S], points [P,5]).

    For every class, in the quotas' order, as many objects as the frame falls short of are drawn without replacement.
    Then, one by one in that order, an object is dropped that overlaps, seen from above, a box of the frame, an object
    kept before, or one of its own class that comes later (so upstream: of two that collide the later one stays).
    Boxes of other classes (labels -1) are in the way as well.

    sweeps: objects have their key frame's points and those of their newest `sweeps` sweeps, the frame's own being no
        older; what has too few of them is not drawn.

    Raises ValueError if a quota's class is not in class_names.
    """
    drawn = []
    for name, quota in config.quotas.items():
        if name not in class_names:
            raise ValueError(f"GT paste has a quota for {name!r}, which is none of {', '.join(class_names)}.")
        found = database.usable.get(name, np.zeros(0, dtype=np.int64))
        if sweeps < SWEEPS:
            found = found[database.scans[found, sweeps] >= database.min_points]
        missing = max(0, quota - int((labels == class_names.index(name)).sum()))
        drawn.append(generator.choice(found, min(missing, len(found)), replace=False))
    candidates = np.concatenate([*drawn, np.zeros(0, dtype=np.int64)]).astype(np.int64)  # S
    kept = candidates[_free(boxes, database.boxes[candidates], [len(group) for group in drawn])]
    clouds = [database.points(i, sweeps) for i in kept]
    new_labels = np.array([class_names.index(database.class_names[k]) for k in database.labels[kept]], dtype=np.int64)
    return database.boxes[kept], new_labels, np.concatenate([np.zeros((0, points.COLUMNS), np.float32), *clouds])


def insert(cloud: np.ndarray, boxes: np.ndarray, pasted: np.ndarray) -> np.ndarray:
    """The scene's points [P,5] without those inside the pasted boxes [S,9], behind the pasted points."""
    xyz = np.ascontiguousarray(cloud[:, :3].T)  # 3 P
    stays = np.ones(len(cloud), dtype=bool)
    for box in boxes:
        stays[points.in_box(xyz, box)] = False
    return np.concatenate([pasted, cloud[stays]])


def _free(boxes: np.ndarray, candidates: np.ndarray, groups: list[int]) -> np.ndarray:
    """[S] bool: which candidates [S,9], in consecutive groups of these sizes, survive the collision test."""
    G = len(boxes)
    everything = torch.from_numpy(np.concatenate([boxes, candidates]).astype(np.float64))
    collides = (overlap.rotated_overlap_bev(everything[G:], everything) > 0).numpy()  # S G+S
    present = np.arange(len(everything)) < G
    start = 0
    for size in groups:
        present[G + start : G + start + size] = True
        for i in range(start, start + size):
            others = collides[i] & present
            others[G + i] = False
            present[G + i] = not others.any()
        start += size
    return present[G:]


# ------------------------------------------------------------------------------------------------------------ building


def build(
    index: Index,
    out: Path,
    *,
    class_names: tuple[str, ...],
    making: Making | None = None,
    workers: int = 1,
    progress: bool = True,
) -> Database:
    """Makes the database of all valid boxes of `class_names` in `index`, or returns the one that is there already.

    making: by default as published; a database that was made otherwise is made again.

    A stopped or killed build goes on where it was: finished parts of FRAMES frames lie in `out/parts` until the end
    (twice the database's size on disk for a moment). `objects.npz` is written last, so that there is a whole database
    or none, or the previous one. The bytes do not depend on the number of workers (processes).

    Raises ValueError if a point file is damaged, if there is no frame, or if another build writes to `out`.
    """
    out, making = Path(out), making or Making()
    if len(index) == 0:
        raise ValueError(f"{index.root} ({index.version}, split {index.split!r}) has no frames to build a database of.")
    with building.only_writer(out):
        origin = made_of(index)
        key = _fingerprint(origin, class_names, making)
        if not _is_built(out, key):
            ranges = [range(i, min(i + FRAMES, len(index))) for i in range(0, len(index), FRAMES)]
            folder = out / "parts" / key
            parts = [folder / f"{positions.start:07d}.npz" for positions in ranges]
            todo = [(part, positions) for part, positions in zip(parts, ranges) if not part.is_file()]
            done = len(index) - sum(len(positions) for _, positions in todo)
            with waiting.counted("GT-paste database", len(index), done=done, quiet=not progress) as advance:
                for frames in host.unordered(_make_part, _jobs(index, todo, class_names, making), workers):
                    advance(frames)
            _merge(out, key, parts, class_names, making, origin)
        made = read(out)
        shutil.rmtree(out / "parts", ignore_errors=True)
        for stale in set(out.glob("points-*")) - {made.points_path}:
            stale.unlink()
    return made


def _jobs(
    index: Index, todo: list[tuple[Path, range]], class_names: tuple[str, ...], making: Making
) -> Iterator[tuple]:
    for part, positions in todo:
        yield part, [index[i] for i in positions], index.root, class_names, making


def _make_part(part: Path, frames: list[Frame], root: Path, class_names: tuple[str, ...], making: Making) -> int:
    """Writes the objects of some frames; returns how many frames."""
    columns: dict[str, list[np.ndarray]] = {
        "boxes": [np.zeros((0, 9), np.float32)],
        "labels": [np.zeros(0, np.int16)],
        "scans": [np.zeros((0, SWEEPS + 1), np.int32)],
        "tokens": [np.zeros(0, "S1")],
        "points": [np.zeros((0, points.COLUMNS), np.float32)],
    }
    for frame in frames:
        boxes, labels, scans, clouds = _objects(frame, root, class_names, making)
        columns["boxes"].append(boxes)
        columns["labels"].append(labels.astype(np.int16))
        columns["scans"].append(scans)
        columns["tokens"].append(np.full(len(boxes), frame.token.encode()))
        columns["points"] += clouds
    write_atomically(part, _npz({name: np.concatenate(values) for name, values in columns.items()}))
    return len(frames)


def _objects(
    frame: Frame, root: Path, class_names: tuple[str, ...], making: Making
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """(boxes [n,9], labels [n], scans [n,SWEEPS + 1], points [P,5] of each) of the frame's valid annotations."""
    scans, _ = sweeps.scans(frame, root, count=SWEEPS, published=making.published_sweeps)
    cloud = np.concatenate(scans)
    ends = np.cumsum([len(scan) for scan in scans] + [0] * (SWEEPS + 1 - len(scans)))
    xyz = np.ascontiguousarray(cloud[:, :3].T)  # 3 P
    boxes, labels = annotations.valid(frame, class_names)
    if making.published_paste and IGNORED in class_names:
        labels[labels < 0] = class_names.index(IGNORED)
    boxes, labels = boxes[labels >= 0], labels[labels >= 0]
    counts = np.zeros((len(boxes), SWEEPS + 1), dtype=np.int32)
    clouds = []
    for i, box in enumerate(boxes):
        rows = points.in_box(xyz, box)
        counts[i] = np.searchsorted(rows, ends)
        clouds.append(cloud[rows])
        clouds[i][:, :3] -= box[:3]
    return boxes, labels, counts, clouds


def _merge(
    out: Path, key: str, parts: list[Path], class_names: tuple[str, ...], making: Making, origin: building.Origin
) -> None:
    """All parts as one file of points and, when that is on disk, the arrays that name it."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("boxes", "labels", "scans", "tokens")}
    points_path = out / f"points-{key}.bin"
    temporary = points_path.with_suffix(".part")
    try:
        with writing(points_path), open(temporary, "wb") as file:
            for part in parts:
                with np.load(part, allow_pickle=False) as arrays:
                    for name, values in columns.items():
                        values.append(arrays[name])
                    file.write(arrays["points"].tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, points_path)
    finally:
        temporary.unlink(missing_ok=True)
    arrays = {name: np.concatenate(values) for name, values in columns.items()}
    arrays["starts"] = np.concatenate([[0], np.cumsum(arrays["scans"][:, -1], dtype=np.int64)])
    arrays["difficulty"] = np.zeros(len(arrays["boxes"]), dtype=np.int32)
    arrays["crc"] = np.uint32(checksum(points_path)[1])
    arrays |= {"points_file": np.str_(points_path.name), "class_names": np.array(class_names), "key": np.str_(key)}
    arrays |= {name: np.str_(json.dumps(asdict(how))) for name, how in (("making", making), ("made_of", origin))}
    write_atomically(out / OBJECTS, _npz(arrays))


def _is_built(out: Path, key: str) -> bool:
    if not (out / OBJECTS).is_file():
        return False
    try:
        made = read(out)
        return made.key == key and not damaged(made)
    except ValueError:  # damaged: build it again
        return False


def made_of(index: Index) -> building.Origin:
    """Everything of a split that decides what the database holds, but for the point files' contents."""
    numbers = ("sweep_transform", "sweep_lag", "box_start", "boxes", "names_words", "names", "valid")
    return building.Origin.of(index, ("token", "lidar_path", "sweep_start", "sweep_path"), numbers)


def _fingerprint(origin: building.Origin, class_names: tuple[str, ...], making: Making) -> str:
    what = [FORMAT, FRAMES, list(class_names), asdict(making), origin.files, origin.numbers]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()
