"""BEVNeXt (Li et al. 2024, arXiv 2312.01696), R50, 256 x 704 images, 128 x 128 cells of 0.8 m, nuScenes, in two stages.

Published (nuScenes val, BEVNeXt at 9b0e4ad; fp32, CBGS, EMA; 8 devices x 8 samples, stage 2 of 8 or 16 devices):

    --model              key frames  epochs  starts from                           mAP   NDS
    bevnext-stage1       1           2       an ImageNet ResNet-50                 not published
    bevnext-stage2       9           12      bevnext-stage1                        43.7  54.8
    bevnext-pers-stage1  1           2       the image backbone of a 2D detector   not published
    bevnext-pers-stage2  9           12      bevnext-pers-stage1                   45.6  56.0

On eight Ascend NPUs (DrivingSDK) stage 2 reaches 43.16 mAP. `--stage 1` and `--stage 2` are short for the first two models.
Stage 2 starts from stage 1's averages and takes what has the same shape there; the run says what is left out.

    bevfn checkpoint import resnet50-0676ba61.pth resnet50.safetensors --model resnet50
    torchrun --nproc-per-node 8 -m bevfn.experiments.bevnext --stage 1 --precision fp16 --data-root /data/nuscenes \\
        --pretrained resnet50.safetensors
    torchrun --nproc-per-node 8 -m bevfn.experiments.bevnext --stage 2 --precision fp16 --data-root /data/nuscenes \\
        --pretrained runs/bevnext_stage1/checkpoints/step_00003862
    python -m bevfn.experiments.bevnext --data-root FRAME_FOLDER                               # one key frame
    python -m bevfn.experiments.bevnext --stage 2 --from-scratch           # a synthetic world, minutes on a laptop

The flags' defaults are the published recipe of --model on nuScenes, and smaller numbers (`FRAME`, `SYNTHETIC`) elsewhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch

from bevfn import tree, upstream
from bevfn.choices import one_of
from bevfn.data import augment, sampling, source
from bevfn.data.batch import Base, Capacities
from bevfn.data.reading import Cameras, Reading
from bevfn.experiments.bevdepth import CHANNELS, fitted
from bevfn.models import bevnext
from bevfn.training import command_line, optim, pretrained, run, tasks

NETWORKS: dict[str, Callable[[], bevnext.Config]] = {
    "bevnext-stage1": bevnext.stage_one,
    "bevnext-stage2": bevnext.stage_two,
    "bevnext-pers-stage1": bevnext.stage_one,
    "bevnext-pers-stage2": bevnext.stage_two,
}

# How key frames are read, as published.
EVAL = Reading(
    base=Base.EGO_AT_FRONT,
    cameras=Cameras(channels=CHANNELS),
    range=(-51.2, -51.2, -5.0, 51.2, 51.2, 3.0),
    capacities=Capacities(points=0, boxes=200),
)
TRAIN = replace(
    EVAL,
    cameras=Cameras(channels=CHANNELS, augmentation=augment.Images(resize=(0.44 - 0.06, 0.44 + 0.11))),
    augmentation=augment.Global(rotation=math.radians(22.5), scale=(0.95, 1.05), translation=0.0),
    depth=True,
    depths="nearest",
)


@dataclass(frozen=True)
class Config(command_line.Config):
    """The recipe of bevnext-stage1 (bevnext-stage1.py)."""

    CHOOSES: ClassVar[tuple[str, ...]] = ("model", "stage")

    model: Annotated[str, one_of(NETWORKS)] = "bevnext-stage1"
    """network and recipe; the other flags' defaults are its published numbers"""
    stage: Literal[1, 2] = 1
    """1: the key frame alone; 2: the eight before it too. Without --model it chooses bevnext-stage1 or bevnext-stage2"""
    past_frames: Literal[0, 2, 5, 8] | None = None
    """earlier key frames that stage 2 looks at (none: 8 as published, 2 of --scale mini); 0: their maps are zeros"""
    from_scratch: bool = False
    """stage 2 may start without a checkpoint of stage 1: from the seed, or from one of stage 2"""
    epochs: int = 2
    batch_size: int = 8
    recipe_batch: int = 64
    eval_every: int = 0
    recipe_lr: float = 2e-4
    warmup_steps: int = 200
    """the learning rate rises linearly until this step, whatever the batch; in a run that is no longer, in its first tenth"""
    warmup_factor: float = 1e-3
    """of the first step, as a share of the learning rate"""
    image_backbone_lr: float = 1.0
    """learning rate of the image backbone over the others'"""
    clip_norm: float = 5.0
    ema: float | None = 0.999
    ema_ramp: float = 2000.0
    """updates in which the decay of --ema comes within 1/e of its value"""
    ema_updates: int = 10560
    """updates that the ramp counts before the run's first one; published: in both stages"""
    class_balanced: bool = True
    published_draw: bool = True
    """--class-balanced draws upstream's very samples, with numpy's generator of --seed; no: as the other recipes do"""
    published_history: bool = True
    """earlier key frames are those before it in the order of time of all scenes: a scene that was recorded beside another
    loses every other one, and the first scene begins with copies of its first frame; no: those of the scene"""
    published_z: bool = True
    """results files have the bottom centre of boxes, where nuScenes has the gravity centre; scores do not look at z"""
    redraw: bool = True
    """a training sample without any box in range is replaced by another one"""
    depth_loss: float = 3.0
    """weight of the depth loss; 0: no depth maps are read"""
    host_tables: bool | None = None
    """the cells of the frustums' points and their order are made by the processes that read samples, in place of the step; none: where
    the step runs on an Ascend NPU, which is slow without"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model in NETWORKS and not self.model.endswith(f"stage{self.stage}"):
            raise ValueError(f"--stage {self.stage} is not the stage of --model {self.model}; leave one of them out")
        if self.stage == 1 and self.past_frames:
            raise ValueError(f"--past-frames {self.past_frames} is of stage 2, stage 1 has none; add --stage 2")
        if self.norm_momentum is not None:
            raise ValueError(
                "--norm-momentum is of batch norms published with 0.01, and BEVNeXt has none; leave it out"
            )


STAGE_1 = Config()
STAGE_2 = Config(model="bevnext-stage2", stage=2, epochs=12, sync_statistics=True, sync_after=8)
VARIANTS: dict[str, Config] = {
    "bevnext-stage1": STAGE_1,
    "bevnext-stage2": STAGE_2,
    "bevnext-pers-stage1": replace(STAGE_1, model="bevnext-pers-stage1", image_backbone_lr=0.75),
    "bevnext-pers-stage2": replace(STAGE_2, model="bevnext-pers-stage2", image_backbone_lr=0.75),
}
# Nothing published is claimed: what one would choose instead of the quirks.
SANE: dict[str, Any] = {
    "published_draw": False,
    "published_history": False,
    "published_z": False,
    "class_balanced": False,
    "ema": None,
    "augment": False,
    "eval_first": True,
    "eval_backend": "eager",
}
# One key frame over and over, nothing augmented: for a first look at a laptop.
FRAME: dict[str, Any] = SANE | {
    "steps": 40,
    "batch_size": 1,
    "workers": 0,
    "lr": 1e-3,
    "checkpoint_every": 1000,
}
# The synthetic world on two CPU cores. Nothing is augmented, as in BEVDepth's. The rate stays where it is, so averages of the last
# 100 steps stand in for its decay: 980 steps without them ended at mAP 0.13 (seed 0, from scratch, lr 1e-3).
SYNTHETIC: dict[str, Any] = SANE | {
    "scale": "mini",
    "epochs": 14,
    "batch_size": 2,
    "workers": 1,
    "lr": 2e-3,
    "ema": 0.99,
    "warmup_steps": 50,
}


def defaults(recipe: Config) -> dict[source.Kind, command_line.Config]:
    """The flags' defaults of a recipe, for what may lie at the data root; every model has its own run folders."""
    name = recipe.model.replace("-", "_")
    return {
        "nuscenes": replace(recipe, run_dir=command_line.RUNS / name),
        "frame": replace(recipe, run_dir=command_line.RUNS / f"{name}_frame", **FRAME),
        "synthetic": replace(recipe, run_dir=command_line.RUNS / f"{name}_synthetic", **SYNTHETIC),
    }


DEFAULTS: command_line.Defaults = {model: defaults(recipe) for model, recipe in VARIANTS.items()}


def task(config: Config, splits: source.Source | None = None) -> tasks.Task:
    """The task of config.model; `splits`: key frames other than the config's."""
    model = sized(config, NETWORKS[config.model]())
    return tasks.make_task(
        config,
        bevnext,
        model,
        data(config, splits, model),
        partial(optimizer, config),
        ema=None if config.ema is None else optim.Ema(config.ema, config.ema_ramp, first_update=config.ema_updates),
        shared_normalisers=True,
        start=pretrained.Start(partial(begin, config=config), averages=True),
        unready=unready(config),
        bottom=config.published_z,
        tables=partial(bevnext.with_tables, config=model) if tasks.on_host(config.host_tables, config.device) else None,
    )


def sized(config: Config, model: bevnext.Config) -> bevnext.Config:
    """The network at the config's scale, with the config's earlier frames and depth loss."""
    if config.scale == "mini":
        model = bevnext.mini(model)
    if config.past_frames == 0:
        model = replace(model, with_prev=False)
    elif config.past_frames is not None and model.frames > 1:
        model = replace(model, frames=1 + config.past_frames)
    return replace(model, depth_loss_weight=config.depth_loss)


def data(config: Config, splits: source.Source | None, model: bevnext.Config) -> tasks.Data:
    """Training and evaluation splits and how they are read."""
    reading, eval_reading = (historic(config, model, fitted(config, model, way)) for way in (TRAIN, EVAL))
    if not config.augment:
        reading = replace(eval_reading, depths=reading.depths)
    reading = replace(reading, depth=config.depth_loss > 0, redraw=config.redraw)
    balanced = sampling.published_cbgs if config.published_draw else sampling.cbgs
    return tasks.make_data(config, splits, reading, eval_reading, balanced)


def historic(config: Config, model: bevnext.Config, reading: Reading) -> Reading:
    """The reading with the config's choice of earlier key frames, where the model looks at any."""
    assert reading.cameras is not None
    by_time = config.published_history and model.seen > 1
    cameras = replace(reading.cameras, frames=model.seen, history="time" if by_time else "scene")
    return replace(reading, cameras=cameras)


def optimizer(config: Config, plan: tasks.Plan) -> optim.Config:
    """AdamW at a constant rate after its warm-up; the published step at epoch 20 is never reached."""
    warmup = config.warmup_steps if config.warmup_steps < plan.total_steps else plan.total_steps // 10
    groups = (optim.Group("image.backbone.*", lr=config.image_backbone_lr),)
    return optim.Config(
        lr=optim.Schedule(tasks.scaled_lr(config, plan), warmup_steps=warmup + 1, warmup_factor=config.warmup_factor),
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        groups=groups if config.image_backbone_lr != 1.0 else (),
    )


# ------------------------------------------------------------------------------------------- one stage after the other


def unready(config: Config) -> str:
    """Why a stage 2 is not trained as it is, "" for what can be."""
    if config.stage == 1 or config.pretrained or config.from_scratch:
        return ""
    return (
        "stage 2 starts from stage 1: give --pretrained a checkpoint folder of its run, or a file of `bevfn checkpoint "
        "import --model bevnext-stage1`; --from-scratch trains without"
    )


def begin(params: dict, state: dict, loaded: upstream.Loaded, *, config: Config) -> tuple[dict, dict, upstream.Merge]:
    """The trees with what the files of --pretrained have: stage 2's with stage 1's leaves of the same shape, and in both
    stages parts such as an image backbone, which must fit as a whole.

    Raises ValueError, one sentence, for a checkpoint of the other stage than is expected, or of another model.
    """
    stages = {name: stage_of(trees) for name, trees in loaded.items()}
    second = [name for name, stage in stages.items() if stage == 2]
    if config.stage == 1 and second:
        raise ValueError(
            f"{second[0]} is a checkpoint of BEVNeXt's stage 2, and stage 1 comes before it; give the image backbone that it "
            "starts from, or --stage 2"
        )
    if config.stage == 2 and second and not config.from_scratch:
        raise ValueError(
            f"{second[0]} is a checkpoint of BEVNeXt's stage 2, which starts from one of stage 1; give that, go on with stage 2's "
            "own run by --resume, or add --from-scratch to train these weights further"
        )
    ours, other = shapes(params, state), shapes(*other_stage(config))
    strange = any(not _fits(trees, ours) and not _fits(trees, other) for trees in loaded.values())
    if config.stage == 1 or second or strange:
        return pretrained.parts(params, state, loaded)  # which says what does not fit
    if 1 not in stages.values() and not config.from_scratch:
        raise ValueError(
            f"none of {', '.join(loaded)} is a checkpoint of BEVNeXt's stage 1, from which stage 2 starts; add one, or "
            "--from-scratch"
        )
    return upstream.load_into(params, state, loaded, allow_missing=tuple(params), fitting_only=True)


def stage_of(trees: tuple[dict, dict]) -> int:
    """1 or 2 of a whole detector, whatever its number of frames, 0 of a part such as an image backbone."""
    backbone = trees[0].get("bev", {}).get("backbone", {})
    return 2 if "fusion" in backbone else int(bool(backbone))


def other_stage(config: Config) -> tuple[dict, dict]:
    """(params, state) of the other stage's network at the config's size, without memory."""
    network = bevnext.stage_two() if config.stage == 1 else bevnext.stage_one()
    with torch.device("meta"):
        return bevnext.init(sized(config, network), seed=0)


def shapes(params: dict, state: dict) -> dict[str, torch.Size]:
    """By path."""
    return {path: leaf.shape for path, leaf in tree.flatten({"params": params, "state": state}).items()}


def _fits(trees: tuple[dict, dict], whole: dict[str, torch.Size]) -> bool:
    """Whether every leaf of the trees has its place there."""
    return all(whole.get(path) == shape for path, shape in shapes(*trees).items())


if __name__ == "__main__":
    run.cli(DEFAULTS, task, __doc__)
