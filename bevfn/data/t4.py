"""A T4 data set to an Index: TIER IV's nuScenes-like format, read from its JSON tables, with annotations as AWML takes them.

The LiDAR is LIDAR_TOP, or LIDAR_CONCAT, several LiDARs as one cloud in base_link (x forward, y left, z up, on the ground under
the rear axle): then the LiDAR's frame is the vehicle's. Every camera of the sensor table is there, known names first.

Sources: tier4/t4-devkit v0.8.0 (velocities, links, mandatory tables), tier4/AWML create_data_t4dataset.py (fact sheet
t4dataset; rules in `t4_classes`).
"""

import hashlib
import json
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bevfn import host, waiting
from bevfn.data import faults, points, possible, rows, stored, t4_classes, t4_folders, tables
from bevfn.data.index import CAMERAS, Frame, Index, Packed, inverse, join, pack
from bevfn.data.rows import Impossible, Row
from bevfn.data.t4_classes import Objects, Rules
from bevfn.data.t4_folders import LIDARS, TABLES, Scene
from bevfn.files import read_json
from bevfn.names import leaves, printable

VERSION = "T4"  # of an Index
ANNOTATIONS = "sample_annotation"
APART = 1.5  # s, at most, between two annotations that a velocity is measured from; twice that over both neighbours
LEVELS = {"v80-100": "full", "v60-80": "most", "v40-60": "partial", "v0-40": "none"}  # other names of visibilities
DESCRIBED = 2**20  # bytes of a point cloud's description, at most; it has a few LiDARs
FORMAT = 4  # of the cache file
NO_FRAMES = pack(())
SCHEMA = tables.Schema(
    ends=(*tables.ENDS, "sample_data.sample_token"),  # which only key frames have
    fields=tables.FIELDS | {"map": {"log_tokens": list}, "attribute": {"name": str}},
    mend="the tables are incomplete or of another version of the T4 format than t4-devkit 0.8 reads; copy or convert them again",
)


@dataclass(frozen=True)
class _Read:
    """A scene's frames, and what was left out of them."""

    frames: Packed
    categories: Counter[str]
    """Annotations by raw category."""
    blind: int
    """Key frames without a LiDAR scan."""
    lost_maps: tuple[str, ...]


def index(
    root: Path,
    split: str = t4_folders.ALL,
    *,
    revision: str | None = None,
    rules: Rules | None = None,
    cache: Path | None = None,
    workers: int = 1,
) -> Index:
    """The key frames of a split, scene after scene by folder, each in the order of its sample table.

    root: a scene's folder, a folder above scenes, or a list of scenes as AWML has (see `t4_folders`); split: of its lists, or
    `all`; revision: of scenes that have several, None for the highest that a list does not name; rules: what becomes of
    annotations, None for AWML's; cache: see `nuscenes.index`; workers: processes that build.

    Raises ValueError, one sentence, for a wrong root, revision or split, broken tables, and values that are not possible, which
    names the annotation or key frame.
    """
    rules = rules or Rules()
    packed = faults.refuse(frames(root, split, revision=revision, rules=rules, cache=cache, workers=workers), f"{root}")
    return Index(t4_folders.base(root), VERSION, split, packed, class_names=rules.classes, metric="t4")


def frames(
    root: Path,
    split: str = t4_folders.ALL,
    *,
    revision: str | None = None,
    rules: Rules | None = None,
    cache: Path | None = None,
    workers: int = 1,
    keep: bool = True,
) -> Packed:
    """What `index` has, whatever its values are: for `bevfn data check`, which writes nothing (`keep` False)."""
    root, rules = Path(root), rules or Rules()
    scenes = t4_folders.chosen(root, split, revision)
    base = t4_folders.base(root)
    header = _header(base, scenes, rules)
    build = partial(_build, base, scenes, rules, split, workers)
    return stored.get(stored.places(base, cache), _name(root, split), header, build, keep=keep)


def has_index(root: Path, split: str, revision: str | None = None) -> bool:
    """Whether `index` would read a cached file."""
    base = t4_folders.base(root)
    header = _header(base, t4_folders.chosen(root, split, revision), Rules())
    return stored.read(stored.places(base), _name(root, split), header) is not None


def _name(root: Path, split: str) -> str:
    """Lists have splits of their own."""
    return f"index-t4-{root.stem}-{split}.npz" if t4_folders.is_list(root) else f"index-t4-{split}.npz"


def _header(base: Path, scenes: list[Scene], rules: Rules) -> stored.Header:
    """A digest, as thousands of scenes have tens of thousands of tables."""
    digest = hashlib.sha256(
        repr((rules.classes, sorted(rules.mapping.items()), rules.merged, sorted(rules.dropped))).encode()
    )
    for scene in scenes:
        files = {name: base / scene.folder / TABLES / f"{name}.json" for name in SCHEMA.tables}
        digest.update(json.dumps([scene.folder, stored.stats(files)]).encode())
    return {"format": FORMAT, "tables": digest.hexdigest()}


# --- building ---


def _build(base: Path, scenes: list[Scene], rules: Rules, split: str, workers: int) -> Packed:
    jobs = [(i, base, scene, rules) for i, scene in enumerate(scenes)]
    done = host.unordered(_numbered, jobs, min(workers, len(jobs)))
    found = {}
    with waiting.counted(f"index of T4 {split}", len(jobs), "scenes") as advance:
        for number, read in done:
            found[number] = read
            advance(1)
    reads = [found[i] for i in range(len(scenes))]
    packed = _distinct(join(read.frames for read in reads))
    _tell(base, scenes, reads, rules)
    if not len(packed):
        raise ValueError(
            f"{base}: the split {split!r} has no key frame with a scan of {' or '.join(LIDARS)}; copy the data set again."
        )
    return packed


def _distinct(packed: Packed) -> Packed:
    """With tokens below their scene where scenes share some: T4's need to be distinct in a scene alone, and writers that make them
    of the scene's name repeat them in scenes of one name."""
    columns = packed.columns
    if len(np.unique(columns["token"])) == len(packed):
        return packed
    scenes = np.char.add(columns["scene_words"][columns["scene"]], b"/")
    below = {
        name: np.where(columns[name] == b"", b"", np.char.add(scenes, columns[name])) for name in ("token", "previous")
    }
    return Packed({**columns, **below})


def _tell(base: Path, scenes: list[Scene], reads: list[_Read], rules: Rules) -> None:
    """Warns of what is left out or missing; raises ValueError if no annotation's category is known."""
    counts = sum((read.categories for read in reads), Counter[str]())
    foreign = {name: count for name, count in counts.items() if not is_known(name, rules)}
    names = ", ".join(printable(name) for name in list(foreign)[:5])
    if foreign and len(foreign) == len(counts):
        raise ValueError(f"{base}: its categories ({names}) are none of AWML's, so no object could be learned.")
    if foreign:
        warnings.warn(
            f"{base}: {sum(foreign.values()):,} of {sum(counts.values()):,} annotations are left out, since their categories "
            f"are none of AWML's ({names}).",
            stacklevel=5,
        )
    if blind := sum(read.blind for read in reads):
        warnings.warn(
            f"{base}: {blind:,} key frames are left out, which have no scan of {' or '.join(LIDARS)}.", stacklevel=5
        )
    if lost := [scene.path(path) for scene, read in zip(scenes, reads) for path in read.lost_maps]:
        warnings.warn(
            f"{base}: {printable(lost[0])} does not exist, which map.json names ({len(lost):,} such); detection does without maps.",
            stacklevel=5,
        )


def is_known(category: str, rules: Rules) -> bool:
    """Whether a raw category is in the mapping, or is called as one of its names."""
    return category in rules.mapping or category in rules.mapping.values() or category in rules.classes


def _numbered(i: int, base: Path, scene: Scene, rules: Rules) -> tuple[int, _Read]:
    return i, _read(base, scene, rules)


def read_tables(folder: Path) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """(the scene's tables that can be read, table: what is wrong with it)."""
    found, problems = tables.read_folder(folder / TABLES, SCHEMA)
    if "scene" in found and len(found["scene"]) != 1:
        problems.setdefault(
            "scene",
            f"{folder / TABLES}/scene.json has {len(found['scene'])} rows, where T4 has one scene a folder; {SCHEMA.mend}.",
        )
    valid = (
        f"{printable(row['token'])}, {printable(row['is_valid'])}"
        for row in found.get("sample_data", ())
        if not isinstance(row.get("is_valid", True), bool)
    )
    if (odd := next(valid, None)) is not None:
        where = f"{folder / TABLES}/sample_data.json"
        problems.setdefault(
            "sample_data", f"{where}: is_valid of a row is no true or false (the first is of {odd}); {SCHEMA.mend}."
        )
    return found, problems


def _read(base: Path, scene: Scene, rules: Rules) -> _Read:
    """A scene's key frames. Raises ValueError."""
    folder = base / scene.folder
    found, problems = read_tables(folder)
    if problems:
        raise ValueError(next(iter(problems.values())))
    own = Tables(found)
    try:
        made = [_frame(own, scene, sample, rules) for sample in found["sample"]]
        packed = pack(frame for frame in made if frame is not None)
        _check_clouds(own, folder)
    except Impossible as error:
        raise ValueError(f"{folder}: {error}.") from None
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{folder}: {type(error).__name__} {printable(error)}: {SCHEMA.mend}.") from error
    maps = [str(row.get("filename") or "") for row in found["map"]]
    return _Read(
        frames=packed,
        categories=Counter(own.category(row) for row in found[ANNOTATIONS]),
        blind=sum(frame is None for frame in made),
        lost_maps=tuple(path for path in maps if path and not (folder / path).exists()),
    )


class Tables:
    """A scene's rows by token, and by what they belong to; made of tables without problems."""

    def __init__(self, found: dict[str, list[dict]]) -> None:
        self.rows = {name: {row["token"]: row for row in of} for name, of in found.items()}
        sensors = {row["token"]: row["channel"] for row in found["sensor"]}
        self.channels = {row["token"]: sensors[row["sensor_token"]] for row in found["calibrated_sensor"]}
        others = [row["channel"] for row in found["sensor"] if row.get("modality") == "camera"]
        self.cameras = tuple(dict.fromkeys(name for name in (*CAMERAS, *others) if name in sensors.values()))
        self.recorded: dict[str, dict[str, Row]] = defaultdict(dict)
        for row in found["sample_data"]:
            if row["is_key_frame"] and row.get("is_valid") is not False:
                self.recorded[row["sample_token"]][self.channel(row)] = row
        self.annotated: dict[str, list[Row]] = defaultdict(list)
        for row in found[ANNOTATIONS]:
            self.annotated[row["sample_token"]].append(row)

    def get(self, table: str, token: str) -> Row:
        """The row of that token."""
        return self.rows[table][token]

    def channel(self, data: Row) -> str:
        """Of a row of sample_data."""
        return self.channels[data["calibrated_sensor_token"]]

    def category(self, annotation: Row) -> str:
        """The raw category of an annotation."""
        return self.get("category", self.get("instance", annotation["instance_token"])["category_token"])["name"]

    def previous(self, scan: Row) -> Row | None:
        """The valid scan before, of the same sensor. Raises Impossible."""
        after = scan
        while after.get("prev"):
            before = self.get("sample_data", after["prev"])
            # ever earlier, also where rows are passed over: rows in a circle end here
            if self.channel(before) != self.channel(after) or before["timestamp"] >= after["timestamp"]:
                raise Impossible(
                    f"row {printable(after['token'])} of sample_data.json has its `prev` in another sensor or time"
                )
            if before.get("is_valid") is not False:
                return before
            after = before
        return None


def _frame(own: Tables, scene: Scene, sample: Row, rules: Rules) -> Frame | None:
    """One row of the sample table; None without a LiDAR scan."""
    recorded = own.recorded[sample["token"]]
    lidar = next((recorded[channel] for channel in LIDARS if channel in recorded), None)
    if lidar is None:
        return None
    rows.check_times(own.get, sample, lidar)
    ego_from_lidar, global_from_ego = rows.poses(own.get, lidar)
    lidar_from_global = inverse(global_from_ego @ ego_from_lidar)
    seen = {
        channel: rows.camera(own.get, recorded[channel], lidar_from_global)
        for channel in own.cameras
        if channel in recorded
    }
    swept = rows.sweeps(own.get, lidar, lidar_from_global, own.previous)
    return Frame(
        token=sample["token"],
        scene=scene.name,  # names of scene.json may be those of other scenes
        previous=sample.get("prev") or "",
        timestamp=1e-6 * lidar["timestamp"],
        lidar_path=scene.path(lidar["filename"]),
        ego_from_lidar=ego_from_lidar,
        global_from_ego=global_from_ego,
        sweeps=tuple(replace(sweep, path=scene.path(sweep.path)) for sweep in swept),
        cameras={channel: replace(camera, path=scene.path(camera.path)) for channel, camera in seen.items()},
        **_annotations(own, own.annotated[sample["token"]], lidar_from_global, rules),
    )


def _annotations(own: Tables, found: list[Row], lidar_from_global: np.ndarray, rules: Rules) -> dict[str, Any]:
    """The Frame's fields of boxes: merged ones first, then in the order of the table."""
    rows.check_links(own.get, ANNOTATIONS, found)
    velocities = np.array([velocity(own.get, row) for row in found]).reshape(-1, 3)
    boxes = rows.boxes_of(ANNOTATIONS, found, velocities, lidar_from_global) if found else np.zeros((0, 9))
    seen = rows.counts(ANNOTATIONS, found, "num_lidar_pts")
    attributes = tuple(tuple(own.get("attribute", token)["name"] for token in row["attribute_tokens"]) for row in found)
    made = t4_classes.merge(
        Objects(
            boxes=boxes[:, :7],
            velocities=t4_classes.clipped(boxes[:, 7:]),
            points=seen,
            categories=tuple(own.category(row) for row in found),
            attributes=attributes,
            valid=t4_classes.lidar_valid(seen),
        ),
        rules,
    )
    levels = [_level(own, found[i]) for i in made.sources]
    return {
        "boxes": np.concatenate([made.boxes, made.velocities], axis=1),
        "names": tuple(rules.classes[label] if label >= 0 else "" for label in t4_classes.labels(made, rules)),
        "valid": t4_classes.lidar_valid(made.points),  # what training asks, of merged ones too
        "num_lidar_points": made.points,
        "attributes": tuple(", ".join(names) for names in made.attributes),
        "visibility": tuple(levels),
        "annotations": tuple(found[i]["token"] for i in made.sources),
        "categories": made.categories,
    }


def _level(own: Tables, row: Row) -> str:
    level = own.get("visibility", row["visibility_token"]).get("level") if row.get("visibility_token") else ""
    return LEVELS.get(str(level), str(level))


def velocity(get: rows.Get, row: Row) -> np.ndarray:
    """[3] m/s, global, of an annotation: its own, else measured between its neighbours (itself, at an end); NaN where it is the
    only one, or they are too far apart. Raises Impossible."""
    if row.get("velocity") is not None:
        own = rows.numbers(ANNOTATIONS, [row], "velocity", (3,))[0]
        if possible.VELOCITY.impossible(own).any():
            told = " ".join(f"{value:g}" for value in own)
            raise Impossible(
                f"annotation {printable(row['token'])} has the velocity {told}, which must be {possible.VELOCITY}"
            )
        return own
    neighbours = [get(ANNOTATIONS, row[name]) if row.get(name) else row for name in ("prev", "next")]
    first, last = neighbours
    if first is last:
        return np.full(3, np.nan)
    places = rows.numbers(ANNOTATIONS, neighbours, "translation", (3,))
    seconds = 1e-6 * np.diff([get("sample", one["sample_token"])["timestamp"] for one in neighbours])[0]
    if seconds <= 0:
        raise Impossible(f"annotation {printable(row['token'])} has its `prev` and `next` in the wrong order of time")
    limit = APART if row in neighbours else 2 * APART
    return (places[1] - places[0]) / seconds if seconds <= limit else np.full(3, np.nan)


def _check_clouds(own: Tables, folder: Path) -> None:
    """Raises Impossible unless points have the usual number of columns, as far as the first scan's description says."""
    scans = (recorded[channel] for recorded in own.recorded.values() for channel in LIDARS if channel in recorded)
    described = next((row["info_filename"] for row in scans if row.get("info_filename")), None)
    if described is None:
        return
    columns = description(folder, described).get("num_pts_feats", points.COLUMNS)
    if columns != points.COLUMNS:
        raise Impossible(
            f"{printable(described)} says that points have {columns} numbers; write {points.COLUMNS} (x, y, z, intensity, ring)"
        )


def description(folder: Path, name: object) -> dict[str, Any]:
    """What a scan's `info_filename` holds: of how many numbers a point is, and which LiDAR's points lie where. Raises Impossible
    for a name that is not of a file of the scene's folder, or of one that is no such description."""
    if not isinstance(name, str) or leaves(name):
        raise Impossible(f"{printable(name)}, an info_filename of sample_data.json, is not below the scene's folder")
    path, what = folder / name, f"{printable(name)}, which describes a point file, cannot be read"
    if not tables.is_file(path):  # a pipe or device would never end
        raise Impossible(f"{what} (there is no such file)")
    if (size := path.stat().st_size) > DESCRIBED:
        raise Impossible(f"{what} ({size:,} bytes, more than {DESCRIBED:,})")
    try:
        told = read_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Impossible(f"{what} ({error})") from None
    if not isinstance(told, dict):
        raise Impossible(f"{what} (it holds a {type(told).__name__}, not a dict)")
    return told
