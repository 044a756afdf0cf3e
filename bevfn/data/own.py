"""Data of one's own to an Index: a folder a scene, whose key frames and scans one `frames.json` tells.

A `frames.json` has the form of mmdetection3d's info files (v1.1: `metainfo`, `data_list`; `infos.read`), in JSON, and in order
of time. Paths in it are relative to its folder. What it may leave out, and what follows (docs/custom_data.md):

    metainfo.points     what the numbers of a point are, `columns.parse`; nuScenes' five
    token               the scene's name and the entry's number
    timestamp           no earlier scans, no earlier key frames
    ego2global          no earlier scans; the vehicle's frame stands for the world's
    lidar2ego           the LiDAR's frame is the vehicle's
    lidar_sweeps        the scans before it in the scene, key frames or not, moved through both poses
    instances           a scan between key frames; where no entry has any: key frames to detect objects in
    instance.velocity   measured between the neighbours of the same `track`, else unknown
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bevfn.data import faults, infos, possible, stored, tables
from bevfn.data.index import Camera, Frame, Index, Packed, Sweep, inverse, pack
from bevfn.data.rows import MAX_SWEEPS
from bevfn.names import leaves, printable

FILE = "frames.json"
VERSION = "own"  # of an Index
ALL = "all"
FORMAT = 1  # of the cache file
DEPTH = 2  # folders from a root to a scene's own, at most
MEND = "write it again"
IDENTITY = np.eye(4).tolist()
APART = 1.5  # s, at most, from an annotation to a neighbour that its velocity is measured by


def scenes(root: Path) -> list[str]:
    """Folders with a frames.json, relative to the root, "" being itself; sorted. Folders in a scene's are not looked at."""
    found, folders = list[str](), [""]
    for _ in range(DEPTH + 1):
        inner = list[str]()
        for folder in folders:
            if (Path(root) / folder / FILE).is_file():
                found.append(folder)
                continue
            try:
                entries = sorted(e.name for e in os.scandir(Path(root) / folder) if e.name[0] != "." and e.is_dir())
            except OSError:  # not there, or not ours to read
                entries = []
            inner += [f"{folder}/{name}".lstrip("/") for name in entries]
        folders = inner
    return sorted(found)


def splits(root: Path) -> dict[str, list[str]]:
    """Split: its scenes; those of a splits.json in the root, and `all`. Raises ValueError for scenes that are not there."""
    every, path = scenes(root), Path(root) / tables.SPLITS
    own = tables.own_splits(path, set(every), FILE) if path.is_file() else {}
    return own | {ALL: every}


def default_splits(root: Path) -> tuple[str, str] | None:
    """(to train on, to evaluate on): train and val, or the only scene for both; None: they must be named."""
    present = splits(root)
    if {"train", "val"} <= present.keys():
        return "train", "val"
    return (ALL, ALL) if len(present[ALL]) == 1 else None


def index(root: Path, split: str = ALL, *, keep: bool = True) -> Index:
    """The key frames of a split, scene after scene. keep: False writes no file from which it is read the next time.

    Raises ValueError, one sentence with file and field, for a file that is damaged, of another form or tells values that are not
    possible, and for scenes of different classes.
    """
    root, present = Path(root), splits(root)
    if split not in present:
        raise ValueError(f"{root} has no split '{printable(split)}'; it has {', '.join(map(printable, present))}.")
    if not present[split]:
        raise ValueError(f"{root}: the split '{printable(split)}' has no scene; it needs folders with a {FILE}.")
    files = {name: root / name / FILE for name in present[split]}
    header = {"format": FORMAT, "scenes": stored.stats(files)}
    packed = stored.get(
        stored.places(root), f"index-own-{split}.npz", header, lambda: _build(root, list(files)), keep=keep
    )
    first = next(iter(files.values()))
    classes = _categories(infos.get(tables.read(first, dict, MEND), str(first), "metainfo", dict), first)
    return Index(
        root, VERSION, split, faults.refuse(packed, str(root)), class_names=tuple(classes.values()), metric="t4"
    )


def _build(root: Path, names: list[str]) -> Packed:
    """The key frames of these scenes. Raises ValueError."""
    read = [_read(root, name) for name in names]
    for one in read[1:]:
        if one.classes != read[0].classes:
            raise ValueError(
                f"{one.path} has the classes {_listed(one.classes)}, but {read[0].path} {_listed(read[0].classes)}; write the same "
                "metainfo.categories into both."
            )
    annotated = any(any(one.annotated) for one in read)
    return pack(frame for one in read for frame, is_key in zip(one.frames, one.annotated) if is_key or not annotated)


@dataclass(frozen=True)
class _Scene:
    """What a frames.json says."""

    path: Path
    classes: tuple[str, ...]
    frames: list[Frame]
    annotated: list[bool]
    """Whether an entry has `instances`."""


def _read(root: Path, name: str) -> _Scene:
    path = root / name / FILE
    document = tables.read(path, dict, MEND)
    meta, entries = infos.get(document, str(path), "metainfo", dict), infos.get(document, str(path), "data_list", list)
    categories = _categories(meta, path)
    told = infos.point_columns(meta, f"{path}: metainfo")
    odd = next((i for i, entry in enumerate(entries) if not isinstance(entry, dict)), None)
    if odd is not None:
        raise ValueError(f"{path}: data_list[{odd}] is a {type(entries[odd]).__name__}, not an object; {MEND}.")
    own = [_Entry(entry, f"{path}: data_list[{i}]", name, i) for i, entry in enumerate(entries)]
    frames = [replace(one.frame(categories), columns=told) for one in own]
    _check_times(own, frames)
    annotated = [entry.get("instances") is not None for entry in entries]
    frames = [_after(own, frames, annotated, i) for i in range(len(own))]
    return _Scene(path, tuple(categories.values()), _moving(own, frames), annotated)


def _categories(meta: dict, path: Path) -> dict[int, str]:
    """Number to class. Raises ValueError."""
    found = infos.numbered(infos.get(meta, str(path), "categories", dict), f"{path}: metainfo.categories")
    if not found:
        raise ValueError(f"{path}: metainfo.categories names no class; write {{name: 0, name: 1, ...}}.")
    return found


@dataclass(frozen=True)
class _Entry:
    """One of data_list."""

    told: dict
    where: str
    scene: str
    number: int

    @property
    def timed(self) -> bool:
        return self.told.get("timestamp") is not None

    @property
    def posed(self) -> bool:
        return self.told.get("ego2global") is not None

    def frame(self, categories: dict[int, str]) -> Frame:
        """As it is told, with the vehicle's frame where poses are not."""
        cloud = infos.get(self.told, self.where, "lidar_points", dict)
        mounted = {"lidar2ego": IDENTITY} | {name: value for name, value in cloud.items() if value is not None}
        made = infos.frame(self.told | {"lidar_points": mounted}, self.where, categories, self._placed)
        return replace(
            made,
            token=made.token or f"{self.scene}/{self.number:06d}".lstrip("/"),
            scene=self.scene or ".",
            global_from_ego=made.global_from_ego if self.posed else np.eye(4),
            cameras={channel: _mounted(camera, made) for channel, camera in made.cameras.items()},
        )

    def _placed(self, name: str, folder: str) -> str:
        """A path that leaves the scene's folder is `faults`' to refuse."""
        return name if leaves(name) else f"{self.scene}/{name}".lstrip("/")

    def tracks(self) -> list[str]:
        """Of its instances, "" where there is none. Raises ValueError for one that is there twice."""
        told = [infos.text(one, self.where, "track") for one in self.told.get("instances") or ()]
        if twice := {track for track in told if track and told.count(track) > 1}:
            raise ValueError(f"{self.where}: two instances have the track {printable(min(twice))}; number them anew.")
        return told


def _mounted(camera: Camera, frame: Frame) -> Camera:
    """With its place on the vehicle, if only that to the LiDAR is told."""
    if np.isfinite(camera.ego_from_camera).all():
        return camera
    ego_from_camera = frame.ego_from_lidar @ inverse(camera.camera_from_lidar)
    return replace(camera, ego_from_camera=ego_from_camera, global_from_ego=frame.global_from_ego)


def _check_times(own: list[_Entry], frames: list[Frame]) -> None:
    """Raises ValueError unless all are in order of time, or none has one."""
    if lacking := [one for one in own if not one.timed]:
        if len(lacking) < len(own):
            raise ValueError(f"{lacking[0].where} has no timestamp, which others have; write it into all, in seconds.")
        return
    for one, before, after in zip(own[1:], frames, frames[1:]):
        if not before.timestamp < after.timestamp:
            raise ValueError(
                f"{one.where} is of the time {after.timestamp:g} s, not after {before.timestamp:g} s of the entry before; write a "
                "scene's entries in order of time."
            )


def _after(own: list[_Entry], frames: list[Frame], annotated: list[bool], i: int) -> Frame:
    """A scene's frame i, with what was before it: a key frame, and as many scans as are read, if it does not tell any."""
    frame = frames[i]
    if not own[i].timed:
        return frame
    keys = [k for k in range(i) if annotated[k] or not any(annotated)]
    previous = frames[keys[-1]].token if keys else ""
    if own[i].told.get("lidar_sweeps") is not None or not own[i].posed:
        return replace(frame, previous=previous)
    lidar_from_global = inverse(frame.global_from_lidar)
    sweeps = [
        Sweep(before.lidar_path, lidar_from_global @ before.global_from_lidar, frame.timestamp - before.timestamp)
        for one, before in zip(own[i - 1 :: -1] if i else (), frames[i - 1 :: -1])
        if one.posed
    ]
    near = [sweep for sweep in sweeps if not possible.LAG.impossible(np.array(sweep.lag))]
    return replace(frame, previous=previous, sweeps=tuple(near[:MAX_SWEEPS]))


def _moving(own: list[_Entry], frames: list[Frame]) -> list[Frame]:
    """With velocities of annotations that have a track and none of their own: between its neighbours, or itself, at an end."""
    placed: dict[str, list[tuple[int, int, np.ndarray]]] = {}  # frame, box, centre in the world
    for i, (one, frame) in enumerate(zip(own, frames)):
        for k, track in enumerate(one.tracks()):
            if track and one.timed and one.posed:
                centre = frame.global_from_lidar @ np.append(frame.boxes[k, :3], 1.0)
                placed.setdefault(track, []).append((i, k, centre[:3]))
    for seen in placed.values():
        for place, (i, k, _) in enumerate(seen):
            time = frames[i].timestamp
            around = [s for s in seen[max(0, place - 1) : place + 2] if abs(frames[s[0]].timestamp - time) <= APART]
            seconds = frames[around[-1][0]].timestamp - frames[around[0][0]].timestamp
            if len(around) > 1 and np.isnan(frames[i].boxes[k, 7:]).any():
                speed = (around[-1][2] - around[0][2]) / seconds
                frames[i].boxes[k, 7:] = (inverse(frames[i].global_from_lidar)[:3, :3] @ speed)[:2]
    return frames


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(printable, names))
