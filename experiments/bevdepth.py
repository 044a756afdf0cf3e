"""BEVDepth (Li et al. 2022, arXiv 2206.10092), R50, 256 x 704 images, 128 x 128 cells of 0.8 m, nuScenes.

Published (nuScenes val, BEVDepth at d78c7b5; 8 devices x 8 samples, fp16, from an ImageNet ResNet-50):

    --model               key frames  epochs             mAP     mATE   mASE   mAOE   mAVE   mAAE   NDS
    bevdepth-2key         2           24                 .3304   .7021  .2795  .5346  .5530  .2274  .4355
    bevdepth-2key-ema     2           24, EMA            .3329   .6832  .2761  .5446  .5258  .2259  .4409
    bevdepth-2key-da      2           20, CBGS           .3484   .6159  .2716  .4144  .4402  .1954  .4805
    bevdepth-2key-da-ema  2           20, CBGS, EMA      .3589   .6119  .2692  .5074  .4086  .2009  .4797
    bevdepth-1key-ema     1           24, EMA            not published (the base of MatrixVT); its rate never falls
    bevdepth-4key         4           24                 not published; bevdepth-2key with four key frames

On eight Ascend NPUs (DrivingSDK) bevdepth-2key reaches 32.53 mAP, 43.32 NDS in fp16. "da" refines the lifted volume before it
is pooled. (Upstream's "key4" files are BEVStereo's and read one earlier camera sweep, not four key frames.)

    bevfn checkpoint import resnet50-0676ba61.pth resnet50.safetensors --model resnet50
    torchrun --nproc-per-node 8 -m bevfn.experiments.bevdepth --precision fp16 --data-root /data/nuscenes \\
        --pretrained resnet50.safetensors
    python -m bevfn.experiments.bevdepth --data-root FRAME_FOLDER                              # one key frame
    python -m bevfn.experiments.bevdepth                                   # a synthetic world, minutes on a laptop

The flags' defaults are the published recipe of --model on nuScenes, and smaller numbers (`FRAME`, `SYNTHETIC`) elsewhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Protocol

from bevfn.choices import one_of
from bevfn.data import augment, sampling, source
from bevfn.data.batch import Base, Capacities
from bevfn.data.reading import Cameras, Reading
from bevfn.models import bevdepth
from bevfn.training import command_line, optim, run, tasks
from bevfn.views import camera_grid

NETWORKS: dict[str, Callable[[], bevdepth.Config]] = {
    "bevdepth-2key": bevdepth.two_key,
    "bevdepth-2key-ema": bevdepth.two_key,
    "bevdepth-2key-da": bevdepth.two_key_aggregated,
    "bevdepth-2key-da-ema": bevdepth.two_key_aggregated,
    "bevdepth-1key-ema": partial(bevdepth.key_frames, 1),
    "bevdepth-4key": partial(bevdepth.key_frames, 4),
}


# How key frames are read, as published. No range filters boxes.
CHANNELS = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
CAMERAS = Cameras(channels=CHANNELS, frames=2)
EVAL = Reading(base=Base.EGO_AT_CAMERAS, cameras=CAMERAS, capacities=Capacities(points=0, boxes=200))
TRAIN = replace(
    EVAL,
    cameras=replace(CAMERAS, augmentation=augment.Images(resize=(0.386, 0.55))),
    augmentation=augment.Global(rotation=math.radians(22.5), scale=(0.95, 1.05), translation=0.0),
    depth=True,
)


@dataclass(frozen=True)
class Config(command_line.Config):
    """The recipe of bevdepth-2key (bev_depth_lss_r50_256x704_128x128_24e_2key)."""

    model: Annotated[str, one_of(NETWORKS)] = "bevdepth-2key"
    """network and recipe; the other flags' defaults are its published numbers"""
    epochs: int = 24
    batch_size: int = 8
    drop_last: bool = True
    recipe_batch: int = 64
    eval_every: int = 0
    recipe_lr: float = 2e-4
    milestones: tuple[int, ...] = (19, 23)
    """epochs after which the learning rate falls to a tenth; with --steps at the same shares of the run"""
    weight_decay: float = 1e-7
    clip_norm: float = 5.0
    ema_ramp: float = 2000.0
    """updates in which the decay of --ema comes within 1/e of its value; counted from the number of samples of the whole
    run, as published: on nuScenes it has arrived before the first step"""
    published_cbgs: bool = True
    """--class-balanced counts boxes without points too, and adults, children and workers of a frame as three pedestrians;
    no: it counts as mmdetection3d does"""
    depth_loss: float = 3.0
    """weight of the depth loss; 0: no depth maps are read"""


VARIANTS: dict[str, Config] = {
    "bevdepth-2key": Config(),
    "bevdepth-2key-ema": Config(model="bevdepth-2key-ema", ema=0.999),
    "bevdepth-2key-da": Config(model="bevdepth-2key-da", epochs=20, milestones=(16, 19), class_balanced=True),
    "bevdepth-2key-da-ema": Config(
        model="bevdepth-2key-da-ema", epochs=20, milestones=(16, 19), class_balanced=True, ema=0.999
    ),
    "bevdepth-1key-ema": Config(model="bevdepth-1key-ema", milestones=(), ema=0.999),
    "bevdepth-4key": Config(model="bevdepth-4key"),
}
# One key frame over and over, nothing augmented: for a first look at a laptop.
FRAME: dict[str, Any] = {
    "steps": 40,
    "batch_size": 1,
    "workers": 0,
    "lr": 1e-3,
    "norm_momentum": 0.1,
    "class_balanced": False,
    "ema": None,
    "augment": False,
    "eval_first": True,
    "eval_backend": "eager",
    "checkpoint_every": 1000,
}
# The synthetic world on two CPU cores. Nothing is augmented: with the vehicle's frame turned and mirrored, runs of this
# length ended at mAOE 1.3 rad and mAVE 2.3 m/s, without at 0.3 and 1.0 (experiments/results/world_bevdepth.json).
SYNTHETIC: dict[str, Any] = {
    "scale": "mini",
    "epochs": 14,
    "milestones": (10, 13),
    "batch_size": 2,
    "workers": 1,
    "lr": 2e-3,
    "norm_momentum": 0.1,
    "class_balanced": False,
    "augment": False,
    "eval_first": True,
    "eval_backend": "eager",
}


def defaults(recipe: Config, name: str) -> dict[source.Kind, command_line.Config]:
    """The flags' defaults of a recipe, for what may lie at the data root; runs are called `name`."""
    return {
        "nuscenes": replace(recipe, run_dir=command_line.RUNS / name),
        "frame": replace(recipe, run_dir=command_line.RUNS / f"{name}_frame", **FRAME),
        "synthetic": replace(recipe, run_dir=command_line.RUNS / f"{name}_synthetic", **SYNTHETIC),
    }


DEFAULTS: command_line.Defaults = {model: defaults(recipe, "bevdepth") for model, recipe in VARIANTS.items()}


def task(config: Config, splits: source.Source | None = None) -> tasks.Task:
    """The task of config.model; `splits`: key frames other than the config's."""
    return assemble(config, splits, NETWORKS[config.model]())


# ---------------------------------------------------------------------------------------- what MatrixVT's recipe shares


def assemble(config: Config, splits: source.Source | None, model: bevdepth.Config) -> tasks.Task:
    """The task of a published network under the config's recipe."""
    model = sized(config, model)
    read = data(config, splits, model)
    ema = None
    if config.ema is not None:
        ema = optim.Ema(config.ema, config.ema_ramp, first_update=len(read.items) * config.epochs)
    return tasks.make_task(
        config, bevdepth, model, read, partial(optimizer, config, model), ema=ema, shared_normalisers=True
    )


def optimizer(config: Config, model: bevdepth.Config, plan: tasks.Plan) -> optim.Config:
    """AdamW at a constant rate that falls to a tenth at the milestones; the image backbone's stem stays as it is."""
    drops = tuple(round(plan.total_steps * epoch / config.epochs) for epoch in config.milestones)
    lr = optim.Schedule(tasks.scaled_lr(config, plan), drops=drops)
    return optim.Config(
        lr=lr,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        groups=tuple(optim.Group(pattern, frozen=True) for pattern in model.frozen),
    )


def sized(config: Config, model: bevdepth.Config) -> bevdepth.Config:
    """The network at the config's scale, with the config's depth loss and batch norms."""
    if config.scale == "mini":
        model = bevdepth.mini(model)
    if config.norm_momentum is not None:
        model = bevdepth.with_norm_momentum(model, config.norm_momentum)
    return replace(model, depth_loss_weight=config.depth_loss)


def data(config: Config, splits: source.Source | None, model: bevdepth.Config) -> tasks.Data:
    """Training and evaluation splits and how they are read."""
    reading, eval_reading = (fitted(config, model, way) for way in (TRAIN, EVAL))
    reading = replace(reading if config.augment else eval_reading, depth=config.depth_loss > 0)
    classes_of = sampling.categorised if config.published_cbgs else sampling.boxed
    balanced = partial(sampling.cbgs, classes_of=classes_of)
    return tasks.make_data(config, splits, reading, eval_reading, balanced)


class Seeing(Protocol):
    """What a camera model's Config says of its images."""

    @property
    def frames(self) -> int: ...
    @property
    def grid(self) -> camera_grid.Config: ...


def fitted(config: command_line.Config, model: Seeing, reading: Reading) -> Reading:
    """A published way of reading, for the model's frames and image size, with the config's room for boxes."""
    assert reading.cameras is not None
    cameras = replace(reading.cameras, frames=model.frames, image_size=model.grid.image_size)
    return replace(reading, cameras=cameras, capacities=reading.capacities.changed(boxes=config.box_capacity))


if __name__ == "__main__":
    run.cli(DEFAULTS, task, __doc__)
