"""Frames of an Index made by hand, for tests of what happens to them, and the reading of a folder with one frame."""

from pathlib import Path

import numpy as np

from bevfn.data import infos, scene
from bevfn.data.batch import Sample
from bevfn.data.index import Frame, Index
from bevfn.data.reading import Cameras, Points, Reading

RANGE = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)
# Of generated frames of 225 x 400 pixels.
SMALL = Reading(points=Points(sweeps=0), cameras=Cameras(image_size=(64, 176), resize=0.48), range=RANGE)


def labelled(names: tuple[str, ...], valid: tuple[bool, ...] | None = None) -> Frame:
    """A frame of which only the annotations' names matter."""
    count = len(names)
    blank = ("",) * count
    return Frame(
        token="", scene="", previous="", timestamp=0.0, lidar_path="", ego_from_lidar=np.eye(4),
        global_from_ego=np.eye(4), sweeps=(), cameras={}, boxes=np.ones((count, 9)), names=names,
        valid=np.array(valid or (True,) * count, dtype=bool), num_lidar_points=np.ones(count, dtype=np.int64),
        attributes=blank, visibility=blank, annotations=blank,
    )  # fmt: skip


def indexed(frames: list[Frame]) -> Index:
    return Index(Path("/nowhere"), "v1.0-mini", "mini_train", tuple(frames))


def load(folder: Path, reading: Reading = SMALL) -> Sample:
    """The frame of a folder."""
    return scene.load(infos.read(Path(folder) / "frame.json"), 0, reading)
