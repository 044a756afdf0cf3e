"""What of a T4 data set is there, missing or damaged, and what training does with odd values: `bevfn data check` of one.

Files and values go through the same hands as nuScenes' (`check`, `values`); here is what T4's tables say beyond.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from bevfn.data import check as checking
from bevfn.data import depth, paste, points, t4, t4_classes, t4_folders, values
from bevfn.data.check import OUTSIDE, Inspection, Part, Problem
from bevfn.data.index import Index, Packed
from bevfn.data.t4_folders import Scene
from bevfn.data.values import Finding, some
from bevfn.files import read_json
from bevfn.names import leaves, printable

DROPS = values.Drops(reach=122.4, sensors="LiDAR")  # of AWML's recipes

Found = dict[str, list[dict]]  # tables
ODD: dict[str, tuple[str, str, Literal["left out", "note"]]] = {
    "map": ("missing maps", "it needs none", "note"),
    "scan": (f"key frames without a scan of {' or '.join(t4_folders.LIDARS)}", "it leaves them out", "left out"),
    "lens": ("cameras whose lenses distort", "as AWML, it takes their images for undistorted", "note"),
    "velocity": (
        "annotations without a velocity of their own",
        "it measures them between annotations of the same object that are near in time, else it takes 0",
        "note",
    ),
    "invalid": ("recordings that are marked as invalid", "it takes them for missing", "note"),
    "dim": (
        "first scans without an intensity above 1",
        "it takes them as they are, where AWML's weights know 0..255",
        "note",
    ),
    "sources": (
        "descriptions of clouds that do not tell of all their points",
        "it does not read which LiDAR a point is of",
        "note",
    ),
}
"""Kind: what, what training does, its weight."""


def check(
    root: Path, version: str | None = None, split: str | None = None, *, deep: bool = False, workers: int = 0
) -> Inspection:
    """Looks at tables, maps, and every LiDAR, sweep and camera file that the splits need.

    version: a number is the revision to look at; split: None for all of the root's lists, or every scene where there are
    none; workers: see `check.check`. Raises ValueError for a wrong root, revision or split: then there is nothing to look at.
    """
    root, revision = Path(root), t4_folders.revision_of(version)
    base, chosen = t4_folders.base(root), _chosen(root, split, revision)
    scenes = list({scene.folder: scene for name in chosen for scene in chosen[name]}.values())
    found, problems, parts = _tables(base, scenes)
    samples = {
        name: sum(len(found[scene.folder].get("sample", [])) for scene in members) for name, members in chosen.items()
    }
    facts, findings, affected, notes = [], list(_splits(root, chosen, revision)), set[str](), []
    if any(problem.path.endswith(".json") for problem in problems):
        affected_count = sum(samples.values())
    else:
        packed = {name: _frames(root, name, revision, findings) for name in chosen}
        needed = _files_needed(packed.values())
        bad = checking.examine_all(base, [path for files in needed.values() for path in files], deep, workers)
        for name, files in needed.items():
            wrong = [Problem(path, *bad[path], len(tokens)) for path, tokens in files.items() if path in bad]
            affected.update(*(files[problem.path] for problem in wrong))
            parts.append(checking.part_of(name, len(files), wrong))
            problems += wrong
        findings += _scenes(base, {scene: found[scene.folder] for scene in scenes}, deep)
        facts.append(_annotations(found.values()))
        findings += _categories(found.values())
        for name, frames in packed.items():
            told, odd = values.of_frames(frames, base, name, set(bad), DROPS) if len(frames) else ([], [])
            facts += told
            findings += odd
        notes = _made(root, base, chosen, revision)
        affected_count = len(affected)
    return Inspection(
        root=str(base),
        version=t4.VERSION,
        samples=samples,
        affected=affected_count,
        parts=tuple(parts),
        problems=tuple(problems),
        notes=tuple(notes),
        facts=tuple(facts),
        findings=tuple(findings),
    )


def _chosen(root: Path, split: str | None, revision: str | None) -> dict[str, list[Scene]]:
    """Split: its scenes."""
    if split is not None:
        return {split: t4_folders.chosen(root, split, revision)}
    every = t4_folders.splits(root, revision)
    return {name: scenes for name, scenes in every.items() if name != t4_folders.ALL} or every


def _splits(root: Path, chosen: dict[str, list[Scene]], revision: str | None) -> Iterator[Finding]:
    if t4_folders.default_splits(root) is None:
        what = f"there are no lists of splits train and val; its splits are {some(list(t4_folders.splits(root, revision)))}"
        yield Finding(what, "it needs --train-split and --eval-split", "note")
    listed = {scene.name for scenes in t4_folders.splits(root, revision).values() for scene in scenes}
    listed_only = {scene.name for name, scenes in chosen.items() for scene in scenes}
    if t4_folders.ALL not in chosen and len(chosen) > 1 and (lost := sorted(listed - listed_only)):
        yield Finding(
            f"{len(lost):,} scenes, such as {printable(lost[0])}, are of no list",
            "it reads them as split all only",
            "note",
        )


# --- files ---


def _tables(base: Path, scenes: list[Scene]) -> tuple[dict[str, Found], list[Problem], list[Part]]:
    """({folder: tables}, what is wrong with tables and maps, their parts)."""
    found: dict[str, Found] = {}
    broken, lost, maps = [], [], 0
    for scene in scenes:
        found[scene.folder], wrong = t4.read_tables(base / scene.folder)
        broken += [
            Problem(
                scene.path(f"{t4_folders.TABLES}/{name}.json"),
                "missing" if "does not exist" in what else "damaged",
                what,
                0,
            )
            for name, what in wrong.items()
        ]
        paths = [str(row["filename"]) for row in found[scene.folder].get("map", []) if row.get("filename")]
        maps += len(paths)
        lost += [Problem(scene.path(p), "damaged", OUTSIDE, 0) for p in paths if leaves(p)]
        lost += [
            Problem(scene.path(p), "missing", "does not exist; detection does without it", 0)
            for p in paths
            if not leaves(p) and not (base / scene.path(p)).exists()
        ]
    parts = [
        checking.part_of("tables", len(t4.SCHEMA.tables) * len(scenes), broken),
        checking.part_of("maps", maps, lost),
    ]
    return found, broken + lost, parts


def _frames(root: Path, split: str, revision: str | None, findings: list[Finding]) -> Packed:
    """A split's key frames; none where its tables say what cannot be, which becomes a finding."""
    try:
        with warnings.catch_warnings():  # of what is a finding here
            warnings.simplefilter("ignore")
            return t4.frames(root, split, revision=revision, keep=False)
    except ValueError as error:
        what = f"{split}: {printable(error).rstrip('.')}"
        findings.append(Finding(what, "training refuses the data set", "refused"))
        return t4.NO_FRAMES


def _files_needed(splits: Iterable[Packed]) -> dict[str, dict[str, set[str]]]:
    """Part (channel, or "sweeps"): file: tokens of the key frames that need it."""
    needed: dict[str, dict[str, set[str]]] = {"scans": {}, "sweeps": {}}
    for packed in splits:
        column = packed.columns
        tokens = [token.decode() for token in column["token"]]
        for path, token in zip(column["lidar_path"], tokens):
            needed["scans"].setdefault(path.decode(), set()).add(token)
        for table, paths in (("sweep", column["sweep_path"]), ("camera", column["camera_path"])):
            owners = np.repeat(np.arange(len(tokens)), np.diff(column[f"{table}_start"]))
            for k, (path, owner) in enumerate(zip(paths, owners)):
                part = "sweeps" if table == "sweep" else column["channel_words"][column["channel"][k]].decode()
                needed.setdefault(part, {}).setdefault(path.decode(), set()).add(tokens[owner])
    for path in set(needed["sweeps"]) & set(needed["scans"]):  # an earlier key frame is a sweep too, but one file
        needed["scans"][path] |= needed["sweeps"].pop(path)
    return {part: files for part, files in needed.items() if files}


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


def _annotations(scenes: Iterable[Found]) -> str:
    """What AWML's rules make of all annotations."""
    rules, told = t4_classes.Rules(), Counter[str]()
    for found in scenes:
        own = t4.Tables(found)
        for row in found[t4.ANNOTATIONS]:
            category = own.category(row)
            names = [own.get("attribute", token)["name"] for token in row["attribute_tokens"]]
            label, without = rules.label(category, names), rules.label(category)
            told["annotations"] += 1
            told[
                f"of {rules.classes[label]}"
                if label >= 0
                else "dropped by attribute"
                if without >= 0
                else "of no class"
            ] += 1
    kinds = [f"{told[name]:,} {name}" for name in sorted(told, key=lambda name: (not name.startswith("of "), name))]
    return f"annotations before trucks and trailers are merged: {', '.join(kinds)}" if told else "no annotations"


def _categories(scenes: Iterable[Found]) -> Iterator[Finding]:
    rules, counts = t4_classes.Rules(), Counter[str]()
    for found in scenes:
        own = t4.Tables(found)
        counts.update(own.category(row) for row in found[t4.ANNOTATIONS])
    foreign = {name: count for name, count in counts.items() if not t4.is_known(name, rules)}
    if foreign:
        every = len(foreign) == len(counts)
        yield Finding(
            f"{sum(foreign.values()):,} of {sum(counts.values()):,} annotations are of categories that AWML's mapping has not, "
            f"{some(list(foreign))}",
            "it refuses the data set, which has no other" if every else "it leaves them out",
            "refused" if every else "left out",
        )


def _scenes(base: Path, scenes: dict[Scene, Found], deep: bool) -> Iterator[Finding]:
    """What is odd about scenes, each kind once."""
    first: dict[str, Scene] = {}
    counts, owners = Counter[str](), Counter[str]()
    for scene, found in scenes.items():
        for kind, count in _odd(base, scene, t4.Tables(found), found, deep).items():
            if count:
                first.setdefault(kind, scene)
                counts[kind] += count
                owners[kind] += 1
    for kind, scene in first.items():
        what, then, weight = ODD[kind]
        which = f"{owners[kind]:,} of {len(scenes):,} scenes (the first is {printable(scene.name)})"
        yield Finding(f"{counts[kind]:,} {what} in {which}", then, weight)


def _odd(base: Path, scene: Scene, own: t4.Tables, found: Found, deep: bool) -> dict[str, int]:
    """Kind of ODD: how often it is there."""
    scans = [r for recorded in own.recorded.values() for channel in t4_folders.LIDARS if (r := recorded.get(channel))]
    return {
        "map": int(not any(row.get("filename") for row in found["map"])),
        "scan": sum(not set(t4_folders.LIDARS) & own.recorded[row["token"]].keys() for row in found["sample"]),
        "lens": sum(bool(np.any(row.get("camera_distortion") or 0)) for row in found["calibrated_sensor"]),
        "velocity": sum(row.get("velocity") is None for row in found[t4.ANNOTATIONS]),
        "invalid": sum(row.get("is_valid") is False for row in found["sample_data"]),
        "dim": sum(_is_dim(base / scene.path(row["filename"])) for row in scans[:1]),
        "sources": sum(_is_untiled(base, scene, row) for row in scans if row.get("info_filename")) if deep else 0,
    }


def _is_dim(path: Path) -> bool:
    """Whether no point is brighter than 1."""
    try:
        cloud, _ = points.read(path)
    except (ValueError, OSError):
        return False  # which another finding tells of
    return bool(len(cloud)) and bool(cloud[:, 3].max() <= 1)


def _is_untiled(base: Path, scene: Scene, row: dict) -> bool:
    """Whether the description of a concatenated cloud does not tell, LiDAR by LiDAR, of all its points."""
    try:
        told = read_json((base / scene.path(row["info_filename"])).read_bytes())
        spans = sorted((int(s["idx_begin"]), int(s["length"])) for s in told["sources"])
        size = (base / scene.path(row["filename"])).stat().st_size // points.BYTES
    except (OSError, ValueError, KeyError, TypeError):
        return True
    ends = [begin + length for begin, length in spans]
    return [begin for begin, _ in spans] != [0, *ends][: len(spans)] or ends[-1:] != [size]
