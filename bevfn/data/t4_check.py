"""What of a T4 data set is there, missing or damaged, and what training does with odd values: `bevfn data check` of one.

Files and values go through the same hands as nuScenes' (`check`, `values`); here is what T4's tables say beyond.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bevfn.data import check as checking
from bevfn.data import depth, paste, plausible, points, t4, t4_classes, t4_folders, values
from bevfn.data.check import OUTSIDE, Inspection, Problem
from bevfn.data.index import Index, Packed
from bevfn.data.t4_folders import Scene
from bevfn.data.values import Finding, some
from bevfn.names import leaves, printable, sentence

DROPS = values.Drops(reach=122.4, sensors="LiDAR")  # of AWML's recipes
RULES = t4_classes.Rules()
FOREIGN, DROPPED = "of no class", "dropped by attribute"
Found = dict[str, list[dict]]  # tables
ODD: dict[str, tuple[str, str, Literal["left out", "suspect", "note"]]] = {
    "map": ("missing maps", "it needs none", "note"),
    "scan": (f"key frames without a scan of {' or '.join(t4_folders.LIDARS)}", "it leaves them out", "left out"),
    "lens": ("cameras whose lenses distort", "as AWML, it takes their images for undistorted", "note"),
    "velocity": (
        "annotations without a velocity of their own",
        "it measures them between annotations of the same object that are near in time, else it takes 0",
        "note",
    ),
    "lying": (
        "annotations that do not stand upright",
        f"it takes another yaw for theirs; {plausible.QUATERNION}",
        "suspect",
    ),
    "invalid": ("recordings that are marked as invalid", "it takes them for missing", "note"),
    "sources": (
        "descriptions of clouds that do not tell of all their points",
        "it does not read which LiDAR a point is of",
        "note",
    ),
}
"""Kind: what, what training does, its weight."""


@dataclass(frozen=True)
class _Look:
    """What one scene's tables say; they are not kept, as thousands of scenes would not fit into memory."""

    broken: tuple[Problem, ...]
    lost_maps: tuple[Problem, ...]
    maps: int
    title: str
    """the scene's name in scene.json"""
    samples: int
    classes: Counter[str]
    """annotations by what AWML's rules make of them"""
    categories: Counter[str]
    odd: dict[str, int]
    """kind of ODD: how often it is there"""


def check(
    root: Path,
    version: str | None = None,
    split: str | None = None,
    *,
    training: str | None = None,
    evaluation: str | None = None,
    deep: bool = False,
    workers: int = 0,
) -> Inspection:
    """Looks at tables, maps, and every LiDAR, sweep and camera file that the splits need.

    version: a number is the revision to look at; split: a split to look at; training, evaluation: those of a run, which may
    share no scene; where none is named all of the root's lists, or every scene; workers: see `check.check`. Raises ValueError for a wrong root, revision or split: then there is nothing to look at.
    """
    root, revision = Path(root), t4_folders.revision_of(version)
    base = t4_folders.base(root)
    chosen = _chosen(root, [name for name in (split, training, evaluation) if name is not None], revision)
    every = dict.fromkeys(scene for members in chosen.values() for scene in members)
    looks = {scene: _look(base, scene, deep) for scene in every}
    samples = {name: sum(looks[scene].samples for scene in members) for name, members in chosen.items()}
    broken = [problem for look in looks.values() for problem in look.broken]
    lost = [problem for look in looks.values() for problem in look.lost_maps]
    parts = [
        checking.part_of("tables", len(t4.SCHEMA.tables) * len(looks), broken),
        checking.part_of("maps", sum(look.maps for look in looks.values()), lost),
    ]
    problems, facts = broken + lost, list[str]()
    findings = [*_splits(root, chosen, revision), *_shared(root, revision, training, evaluation)]
    affected = sum(samples.values())
    if not broken:
        packed = {name: _frames(root, name, revision, findings) for name in chosen}
        more, bad, affected = checking.files(base, packed, deep, workers)
        parts += more
        problems += bad
        facts.append(_annotations(looks.values()))
        findings += [*_scenes(looks), *_titles(looks), *_categories(looks.values())]
        for name, frames in packed.items():
            damaged = {problem.path for problem in bad}
            index = Index(base, t4.VERSION, name, frames)
            told, odd = values.of_frames(index, damaged, DROPS, deep=deep) if len(frames) else ([], [])
            facts += told
            findings += odd
    return Inspection(
        root=str(base),
        version=t4.VERSION,
        samples=samples,
        affected=affected,
        parts=tuple(parts),
        problems=tuple(problems),
        notes=() if broken else tuple(_made(root, base, chosen, revision)),
        facts=tuple(facts),
        findings=tuple(findings),
    )


def _chosen(root: Path, named: list[str], revision: str | None) -> dict[str, list[Scene]]:
    """Split: its scenes; of the splits that are named, or of all lists."""
    if named:
        return {split: t4_folders.chosen(root, split, revision) for split in named}
    every = t4_folders.splits(root, revision)
    return {name: scenes for name, scenes in every.items() if name != t4_folders.ALL} or every


def _shared(root: Path, revision: str | None, training: str | None, evaluation: str | None) -> Iterator[Finding]:
    """Scenes that the split to train on and the one to evaluate on both have; one split may be both."""
    default = t4_folders.default_splits(root) or ("", "")
    pair = (training or default[0], evaluation or default[1])
    present = t4_folders.splits(root, revision)
    ours, theirs = ([scene.name for scene in present.get(name, [])] for name in pair)
    if pair[0] != pair[1] and (both := sorted(set(ours) & set(theirs))):
        what = (
            f"the splits {' and '.join(map(printable, pair))} share {len(both):,} scenes, such as {printable(both[0])}"
        )
        yield Finding(what, "it refuses to score on what it was trained on", "refused")


def _splits(root: Path, chosen: dict[str, list[Scene]], revision: str | None) -> Iterator[Finding]:
    present = t4_folders.splits(root, revision)
    if t4_folders.default_splits(root) is None:
        what = f"there are no lists of splits train and val; its splits are {some(list(present))}"
        yield Finding(what, "it needs --train-split and --eval-split", "note")
    listed = {scene.name for scenes in chosen.values() for scene in scenes}
    lost = sorted({scene.name for scene in present[t4_folders.ALL]} - listed)
    if lost and {*chosen, t4_folders.ALL} == present.keys():
        yield Finding(
            f"{len(lost):,} scenes, such as {printable(lost[0])}, are of no list",
            "it reads them as split all only",
            "note",
        )


# --- files ---


def _look(base: Path, scene: Scene, deep: bool) -> _Look:
    """Reads a scene's tables."""
    found, wrong = t4.read_tables(base / scene.folder)
    broken = (
        Problem(
            scene.path(f"{t4_folders.TABLES}/{name}.json"),
            "missing" if "does not exist" in what else "damaged",
            what,
            0,
        )
        for name, what in wrong.items()
    )
    paths = [str(row["filename"]) for row in found.get("map", []) if row.get("filename")]
    lost = [Problem(scene.path(p), "damaged", OUTSIDE, 0) for p in paths if leaves(p)] + [
        Problem(scene.path(p), "missing", "does not exist; detection does without it", 0)
        for p in paths
        if not leaves(p) and not (base / scene.path(p)).exists()
    ]
    own = None if wrong else t4.Tables(found)
    return _Look(
        broken=tuple(broken),
        lost_maps=tuple(lost),
        maps=len(paths),
        title="" if wrong else str(found["scene"][0]["name"]),
        samples=len(found.get("sample", [])),
        classes=Counter() if own is None else _classes(own, found),
        categories=Counter() if own is None else Counter(own.category(row) for row in found[t4.ANNOTATIONS]),
        odd={} if own is None else _odd(base, scene, own, found, deep),
    )


def _frames(root: Path, split: str, revision: str | None, findings: list[Finding]) -> Packed:
    """A split's key frames; none where its tables say what cannot be, which becomes a finding."""
    try:
        with warnings.catch_warnings():  # of what is a finding here
            warnings.simplefilter("ignore")
            return t4.frames(root, split, revision=revision, keep=False)
    except ValueError as error:
        what = f"{split}: {sentence(error).rstrip('.')}"
        findings.append(Finding(what, "training refuses the data set", "refused"))
        return t4.NO_FRAMES


def _made(root: Path, base: Path, chosen: dict[str, list[Scene]], revision: str | None) -> list[str]:
    """A line per split about what `bevfn data prepare` makes of it."""
    lines = []
    for split in chosen:
        index = "yes" if t4.has_index(root, split, revision) else "not yet (made on first use)"
        empty = Index(base, t4.VERSION, split, frames=())
        there = {
            "GT-paste database": paste.folder(empty) / paste.OBJECTS,
            "depth ground truth": depth.folder(empty) / depth.DEPTH,
        }
        parts = [f"{name} {'yes' if path.is_file() else 'not there'}" for name, path in there.items()]
        lines.append("; ".join([f"{split}: index {index}", *(parts if split in ("train", t4_folders.ALL) else [])]))
    return lines


# --- values ---


def _classes(own: t4.Tables, found: Found) -> Counter[str]:
    """What AWML's rules make of a scene's annotations."""
    told = Counter[str]()
    for row in found[t4.ANNOTATIONS]:
        names = [own.get("attribute", token)["name"] for token in row["attribute_tokens"]]
        label, without = RULES.label(own.category(row), names), RULES.label(own.category(row))
        told[f"of {RULES.classes[label]}" if label >= 0 else DROPPED if without >= 0 else FOREIGN] += 1
    return told


def _annotations(looks: Iterable[_Look]) -> str:
    told = sum((look.classes for look in looks), Counter[str]())
    order = [*(f"of {name}" for name in RULES.classes), FOREIGN, DROPPED]
    kinds = [f"{told[name]:,} {name}" for name in order if told[name]]
    return f"annotations before trucks and trailers are merged: {', '.join(kinds) or 'none'}"


def _categories(looks: Iterable[_Look]) -> Iterator[Finding]:
    counts = sum((look.categories for look in looks), Counter[str]())
    foreign = {name: count for name, count in counts.items() if not t4.is_known(name, RULES)}
    if foreign:
        every = len(foreign) == len(counts)
        yield Finding(
            f"{sum(foreign.values()):,} of {sum(counts.values()):,} annotations are of categories that AWML's mapping has not, "
            f"{some(list(foreign))}",
            "it refuses the data set, which has no other" if every else "it leaves them out",
            "refused" if every else "left out",
        )


def _scenes(looks: dict[Scene, _Look]) -> Iterator[Finding]:
    """What is odd about scenes, each kind once."""
    for kind, (what, then, weight) in ODD.items():
        having = {scene: look.odd[kind] for scene, look in looks.items() if look.odd[kind]}
        if having:
            which = f"{len(having):,} of {len(looks):,} scenes (the first is {printable(next(iter(having)).name)})"
            yield Finding(f"{sum(having.values()):,} {what} in {which}", then, weight)


def _titles(looks: dict[Scene, _Look]) -> Iterator[Finding]:
    """Names that scenes share."""
    named: dict[str, set[str]] = {}
    for scene, look in looks.items():
        named.setdefault(look.title, set()).add(scene.name)
    shared = {title: sorted(names) for title, names in named.items() if title and len(names) > 1}
    if shared:
        title, names = next(iter(shared.items()))
        such = f"such as '{printable(title)}' of {some(names)}"
        what = f"{sum(map(len, shared.values())):,} scenes have names of others in scene.json, {such}"
        yield Finding(what, "it tells them apart by their folders", "note")


def _odd(base: Path, scene: Scene, own: t4.Tables, found: Found, deep: bool) -> dict[str, int]:
    """Kind of ODD: how often it is there."""
    scans = [r for recorded in own.recorded.values() for channel in t4_folders.LIDARS if (r := recorded.get(channel))]
    return {
        "map": int(not any(row.get("filename") for row in found["map"])),
        "scan": sum(not set(t4_folders.LIDARS) & own.recorded[row["token"]].keys() for row in found["sample"]),
        "lens": sum(_bends(row.get("camera_distortion")) for row in found["calibrated_sensor"]),
        "velocity": sum(row.get("velocity") is None for row in found[t4.ANNOTATIONS]),
        "lying": plausible.lying(found[t4.ANNOTATIONS]),
        "invalid": sum(row.get("is_valid") is False for row in found["sample_data"]),
        "sources": sum(_is_untiled(base, scene, row) for row in scans if row.get("info_filename")) if deep else 0,
    }


def _bends(distortion: object) -> bool:
    """Whether a lens has a coefficient that is not 0."""
    return isinstance(distortion, list) and any(value != 0 for value in distortion)


def _is_untiled(base: Path, scene: Scene, row: dict) -> bool:
    """Whether the description of a concatenated cloud does not tell, LiDAR by LiDAR, of all its points."""
    try:
        told = t4.description(base / scene.folder, row["info_filename"])
        spans = sorted((int(s["idx_begin"]), int(s["length"])) for s in told["sources"])
        size = (base / scene.path(row["filename"])).stat().st_size // points.BYTES
    except (OSError, ValueError, KeyError, TypeError):
        return True
    ends = [begin + length for begin, length in spans]
    return [begin for begin, _ in spans] != [0, *ends][: len(spans)] or ends[-1:] != [size]
