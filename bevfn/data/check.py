"""What of a nuScenes root is there, missing or damaged, file by file, before a training run finds out.

Beside files, their values (`values`), each oddity with what training does with it.

Quick by default: every file that the splits need is looked up, point files must be whole points and not end in zeros, and
JPEGs must end as JPEGs do, which finds what an interrupted copy leaves behind. Deep decodes every file.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from bevfn import waiting
from bevfn.data import depth, image, nuscenes, paste, points, values
from bevfn.data import tables as tables_of
from bevfn.data.columns import parse
from bevfn.data.index import CAMERAS, Index, Packed
from bevfn.data.rows import MAX_SWEEPS
from bevfn.files import to_json
from bevfn.names import leaves, printable, sentence

CHUNK = 128  # files per task of a thread
OUTSIDE = "is not below the data set's root"
Finding = tuple[Literal["missing", "damaged"], str]


@dataclass(frozen=True)
class Problem:
    """One file that is missing or damaged."""

    path: str
    """Relative to the root."""
    kind: Literal["missing", "damaged"]
    what: str
    """The sentence for the user."""
    samples: int
    """Key frames that need the file."""


@dataclass(frozen=True)
class Part:
    """Files of one kind."""

    name: str
    files: int
    missing: int
    damaged: int


@dataclass(frozen=True)
class Inspection:
    """Everything that was found."""

    root: str
    version: str
    samples: dict[str, int]
    """Split: its key frames."""
    affected: int
    """Key frames that need at least one file that is missing or damaged; all of them if a table or a map is."""
    parts: tuple[Part, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    """What `bevfn data prepare` makes, and whether it is there."""
    facts: tuple[str, ...] = ()
    """What values are there."""
    findings: tuple[values.Finding, ...] = ()
    """What is odd about them."""

    @property
    def good(self) -> bool:
        """Whether all key frames can be trained on as they are; notes do not count."""
        return not self.problems and all(finding.kind == "note" for finding in self.findings)

    def text(self, shown: int = 20) -> str:
        """Summary first, then the first `shown` problems."""
        splits = ", ".join(f"{split} {count:,}" for split, count in self.samples.items()) or "no split can be read"
        lines = [f"{self.root}  {self.version}  samples: {splits}"]
        for part in self.parts:
            bad = [
                f"{count:,} {word}" for word, count in (("missing", part.missing), ("damaged", part.damaged)) if count
            ]
            lines.append(f"  {part.name:<16}  {part.files:9,d} files  {', '.join(bad) or 'ok'}")
        lines += [f"  {note}" for note in (*self.notes, *self.facts)]
        if self.findings:
            lines.append(
                f"{len(self.findings):,} finding{'s' if len(self.findings) > 1 else ''}, and what training does"
            )
        lines += [f"  {finding.kind}: {sentence(finding)}" for finding in self.findings[:shown]]
        if len(self.findings) > shown:
            lines.append(f"  and {len(self.findings) - shown:,} more; --json FILE writes all of them")
        total = sum(self.samples.values())
        if not self.problems:
            kinds = {finding.kind for finding in self.findings}
            but = ", and training refuses the data" if "refused" in kinds else ", but values are suspect"
            ends = (
                f"no file is missing or damaged{but}"
                if kinds & {"refused", "suspect"}
                else "nothing is missing or damaged"
            )
            return "\n".join([*lines, ends])
        plural = "s" if len(self.problems) > 1 else ""
        affected = f"samples affected: {self.affected:,} of {total:,}" if total else "no sample can be read"
        lines.append(f"{len(self.problems):,} problem{plural}; {affected}")
        for problem in self.problems[:shown]:
            needed = f" (samples: {problem.samples:,})" if problem.samples else ""
            what = problem.what.removeprefix(f"{self.root}/{problem.path}: ")
            lines.append(f"  {printable(problem.path)}: {sentence(what)}{needed}")
        if len(self.problems) > shown:
            lines.append(f"  and {len(self.problems) - shown:,} more; --json FILE writes all of them")
        return "\n".join(lines)

    def json(self) -> bytes:
        """The whole report."""
        return to_json(asdict(self), indent=1)


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

    version: None for the only one that the root has; split: a split to look at; training, evaluation: those of a run, which
    may share no scene; all splits where none is named. workers: threads, 0 for twice the processors. Raises ValueError for a
    wrong root, version or split: then there is nothing to look at.
    """
    root = Path(root)
    version = version or tables_of.only_version(root)
    tables_of.check_root(root, version)
    tables, broken = tables_of.read_tables(root, version)
    problems = [
        Problem(f"{version}/{name}.json", "missing" if "does not exist" in what else "damaged", what, 0)
        for name, what in broken.items()
    ]
    parts = [part_of("tables", len(tables_of.TABLES), problems)]
    maps = [] if "map" in broken else [str(row["filename"]) for row in tables["map"]]
    lost = list(_lost_maps(root, maps))
    parts.append(part_of("maps", len(maps), lost))
    problems += lost

    samples: dict[str, int] = {}
    affected: set[str] = set()
    facts: list[str] = []
    findings: list[values.Finding] = []
    if not broken:
        chosen = _chosen(root, version, [name for name in (split, training, evaluation) if name is not None])
        members = _samples(chosen, tables)
        samples = {name: len(tokens) for name, tokens in members.items()}
        needed = files_needed(tables, set().union(*members.values()))
        found = examine_all(root, [path for files in needed.values() for path in files], deep, workers)
        for name, files in needed.items():
            bad = [Problem(path, *found[path], len(tokens)) for path, tokens in files.items() if path in found]
            affected.update(*(files[problem.path] for problem in bad))
            parts.append(part_of(name, len(files), bad))
            problems += bad
        if not lost:  # with a map missing, the devkit does not start
            findings += values.of_tables(root, version, tables, chosen)
            findings += values.of_pairs(tables_of.shared_scenes(root, version, training, evaluation))
            told = [values.of_split(root, version, name, set(found), deep) for name in chosen]
            facts += [fact for facts_of_one, _ in told for fact in facts_of_one]
            findings += [finding for _, of_one in told for finding in of_one]
    # Without a table nothing can be read, without a map the devkit does not start.
    count = sum(samples.values()) if any(part.missing or part.damaged for part in parts[:2]) else len(affected)
    notes = _made(root, version, list(samples))
    return Inspection(
        str(root), version, samples, count, tuple(parts), tuple(problems), tuple(notes), tuple(facts), tuple(findings)
    )


def files_needed(tables: dict[str, list[dict]], samples: set[str]) -> dict[str, dict[str, set[str]]]:
    """Part (channel, or "sweeps"): file: tokens of the samples that need it. Radar is not read, so not needed."""
    data = {row["token"]: row for row in tables["sample_data"]}
    sensors = {row["token"]: row["channel"] for row in tables["sensor"]}
    channels = {row["token"]: sensors[row["sensor_token"]] for row in tables["calibrated_sensor"]}
    needed: dict[str, dict[str, set[str]]] = {part: {} for part in ("LIDAR_TOP", "sweeps", *CAMERAS)}
    scans = []
    for row in tables["sample_data"]:
        channel = channels[row["calibrated_sensor_token"]]
        if row["is_key_frame"] and row["sample_token"] in samples and channel in needed:
            needed[channel].setdefault(row["filename"], set()).add(row["sample_token"])
            if channel == "LIDAR_TOP":
                scans.append(row)
    for row in scans:
        before = row
        for _ in range(MAX_SWEEPS):
            if not before["prev"]:
                break
            before = data[before["prev"]]
            # an earlier key frame is a sweep too, but one file
            part = "LIDAR_TOP" if before["filename"] in needed["LIDAR_TOP"] else "sweeps"
            needed[part].setdefault(before["filename"], set()).add(row["sample_token"])
    return {part: files for part, files in needed.items() if files}


def examine(path: Path, deep: bool, columns: str = "") -> Finding | None:
    """What is wrong with a point file, of these `columns`, or an image; None if nothing is found."""
    try:
        if not tables_of.is_file(path):
            return "missing", "does not exist"
        size = path.stat().st_size
        if size == 0:
            return "damaged", "is empty"
        if path.suffix in (".bin", ".pcd", ".npy"):
            wide = parse(columns).dtype.itemsize
            if size % wide and path.suffix == ".bin":  # the others have a header
                return "damaged", f"is truncated: {size} bytes are no whole number of points ({wide} bytes each)"
            if points.ends_in_zeros(path):
                return "damaged", "ends in zeros, as an interrupted copy leaves them"
            if deep:
                cloud, bad = points.read(path, columns)
                if not len(cloud):
                    return "damaged", f"has only NaN: {bad} points"
        else:
            if path.suffix.lower() in (".jpg", ".jpeg") and (what := _jpeg_ends(path, size)):
                return "damaged", what
            if deep:
                image.decode(path)
    except (OSError, ValueError) as error:
        return "damaged", str(error).removeprefix(f"{path}: ")
    return None


def _lost_maps(root: Path, maps: list[str]) -> Iterator[Problem]:
    for path in maps:
        if leaves(path):
            yield Problem(path, "damaged", OUTSIDE, 0)
        elif not tables_of.is_file(root / path):
            yield Problem(path, "missing", "does not exist", 0)


def _outside(path: str) -> Finding | None:
    return ("damaged", OUTSIDE) if leaves(path) else None


def _jpeg_ends(path: Path, size: int) -> str:
    """A sentence if the file does not begin and end as a JPEG; some writers pad the end."""
    with open(path, "rb") as file:
        start = file.read(2)
        file.seek(max(0, size - 64))
        end = file.read()
    if start != b"\xff\xd8":
        return f"is no JPEG: it begins with {start!r}"
    return "" if b"\xff\xd9" in end else "is truncated: the JPEG has no end-of-image marker"


def examine_all(
    root: Path, files: list[str], deep: bool, workers: int, columns: Mapping[str, str] | None = None
) -> dict[str, Finding]:
    """File: (kind, what is wrong), in parallel: threads, because this waits for the disk and decoders free the lock. columns: of
    point files that have others than nuScenes'."""
    told = columns or {}

    def look(chunk: list[str]) -> dict[str, Finding]:
        found = ((path, _outside(path) or examine(root / path, deep, told.get(path, ""))) for path in chunk)
        return {path: what for path, what in found if what is not None}

    chunks = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
    problems: dict[str, Finding] = {}
    with (
        ThreadPoolExecutor(workers or 2 * (os.cpu_count() or 1)) as pool,
        waiting.counted("looking at files", len(files), "files") as advance,
    ):
        for chunk, found in zip(chunks, pool.map(look, chunks)):
            problems |= found
            advance(len(chunk))
    return problems


def files(base: Path, packed: dict[str, Packed], deep: bool, workers: int) -> tuple[list[Part], list[Problem], int]:
    """(parts, what is wrong with files, key frames that need one such) of splits whose key frames are known."""
    columns = {path.decode(): text for one in packed.values() for path, text in _columns(one)}
    needed = _of_frames(packed.values())
    found = examine_all(base, [path for files in needed.values() for path in files], deep, workers, columns)
    parts, problems, affected = [], list[Problem](), set[str]()
    for name, files in needed.items():
        wrong = [Problem(path, *found[path], len(tokens)) for path, tokens in files.items() if path in found]
        affected.update(*(files[problem.path] for problem in wrong))
        parts.append(part_of(name, len(files), wrong))
        problems += wrong
    return parts, problems, len(affected)


def _of_frames(splits: Iterable[Packed]) -> dict[str, dict[str, set[str]]]:
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


def _columns(packed: Packed) -> Iterator[tuple[bytes, str]]:
    """(a point file, its columns) where they are not nuScenes'."""
    column = packed.columns
    words = [word.decode() for word in column["columns_words"]]
    for table, paths in (("", column["lidar_path"]), ("sweep", column["sweep_path"])):
        owners = (
            np.repeat(np.arange(len(packed)), np.diff(column[f"{table}_start"])) if table else np.arange(len(packed))
        )
        yield from (
            (path, words[column["columns"][i]]) for path, i in zip(paths, owners) if words[column["columns"][i]]
        )


def _chosen(root: Path, version: str, named: list[str]) -> dict[str, list[str]]:
    """Split: names of its scenes; of the splits that are named, or of all."""
    if named:
        return {split: tables_of.scenes_of(root, version, split) for split in named}
    parts_of_train = ("train_detect", "train_track")
    chosen = {s: names for s, names in tables_of.splits(root, version).items() if s not in parts_of_train}
    if not chosen:
        raise ValueError(f"{root}, {version}, has no scene of any split; add a splits.json beside its tables.")
    return chosen


def _samples(chosen: dict[str, list[str]], tables: dict[str, list[dict]]) -> dict[str, set[str]]:
    """Split: tokens of its samples."""
    scenes = {row["token"]: row["name"] for row in tables["scene"]}
    return {
        name: {row["token"] for row in tables["sample"] if scenes[row["scene_token"]] in names}
        for name, names in ((name, set(names)) for name, names in chosen.items())
    }


def part_of(name: str, files: int, problems: list[Problem]) -> Part:
    missing = sum(problem.kind == "missing" for problem in problems)
    return Part(name, files, missing, len(problems) - missing)


def _made(root: Path, version: str, splits: list[str]) -> list[str]:
    """A line per split about what `bevfn data prepare` makes of it."""
    lines = []
    for split in splits:
        index = "yes" if nuscenes.has_index(root, version, split) else "not yet (made on first use)"
        empty = Index(root, version, split, frames=())
        there = {
            "GT-paste database": paste.folder(empty) / paste.OBJECTS,
            "depth ground truth": depth.folder(empty) / depth.DEPTH,
        }
        parts = [f"{name} {'yes' if path.is_file() else 'not there'}" for name, path in there.items()]
        lines.append("; ".join([f"{split}: index {index}", *(parts if split.endswith("train") else [])]))
    return lines
