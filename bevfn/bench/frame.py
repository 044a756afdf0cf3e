"""A key frame as a batch, for what is measured on its calibration."""

import tempfile
from pathlib import Path

from bevfn.data import infos, scene
from bevfn.data.batch import Batch, collate
from bevfn.data.reading import Reading
from bevfn.synth import key_frame


def batch_of(frame: Path | None, reading: Reading) -> Batch:
    """One sample of a folder with frame.json, None: of a generated key frame."""
    with tempfile.TemporaryDirectory(prefix="bevfn-frame-") as folder:
        index = infos.read((frame or key_frame.write_frame(Path(folder))) / "frame.json")
        sample = scene.load(index, 0, reading)
    return collate([sample], capacities=reading.capacities)[0]
