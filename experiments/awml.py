"""TIER IV's BEVFusion (AWML, projects/BEVFusion): LiDAR, LiDAR-camera and camera-only on T4 data sets, LiDAR on nuScenes.

Published by AWML, on its own data (percent; mAP over 0.5, 1, 2 and 4 m, all classes to 120 m; 8 devices x 8 samples, fp32):

    --model               epochs  classes  release             mAP    mAPH   of which network
    awml-lidar            50      5        base/2.7.0          77.77  74.2   this one
    awml-lidar            30      5        j6gen2_base/2.7.1   79.9   74.87  this one with --intensity
    awml-lidar-offline    30      5        base/0.2            72.2   none   an older one, without intensity
    awml-camera-lidar     20      5        j6gen2/2.0.1        80.08  none   an older one, with --fuser-kernel 3
    awml-camera           30      5        none
    awml-nuscenes-lidar   20      10       none (mmdetection3d's: bevfn.experiments.bevfusion_lidar)

LiDAR first, then fusion from its checkpoint and a nuImages Swin-T. The run names what has another shape there (the encoder's first
convolution: awml-lidar reads Fourier features) and starts it from scratch, as upstream does.

    torchrun --nproc-per-node 8 -m bevfn.experiments.awml --model awml-lidar --data-root /data/t4
    torchrun --nproc-per-node 8 -m bevfn.experiments.awml --model awml-camera-lidar --data-root /data/t4 \\
        --pretrained runs/awml_lidar/checkpoints/step_00111100 swin.safetensors
    torchrun --nproc-per-node 8 -m bevfn.experiments.awml --model awml-lidar --intensity --epochs 30 --lr-turn 0.266667 \\
        --beta1-turn 0.266667 --data-root /data/t4/db_j6gen2_v1.yaml
    python -m bevfn.experiments.awml                                # a synthetic T4 world, minutes on a laptop

The flags' defaults are the published recipe on T4 data sets (of awml-nuscenes-lidar: on nuScenes), and smaller numbers (`FRAME`,
`SYNTHETIC`) elsewhere. Evaluations print and write the T4 metric, with NDS over the same classes beside it (docs/t4_metrics.md).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

from bevfn import upstream
from bevfn.choices import one_of
from bevfn.data import augment, source
from bevfn.data.batch import Capacities
from bevfn.data.reading import Cameras, Points, Reading
from bevfn.data.t4_classes import CLASSES
from bevfn.experiments import bevfusion, bevfusion_lidar
from bevfn.models import awml
from bevfn.models import bevfusion as family
from bevfn.training import command_line, optim, pretrained, run, tasks

NETWORKS: dict[str, Callable[[], family.Config]] = {
    "awml-lidar": awml.lidar,
    "awml-lidar-offline": awml.lidar_offline,
    "awml-camera-lidar": awml.camera_lidar,
    "awml-camera": awml.camera,
    "awml-nuscenes-lidar": awml.nuscenes_lidar,
}
NUSCENES = "awml-nuscenes-lidar"

# How key frames are read, as published.
CHANNELS = ("CAM_FRONT", "CAM_FRONT_LEFT", "CAM_BACK_LEFT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT")
SCAN_POINTS = 200_000  # of one cloud of several LiDARs, the most that AWML's deployment has room for
COVERING = 0.29  # the smallest factor of training just covers, where factors follow the images' sizes
CAMERAS = Cameras(channels=CHANNELS, image_size=(384, 768), resize=0.32, covering=None)
EVAL = Reading(
    points=Points(sweeps=1, sweep_pool=2, pad_empty_sweeps=False, published_sweeps=True),
    cameras=CAMERAS,
    class_names=CLASSES,
    range=(-122.4, -122.4, -3.0, 122.4, 122.4, 5.0),
    capacities=Capacities(points=2 * SCAN_POINTS, boxes=256),
)
TRAIN = replace(
    EVAL,
    points=Points(
        sweeps=1, sweep_choice="random", sweep_pool=2, pad_empty_sweeps=False, published_sweeps=True, shuffle=True
    ),
    cameras=replace(CAMERAS, augmentation=augment.Images(resize=(0.29, 0.35), turned="bicubic")),
    augmentation=augment.Global(scale=(0.95, 1.05), translation=(0.5, 0.5, 0.2)),
)


@dataclass(frozen=True)
class Config(bevfusion_lidar.Config):
    """The recipe of awml-lidar (AWML bevfusion_lidar_voxel_second_secfpn_50e_8xb8_base_120m)."""

    model: Annotated[str, one_of(NETWORKS)] = "awml-lidar"
    """network and recipe; the other flags' defaults are its published numbers"""
    intensity: bool = False
    """awml-lidar reads the points' intensity too, as published for j6gen2_base and jpntaxi_base (30 epochs); the other models
    always do"""
    fuser_kernel: Literal[3, 5] = 5
    """cells per side of awml-camera-lidar's fuser; 3: of AWML's releases up to 2.0"""
    epochs: int = 50
    batch_size: int = 8
    recipe_batch: int = 64
    recipe_lr: float = 1.4141e-3
    lr_turn: float = 15 / 50
    beta1_turn: float = 15 / 50
    eval_last: int = 7
    sync_statistics: bool = True
    """batch norm over all devices; the loss is normalised on each by its own positives, as published"""
    class_balanced: bool = False
    sweeps: int = 1
    """LiDAR sweeps added to the key frame's: the newest, in training one of the newest two; any other number than the
    published one takes the newest"""
    published_resize: bool = True
    """images are resized by AWML's factors whatever their size, and those of several sizes lie in the upper left of the
    largest, on black; no: each by its own factor, of which the smallest just covers the model's image"""
    range_m: float | None = None
    """m from the vehicle to each side that the network looks at: its cells grow or shrink with it; none: 122.4, as published"""
    class_reach: tuple[float, ...] = ()
    """m from the vehicle of car, truck, bus, bicycle and pedestrian: boxes that are farther are neither learned nor scored;
    none (published): all within 122.4 m are learned, to 121 m scored"""
    paste: bool = False
    """of awml-nuscenes-lidar: paste objects of other frames, from the database that `bevfn data prepare` made in the data root"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paste and self.model != NUSCENES:
            raise ValueError(f"--paste is of {NUSCENES}: AWML pastes nothing on T4 data sets; leave it out")
        if self.intensity and self.detector != "awml-lidar":
            raise ValueError(f"--intensity is of awml-lidar, and what {self.model} reads is fixed; leave it out")
        if self.range_m is not None and self.model == NUSCENES:
            raise ValueError(f"--range-m is of the models of T4 data sets; {self.model} sees 54 m, leave it out")
        if self.class_reach and (self.model == NUSCENES or len(self.class_reach) != len(CLASSES)):
            raise ValueError(
                f"--class-reach is of the models of T4 data sets, {len(CLASSES)} numbers ({', '.join(CLASSES)}); correct it"
            )
        if self.fuser_kernel != 5 and self.model != "awml-camera-lidar":
            raise ValueError(f"--fuser-kernel is of awml-camera-lidar, and {self.model} has no fuser; leave it out")

    @property
    def detector(self) -> str:
        """Whose network it is; in pretraining the one that starts from it."""
        return self.model

    @property
    def grid(self) -> family.Voxels:
        return sized(self, network(self)).voxels

    @property
    def world(self) -> source.World:
        return "nuscenes" if self.model == NUSCENES else "t4"


LIDAR = Config()
FUSION = replace(
    LIDAR,
    model="awml-camera-lidar",
    schedule="stairs",
    epochs=20,
    recipe_lr=1e-4,
    final_lr=1e-4,
    clip_norm=0.1,
    eval_every=1,
    eval_last=0,
    lr_turn=6 / 20,
    beta1_turn=6 / 20,
)
VARIANTS: dict[str, Config] = {
    "awml-lidar": LIDAR,
    "awml-lidar-offline": replace(LIDAR, model="awml-lidar-offline", epochs=30, lr_turn=8 / 30, beta1_turn=8 / 30),
    "awml-camera-lidar": FUSION,
    "awml-camera": replace(FUSION, model="awml-camera", epochs=30, lr_turn=8 / 30, beta1_turn=8 / 30),
    NUSCENES: replace(
        LIDAR,
        model=NUSCENES,
        epochs=20,
        batch_size=4,
        recipe_batch=32,
        recipe_lr=1e-3,
        lr_turn=0.4,
        beta1_turn=0.4,
        eval_last=0,
        sync_statistics=False,
        class_balanced=True,
        sweeps=9,
        paste=True,
    ),
}
# One key frame of nuScenes over and over, nothing augmented: for a first look at a laptop. T4's classes by their names.
FRAME: dict[str, Any] = bevfusion.FRAME | {
    "published_resize": False,
    "paste": False,
    "clip_norm": 35.0,
    "point_capacity": bevfusion.SCAN_POINTS,
}
# Of the golden frame's two sweeps L-offline has 25,840 voxels and at most 42,756 active sites a level.
FRAME_VOXELS = (25_600, 25_600)
FRAME_SITES = (45_056, 32_768, 16_384, 13_312)
# The synthetic world, whose objects are within 75 m, on two CPU cores, from scratch, with what one would choose instead of the
# quirks.
WORLD_RANGE = 76.8
SYNTHETIC: dict[str, Any] = bevfusion.SYNTHETIC | {
    "lr_turn": 0.4,
    "beta1_turn": 0.4,
    "eval_last": 0,
    "clip_norm": 35.0,
    "sweeps": 1,
    "published_resize": False,
    "paste": False,
}


def defaults(recipe: Config, name: str) -> dict[source.Kind, command_line.Config]:
    """The flags' defaults of a recipe, for what may lie at the data root, and run folders of that name."""
    made = dict[source.Kind, command_line.Config]()
    made["nuscenes" if recipe.model == NUSCENES else "t4"] = replace(recipe, run_dir=command_line.RUNS / name)
    made["frame"] = replace(recipe, run_dir=command_line.RUNS / f"{name}_frame", **FRAME)
    own: dict[str, Any] = {"sweeps": 4} if recipe.model == NUSCENES else {"range_m": WORLD_RANGE}
    made["synthetic"] = replace(recipe, run_dir=command_line.RUNS / f"{name}_synthetic", **SYNTHETIC | own)
    return made


DEFAULTS: command_line.Defaults = {
    model: defaults(recipe, model.replace("-", "_")) for model, recipe in VARIANTS.items()
}


def task(config: Config, splits: source.Source | None = None) -> tasks.Task:
    """The task of config.model; `splits`: key frames other than the config's."""
    if splits is None:
        source.of_kind(DEFAULTS[config.model], config.data_root)  # or it is trained on other data
    if config.model == NUSCENES:
        made = bevfusion.assemble(config, splits, NETWORKS[config.model](), bevfusion_lidar.TRAIN)
        return replace(made, data=bevfusion_lidar.with_paste(config, made.data))
    model = sized(config, network(config))
    made = tasks.make_task(
        config,
        family,
        model,
        data(config, splits, model),
        partial(bevfusion.optimizer, config),
        ema=None if config.ema is None else optim.Ema(decay=config.ema),
        start=pretrained.Start(begin),
        tables=bevfusion.with_tables(config, model),
    )
    return replace(made, loss=partial(made.loss, own_normalisers=True))


def network(config: Config) -> family.Config:
    """The published network of config.detector."""
    if config.intensity:
        return awml.lidar(intensity=True)
    made = NETWORKS[config.detector]()
    return replace(made, fuser_kernel=config.fuser_kernel) if config.detector == "awml-camera-lidar" else made


def released(release: family.Config, model: str) -> dict[str, Any]:
    """The flags by which `network` makes a model as one of AWML's releases has it."""
    today = NETWORKS[model]()
    if model == "awml-lidar" and release.lidar is not None and today.lidar is not None:
        return {"intensity": release.lidar.encoder.channels_in != today.lidar.encoder.channels_in}
    return {"fuser_kernel": release.fuser_kernel} if model == "awml-camera-lidar" else {}


def ranged(model: family.Config, half: float) -> family.Config:
    """The network over so many metres to each side, with as many cells."""
    factor = half / model.voxels.upper[0]

    def wide(numbers: tuple[float, ...], axes: int = 2) -> Any:
        return tuple(number * factor if i < axes else number for i, number in enumerate(numbers))

    voxels = replace(
        model.voxels, lower=wide(model.voxels.lower), upper=wide(model.voxels.upper), size=wide(model.voxels.size)
    )
    lidar, camera = model.lidar, model.camera
    if lidar is not None and lidar.fourier is not None:
        waves = replace(lidar.fourier, lower=wide(lidar.fourier.lower), upper=wide(lidar.fourier.upper))
        lidar = replace(lidar, fourier=waves)
    if camera is not None:
        grid = replace(camera.view.grid, x_m=wide(camera.view.grid.x_m, 3), y_m=wide(camera.view.grid.y_m, 3))
        camera = replace(camera, view=replace(camera.view, grid=grid))
    head = replace(model.head, lower=wide(model.head.lower), voxel=wide(model.head.voxel))
    return replace(model, voxels=voxels, lidar=lidar, camera=camera, head=head)


def sized(config: Config, model: family.Config) -> family.Config:
    """The model at the config's range and scale, with the static capacities of what it reads."""
    if config.range_m is not None:
        model = ranged(model, config.range_m)
    if config.scale == "mini":
        model = family.with_capacities(family.mini(model), bevfusion.MINI_VOXELS, bevfusion.MINI_SITES)
    elif config.sweeps == 0 and source.kind(config.data_root) == "frame":
        model = family.with_capacities(model, FRAME_VOXELS, FRAME_SITES)
    return bevfusion.with_room(config, model)


def data(config: Config, splits: source.Source | None, model: family.Config) -> tasks.Data:
    """Training and evaluation splits and how they are read."""
    reading, eval_reading = (fitted(config, model, way) for way in (TRAIN, EVAL))
    return tasks.make_data(config, splits, reading if config.augment else eval_reading, eval_reading)


def fitted(config: Config, model: family.Config, reading: Reading) -> Reading:
    """A published way of reading, for the config's sweeps and the model's sensors and image size."""
    made = replace(
        bevfusion.fitted(config, model, reading, SCAN_POINTS),
        range=(*model.voxels.lower, *model.voxels.upper),
        class_reach=config.class_reach,
    )
    # AWML's factors are for its own images: a single frame is one of nuScenes.
    if made.cameras is None or (config.published_resize and source.kind(config.data_root) == "t4"):
        return made
    return replace(made, cameras=replace(made.cameras, covering=COVERING))


def begin(params: dict, state: dict, loaded: upstream.Loaded) -> tuple[dict, dict, upstream.Merge]:
    """The trees with what the files of --pretrained have in the same shape; the rest is named.

    Raises ValueError, one sentence, where a file has nothing of the model.
    """
    made = upstream.load_into(params, state, loaded, allow_missing=tuple(params), fitting_only=True)
    useless = [name for name in loaded if name not in made[2].filled.values()]
    if useless:
        raise ValueError(
            f"{useless[0]} has no tensor that fits this model; give a checkpoint of its recipe's LiDAR model, or a Swin of `bevfn checkpoint "
            "import --model swin-nuimages`"
        )
    return made


if __name__ == "__main__":
    run.cli(DEFAULTS, task, __doc__)
