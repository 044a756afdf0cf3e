"""BEVFusion (Liu et al. 2022, arXiv 2205.13542), LiDAR-camera and camera-only, on nuScenes.

Published (nuScenes val, mmdetection3d): 71.4 NDS, 68.6 mAP; on eight Ascend NPUs (DrivingSDK) 69.98 NDS, 67.36 mAP in
fp32, 70.11 and 68.01 in fp16. 6 epochs, 8 devices x 4 samples, from the LiDAR-only detector and a nuImages Swin-T.

    torchrun --nproc-per-node 8 -m bevfn.experiments.bevfusion --precision fp16 --data-root /data/nuscenes \\
        --pretrained runs/bevfusion_lidar/checkpoints/step_00077240 swin.safetensors
    python -m bevfn.experiments.bevfusion --precision fp16 --data-root FRAME_FOLDER                # one key frame
    python -m bevfn.experiments.bevfusion                                  # a synthetic world, minutes on a laptop

The flags' defaults are the published recipe on nuScenes, and smaller numbers (`FRAME`, `SYNTHETIC` below) elsewhere.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from bevfn.choices import one_of
from bevfn.data import augment, source
from bevfn.data.batch import Batch, Capacities
from bevfn.data.reading import Cameras, Points, Reading
from bevfn.models import bevfusion, capacities
from bevfn.training import command_line, optim, run, tasks

NETWORKS = {"bevfusion-lidar-camera": bevfusion.lidar_camera, "bevfusion-camera": bevfusion.camera_only}
# How key frames are read, as published: nine sweeps, the newest ones where upstream takes random ones when testing too.
CAMERAS = Cameras(resize=0.48)
EVAL = Reading(
    points=Points(published_sweeps=True),
    cameras=CAMERAS,
    range=(-54.0, -54.0, -5.0, 54.0, 54.0, 3.0),
    capacities=Capacities(points=330_000, boxes=160),  # at most ten times 34,720 points, of which 93 % lie in range
)
TRAIN = replace(  # the published GridMask has probability 0, so it is left out
    EVAL,
    points=Points(published_sweeps=True, sweep_choice="random", shuffle=True),
    cameras=replace(CAMERAS, augmentation=augment.Images()),
    augmentation=augment.Global(),
)
SCAN_POINTS = 35_000  # of one sweep, at most 34,720
# A real key frame alone has 17,509 voxels and at most 29,374 active sites a level.
FRAME_VOXELS = (20_480, 20_480)
FRAME_SITES = (34_816, 25_600, 13_312, 11_264)
# Five scans of the synthetic world in the mini model's larger voxels.
MINI_VOXELS = (26_000, 26_000)
MINI_SITES = (20_000, 9_000, 9_000)


@dataclass(frozen=True)
class Shared(command_line.Config):
    """Flags of this recipe and of the LiDAR-only one."""

    schedule: Literal["cosine", "cycle", "stairs"] = "cosine"
    """cosine: warm-up, then down, for a model that starts from a trained detector; cycle: up, then down, from scratch; stairs
    (AWML's for fusion): up a stair an epoch, then down as a cosine"""
    warmup_steps: int = 500
    """of the cosine: linear, from warmup_factor; a tenth of a run that is not longer"""
    warmup_factor: float = 1 / 3
    """of the first step, or stair"""
    start_lr: float = 0.1
    """where the cycle starts, as a share of the peak"""
    lr_turn: float = 0.4
    """share of the run after which the cycle, or what comes after the stairs, falls"""
    final_lr: float = 1e-4
    """the end, as a share of the peak"""
    beta1_turn: float = 0.4
    """share of the run after which beta1 rises again"""
    published_beta1: bool = True
    """the recipe's beta1, which ends at 1.0 because mmengine takes a ratio for a value; no: 0.9 -> 0.8 -> 0.9"""
    frozen: tuple[str, ...] = ()
    """paths of parameters that are not trained, such as "lidar.*" (published: none); batch norms among them normalise by
    their running statistics, which stay as they are"""
    class_balanced: bool = True
    sweeps: int = 9
    """LiDAR sweeps added to the key frame's; any other number than the published one takes the newest"""
    published_sweeps: bool = True
    """sweeps move as the published weights were trained and scored: off by up to 0.6 m when the car turns; no: right"""
    point_capacity: int | None = None
    """room for the points in range of a sample (none: the recipe's, by --sweeps); of more the last ones are dropped and
    counted, when evaluating those of the oldest sweeps"""
    voxel_capacity: int | None = None
    """voxels of a sample, later ones are dropped and counted (none: as published, 120,000 in training, 160,000 when
    evaluating)"""
    site_capacity: tuple[int, ...] | None = None
    """active sites of a sample at each level of the sparse encoder, further ones are dropped and counted; none: the recipe's"""

    capacity_file: Path | None = None
    """of `bevfn data prepare --capacities`: --voxel-capacity and --site-capacity, where they are not given, by what the data
    need, and --headroom; config.json keeps the numbers"""
    headroom: float = 0.1
    """share by which capacities of --capacity-file exceed what was counted"""
    host_tables: bool | None = None
    """voxels, neighbour tables, depth maps and the cells of the frustums' points are made by the processes that read samples, in
    place of the step, bit for bit; none: where the step runs on an Ascend NPU, which is slow at it"""

    @property
    def grid(self) -> bevfusion.Voxels:
        """The voxels of the network that the flags make. Raises ValueError where none is made of them."""
        raise ValueError(f"--capacity-file is of detectors, {self.model} is none; leave it out")

    def completed(self) -> Self:
        return with_measured(self)

    @property
    def groups(self) -> tuple[optim.Group, ...]:
        """What is trained otherwise than the rest."""
        return tuple(optim.Group(pattern, frozen=True) for pattern in self.frozen)


@dataclass(frozen=True)
class Config(Shared):
    """The LiDAR-camera recipe (mmdetection3d bevfusion_lidar-cam_voxel0075_second_secfpn_8xb4-cyclic-20e)."""

    model: Annotated[str, one_of(NETWORKS)] = "bevfusion-lidar-camera"
    """sensors of the model (LiDAR-only: bevfn.experiments.bevfusion_lidar)"""
    epochs: int = 6
    recipe_lr: float = 2e-4
    image_backbone_lr: float = 1.0
    """learning rate of the image backbone over the others'"""

    @property
    def grid(self) -> bevfusion.Voxels:
        return sized(self, NETWORKS[self.model]()).voxels

    @property
    def groups(self) -> tuple[optim.Group, ...]:
        lr = self.image_backbone_lr
        return super().groups + ((optim.Group("camera.backbone.*", lr=lr),) if lr != 1.0 else ())


# One key frame over and over, nothing augmented: for a first look at a laptop.
FRAME: dict[str, Any] = {
    "steps": 40,
    "batch_size": 1,
    "workers": 0,
    "lr": 1e-3,
    "norm_momentum": 0.1,
    "class_balanced": False,
    "augment": False,
    "sweeps": 0,
    "eval_first": True,
    "eval_every": 0,
    "eval_backend": "eager",
    "checkpoint_every": 1000,
}
# The synthetic world on two CPU cores, from scratch, with sweeps where they belong: on the cycle of the LiDAR-only
# recipe, as the cosine is for a model that starts from a trained detector.
SYNTHETIC: dict[str, Any] = {
    "schedule": "cycle",
    "final_lr": 1e-5,
    "scale": "mini",
    "epochs": 9,
    "batch_size": 2,
    "workers": 1,
    "lr": 2e-3,
    "norm_momentum": 0.1,
    "eval_every": 0,
    "class_balanced": False,
    "augment": False,
    "eval_first": True,
    "eval_backend": "eager",
    "sweeps": 4,
    "published_sweeps": False,
}
DEFAULTS: command_line.Defaults = {
    name: {
        "nuscenes": Config(model=name, run_dir=command_line.RUNS / "bevfusion"),
        "frame": Config(model=name, run_dir=command_line.RUNS / "bevfusion_frame", **FRAME),
        "synthetic": Config(model=name, run_dir=command_line.RUNS / "bevfusion_synthetic", **SYNTHETIC),
    }
    for name in NETWORKS
}


def task(config: Config, splits: source.Source | None = None) -> tasks.Task:
    """The LiDAR-camera or camera-only task; `splits`: key frames other than the config's."""
    return assemble(config, splits, NETWORKS[config.model](), TRAIN)


# ------------------------------------------------------------------------------- what the LiDAR-only recipe shares


def optimizer(config: Shared, plan: tasks.Plan) -> optim.Config:
    """AdamW with the recipe's learning rate, and beta1 the other way round."""
    total, peak = plan.total_steps, tasks.scaled_lr(config, plan)
    final = peak * config.final_lr
    if config.schedule == "cosine":
        warmup = config.warmup_steps if config.warmup_steps < total else total // 10
        lr = optim.Schedule(peak, (optim.Phase(total, final),), warmup, config.warmup_factor)
    else:
        top = share(config.lr_turn, total)
        phases = (optim.Phase(top, peak), optim.Phase(max(total, top + 1), final))
        if config.schedule == "cycle":
            lr = optim.Schedule(peak * config.start_lr, phases)
        else:  # the last stair, an epoch before `top`, is the peak, where the rate is until there
            epochs = round(top / plan.steps_per_epoch)
            stairs = epochs if epochs > 1 else top  # of a step, where the run is too short
            lr = optim.Schedule(peak, phases, stairs, config.warmup_factor, warmup_every=-(-top // stairs))
    turn = share(config.beta1_turn, total)
    return optim.Config(
        lr=lr,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        groups=config.groups,
        beta1=optim.beta1_cycle(turn, max(total, turn + 1), published=config.published_beta1),
    )


def share(of: float, total: int) -> int:
    """The step at that share of a run, the first at least: cut off, as mmengine turns 2.4 epochs into steps."""
    return max(1, int(round(of * total, 6)))  # 3 epochs of 10 are 0.3, which is no float


def assemble(config: Shared, splits: source.Source | None, model: bevfusion.Config, training: Reading) -> tasks.Task:
    """The task of one network: `training` is how it is published to read."""
    model = sized(config, model)
    ema = None if config.ema is None else optim.Ema(decay=config.ema)
    made = data(config, splits, model, training)
    tables = with_tables(config, model)
    return tasks.make_task(config, bevfusion, model, made, partial(optimizer, config), ema=ema, tables=tables)


def with_tables(config: Shared, model: bevfusion.Config) -> Callable[..., Batch] | None:
    """The task's `tables`."""
    return partial(bevfusion.with_tables, config=model) if tasks.on_host(config.host_tables, config.device) else None


def sized(config: Shared, model: bevfusion.Config) -> bevfusion.Config:
    """The model at the config's scale, with the static capacities of what it reads."""
    if config.scale == "mini":
        model = bevfusion.with_capacities(bevfusion.mini(model), MINI_VOXELS, MINI_SITES)
    elif config.sweeps == 0:
        model = bevfusion.with_capacities(model, FRAME_VOXELS, FRAME_SITES)
    return with_room(config, model)


def with_room(config: Shared, model: bevfusion.Config) -> bevfusion.Config:
    """The model with the capacities and the momentum of batch norms that flags say. Raises ValueError for too few or many."""
    if model.lidar is not None:
        voxels = model.voxels.max_voxels if config.voxel_capacity is None else (config.voxel_capacity,) * 2
        sites, levels = config.site_capacity or model.lidar.encoder.capacities, len(model.lidar.encoder.channels)
        if len(sites) != levels:
            of_file = "" if config.capacity_file is None else f" (of {config.capacity_file})"
            raise ValueError(
                f"--site-capacity {' '.join(map(str, sites))}{of_file} must be {levels} numbers, one for each of the {levels - 1} stride-2 "
                f"convolutions of {config.model}'s sparse encoder at {config.scale} size and one for conv_out"
            )
        model = bevfusion.with_capacities(model, voxels, sites)
    return model if config.norm_momentum is None else bevfusion.with_norm_momentum(model, config.norm_momentum)


def with_measured(config: Any) -> Any:
    """The config with the capacities of its --capacity-file. Raises ValueError where that is not of its data and network."""
    if config.capacity_file is None or (config.voxel_capacity is not None and config.site_capacity is not None):
        return config
    where = (config.data_root, config.version, config.train_split, config.eval_split)
    index = source.open(*where, config.world).training
    voxels, sites = capacities.read(config.capacity_file, index, config.grid, config.sweeps).rooms(config.headroom)
    return replace(config, voxel_capacity=config.voxel_capacity or voxels, site_capacity=config.site_capacity or sites)


def data(config: Shared, splits: source.Source | None, model: bevfusion.Config, training: Reading) -> tasks.Data:
    """Training and evaluation splits and how they are read."""
    reading, eval_reading = (fitted(config, model, way) for way in (training, EVAL))
    return tasks.make_data(config, splits, reading if config.augment else eval_reading, eval_reading)


def fitted(config: Shared, model: bevfusion.Config, reading: Reading, scan_points: int = SCAN_POINTS) -> Reading:
    """A published way of reading, for the config's sweeps, each of so many points at most, and the model's sensors and image
    size."""
    points, cameras = reading.points, reading.cameras
    assert points is not None
    points = replace(points, published_sweeps=config.published_sweeps)
    if config.sweeps != points.sweeps:
        room = replace(reading.capacities, points=scan_points * (1 + config.sweeps))
        points = replace(points, sweeps=config.sweeps, sweep_choice="newest", pad_empty_sweeps=False)
        reading = replace(reading, capacities=room)
    room = reading.capacities.changed(config.point_capacity, config.box_capacity)
    reading = replace(reading, points=points, capacities=room)
    if model.camera is None or cameras is None:
        return replace(reading, cameras=None)
    return replace(reading, cameras=replace(cameras, image_size=model.camera.view.grid.image_size))


if __name__ == "__main__":
    run.cli(DEFAULTS, task, __doc__)
