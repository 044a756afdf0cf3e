"""A small synthetic T4 world, made once a process: a scene of four key frames in each of train and val."""

import atexit
import functools
import tempfile
from pathlib import Path

from bevfn import synth
from bevfn.data import t4
from bevfn.data.index import Index

SIZE = (90, 160)  # of its images


@functools.cache
def root() -> Path:
    """Its folder, which nobody changes."""
    folder = tempfile.TemporaryDirectory(prefix="bevfn-small-t4-world-")
    atexit.register(folder.cleanup)
    how = {"scenes": 2, "frames_per_scene": 4, "image_size": SIZE, "azimuths": 180, "format": "t4"}
    return synth.write(Path(folder.name) / "world", **how, workers=1, progress=False)


@functools.cache
def index(split: str) -> Index:
    """The key frames of train or val."""
    return t4.index(root(), split)
