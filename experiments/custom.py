"""BEVFusion on data of one's own, or on several data sets at once: own classes, cameras, range, voxels and LiDAR.

Nothing is published: the networks and the recipes are BEVFusion's (bevfn.experiments.bevfusion, and its _lidar)
at the sizes that the flags say, without the quirks that their published weights need.

    python -m bevfn.experiments.custom --data-root drives                       # docs/custom_data.md: what lies there
    torchrun --nproc-per-node 8 -m bevfn.experiments.custom --data-root all.toml --classes car pedestrian \\
        --bounds-m -76.8 -76.8 -3 76.8 76.8 5 --voxel-m 0.1 0.1 0.2             # T4 and nuScenes as one
    python -m bevfn.experiments.custom                                          # a synthetic world, minutes on a laptop

What is said of a run once, in a small Python file instead of flags, is a `preset`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Self

from bevfn.backbones import second, sparse_encoder
from bevfn.choices import one_of
from bevfn.data import augment, source
from bevfn.data import paste as pasting
from bevfn.data.batch import Capacities
from bevfn.data.reading import Cameras, Points, Reading
from bevfn.experiments import awml, bevfusion, bevfusion_lidar
from bevfn.models import bevfusion as family
from bevfn.training import command_line, optim, pretrained, run, tasks

NETWORKS: dict[str, Callable[[], family.Config]] = {
    "custom-lidar": family.lidar_only,
    "custom-lidar-camera": family.lidar_camera,
    "custom-camera": family.camera_only,
}
STRIDE = 8  # voxels per BEV cell
SMALL = ("pedestrian", "traffic_cone")  # classes of the published models that are smaller than a cell
IMAGE = 32  # pixels, of which both sides of the images are multiples
BELOW, ABOVE = (7.2, 7.2, 5.0), (7.2, 7.2, 7.0)  # m beyond the range's corners, where detections still count
PASTED = 2  # objects of a class that a frame should have, where it is none of the published models'
UNLEARNED = (1.0,) * 8 + (0.0, 0.0)  # weights of a box's numbers where velocities are not known


@dataclass(frozen=True)
class Config(bevfusion_lidar.Config):
    """The recipe of custom-lidar."""

    model: Annotated[str, one_of(NETWORKS)] = "custom-lidar"
    """sensors of the network"""
    classes: tuple[str, ...] = ()
    """what is detected, in the order of the labels; none: all classes of the data"""
    small_classes: tuple[str, ...] = SMALL
    """those of them that are smaller than a BEV cell of 8 voxels, so that neighbouring cells may hold one each"""
    cameras: tuple[str, ...] = ()
    """the cameras that are read, in their order; none: all of the data"""
    image_size: tuple[int, int] = (256, 704)
    """rows and columns of the network's images, multiples of 32: every camera's are resized until they just cover it, whatever
    their size, and what is over is cut off at the top and both sides"""
    bounds_m: tuple[float, float, float, float, float, float] = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)
    """the range that is looked at: x, y, z from, x, y, z to, in m of the frame that boxes are in"""
    voxel_m: tuple[float, float, float] = (0.075, 0.075, 0.2)
    """sides of a voxel; x and y of the range must be multiples of 8 of them"""
    class_reach: tuple[float, ...] = ()
    """m of each class, beyond which its boxes are neither learned nor scored; none: the range alone"""
    scan_points: int = 120_000
    """points of one cloud at most, which is what --point-capacity has room for of the key frame's and of each sweep"""
    published_sweeps: bool = False
    """sweeps move as BEVFusion's published weights were trained; no: where they belong"""
    published_beta1: bool = False
    """the published recipe's beta1, which ends at 1.0; no: 0.9 -> 0.8 -> 0.9"""
    published_paste: bool = False
    """objects of no class are pasted as barriers; no: they are not pasted"""
    paste: bool = False
    """paste objects of other frames, from the database that `bevfn data prepare` made in the data root; not of mixtures"""
    class_balanced: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.classes)) < len(self.classes) or len(set(self.cameras)) < len(self.cameras):
            raise ValueError("--classes or --cameras has a name twice; leave one of them out")
        if self.small_classes != SMALL and self.classes and (odd := set(self.small_classes) - set(self.classes)):
            raise ValueError(f"--small-classes has {min(odd)}, which is none of --classes {' '.join(self.classes)}")
        if any(side % IMAGE for side in self.image_size):
            raise ValueError(
                f"--image-size {' '.join(map(str, self.image_size))} must be multiples of {IMAGE}, such as "
                f"{' '.join(str(max(1, round(side / IMAGE)) * IMAGE) for side in self.image_size)}"
            )
        check_grid(self.bounds_m, self.voxel_m)

    def completed(self) -> Self:
        """With the data's classes and cameras, so that a checkpoint is read with those that it was trained with."""
        if self.classes and (self.cameras or self.model == "custom-lidar"):
            return bevfusion.with_measured(self)
        index = source.open(self.data_root, self.version, self.train_split, self.eval_split, self.world).training
        classes = self.classes or index.class_names
        made = replace(
            self,
            classes=classes,
            small_classes=tuple(name for name in self.small_classes if name in classes),
            cameras=() if self.model == "custom-lidar" else self.cameras or index.channels,
        )
        return bevfusion.with_measured(made)

    @property
    def grid(self) -> family.Voxels:
        made = network(self)
        return (family.mini(made) if self.scale == "mini" else made).voxels


def check_grid(bounds: tuple[float, ...], voxel: tuple[float, ...]) -> None:
    """Raises ValueError, one sentence with numbers that fit, for a range that is none, or not of whole voxels and cells."""
    for i, axis in enumerate("xyz"):
        low, high, side = bounds[i], bounds[3 + i], voxel[i]
        if not low < high:
            raise ValueError(
                f"--bounds-m goes from {low:g} to {high:g} m in {axis}; give x, y, z from, then x, y, z to"
            )
        of, count = 1 if axis == "z" else STRIDE, (high - low) / side
        whole = max(1, round(count / of)) * of
        if abs(count - whole) > 1e-4:
            multiples = "a whole number" if axis == "z" else f"a multiple of {of}"
            raise ValueError(
                f"--bounds-m and --voxel-m: {high - low:g} m in {axis} are {count:g} voxels of {side:g} m, which must be "
                f"{multiples}; let it end at {low + whole * side:.10g} m, or take voxels of {(high - low) / whole:.6g} m"
            )


RECIPES: dict[str, dict[str, Any]] = {
    "custom-lidar": {},
    "custom-lidar-camera": {"schedule": "cosine", "epochs": 6, "recipe_lr": 2e-4, "final_lr": 1e-4, "eval_every": 1},
    "custom-camera": {"schedule": "cosine", "epochs": 24, "recipe_lr": 2e-4, "final_lr": 1e-4},
}
FRAME: dict[str, Any] = bevfusion.FRAME | {
    "scan_points": bevfusion.SCAN_POINTS,
    "voxel_capacity": bevfusion.FRAME_VOXELS[0],
    "site_capacity": bevfusion.FRAME_SITES,
}
SYNTHETIC: dict[str, Any] = bevfusion.SYNTHETIC | {"scan_points": bevfusion.SCAN_POINTS}


def preset(**flags: Any) -> command_line.Defaults:
    """The flags' defaults of every model, for `run.cli`, with these for data of every kind but a single frame and the synthetic
    world."""
    made: dict[str, dict[source.Kind, command_line.Config]] = {}
    for model, recipe in RECIPES.items():
        name = model.replace("-", "_")
        config = Config(model=model, run_dir=command_line.RUNS / name, **recipe)
        told = replace(config, **flags)
        made[model] = {
            "own": told,
            "mixed": told,
            "t4": told,
            "nuscenes": told,
            "frame": replace(config, run_dir=command_line.RUNS / f"{name}_frame", **FRAME),
            "synthetic": replace(config, run_dir=command_line.RUNS / f"{name}_synthetic", **SYNTHETIC),
        }
    return made


DEFAULTS = preset()


def task(config: Config, splits: source.Source | None = None) -> tasks.Task:
    """The task of config.model; `splits`: key frames other than the config's."""
    where = (config.data_root, config.version, config.train_split, config.eval_split, config.world)
    splits = splits or source.open(*where)
    known = splits.training
    if config.model != "custom-lidar":
        config = replace(config, cameras=config.cameras or known.channels)
    config = replace(config, classes=config.classes or known.class_names)
    velocities = known.has("velocity")
    model = network(config, velocities=velocities)
    if config.scale == "mini":
        model = family.with_capacities(family.mini(model), bevfusion.MINI_VOXELS, bevfusion.MINI_SITES)
    model = bevfusion.with_room(config, model)
    reading, eval_reading = (
        replace(fitted(config, model, train=train), velocities=velocities) for train in (config.augment, False)
    )
    data = tasks.make_data(config, splits, reading, eval_reading)
    if config.paste and known.shares:
        raise ValueError(
            f"--paste takes the objects of one data set, and {config.data_root} is a mixture; leave it out"
        )
    ema = None if config.ema is None else optim.Ema(decay=config.ema)
    optimizer, start = partial(bevfusion.optimizer, config), pretrained.Start(awml.begin)
    tables = bevfusion.with_tables(config, model)
    made = tasks.make_task(config, family, model, data, optimizer, ema=ema, start=start, tables=tables)
    return replace(made, data=bevfusion_lidar.with_paste(config, data))


def network(config: Config, *, velocities: bool = True) -> family.Config:
    """The published network of these sensors at the config's range, voxels, images and classes."""
    made = NETWORKS[config.model]()
    lower, upper, size = config.bounds_m[:3], config.bounds_m[3:], config.voxel_m
    voxels = replace(made.voxels, lower=lower, upper=upper, size=size)
    if made.lidar is not None and made.camera is None:
        made = replace(made, backbone=second.Config(channels_in=lidar_channels(made.lidar, voxels)))
    x, y, _ = voxels.grid
    head = replace(
        made.head,
        classes=len(config.classes),
        small_classes=tuple(i for i, name in enumerate(config.classes) if name in config.small_classes),
        lower=lower[:2],
        voxel=size[:2],
        cells=(x // STRIDE, y // STRIDE),
        post_center_range=(*(a - b for a, b in zip(lower, BELOW)), *(a + b for a, b in zip(upper, ABOVE))),
        code_weights=made.head.code_weights if velocities else UNLEARNED,
    )
    return replace(made, voxels=voxels, camera=made.camera and camera(config, made.camera), head=head)


def lidar_channels(lidar: family.Lidar, voxels: family.Voxels) -> int:
    """Of the LiDAR's BEV map, whose levels of height are beside each other. Raises ValueError where there is none."""
    x, y, z = voxels.grid
    _, _, levels = sparse_encoder.output_grid(lidar.encoder, (x, y, z + 1))
    if levels < 1:
        raise ValueError(
            f"--bounds-m and --voxel-m make {z} voxels in z, which the encoder halves four times to nothing; take lower voxels, or "
            "more of z"
        )
    return lidar.encoder.channels_out * levels


def camera(config: Config, published: family.Camera) -> family.Camera:
    """The camera branch for the config's images, whose BEV cells are half those of the head, and whose depths reach the range's
    farther side."""
    bounds, view = config.bounds_m, published.view
    reach = math.ceil(max(map(abs, (*bounds[:2], *bounds[3:5]))))
    x, y = ((bounds[i], bounds[3 + i], config.voxel_m[i] * STRIDE / 2) for i in range(2))
    low, high = bounds[2] - BELOW[2], bounds[5] + ABOVE[2]
    step = 0.5 if reach <= 60 else 1.0
    grid = replace(
        view.grid,
        image_size=config.image_size,
        depth_m=(1.0, 1.0 + math.ceil(reach * 1.09), step),
        x_m=x,
        y_m=y,
        z_m=(low, high, high - low),
    )
    return replace(published, view=replace(view, grid=grid))


def quotas(classes: tuple[str, ...]) -> dict[str, int]:
    """Objects of each class that a frame should have, pasted or not."""
    published = pasting.Config().quotas
    return {name: published.get(name, PASTED) for name in classes}


def fitted(config: Config, model: family.Config, *, train: bool) -> Reading:
    """How key frames are read, augmented in training as BEVFusion's are."""
    images = augment.Images() if train else None
    cameras = Cameras(channels=config.cameras, image_size=config.image_size, resize=0.48, augmentation=images)
    scans = Points(
        sweeps=config.sweeps, published_sweeps=config.published_sweeps, pad_empty_sweeps=False, shuffle=train
    )
    room = Capacities(points=config.scan_points * (1 + config.sweeps), boxes=160)
    lidar_alone = model.camera is None
    reading = Reading(
        points=scans,
        cameras=None if lidar_alone else cameras,
        class_names=config.classes,
        range=config.bounds_m,
        class_reach=config.class_reach,
        augmentation=augment.Global(scale_translation=not lidar_alone) if train else None,
        paste=pasting.Config(quotas(config.classes)) if train and config.paste else None,
        capacities=room.changed(config.point_capacity, config.box_capacity),
    )
    if model.camera is None:
        return reading
    return replace(reading, cameras=replace(cameras, image_size=model.camera.view.grid.image_size))


if __name__ == "__main__":
    run.cli(DEFAULTS, task, __doc__)
