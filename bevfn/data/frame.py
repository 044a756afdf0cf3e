"""One key frame on disk, in mmdetection3d's v1.1 info form as JSON, to a Sample.

A folder holds `frame.json` (`metainfo.categories`: class name -> label number; `data_list`: one entry with
`lidar_points`, `images` and `instances`), the images and the point file, named relative to the folder. Its key frame is
all there is: sweeps are not read.

Golden cases bevfusion_lidar and bevfusion_lidar_cam hold what upstream makes of `../shared/nuscenes_frame`.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from bevfn.data import infos, pipeline
from bevfn.data.batch import Sample
from bevfn.data.pipeline import CLASS_NAMES, Config

__all__ = ["CLASS_NAMES", "Config", "Sample", "load"]


def load(root: Path, *, config: Config, generator: np.random.Generator | None = None) -> Sample:
    """The frame in the folder `root`, read as `config` says but without sweeps.

    Column 4 of the points, the ring in the file, becomes the time lag of a key frame: 0 s.
    Raises ValueError, one sentence with file and field, for anything missing, truncated or of another size.
    """
    path = Path(root) / "frame.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a frame folder, or make one with `bevfn.synth.key_frame`.")
    index = infos.read(path)
    if len(index) != 1:
        raise ValueError(f"{path}: data_list has {len(index)} entries; a frame folder holds exactly one.")
    return pipeline.load(index[0], index.root, replace(config, sweeps=0), generator)
