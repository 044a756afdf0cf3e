"""A nuScenes root to an Index, through nuscenes-devkit: built once per split, cached, rebuilt when a table changes.

Numbers come out as mmdetection3d's info files have them (up to 10 sweeps, boxes and velocities in the LiDAR frame,
`valid` by LiDAR and radar points), so recipes written for those files find the same samples.

Source: nuscenes-devkit 1.2; mmdetection3d tools/dataset_converters/nuscenes_converter.py (max_sweeps=10).
"""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bevfn import waiting
from bevfn.data import faults, stored, tables
from bevfn.data.index import CAMERAS, Frame, Index, Packed, inverse, pack
from bevfn.data.rows import Impossible, boxes_of, camera, check_links, check_times, counts, poses, sweeps
from bevfn.names import printable, sentence
from bevfn.synth.tables import CATEGORIES  # nuScenes' 23

ANNOTATIONS = "sample_annotation"
FORMAT = 5  # of the cache file; another number makes every older file be rebuilt


def index(root: Path, version: str, split: str, cache: Path | None = None) -> Index:
    """The key frames of a split, in the order of the sample table; split `test` of v1.0-test has no boxes.

    root: the folder that holds samples/, sweeps/, maps/ and the version's folder of tables; split: one of the devkit's
    (train, val, test, mini_train, mini_val, ...) or a name in the version's splits.json; cache: folder of the cache
    file, else root/.bevfn, else a folder of `$BEVFN_CACHE` (~/.cache/bevfn) if the root cannot be written.
    The first call reads every table, which takes nuScenes' trainval minutes and gigabytes; later ones read one file.
    Processes that call at once wait for the one that builds.

    Raises ValueError, one sentence, for a wrong root, version or split, a split without scenes, broken tables, and values
    that are not possible, which names the annotation or key frame.
    """
    packed = faults.refuse(frames(root, version, split, cache), f"{Path(root) / version}")
    return Index(root=Path(root), version=version, split=split, frames=packed)


def frames(root: Path, version: str, split: str, cache: Path | None = None, *, keep: bool = True) -> Packed:
    """What `index` has, whatever its values are: for `bevfn data check`, which writes nothing (`keep` False)."""
    root = Path(root)
    tables.check_root(root, version)
    return stored.get(
        stored.places(root, cache),
        _name(version, split),
        _header(root, version, split),
        lambda: _build(root, version, split, set(tables.scenes_of(root, version, split))),
        keep=keep,
    )


def has_index(root: Path, version: str, split: str) -> bool:
    """Whether `index` would read a cached file."""
    return stored.read(stored.places(root), _name(version, split), _header(root, version, split)) is not None


# --- building ---


def _build(root: Path, version: str, split: str, scenes: set[str]) -> Packed:
    """Reads the tables; a failure of the devkit is looked into, because it only says which token it missed."""
    from nuscenes import NuScenes  # imports for seconds

    try:
        with waiting.told(f"index of {version} {split}, reading the tables"):
            devkit = NuScenes(version=version, dataroot=str(root), verbose=False)
        _check_rows(devkit)
        samples = [s for s in devkit.sample if devkit.get("scene", s["scene_token"])["name"] in scenes]
        with waiting.counted(f"index of {version} {split}", len(samples)) as advance:
            frames = []
            for sample in samples:
                frames.append(_frame(devkit, sample))
                advance(1)
        packed = pack(frames)
        _tell_of_categories(devkit, root / version)
    except Impossible as error:
        raise ValueError(f"{root / version}: {error}.") from None
    except Exception as error:  # of the devkit: nearly any
        _, problems = tables.read_tables(root, version)
        missing = [] if problems else tables.missing_maps(root, version)
        what = next(iter(problems.values()), "") or (
            f"{printable(missing[0])} does not exist but {version}/map.json names it; extract nuScenes' maps archive."
            if missing
            else f"{root / version}: nuscenes-devkit cannot read the tables ({type(error).__name__}: {sentence(error)})."
        )
        raise ValueError(what) from error
    if not len(packed):
        raise ValueError(f"{root / version}: sample.json has no key frame of the split {split!r}; extract it again.")
    return packed


def _check_rows(devkit: Any) -> None:
    """Raises Impossible for what the devkit takes as it comes: seconds of the minutes that nuScenes' trainval takes."""
    rows = {name: getattr(devkit, name) for name in tables.TABLES}
    for name in tables.TABLES:
        if len(devkit._token2ind[name]) < len(rows[name]):  # it has the last one
            raise Impossible(f"several rows of {name}.json have the same token; extract the metadata archive again")
    for name, what in tables.wrong(rows).items():
        raise Impossible(f"{name}.json: {what}; extract the metadata archive again")


def _tell_of_categories(devkit: Any, where: Path) -> None:
    """Warns of annotations whose category is none of nuScenes', since they are left out; raises Impossible if all are."""
    counts = Counter(row["category_name"] for row in devkit.sample_annotation)
    foreign = {name: count for name, count in counts.items() if name not in CATEGORIES}
    if not foreign:
        return
    names = ", ".join(printable(name) for name in list(foreign)[:5])
    if len(foreign) == len(counts):
        raise Impossible(f"its categories ({names}) are none of nuScenes', so no object could be learned")
    warnings.warn(
        f"{where}: {sum(foreign.values()):,} of {sum(counts.values()):,} annotations are left out, since their categories are "
        f"none of nuScenes' ({names}).",
        stacklevel=6,  # in index
    )


def _frame(devkit: Any, sample: dict) -> Frame:
    """One row of the sample table; `devkit` is a devkit NuScenes."""
    if "LIDAR_TOP" not in sample["data"]:
        raise Impossible(f"key frame {printable(sample['token'])} has no LIDAR_TOP in sample_data.json")
    lidar = devkit.get("sample_data", sample["data"]["LIDAR_TOP"])
    check_times(devkit.get, sample, lidar)
    ego_from_lidar, global_from_ego = poses(devkit.get, lidar)
    lidar_from_global = inverse(global_from_ego @ ego_from_lidar)
    images = {
        channel: devkit.get("sample_data", sample["data"][channel]) for channel in CAMERAS if channel in sample["data"]
    }
    return Frame(
        token=sample["token"],
        scene=devkit.get("scene", sample["scene_token"])["name"],
        previous=sample["prev"],
        timestamp=1e-6 * lidar["timestamp"],
        lidar_path=lidar["filename"],
        ego_from_lidar=ego_from_lidar,
        global_from_ego=global_from_ego,
        sweeps=sweeps(devkit.get, lidar, lidar_from_global, lambda scan: _previous(devkit, scan)),
        cameras={channel: camera(devkit.get, image, lidar_from_global) for channel, image in images.items()},
        **_annotations(devkit, sample["anns"], lidar_from_global),
    )


def _previous(devkit: Any, scan: dict) -> dict | None:
    """The scan before, of the same sensor in the same scene; None for the first."""
    if not scan["prev"]:
        return None
    before = devkit.get("sample_data", scan["prev"])
    scenes = [devkit.get("sample", row["sample_token"])["scene_token"] for row in (before, scan)]
    if before["channel"] != scan["channel"] or scenes[0] != scenes[1]:
        raise Impossible(
            f"row {printable(scan['token'])} of sample_data.json has its `prev` in another scene or sensor"
        )
    return before


def _annotations(devkit: Any, tokens: list[str], lidar_from_global: np.ndarray) -> dict[str, Any]:
    """The Frame's fields of boxes, in the sample's order of annotations."""
    from nuscenes.eval.detection.utils import category_to_detection_name

    rows = [devkit.get("sample_annotation", token) for token in tokens]
    boxes = np.zeros((0, 9))
    if rows:
        check_links(devkit.get, ANNOTATIONS, rows)
        velocities = np.array([devkit.box_velocity(token) for token in tokens])  # G 3, global, NaN where unknown
        velocities[:, 2] = 0.0  # as upstream: the horizontal part is turned
        boxes = boxes_of(ANNOTATIONS, rows, velocities, lidar_from_global)
    seen = np.stack([counts(ANNOTATIONS, rows, f"num_{sensor}_pts") for sensor in ("lidar", "radar")], axis=1)  # G 2
    levels = (row.get("visibility_token") for row in rows)
    return {
        "boxes": boxes,
        "names": tuple(category_to_detection_name(row["category_name"]) or "" for row in rows),
        "valid": seen.sum(axis=1) > 0,
        "num_lidar_points": seen[:, 0],
        "attributes": tuple(
            ", ".join(devkit.get("attribute", token)["name"] for token in row["attribute_tokens"]) for row in rows
        ),
        "visibility": tuple(devkit.get("visibility", level)["level"] if level else "" for level in levels),
        "annotations": tuple(tokens),
        "categories": tuple(row["category_name"] for row in rows),
    }


# --- cache ---


def _name(version: str, split: str) -> str:
    return f"index-{version}-{split}.npz"


def _header(root: Path, version: str, split: str) -> stored.Header:
    stated = stored.stats({name: root / version / f"{name}.json" for name in (*tables.TABLES, "splits")})
    return {"format": FORMAT, "version": version, "split": split, "tables": stated}
