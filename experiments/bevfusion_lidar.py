"""BEVFusion's LiDAR-only detector (TransFusion-L, Bai et al. 2022, arXiv 2203.11496, on BEVFusion's encoder), nuScenes.

Published (nuScenes val, mmdetection3d): 69.6 NDS, 64.9 mAP. 20 epochs, 8 devices x 4 samples, from scratch, with objects
of other frames pasted in (`bevfn data prepare ROOT` makes their database) until epoch 15.

    torchrun --nproc-per-node 8 -m bevfn.experiments.bevfusion_lidar --precision fp16 --data-root /data/nuscenes
    python -m bevfn.experiments.bevfusion_lidar                            # a synthetic world, minutes on a laptop

What it shares with the LiDAR-camera recipe is in `bevfusion.py`.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from bevfn.choices import one_of
from bevfn.data import augment, source
from bevfn.data import paste as pasting
from bevfn.experiments import bevfusion
from bevfn.models.bevfusion import Voxels, lidar_only
from bevfn.training import command_line, run, tasks

NETWORKS = {"bevfusion-lidar": lidar_only}
# How key frames are read, as published; the last 5 of 20 epochs have paste=None.
TRAIN = replace(
    bevfusion.TRAIN, cameras=None, augmentation=augment.Global(scale_translation=False), paste=pasting.Config()
)


@dataclass(frozen=True)
class Config(bevfusion.Shared):
    """The LiDAR-only recipe (mmdetection3d bevfusion_lidar_voxel0075_second_secfpn_8xb4-cyclic-20e)."""

    model: Annotated[str, one_of(NETWORKS)] = "bevfusion-lidar"
    """network and recipe"""
    epochs: int = 20
    eval_every: int = 5
    recipe_lr: float = 1e-3
    schedule: Literal["cosine", "cycle", "stairs"] = "cycle"
    """cycle: up by a cosine, then down by one; cosine: warm-up, then down; stairs: up a stair an epoch, then down as a cosine"""
    final_lr: float = 1e-5
    """the end, as a share of the peak"""
    paste: bool = True
    """paste objects of other frames, from the database that `bevfn data prepare` made in the data root"""
    published_paste: bool = True
    """objects of no class (police cars, debris, bicycle racks) are pasted as barriers; no: they are not pasted"""
    paste_off: int = 5
    """last epochs without pasting; a run of no more epochs pastes nothing"""

    @property
    def grid(self) -> Voxels:
        return bevfusion.sized(self, NETWORKS[self.model]()).voxels


DEFAULTS: command_line.Defaults = {
    "bevfusion-lidar": {
        "nuscenes": Config(run_dir=command_line.RUNS / "bevfusion_lidar"),
        "frame": Config(
            run_dir=command_line.RUNS / "bevfusion_lidar_frame", **{**bevfusion.FRAME, "steps": 100}, paste=False
        ),
        "synthetic": Config(
            run_dir=command_line.RUNS / "bevfusion_lidar_synthetic", **bevfusion.SYNTHETIC, paste=False
        ),
    }
}


def task(config: Config, splits: source.Source | None = None) -> tasks.Task:
    """The LiDAR-only task; `splits`: key frames other than the config's."""
    made = bevfusion.assemble(config, splits, NETWORKS[config.model](), TRAIN)
    return replace(made, data=with_paste(config, made.data))


def with_paste(config: Config, data: tasks.Data) -> tasks.Data:
    """`data` with the GT-paste database, which its last epochs do not use."""
    pasted = data.reading(0)
    plain = replace(pasted, paste=None)
    if not (config.paste and config.augment):
        return replace(data, reading=lambda epoch: plain)
    making = pasting.Making(config.published_sweeps, config.published_paste)
    database = pasting.read(pasting.folder(data.training), making=making, index=data.training)
    last = config.epochs - config.paste_off
    return replace(data, reading=lambda epoch: pasted if epoch < last else plain, database=database)


if __name__ == "__main__":
    run.cli(DEFAULTS, task, __doc__)
