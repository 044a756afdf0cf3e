"""Pretraining of BEVFusion's branches, from which its recipes then start with --pretrained.

    --model                    learns                                         of
    bevfusion-lidar-masked     LiDAR branch and BEV layers                    hidden voxels, without labels
    bevfusion-image            image backbone and neck of LiDAR-camera        LiDAR depth, and boxes as rectangles in images
    bevfusion-camera-image     the same and the depth net, of camera-only     likewise
    awml-lidar-masked          LiDAR branch and BEV layers of awml-lidar      hidden voxels of T4 data, without labels
    awml-lidar-offline-masked  those of awml-lidar-offline                    likewise
    awml-image                 image backbone and neck of both AWML's with    LiDAR depth and boxes of T4 data
                               cameras

What exactly is learned, after which papers, is in `models/masked_voxels.py` and `models/image_branch.py`. Nothing is published for
these networks: schedules are ours, those of BEVFusion's recipes. An evaluation scores the pretext itself (`score` of these files),
which is not detection.

    torchrun --nproc-per-node 8 -m bevfn.experiments.pretrain --precision fp16 --data-root /data/nuscenes
    torchrun --nproc-per-node 8 -m bevfn.experiments.bevfusion_lidar --precision fp16 --data-root /data/nuscenes \\
        --pretrained runs/pretrain_bevfusion_lidar_masked/checkpoints/step_00017600

    torchrun --nproc-per-node 8 -m bevfn.experiments.pretrain --model bevfusion-image --precision fp16 --data-root /data/nuscenes \\
        --pretrained swin.safetensors
    torchrun --nproc-per-node 8 -m bevfn.experiments.bevfusion --precision fp16 --data-root /data/nuscenes \\
        --pretrained runs/pretrain_bevfusion_image/checkpoints/step_00010560 runs/bevfusion_lidar/checkpoints/step_00077240

    torchrun --nproc-per-node 8 -m bevfn.experiments.pretrain --model awml-lidar-masked --data-root /data/t4
    torchrun --nproc-per-node 8 -m bevfn.experiments.awml --data-root /data/t4 \\
        --pretrained runs/pretrain_awml_lidar_masked/checkpoints/step_00044440
    torchrun --nproc-per-node 8 -m bevfn.experiments.pretrain --model awml-image --data-root /data/t4 --pretrained swin.safetensors
    torchrun --nproc-per-node 8 -m bevfn.experiments.awml --model awml-camera-lidar --data-root /data/t4 \\
        --pretrained runs/awml_lidar/checkpoints/step_00111100 runs/pretrain_awml_image/checkpoints/step_00026664

    python -m bevfn.experiments.pretrain                                   # a synthetic world, minutes on a laptop
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

from bevfn.choices import one_of
from bevfn.data import source
from bevfn.data.reading import Reading
from bevfn.experiments import awml, bevfusion
from bevfn.models import awml as t4_detectors
from bevfn.models import bevfusion as detectors
from bevfn.models import image_branch, masked_voxels
from bevfn.training import command_line, optim, run, tasks

Network = masked_voxels.Config | image_branch.Config
NETWORKS: dict[str, Callable[[], Network]] = {
    "bevfusion-lidar-masked": lambda: masked_voxels.Config(detectors.lidar_only()),
    "bevfusion-image": lambda: image_branch.Config(detectors.lidar_camera()),
    "bevfusion-camera-image": lambda: image_branch.Config(detectors.camera_only()),
    "awml-lidar-masked": lambda: masked_voxels.Config(t4_detectors.lidar()),
    "awml-lidar-offline-masked": lambda: masked_voxels.Config(t4_detectors.lidar_offline()),
    "awml-image": lambda: image_branch.Config(t4_detectors.camera_lidar()),
}
STARTED = {
    "awml-lidar-masked": "awml-lidar",
    "awml-lidar-offline-masked": "awml-lidar-offline",
    "awml-image": "awml-camera-lidar",
}
"""AWML's: the detector whose branch it is, by whose flags it is read."""


@dataclass(frozen=True)
class Pretext:
    """Flags of the losses; those of masks are of masked voxels, that of depth of images."""

    mask_ratios: tuple[float, ...] = (0.9, 0.7, 0.5)
    """share of the voxels that is hidden, in each band of distance"""
    mask_edges: tuple[float, ...] = (30.0, 50.0)
    """metres, between these bands"""
    depth_loss: float = 3.0
    """weight of the depth loss of images"""


@dataclass(frozen=True)
class Config(Pretext, bevfusion.Shared):
    """Flags of pretraining on nuScenes."""

    model: Annotated[str, one_of(NETWORKS)] = "bevfusion-lidar-masked"
    """what learns, and of what"""
    epochs: int = 20
    eval_every: int = 5
    recipe_lr: float = 1e-3
    schedule: Literal["cosine", "cycle", "stairs"] = "cycle"
    """cosine: warm-up, then down; cycle: up by a cosine, then down by one; stairs: up a stair an epoch, then down as a cosine"""
    final_lr: float = 1e-5
    """the end, as a share of the peak"""
    class_balanced: bool = False


@dataclass(frozen=True)
class OnT4(Pretext, awml.Config):
    """Flags of pretraining on T4 data sets, read as AWML's detectors read them."""

    model: Annotated[str, one_of(NETWORKS)] = "awml-lidar-masked"
    """what learns, and of what"""
    epochs: int = 20
    eval_every: int = 5
    eval_last: int = 0
    lr_turn: float = 0.4
    beta1_turn: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_reach and self.model != "awml-image":
            raise ValueError(f"--class-reach is of boxes, and {self.model} reads none; leave it out")

    @property
    def detector(self) -> str:
        return STARTED[self.model]


MASKED = Config()
IMAGE = replace(
    MASKED, model="bevfusion-image", epochs=12, eval_every=4, recipe_lr=2e-4, schedule="cosine", final_lr=1e-4
)
VARIANTS = {
    "bevfusion-lidar-masked": MASKED,
    "bevfusion-image": IMAGE,
    "bevfusion-camera-image": replace(IMAGE, model="bevfusion-camera-image"),
}
ON_T4 = OnT4()
VARIANTS_T4 = {
    "awml-lidar-masked": ON_T4,
    "awml-lidar-offline-masked": replace(ON_T4, model="awml-lidar-offline-masked"),
    "awml-image": replace(
        ON_T4, model="awml-image", epochs=12, eval_every=4, recipe_lr=1e-4, schedule="cosine", final_lr=1e-4
    ),
}


def defaults(recipe: Config | OnT4) -> dict[source.Kind, command_line.Config]:
    """The flags' defaults for what may lie at the data root; every model has its own run folders."""
    name = "pretrain_" + recipe.model.replace("-", "_")
    if isinstance(recipe, OnT4):
        return awml.defaults(recipe, name)
    return {
        "nuscenes": replace(recipe, run_dir=command_line.RUNS / name),
        "frame": replace(recipe, run_dir=command_line.RUNS / f"{name}_frame", **bevfusion.FRAME),
        "synthetic": replace(recipe, run_dir=command_line.RUNS / f"{name}_synthetic", **bevfusion.SYNTHETIC),
    }


DEFAULTS: command_line.Defaults = {model: defaults(recipe) for model, recipe in (VARIANTS | VARIANTS_T4).items()}


def task(config: Config | OnT4, splits: source.Source | None = None) -> tasks.Task:
    """The pretraining of config.model; `splits`: key frames other than the config's."""
    if splits is None:
        source.of_kind(DEFAULTS[config.model], config.data_root)  # or it is trained on other data
    network, readings = NETWORKS[config.model](), []
    if isinstance(config, OnT4):
        detector = awml.sized(config, awml.network(config) if config.intensity else network.detector)
        readings = [awml.fitted(config, detector, way) for way in (awml.TRAIN, awml.EVAL)]
    else:
        detector = bevfusion.sized(config, network.detector)
        readings = [bevfusion.fitted(config, detector, way) for way in (bevfusion.TRAIN, bevfusion.EVAL)]
    return assemble(config, splits, with_flags(config, replace(network, detector=detector)), *readings)


# ------------------------------------------------------------------------------ of BEVFusion detectors of other recipes


def assemble(
    config: Config | OnT4, splits: source.Source | None, network: Network, training: Reading, evaluation: Reading
) -> tasks.Task:
    """The task of a network of any BEVFusion detector, under the config's recipe; readings: the detector's, for its size."""
    if config.host_tables:
        raise ValueError(
            "--host-tables is of detectors: what is hidden in pretraining is drawn in the step; leave it out"
        )
    family, way = FAMILIES[type(network)]
    training, evaluation = way(training), way(evaluation)
    data = tasks.make_data(config, splits, training if config.augment else evaluation, evaluation)
    ema = None if config.ema is None else optim.Ema(decay=config.ema)
    return tasks.make_task(
        config, family, network, data, partial(bevfusion.optimizer, config), ema=ema, score=family.score
    )


def with_flags(config: Pretext, network: Network) -> Network:
    """The network with what the config's flags say of its losses."""
    if isinstance(network, image_branch.Config):
        return replace(network, depth_weight=config.depth_loss)
    return replace(network, ratios=config.mask_ratios, edges=config.mask_edges)


def without_labels(reading: Reading) -> Reading:
    """Points alone; annotations are not even read."""
    room = reading.capacities.changed(boxes=1)
    return replace(reading, cameras=None, paste=None, class_names=(), class_reach=(), redraw=False, capacities=room)


def with_depth(reading: Reading) -> Reading:
    """Images, depth maps of them, and boxes; in images nothing is seen of a base frame that is turned and scaled."""
    return replace(reading, points=None, paste=None, augmentation=None, depth=True)


FAMILIES: dict[type, tuple[Any, Callable[[Reading], Reading]]] = {
    masked_voxels.Config: (masked_voxels, without_labels),
    image_branch.Config: (image_branch, with_depth),
}


if __name__ == "__main__":
    run.cli(DEFAULTS, task, __doc__)
