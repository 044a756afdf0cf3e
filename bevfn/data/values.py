"""What the values of a data set are, and what training would do with those that are odd: a section of `bevfn data check`.

A fact is measured; a finding says what is odd and what follows. Values come from the tables and from the key frames that
training would read, with the rules of `possible` and `plausible`; of files, a few of each kind are opened (deep: all scans).
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from bevfn.data import depth, faults, image, nuscenes, paste, plausible
from bevfn.data import tables as tables_of
from bevfn.data.index import CAMERAS, Index, Packed
from bevfn.names import printable, sentence
from bevfn.synth.tables import CATEGORIES  # nuScenes' 23

SHORTEST_LAG = 1e-3  # s: no LiDAR turns a thousand times a second
OPENED = 5  # files of a kind
UNANNOTATED = ("test",)  # splits that are published so
SENSORS = ("LIDAR_TOP", *CAMERAS)


@dataclass(frozen=True)
class Finding:
    """Something odd."""

    what: str
    then: str
    """What training does with it."""
    kind: Literal["refused", "left out", "suspect", "note"]
    """What is suspect is trained on, and hardly meant; a note is fine if it is meant."""

    def __str__(self) -> str:
        return f"{self.what}: {self.then}"


@dataclass(frozen=True)
class Drops:
    """What recipes do not learn; the defaults are those of nuScenes'."""

    reach: float = 54.0
    """m in x and y, beyond which they drop boxes"""
    sensors: str = "LiDAR or radar"
    """of which a box must have points"""
    velocities: bool = True
    """whether data without any are refused"""


DROPS = Drops()


def of_tables(
    root: Path, version: str, tables: dict[str, list[dict]], chosen: dict[str, list[str]]
) -> Iterator[Finding]:
    """What the tables say beyond key frames. chosen: the splits that are looked at, and their scenes."""
    yield from _channels(tables)
    yield from _categories(tables)
    yield from _links(tables)
    yield from _told("suspect", plausible.rotations(tables["sample_annotation"]))
    yield from _splits(root, version, tables, chosen)


def of_pairs(shared: dict[tuple[str, str], list[str]]) -> Iterator[Finding]:
    """Splits that would be trained on and evaluated on, and the scenes that both have (`tables.shared_scenes`)."""
    for (training, evaluation), scenes in shared.items():
        if training == evaluation:
            what = f"the split {printable(training)} would be trained on and evaluated on too"
        else:
            count = f"{len(scenes):,} scene{'s' if len(scenes) > 1 else ''}"
            what = f"the splits {some([training, evaluation])} share {count}, {some(scenes)}"
        yield Finding(what, "it refuses to train on one and evaluate on the other", "refused")


def of_split(
    root: Path, version: str, split: str, damaged: set[str], deep: bool = False
) -> tuple[list[str], list[Finding]]:
    """(facts, findings) of a split's key frames, from its index, or read of the tables where there is none; nothing is
    written. damaged: files, relative to the root, that are known to be; deep: what was made of the split is read."""
    try:
        with warnings.catch_warnings():  # of what is a finding here
            warnings.simplefilter("ignore")
            packed = nuscenes.frames(root, version, split, keep=False)
    except ValueError as error:
        what = f"{printable(split)}: {sentence(error).rstrip('.')}"
        return [], [Finding(what, "training refuses the data set", "refused")]
    return of_frames(Index(root, version, split, packed), damaged, deep=deep)


def of_frames(
    index: Index, damaged: set[str], drops: Drops = DROPS, *, deep: bool = False
) -> tuple[list[str], list[Finding]]:
    """(facts, findings) of a split's packed key frames. damaged, deep: see `of_split`."""
    packed, root, split = index.frames, index.root, index.split
    assert isinstance(packed, Packed)
    found = [
        Finding(f"{fault.first} ({fault.count:,} {fault.what})", "training refuses the data set", "refused")
        for fault in faults.find(packed)
    ]
    told, odd = _files(root, packed, damaged, deep)
    facts = [_sweep_fact(packed), _box_fact(packed), _dropped_fact(packed, drops), _camera_fact(packed), *told]
    found += [*_sweeps(packed), *_boxes(packed, drops, split), *_cameras(packed), *odd]
    found += _told("suspect", plausible.sizes(packed), plausible.poses(packed), plausible.centres(packed))
    found += _told("note", plausible.repeated(packed))
    found += _made(index, deep)
    return [f"{split}: {fact}" for fact in facts], [replace(one, what=f"{split}: {one.what}") for one in found]


# --- tables ---


def _channels(tables: dict[str, list[dict]]) -> Iterator[Finding]:
    channels = {str(row.get("channel")) for row in tables["sensor"]}
    foreign = sorted(name for name in channels - {*SENSORS} if not name.startswith("RADAR"))
    if foreign:
        yield Finding(
            f"sensor.json has the channels {some(foreign)}, which nuScenes has not", "it does not read them", "note"
        )
    if missing := [name for name in SENSORS if name not in channels]:
        yield Finding(
            f"sensor.json has no {some(missing)}",
            "it refuses models that read them; rename the channels that are meant",
            "refused",
        )


def _categories(tables: dict[str, list[dict]]) -> Iterator[Finding]:
    names = {row["token"]: str(row.get("name")) for row in tables["category"]}
    objects = {row["token"]: names[row["category_token"]] for row in tables["instance"]}
    counts = Counter(objects[row["instance_token"]] for row in tables["sample_annotation"])
    foreign = {name: count for name, count in counts.items() if name not in CATEGORIES}
    if foreign:
        every = len(foreign) == len(counts)
        yield Finding(
            f"{sum(foreign.values()):,} of {sum(counts.values()):,} annotations are of categories that nuScenes has not, "
            f"{some(list(foreign))}",
            "it refuses the data set, which has no other" if every else "it leaves them out",
            "refused" if every else "left out",
        )
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        yield Finding(f"category.json has {some(twice)} more than once", "it takes them as one", "note")


def _links(tables: dict[str, list[dict]]) -> Iterator[Finding]:
    """Chains of rows, each of which should stay with its scene, sensor or object, and be followed both ways."""
    scenes = {row["token"]: row["scene_token"] for row in tables["sample"]}
    sensors = {row["token"]: row["sensor_token"] for row in tables["calibrated_sensor"]}
    owners = {
        "sample": lambda row: row["scene_token"],
        "sample_data": lambda row: (scenes[row["sample_token"]], sensors[row["calibrated_sensor_token"]]),
        "sample_annotation": lambda row: row["instance_token"],
    }
    for name, owner in owners.items():
        rows = {row["token"]: row for row in tables[name]}
        broken, one_way = [], []
        for row in tables[name]:
            for way, back in (("prev", "next"), ("next", "prev")):
                other = rows.get(row.get(way, ""))
                if other is not None and (other is row or owner(other) != owner(row)):
                    broken.append((row["token"], way))
                elif other is not None and other.get(back) != row["token"]:
                    one_way.append((row["token"], way))
        if broken:
            what = f"lead to the row itself, or out of its scene, sensor or object {_first_link(broken)}"
            yield Finding(f"{len(broken):,} links of {name}.json {what}", "it refuses those that it follows", "refused")
        if one_way:
            what = f"lead to a row that does not lead back {_first_link(one_way)}"
            yield Finding(f"{len(one_way):,} links of {name}.json {what}", "it follows them as they are", "note")


def _first_link(links: list[tuple[str, str]]) -> str:
    token, way = links[0]
    return f"(the first is {way} of {printable(token)})"


def _splits(root: Path, version: str, tables: dict[str, list[dict]], chosen: dict[str, list[str]]) -> Iterator[Finding]:
    defaults = tables_of.default_splits(root, version)
    own = [name for name in chosen if not defaults or name not in tables_of.NUSCENES]
    if defaults is None:
        what = f"{version} is none of nuScenes' versions; its splits are {some(list(chosen))}"
        yield Finding(what, "it needs --train-split and --eval-split", "note")
    elif own:
        what = f"splits.json has the splits {some(own)}"
        yield Finding(
            what, "they need --train-split and --eval-split; without, it takes " + " and ".join(defaults), "note"
        )
    if len(present := tables_of.splits(root, version)) == len(chosen) or set(present) > set(chosen):
        used = {name for names in present.values() for name in names}
        if lost := [str(row.get("name")) for row in tables["scene"] if row.get("name") not in used]:
            yield Finding(
                f"{len(lost):,} scenes, such as {printable(lost[0])}, are of no split",
                "it never reads them",
                "left out",
            )


# --- key frames ---


def _sweep_fact(packed: Packed) -> str:
    lags, counts = packed.columns["sweep_lag"], np.diff(packed.columns["sweep_start"])
    some = f", {lags.min():.3g} to {lags.max():.3g} s before it" if len(lags) else ""
    return f"{_span(counts)} sweeps a key frame{some}"


def _sweeps(packed: Packed) -> Iterator[Finding]:
    lags = packed.columns["sweep_lag"]
    if len(lags) and 0 <= np.median(lags) < SHORTEST_LAG:
        yield Finding(
            f"sweeps are {np.median(lags):.2g} s before their key frame, so timestamps are not in microseconds",
            "it learns lags and velocities in a wrong unit",
            "refused",
        )


def _told(kind: Literal["suspect", "note"], *odd: Iterator[plausible.Odd]) -> list[Finding]:
    return [Finding(what, then, kind) for what, then in chain(*odd)]


def _box_fact(packed: Packed) -> str:
    boxes = packed.columns["boxes"]
    if not len(boxes):
        return "no boxes"
    speeds = np.hypot(boxes[:, 7], boxes[:, 8])
    known = speeds[np.isfinite(speeds)]
    fast = f", speeds up to {known.max():.3g} m/s" if len(known) else ""
    sizes = boxes[:, 3:6]
    return f"{len(boxes):,} boxes of {sizes.min():.3g} to {sizes.max():.3g} m{fast}, {len(speeds) - len(known):,} of unknown speed"


def _rules(packed: Packed, drops: Drops) -> dict[str, np.ndarray]:
    """Rule: which boxes it drops."""
    column = packed.columns
    classes = column["names_words"][column["names"]] if len(column["names"]) else np.zeros(0, dtype=np.bytes_)
    return {
        f"without {drops.sensors} points": ~column["valid"],
        "of no detection class": classes == b"",
        f"more than {drops.reach:g} m away": ~(np.abs(column["boxes"][:, :2]) < drops.reach).all(axis=1),
    }


def _dropped_fact(packed: Packed, drops: Drops) -> str:
    dropped = _rules(packed, drops)
    kept = ~np.any(list(dropped.values()), axis=0)
    return f"boxes dropped: {', '.join(f'{mask.sum():,} {rule}' for rule, mask in dropped.items())}; {kept.sum():,} are learned"


def _boxes(packed: Packed, drops: Drops, split: str) -> Iterator[Finding]:
    boxes = packed.columns["boxes"]
    if not len(boxes):
        kind: Literal["refused", "note"] = "note" if split in UNANNOTATED else "refused"
        yield Finding("no key frame is annotated", "it refuses to train on the split, or to be scored on it", kind)
        return
    dropped = _rules(packed, drops)
    for rule, mask in dropped.items():
        if mask.all():
            yield Finding(f"all {len(boxes):,} boxes are {rule}", "it drops them and learns of no object", "left out")
    if np.isnan(boxes[:, 7:9]).any(axis=1).all():
        if drops.velocities:
            yield Finding("no box has a velocity", "it refuses the data set", "refused")
        else:
            yield Finding("no box has a velocity", "it learns none", "note")


def _camera_fact(packed: Packed) -> str:
    sizes = Counter(map(tuple, packed.columns["camera_size"].tolist()))
    told = ", ".join(f"{width}x{height}" if height else "of unknown size" for height, width in sizes)
    return f"{_span(np.diff(packed.columns['camera_start']))} cameras a key frame, images {told or 'none'}"


def _cameras(packed: Packed) -> Iterator[Finding]:
    column = packed.columns
    owners = np.repeat(np.arange(len(packed)), np.diff(column["camera_start"]))
    for code, word in enumerate(column["channel_words"]):
        lacking = np.ones(len(packed), dtype=bool)
        lacking[owners[column["channel"] == code]] = False
        if lacking.any() and not lacking.all():
            first = printable(column["token"][int(np.argmax(lacking))].decode())
            yield Finding(
                f"{int(lacking.sum()):,} of {len(packed):,} key frames have no {word.decode()} (the first is {first})",
                "a camera model stops there, or with --on-damaged skip leaves them out",
                "left out",
            )


def _made(index: Index, deep: bool) -> Iterator[Finding]:
    """What `bevfn data prepare` made, of something else, or that was damaged since."""
    for problems in (_depths, _database):
        try:
            found = list(problems(index, deep))
        except ValueError as error:
            found = [sentence(error).rstrip(".")]
        for what in found:
            yield Finding(
                what, "it refuses to train models that read it; `bevfn data prepare` makes it again", "refused"
            )


def _depths(index: Index, deep: bool) -> Iterator[str]:
    if bad := depth.damaged(index, deep=deep):
        name, what = next(iter(bad.items()))
        yield (
            f"{len(bad):,} files of depth ground truth in {depth.folder(index)} are absent or damaged: that of "
            f"{printable(name)} {what}"
        )


def _database(index: Index, deep: bool) -> Iterator[str]:
    if (paste.folder(index) / paste.OBJECTS).is_file():
        database = paste.read(paste.folder(index), index=index)
        if deep and (what := paste.damaged(database)):
            yield what.rstrip(".")


# --- files ---


def _files(root: Path, packed: Packed, damaged: set[str], deep: bool) -> tuple[list[str], list[Finding]]:
    """What point files (a few; deep: all) and a few images are, and what reading them refuses."""
    column = packed.columns
    pictures: dict[str, tuple[int, int] | None] = {}
    for code in range(len(column["channel_words"])):
        places = np.flatnonzero(column["channel"] == code)
        for i in places[:: max(1, -(-len(places) // OPENED))]:
            height, width = column["camera_size"][i].tolist()
            pictures[column["camera_path"][i].decode()] = (height, width) if height else None
    facts = []
    scans, found = _scans(root, packed, damaged, deep)
    for path, size in pictures.items():
        if path not in damaged:
            try:
                image.read(root / path, size=size)
            except (ValueError, OSError) as error:
                found.append(_refused(error))
    endings = Counter("".join(Path(path.decode()).suffixes[-2:]) for path in column["lidar_path"])
    kinds = Counter(Path(path.decode()).suffix for path in column["camera_path"])
    if scans:
        low, high = min(scan.darkest for scan in scans), max(scan.brightest for scan in scans)
        columns = column["columns_words"][column["columns"][0]].decode()
        facts.append(
            f"point files {some(list(endings))}: {columns or '5 columns of float32'}, {_span([s.points for s in scans])} points, "
            f"intensities {low:g} to {high:g} ({len(scans)} opened)"
        )
        found += _told("suspect", plausible.clouds(scans)) + _told("note", plausible.intensities(scans))
        if bad := sum(scan.bad for scan in scans):
            what = f"{bad:,} of {bad + sum(scan.points for scan in scans):,} points that were opened are NaN or beyond what a lidar sees"
            found.append(Finding(what, "it drops and counts them (bad/points)", "note"))
    facts.append(f"image files {some(list(kinds)) or 'none'} ({len(pictures)} opened)")
    return facts, found


def _scans(root: Path, packed: Packed, damaged: set[str], deep: bool) -> tuple[list[plausible.Scan], list[Finding]]:
    """Scans of a few key frames, or (deep) of all and their sweeps; and what is refused first, as the others are the same."""
    column = packed.columns
    reads: dict[str, Callable[[], plausible.Scan]] = {}
    for i in range(len(packed)) if deep else _some(np.arange(len(packed))).tolist():
        reads[column["lidar_path"][i].decode()] = partial(plausible.key_scan, root, packed, i)
    if deep:
        owners = np.repeat(np.arange(len(packed)), np.diff(column["sweep_start"]))
        for path, i in zip(column["sweep_path"], owners):
            columns = column["columns_words"][column["columns"][i]].decode()
            reads.setdefault(path.decode(), partial(plausible.sweep_scan, root, path.decode(), columns))

    def read(path: str) -> plausible.Scan | Finding:
        try:
            return reads[path]()
        except (ValueError, OSError) as error:
            return _refused(error)

    with ThreadPoolExecutor(os.cpu_count() if deep else 1) as pool:
        results = list(pool.map(read, (path for path in reads if path and path not in damaged)))
    refused = [one for one in results if isinstance(one, Finding)]
    return [one for one in results if isinstance(one, plausible.Scan)], refused[:1]


def _refused(error: Exception) -> Finding:
    return Finding(
        sentence(error).rstrip("."),
        "training stops there, or with --on-damaged skip leaves such key frames out",
        "refused",
    )


def _some(values: np.ndarray) -> np.ndarray:
    return values[:: max(1, -(-len(values) // OPENED))]


def _span(counts: np.ndarray | list[int]) -> str:
    low, high = int(np.min(counts)), int(np.max(counts))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def some(names: list[str]) -> str:
    """Names in a sentence."""
    return ", ".join(printable(name) for name in names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
