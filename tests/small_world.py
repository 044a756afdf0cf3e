"""A small synthetic val split, made once a process, and detectors on it that cheat."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np

from bevfn import synth
from bevfn.data import nuscenes
from bevfn.data.index import Frame, Index
from bevfn.data.reading import CLASS_NAMES
from bevfn.evaluation import results, score
from bevfn.evaluation.results import Detections

META = results.Meta(use_lidar=True)


@functools.cache
def unmade() -> Path:
    """A root that looks like nuScenes' from outside, for flags' defaults; a world of `data synth` has its own."""
    folder = tempfile.TemporaryDirectory(prefix="bevfn-nuscenes-")
    atexit.register(folder.cleanup)
    (Path(folder.name) / "v1.0-trainval").mkdir()
    return Path(folder.name)


@functools.cache
def index() -> Index:
    """Three key frames, all of the val split."""
    folder = tempfile.TemporaryDirectory(prefix="bevfn-small-world-")
    atexit.register(folder.cleanup)
    root = synth.write(
        Path(folder.name) / "world", scenes=2, frames_per_scene=3, image_size=(90, 160), azimuths=180, workers=1,
        progress=False,
    )  # fmt: skip
    return nuscenes.index(root, "v1.0-trainval", "val")


def copy(to: Path) -> Path:
    """That world as it was made, in a folder of its own: tests of the same process may have prepared data inside the first."""
    return Path(shutil.copytree(index().root, to, ignore=shutil.ignore_patterns(".bevfn", "bevfn_*")))


@functools.cache
def training() -> Index:
    """The same world's train split: three key frames too."""
    return nuscenes.index(index().root, "v1.0-trainval", "train")


@functools.cache
def tables():
    """The devkit's tables, loaded once."""
    return score.tables(index())


def annotations(frame: Frame) -> Detections:
    """What a perfect detector finds: the boxes that count; scores differ, as the devkit's errors need."""
    keep = [i for i, name in enumerate(frame.names) if name and frame.valid[i]]
    boxes = np.nan_to_num(frame.boxes[keep], nan=0.0)
    boxes[:, 2] -= 0.5 * boxes[:, 5]
    labels = np.array([CLASS_NAMES.index(frame.names[i]) for i in keep], dtype=np.int64)
    return Detections(boxes, np.linspace(0.9, 0.5, len(keep)), labels)


def nothing() -> Detections:
    return Detections(np.zeros((0, 9)), np.zeros(0), np.zeros(0, dtype=np.int64))


def document(change=lambda detections: detections) -> dict:
    """The results document of annotations(frame), changed."""
    found = {frame.token: change(annotations(frame)) for frame in index()}
    return results.format(found, index(), class_names=CLASS_NAMES, meta=META)
