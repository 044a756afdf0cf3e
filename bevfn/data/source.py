"""Where a run's key frames come from: a nuScenes root, a folder with one frame, or a synthetic world made on the spot."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bevfn import synth
from bevfn.data import batch, building, camera_pipeline, depth, infos, nuscenes, paste, pipeline
from bevfn.data.batch import Sample
from bevfn.data.index import Frame, Index, inverse
from bevfn.data.loader import Collate

Kind = Literal["nuscenes", "frame", "synthetic"]
Splits = tuple[Index, Index]  # training, evaluation
WORLD = Path("runs/world")
SCENES, WORLD_IMAGE = 10, (450, 800)  # half of nuScenes' image size: decoding is what two cores wait for
SPLITS = {"v1.0-trainval": ("train", "val"), "v1.0-mini": ("mini_train", "mini_val")}


def kind(root: Path | None) -> Kind:
    """What lies at a data root."""
    if root is None:
        return "synthetic"
    return "frame" if (root / "frame.json").is_file() else "nuscenes"


def prepare(root: Path | None) -> None:
    """Makes the synthetic world that a run without a data root needs, unless it is there; for one process."""
    if root is None and not WORLD.exists():
        print(f"no --data-root: making a synthetic world of {SCENES} scenes in {WORLD} (once)", flush=True)
        synth.write(WORLD, scenes=SCENES, seed=0, image_size=WORLD_IMAGE)


def open_splits(root: Path | None, version: str) -> Splits:
    """(training, evaluation) key frames. A single frame is both."""
    if kind(root) == "frame":
        assert root is not None
        frame = infos.read(root / "frame.json")
        return frame, frame
    if root is None:
        root, version = WORLD, "v1.0-trainval"
    if version not in SPLITS:
        raise ValueError(f"--version {version} has no training split; choose one of {', '.join(SPLITS)}")
    training, evaluation = SPLITS[version]
    return nuscenes.index(root, version, training), nuscenes.index(root, version, evaluation)


@dataclass(frozen=True)
class Reader:
    """The functions that go with a reading, the Config of a pipeline, which has at least class_names and capacities.

    `BEVFUSION` and `BEVDEPTH` are the two that exist.
    """

    load: Callable[[Index, Any, paste.Database | None, int, np.random.Generator], Any]
    """(index, reading, database, place, generator) -> a sample with token, boxes and labels; the loader's once the first
    three are bound"""
    collate: Collate
    lidar_from_boxes: Callable[[Frame, Any], np.ndarray]
    """(key frame, reading) -> [4,4] float64: the lidar frame from the one in which boxes and detections lie"""
    sensors: Callable[[Any], tuple[str, ...]]
    """reading -> "camera", "lidar": what a detector that reads so uses"""


def _load_points_and_images(
    index: Index, reading: pipeline.Config, database: paste.Database | None, place: int, generator: np.random.Generator
) -> Sample:
    return pipeline.load(index[place], index.root, reading, generator, database=database)


def _load_key_frames(
    index: Index,
    reading: camera_pipeline.Config,
    database: paste.Database | None,
    place: int,
    generator: np.random.Generator,
) -> Sample:
    files = depth.prepared(index) if reading.depth else None
    return camera_pipeline.load(index, place, reading, generator, depth_files=files)


BEVFUSION = Reader(
    load=_load_points_and_images,
    collate=batch.collate,
    lidar_from_boxes=lambda frame, reading: np.eye(4),
    sensors=lambda reading: ("camera", "lidar") if reading.cameras else ("lidar",),
)
BEVDEPTH = Reader(  # the LiDAR's depth maps are what it learns from, not what it looks at
    load=_load_key_frames,
    collate=batch.collate,
    lidar_from_boxes=lambda frame, reading: (
        inverse(frame.global_from_lidar) @ camera_pipeline.ego_pose(frame, reading.channels)
    ),
    sensors=lambda reading: ("camera",),
)


def database_folder(index: Index) -> Path:
    """Where `bevfn data prepare` puts the GT-paste database of a split."""
    return building.place(index.root, "bevfn_gt_database") / index.split
