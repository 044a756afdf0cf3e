"""Where a run's key frames come from: a nuScenes root, a folder with one frame, or a synthetic world made on the spot."""

from pathlib import Path
from typing import Literal

import numpy as np

from bevfn.data import infos, nuscenes, paste, pipeline, synth
from bevfn.data.batch import Sample
from bevfn.data.index import Index

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


def load(
    index: Index, reading: pipeline.Config, database: paste.Database | None, place: int, generator: np.random.Generator
) -> Sample:
    """The key frame at a place of an index, read as `reading` says (the loader's function once the first three are bound)."""
    return pipeline.load(index[place], index.root, reading, generator, database=database)


def database_folder(index: Index) -> Path:
    """Where `bevfn data prepare` puts the GT-paste database of a split."""
    return index.root / "bevfn_gt_database" / index.split
