"""MatrixVT (Zhou et al. 2022, arXiv 2211.10593): BEVDepth's single-frame detector whose view transform is two products
with ring and ray matrices, R50, 256 x 704 images, 128 x 128 cells of 0.8 m, nuScenes.

Published: no figure at d78c7b5. DrivingSDK's runs of this recipe (fp16, 8 devices x 8 samples): 32.99 mAP, 41.4 NDS on GPUs,
32.75 and 40.5 on Ascend NPUs. 24 epochs of CBGS with EMA, from an ImageNet ResNet-50; the learning rate never falls.

    torchrun --nproc-per-node 8 -m bevfn.experiments.matrixvt --precision fp16 --data-root /data/nuscenes \\
        --pretrained resnet50.safetensors
    python -m bevfn.experiments.matrixvt                                   # a synthetic world, minutes on a laptop

What it shares with BEVDepth's recipes, nearly all, is in `bevdepth.py`.
"""

from dataclasses import dataclass
from typing import Annotated

from bevfn.choices import one_of
from bevfn.data import source
from bevfn.experiments import bevdepth
from bevfn.models.bevdepth import matrix_vt
from bevfn.training import command_line, run, tasks

NETWORKS = {"matrixvt": matrix_vt}


@dataclass(frozen=True)
class Config(bevdepth.Config):
    """The recipe of matrixvt_bev_depth_lss_r50_256x704_128x128_24e_ema."""

    model: Annotated[str, one_of(NETWORKS)] = "matrixvt"
    """network and recipe"""
    milestones: tuple[int, ...] = ()
    """epochs after which the learning rate falls to a tenth (published: it never does)"""
    class_balanced: bool = True
    ema: float | None = 0.999


DEFAULTS: command_line.Defaults = {"matrixvt": bevdepth.defaults(Config(), "matrixvt")}


def task(config: Config, splits: source.Source | None = None) -> tasks.Task:
    """MatrixVT's task; `splits`: key frames other than the config's."""
    return bevdepth.assemble(config, splits, NETWORKS[config.model]())


if __name__ == "__main__":
    run.cli(DEFAULTS, task, __doc__)
