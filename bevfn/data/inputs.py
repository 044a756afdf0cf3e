"""Key frames to detect in, from whatever lies at a path: a nuScenes root, T4 data set or data of one's own and a scene, an info
file, a folder with one frame, a directory of clouds, or one cloud. Annotations need not be there, nor what the model does not
read."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from bevfn.data import columns as told
from bevfn.data import infos, nuscenes, own, scene, source, t4, t4_folders, tables
from bevfn.data.index import Frame, Index, Packed
from bevfn.data.reading import Reading
from bevfn.names import printable

CLOUDS = (".pcd", ".bin", ".npy")
INFOS = (".json", ".pkl")
ALL = "all"  # scenes
NAMED = 10  # scenes, in a sentence
GIVE = (
    "give a nuScenes root, a T4 data set or data of your own (docs/custom_data.md), an info file (.pkl, .json), a folder with "
    "frame.json, or a directory of point clouds "
    f"({', '.join(CLOUDS)})"
)


def read(data: Path, scene_name: str | None = None, version: str | None = None, columns: str = "") -> Index:
    """The key frames of `data`, of a data set's scene or split those alone; None: of the only scene, "all": of every one.

    version: of a nuScenes root, or the revision of T4 scenes; None: the only one, the highest. columns: of clouds that lie there
    without a data set, see `columns.parse`.

    Raises ValueError, one sentence, where nothing of a known kind is there, for a scene or version that is not there, for columns
    of other data, and where a scene has to be named.
    """
    data = Path(data)
    if not data.exists():
        raise ValueError(f"{data} does not exist; {GIVE}")
    if columns and not _is_bare(data):
        raise ValueError(f"the columns {printable(columns)} are of bare clouds, which {data} is not; leave them out")
    if data.is_file() and not t4_folders.is_list(data):
        made = _of_file(data, columns)
    elif (data / "frame.json").is_file():
        made = infos.read(data / "frame.json")
    elif found := clouds_in(data):
        made = clouds(data, found, columns)
    elif (kind := source.kind(data)) == "t4":
        return _of_t4(data, scene_name, version)
    elif kind == "own":
        return _of_own(data, scene_name)
    elif tables.versions(data):
        return _of_nuscenes(data, scene_name, version)
    else:
        raise ValueError(f"{data} holds no data of a known kind; {GIVE}")
    if scene_name not in (None, ALL):
        raise ValueError(f"{data} has no scenes; leave out the scene {printable(scene_name)}")
    return made


def check(index: Index, reading: Reading) -> None:
    """Raises ValueError, one sentence, where key frames have not what a model reads of them: a sensor, poses, or a file."""
    source.check(index, reading, train=False, labels=False)
    _, lacking = scene.whole(index, np.arange(len(index)), reading)
    if lacking:
        more = f" (and so it is with {len(lacking) - 1:,} others)" if len(lacking) > 1 else ""
        raise ValueError(f"{index.root}: {lacking[0]}, which the model reads{more}; complete the data")


def placed(index: Index) -> tuple[Index, bool]:
    """(the key frames with the LiDAR's frame as the world's where poses are unknown, whether there is such a one)."""
    unknown = [not np.isfinite(frame.global_from_lidar).all() for frame in index]
    if not any(unknown):
        return index, False
    here = np.eye(4)
    frames = (replace(f, ego_from_lidar=here, global_from_ego=here) if u else f for f, u in zip(index, unknown))
    return replace(index, frames=tuple(frames)), True


# --- clouds without a data set ---


def clouds_in(folder: Path) -> list[Path]:
    """Point files that lie in a folder itself, scan 9 before scan 10."""
    found = (f for f in folder.iterdir() if f.suffix in CLOUDS and not f.name.startswith(".") and f.is_file())
    return sorted(found, key=lambda file: [(not w.isdigit(), int(w) if w.isdigit() else w) for w in _words(file.name)])


def _is_bare(data: Path) -> bool:
    """Whether clouds lie there without a data set."""
    if data.is_file():
        return data.suffix in CLOUDS
    return not (data / "frame.json").is_file() and bool(clouds_in(data))


def clouds(folder: Path, files: list[Path], columns: str = "") -> Index:
    """Key frames of a scan each, without cameras, poses, times and earlier scans: the LiDAR's frame is the world's."""
    told.parse(columns)  # or there are none such
    names = [_stem(file.name) for file in files]
    tokens = names if len(set(names)) == len(names) else [file.name for file in files]
    frames = tuple(_cloud(file.name, token, columns) for file, token in zip(files, tokens))
    return Index(folder, "clouds", "", frames, class_names=(), metric="recall")


def _cloud(path: str, token: str, columns: str) -> Frame:
    here = np.eye(4)
    return Frame(
        token=token,
        scene="",
        previous="",
        timestamp=0.0,
        lidar_path=path,
        ego_from_lidar=here,
        global_from_ego=here,
        sweeps=(),
        cameras={},
        boxes=np.zeros((0, 9)),
        names=(),
        valid=np.zeros(0, dtype=bool),
        num_lidar_points=np.zeros(0, dtype=np.int64),
        attributes=(),
        visibility=(),
        annotations=(),
        columns=columns,
    )


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"([0-9]+)", name) if word]


def _stem(name: str) -> str:
    """x of x.pcd.bin."""
    for suffix in CLOUDS[::-1]:
        name = name.removesuffix(suffix)
    return name or "cloud"


# --- files and data sets ---


def _of_file(file: Path, columns: str) -> Index:
    if file.suffix in INFOS:
        return infos.read(file)
    if file.suffix in CLOUDS:
        return clouds(file.parent, [file], columns)
    raise ValueError(f"{file} is a file of no known kind; {GIVE}")


def _of_nuscenes(root: Path, name: str | None, version: str | None) -> Index:
    version = version or tables.only_version(root)
    tables.check_root(root, version)
    splits = tables.splits(root, version)
    if name in splits:
        return nuscenes.index(root, version, name)
    every = list(dict.fromkeys(scene for scenes in splits.values() for scene in scenes))
    chosen = _chosen(root, every, name)
    split = next((split for split, scenes in splits.items() if set(chosen) <= set(scenes)), None)
    if split is None:
        raise ValueError(
            f"{root}, {version}: no split has all {len(every):,} scenes; name a scene, or a split of {', '.join(splits)}"
        )
    index = nuscenes.index(root, version, split)
    assert isinstance(index.frames, Packed)
    column = index.frames.columns
    codes = [code for code, word in enumerate(column["scene_words"]) if word.decode() in chosen]
    return index.select(np.flatnonzero(np.isin(column["scene"], codes)))


def _of_t4(root: Path, name: str | None, version: str | None) -> Index:
    revision = t4_folders.revision_of(version)
    splits = t4_folders.splits(root, revision)
    if name in splits:
        return t4.index(root, name, revision=revision)
    found = {scene.name: scene for scene in splits[t4_folders.ALL]}
    (one,) = _chosen(root, list(found), name)
    return t4.index(t4_folders.base(root) / found[one].folder)


def _of_own(root: Path, name: str | None) -> Index:
    present = own.splits(root)
    if name is not None and name in present:
        return own.index(root, name)
    if len(present[own.ALL]) == 1 and name is None:
        return own.index(root)
    (one,) = _chosen(root, present[own.ALL], name)
    return own.index(root / one)


def _chosen(root: Path, every: list[str], name: str | None) -> list[str]:
    """The scenes that are asked for, by their name or its last part. Raises ValueError."""
    if not every:
        raise ValueError(f"{root} has no scene of any split; list its scenes in a {tables.SPLITS} beside its tables")
    if name == ALL or (name is None and len(every) == 1):
        return every
    listed = ", ".join(map(printable, every[:NAMED])) + (f" and {len(every) - NAMED:,} more" if every[NAMED:] else "")
    if name is None:
        raise ValueError(f"{root} has {len(every):,} scenes: {listed}; name one of them (--scene), or {ALL}")
    matching = [one for one in every if one == name] or [one for one in every if one.rpartition("/")[2] == name]
    if len(matching) != 1:
        raise ValueError(f"{root} has no scene '{printable(name)}'; it has {listed}")
    return matching
