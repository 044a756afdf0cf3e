"""A T4 data set as it lies on the disk: a folder a scene, in revisions, below any folders; and the splits of its scenes.

A scene's folder holds annotation/ (its tables) and data/, or numbered revisions that do: `<database>/<id>/<revision>/`, with or
without the outer two. Splits are those of AWML's lists, `<database>.yaml` beside the database's folder, and of a splits.json in
the root; `all` is every scene.

Source: tier4/t4-devkit v0.8.0, tier4/AWML autoware_ml/configs/t4dataset (fact sheet t4dataset, sections 1 and 4).
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bevfn.data import tables
from bevfn.names import file_name, printable

TABLES = "annotation"
LIDARS = ("LIDAR_TOP", "LIDAR_CONCAT")  # the first that a key frame has
ALL = "all"
DEPTH = 3  # folders from a root to a scene's own, at most
INNER = {"annotation", "data", "map", "maps", "input_bag", "lidarseg", "samples", "sweeps"}  # hold no scene
OURS = (".", "bevfn_")  # beginnings of what else lies there
LISTS = (".yaml", ".yml")


@dataclass(frozen=True)
class Scene:
    """One scene of a root."""

    name: str
    """Its folder without the revision, relative to the root; the root's own name where it is the root."""
    folder: str
    """Of annotation/ and data/, relative to the root, "" where it is the root."""

    def path(self, inside: str) -> str:
        """A path in the scene's folder, relative to the root."""
        return f"{self.folder}/{inside}" if self.folder else inside


def base(root: Path) -> Path:
    """The folder that paths are relative to: the root, or that of a root that is a list of scenes."""
    root = Path(root)
    return root.parent if is_list(root) else root


def is_list(root: Path) -> bool:
    """Whether a root is a file of AWML's form, whose lists are the splits."""
    return Path(root).suffix in LISTS and Path(root).is_file()


def is_t4(root: Path) -> bool:
    """Whether there is a T4 scene, or what is left of one without its tables; looks into folders only, up to the first."""
    return is_list(root) or (Path(root).is_dir() and _any_scene(Path(root), DEPTH))


def scenes(root: Path, revision: str | None = None) -> list[Scene]:
    """Every scene of a root, by name; of several revisions the highest, or the one that is asked for.

    Raises ValueError, one sentence, if there is none, or a scene has not that revision.
    """
    found = list(_find(base(root), "", revision, DEPTH))
    if not found:
        raise ValueError(f"{base(root)} has no T4 scene: no folder annotation/ in it, or in folders below it.")
    return sorted(found, key=lambda scene: scene.name)


def splits(root: Path, revision: str | None = None) -> dict[str, list[Scene]]:
    """Split: its scenes, of the root's lists, and `all`.

    Raises ValueError, one sentence, for a list that cannot be read or names a scene which the root has not.
    """
    every = scenes(root, revision)
    known = _Known(base(root), every)
    listed: dict[str, list[Scene]] = {}
    for path in _list_files(root):
        for split, entries in _read_lists(path).items():
            if file_name(split) != split:
                raise ValueError(
                    f"{path}: '{printable(split)}' cannot name a split, since files are named after it; use letters, digits, "
                    "'-', '_' and '.'."
                )
            listed.setdefault(split, []).extend(known.resolved(path, split, entry) for entry in entries)
    once = {split: list({scene.folder: scene for scene in own}.values()) for split, own in listed.items() if own}
    return {ALL: every} | once


def chosen(root: Path, split: str, revision: str | None = None) -> list[Scene]:
    """The scenes of a split. Raises ValueError, one sentence, if it has none."""
    if split == ALL:
        return scenes(root, revision)
    present = splits(root, revision)
    if split not in present:
        raise ValueError(
            f"{root} has no scene of the split {split!r}; the splits with scenes there (for --split, or a run's --train-split and --eval-split) are "
            f"{', '.join(present)}."
        )
    return present[split]


def default_splits(root: Path) -> tuple[str, str] | None:
    """(the split to train on, the one to evaluate on) where nobody names them: of lists train and val, without lists the only
    scene there is; None elsewhere."""
    if not _list_files(root):
        return (ALL, ALL) if len(scenes(root)) == 1 else None
    return ("train", "val") if {"train", "val"} <= splits(root).keys() else None


def revision_of(version: str | None) -> str | None:
    """The revision that a version asks for, a number; none and nuScenes' names ask for none. Raises ValueError for others."""
    if not version or re.fullmatch(r"v[0-9]+\.[0-9]+-.+", version):
        return None
    if not _is_number(version):
        raise ValueError(
            f"--version {printable(version)} is no revision of a T4 scene, a number such as 2; leave it out for the highest."
        )
    return version


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


# --- folders ---


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder that may hold scenes, sorted."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if not (e.name in INNER or e.name.startswith(OURS)) and e.is_dir())
    except OSError:  # not there, or not ours to read
        return []


def _any_scene(folder: Path, depth: int) -> bool:
    if (folder / TABLES).is_dir() or any((folder / "data" / channel).is_dir() for channel in LIDARS):
        return True
    return depth > 0 and any(_any_scene(folder / name, depth - 1) for name in _folders(folder))


def _find(root: Path, below: str, revision: str | None, depth: int) -> list[Scene]:
    folder = root / below
    if (folder / TABLES).is_dir():
        return [Scene(below or root.resolve().name, below)]
    names = _folders(folder)
    revisions = {int(name): name for name in names if _is_number(name) and (folder / name / TABLES).is_dir()}
    if revisions:
        wanted = max(revisions) if revision is None else int(revision)
        if wanted not in revisions:
            has = ", ".join(str(number) for number in sorted(revisions))
            raise ValueError(f"{folder} has no revision {wanted}; it has {has}: choose one of these as version.")
        inside = "/".join(filter(None, [below, revisions[wanted]]))
        return [Scene(below or root.resolve().name, inside)]
    if depth == 0:
        return []
    inner = ("/".join(filter(None, [below, name])) for name in names)
    return [scene for name in inner for scene in _find(root, name, revision, depth - 1)]


# --- lists ---


def _list_files(root: Path) -> list[Path]:
    """The files of lists that count for a root."""
    if is_list(root):
        return [Path(root)]
    own = [Path(root) / tables.SPLITS] if (Path(root) / tables.SPLITS).is_file() else []
    return own + sorted(path for path in Path(root).glob("*") if path.suffix in LISTS)


class _Known:
    """The scenes of a root by what lists may call them."""

    def __init__(self, root: Path, every: list[Scene]) -> None:
        self.root = root
        self.named = {scene.name: scene for scene in every}
        self.by_id: dict[str, list[Scene]] = {}
        for scene in every:
            self.by_id.setdefault(scene.name.rpartition("/")[2], []).append(scene)

    def resolved(self, path: Path, split: str, entry: str) -> Scene:
        """The scene that an entry names: `<id>[/<revision>[/<city>/<vehicle>]]`, the id with or without the folders above it. An
        id is looked for below the folder that is named as the list first. Raises ValueError."""
        words = entry.strip("/").split("/")
        found, rest = next(self._matches(words, path.stem), (None, []))
        if found is None:
            matching = self.by_id.get(words[0], [])
            what = f"is in {len(matching)} folders of it" if len(matching) > 1 else "is not below it"
            raise ValueError(
                f"{path}: {split} names the scene '{printable(entry)}', which {what} ({self.root}); correct one of them."
            )
        if not rest:
            return found
        number, has_any = rest[0], found.folder not in ("", found.name)
        inside = f"{found.name}/{number}" if "/" in found.folder else number
        if not has_any or not _is_number(number) or not (self.root / inside / TABLES).is_dir():
            folder, name = self.root / found.folder, "/".join(words[: -len(rest)])
            raise ValueError(
                f"{path}: {split} names revision {printable(number)} of the scene '{printable(name)}', which "
                f"{folder.parent if has_any else folder} has not; fetch it, or correct the list."
            )
        return Scene(found.name, inside)

    def _matches(self, words: list[str], stem: str) -> Iterator[tuple[Scene, list[str]]]:
        """(a scene that the first words of an entry name, the other words), the most words first; of no way up."""
        if {"", ".", ".."} & {*words}:
            return
        for many in range(len(words), 0, -1):
            head, rest = "/".join(words[:many]), words[many:]
            matching = self.by_id.get(head, [])
            own = [self.named.get(key) for key in (f"{stem}/{head}", head)]
            yield from (
                (scene, rest) for scene in (*own, *(matching if len(matching) == 1 else ())) if scene is not None
            )


def _read_lists(path: Path) -> dict[str, list[str]]:
    """Split: entries. Raises ValueError."""
    if path.suffix not in LISTS:
        found = tables.read(path, dict, "write it again")
        for split, entries in found.items():
            if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
                raise ValueError(f"{path}: {printable(split)} must be a list of scenes.")
        return found
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text; give a list of scenes as AWML's YAML files.") from None
    found = lists(text)
    if not found:
        raise ValueError(f"{path} has no lists of scenes, such as `train:` with a line `  - <id>/<revision>` for each.")
    return found


def lists(text: str) -> dict[str, list[str]]:
    """The lists of a YAML file of AWML's: `key:` in the first column and `- entry` in lines below; everything else of it
    (version, docs) is passed over."""
    found: dict[str, list[str]] = {}
    key = None
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if top := re.match(r"([^\s#:-][^:]*):\s*(.*)", line):
            value = re.sub(r"(^|\s)#.*", "", top[2]).strip()
            key = top[1].strip("\"' ") if value in ("", "[]") else None
            if key is not None and value == "[]":
                found[key] = []
        elif key is not None and (item := re.match(r"\s*-\s+(.*)", line)):
            found.setdefault(key, []).append(re.sub(r"\s#.*", "", item[1]).strip().strip("\"'"))
    return found
