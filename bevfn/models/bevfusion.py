"""BEVFusion (Liu et al. 2022, arXiv 2205.13542): camera and LiDAR features fused in bird's-eye view, TransFusion head.

LiDAR-only, camera-only and LiDAR-camera are the same code with a modality's config set to None.

    config = bevfusion.lidar_camera()
    params, state = bevfusion.init(config, seed=0)
    outputs, state = bevfusion.apply(params, state, batch, config=config, train=False, policy=Policy())
    detections = bevfusion.decode(outputs, config)

Source: mmdetection3d v1.4.0 projects/BEVFusion (behaviour; goldens bevfusion_lidar, bevfusion_lidar_cam).
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bevfn import rng, tree
from bevfn.backbones import second, sparse_encoder, swin
from bevfn.data.batch import Base, Batch, annotated_boxes, check_base, needed
from bevfn.data.reading import Needs
from bevfn.distributed import Train
from bevfn.heads import transfusion, transfusion_loss
from bevfn.kernels.voxelize import voxelize
from bevfn.layers import conv_norm, fourier_features
from bevfn.models import cameras
from bevfn.necks import lss_fpn, second_fpn
from bevfn.precision import Policy
from bevfn.views import camera_grid, lift_splat

POINT_FEATURES = (0, 1, 2, 3, 4)
"""x, y, z (m), intensity, time lag (s)"""


@dataclass(frozen=True)
class Voxels:
    """The LiDAR range and its voxel grid; every other size follows from it."""

    lower: tuple[float, float, float] = (-54.0, -54.0, -5.0)
    upper: tuple[float, float, float] = (54.0, 54.0, 3.0)
    size: tuple[float, float, float] = (0.075, 0.075, 0.2)
    """metres"""
    max_points: int = 10
    """the first so many points of a voxel, in point order, are averaged"""
    max_voxels: tuple[int, int] = (120_000, 160_000)
    """per sample, in training and in evaluation; later new voxels are dropped with their points"""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Cells in x, y and z."""
        x, y, z = (round((u - l) / s) for l, u, s in zip(self.lower, self.upper, self.size))
        return x, y, z


@dataclass(frozen=True)
class Lidar:
    encoder: sparse_encoder.Config = field(default_factory=sparse_encoder.Config)
    features: tuple[int, ...] = POINT_FEATURES
    """of a point, what the encoder reads the voxel's mean of"""
    fourier: fourier_features.Config | None = None
    """of these features, what the encoder gets in their place; None: they themselves"""

    def __post_init__(self) -> None:
        made = len(self.features) if self.fourier is None else self.fourier.channels
        if self.encoder.channels_in != made:
            raise ValueError(f"the voxels have {made} features, encoder.channels_in is {self.encoder.channels_in}")
        if self.fourier is not None and len(self.fourier.lower) != len(self.features):
            raise ValueError(f"fourier is of {len(self.fourier.lower)} features, features names {len(self.features)}")


@dataclass(frozen=True)
class Camera:
    backbone: swin.Config = field(default_factory=swin.Config)
    neck: lss_fpn.Config = field(default_factory=lss_fpn.Config)
    view: lift_splat.Config = field(default_factory=lift_splat.Config)


@dataclass(frozen=True)
class Config:
    voxels: Voxels = field(default_factory=Voxels)
    lidar: Lidar | None = field(default_factory=Lidar)
    camera: Camera | None = field(default_factory=Camera)
    fused_channels: int = 256
    fuser_kernel: int | None = 3
    """cells per side of the convolution over the maps of all sensors, if cameras are among them; None: there is none"""
    backbone: second.Config | None = field(default_factory=second.Config)
    neck: second_fpn.Config | None = field(default_factory=second_fpn.Config)
    """of the BEV map; both None: the head reads the map itself"""
    head: transfusion.Config = field(default_factory=transfusion.Config)

    def __post_init__(self) -> None:
        if self.lidar is None and self.camera is None:
            raise ValueError("a BEVFusion model needs lidar, camera or both; both are None")
        if self.fuser_kernel is None and self.lidar is not None and self.camera is not None:
            raise ValueError("the maps of two sensors need a fuser: give fuser_kernel")
        if (self.backbone is None) != (self.neck is None):
            raise ValueError("backbone and neck of the BEV map come together: give both or neither")
        if self.lidar is not None:
            X, Y, _ = sparse_encoder.output_grid(self.lidar.encoder, self.sparse_grid)
            if self.head.cells != (X, Y):
                raise ValueError(f"the sparse encoder makes {X} x {Y} BEV cells, head.cells is {self.head.cells}")
        if self.camera is not None:
            X, Y = (count // 2 for count in self.camera.view.grid.cells)
            if self.head.cells != (X, Y):
                raise ValueError(f"the view transform makes {X} x {Y} BEV cells, head.cells is {self.head.cells}")

    @property
    def sparse_grid(self) -> tuple[int, int, int]:
        """The encoder's grid has one cell more in z than the voxelizer's (41 for 40), as published."""
        x, y, z = self.voxels.grid
        return x, y, z + 1


@tree.register
@dataclass(frozen=True)
class Tables:
    """What `apply` computes of a batch's points and calibration alone, before its first parameter; see `with_tables`."""

    voxels: dict[str, Tensor] | None
    """"features" [B V 5] float32, "coords" [B V 3], "count" [B V], "found" [B] int32; of the LiDAR branch, see `voxelize`"""
    neighbours: sparse_encoder.Tables | None
    depth: Tensor | None
    """[B N H W] float32, of cameras that see LiDAR depth (`lift_splat.lidar_depth_map`)"""
    pool: dict[str, Tensor] | None
    """of the camera branch, see `camera_grid.pool_tables`"""


def lidar_camera() -> Config:
    """The published LiDAR-camera model (mmdetection3d bevfusion_lidar-cam_voxel0075_second_secfpn)."""
    return Config()


def lidar_only() -> Config:
    """The published LiDAR-only model (mmdetection3d bevfusion_lidar_voxel0075_second_secfpn)."""
    return Config(camera=None)


def camera_only() -> Config:
    """Cameras alone, with a depth net that sees no LiDAR (the MIT code's LSSTransform), on the same BEV layers."""
    camera = Camera()
    return Config(lidar=None, camera=replace(camera, view=replace(camera.view, lidar_depth=False)))


def mini(config: Config) -> Config:
    """The same model at a size for demos and CI: 384 x 384 voxels and 96 x 96 BEV cells over its range (of 108 m: 0.28 m and
    1.1 m), images of about a quarter of its size, half its depth bins, narrow layers."""
    lower, upper = config.voxels.lower, config.voxels.upper
    size = ((upper[0] - lower[0]) / 384, (upper[1] - lower[1]) / 384, config.voxels.size[2])
    voxels = replace(config.voxels, size=size, max_voxels=(8_000, 8_000))
    lidar, camera = config.lidar, config.camera
    fused = C = 64
    if lidar is not None:
        encoder = sparse_encoder.Config(
            channels_in=lidar.encoder.channels_in,
            channels=(8, 16, 32),
            channels_out=32,
            blocks=1,
            paddings=((1, 1, 1), (1, 1, 0)),
            capacities=(8_000, 4_000, 4_000),
        )
        lidar = replace(lidar, encoder=encoder)
        if camera is None:
            X, Y, Z = voxels.grid
            fused = encoder.channels_out * sparse_encoder.output_grid(encoder, (X, Y, Z + 1))[2]
    if camera is not None:
        camera = _mini_camera(camera)
    head = replace(
        config.head,
        channels_in=C if camera is None or config.backbone is not None else camera.view.channels_out,
        channels=32,
        queries=100,
        heads=4,
        ffn_channels=64,
        head_channels=32,
        voxel=size[:2],
        stride=4,
        cells=(96, 96),
    )
    return replace(
        config,
        voxels=voxels,
        lidar=lidar,
        camera=camera,
        fused_channels=C,
        backbone=config.backbone and second.Config(channels_in=fused, channels=(32, 64), layers=2),
        neck=config.neck and second_fpn.Config(channels_in=(32, 64), channels=(32, 32)),
        head=head,
    )


def _mini_camera(camera: Camera) -> Camera:
    grid = camera.view.grid
    rows, columns = (32 * math.ceil(pixels / 4 / 32) for pixels in grid.image_size)
    low, _, step = grid.depth_m
    depth = (low, low + 2 * step * (grid.depth_bins // 2 + 1), 2 * step)
    x, y = ((start, end, (end - start) / 192) for start, end, _ in (grid.x_m, grid.y_m))
    view = replace(
        camera.view,
        channels_in=32,
        channels_out=16,
        grid=replace(grid, image_size=(rows, columns), depth_m=depth, x_m=x, y_m=y),
    )
    return Camera(backbone=swin.MINI, neck=lss_fpn.Config(channels_in=(32, 64, 128), channels_out=32), view=view)


def with_capacities(config: Config, voxels: tuple[int, int], sites: tuple[int, ...]) -> Config:
    """Other capacities of voxels (training, evaluation) and of active sites per encoder level; cameras have none."""
    if config.lidar is None:
        return config
    encoder = replace(config.lidar.encoder, capacities=sites)
    return replace(
        config, lidar=replace(config.lidar, encoder=encoder), voxels=replace(config.voxels, max_voxels=voxels)
    )


def with_norm_momentum(config: Config, momentum: float) -> Config:
    """Another momentum of the BEV and sparse batch norms (published: 0.01)."""
    backbone = config.backbone and replace(config.backbone, norm_momentum=momentum)
    neck = config.neck and replace(config.neck, norm_momentum=momentum)
    lidar = config.lidar
    if lidar is not None:
        lidar = replace(lidar, encoder=replace(lidar.encoder, norm_momentum=momentum))
    return replace(config, backbone=backbone, neck=neck, lidar=lidar)


def init(config: Config, seed: int) -> tuple[dict, dict]:
    """(params, state): the pytrees of float32 parameters and batch-norm statistics; same seed, same bytes."""
    generator = torch.Generator().manual_seed(seed)
    made: dict = {}
    fused = 0
    if config.camera is not None:
        made["camera"] = {
            "backbone": swin.init(config.camera.backbone, generator),
            "neck": lss_fpn.init(config.camera.neck, generator),
            "view": lift_splat.init(config.camera.view, generator),
        }
        fused += config.camera.view.channels_out
    if config.lidar is not None:
        made["lidar"] = sparse_encoder.init(config.lidar.encoder, generator)
        _, _, Z = sparse_encoder.output_grid(config.lidar.encoder, config.sparse_grid)
        fused += config.lidar.encoder.channels_out * Z
    if config.camera is not None and config.fuser_kernel is not None:
        made["fuser"] = conv_norm.init(fused, config.fused_channels, config.fuser_kernel, generator=generator)
    if config.backbone is not None and config.neck is not None:
        made["bev"] = {
            "backbone": second.init(config.backbone, generator),
            "neck": second_fpn.init(config.neck, generator),
        }
    made["head"] = transfusion.init(config.head, generator)
    return tree.unzip(made)


def needs(config: Config) -> Needs:
    """What the model reads of a batch."""
    view = None if config.camera is None else config.camera.view
    return Needs(
        model="BEVFusion",
        base=Base.LIDAR,
        classes=config.head.classes,
        points=config.lidar is not None or (view is not None and view.lidar_depth),
        image_size=None if view is None else view.grid.image_size,
        range=(*config.voxels.lower, *config.voxels.upper),
    )


def with_tables(batch: Batch, *, config: Config, train: bool) -> Batch:
    """The batch, on the CPU, with its `Tables`, which `apply` then does not compute: the same numbers, bit for bit, of the C++
    kernels in the processes that read. On an Ascend NPU they are half of a step (docs/ascend.md)."""
    voxels = sites = depth = pool = None
    with torch.no_grad():
        if config.lidar is not None:
            points, valid = needed(batch.points, "points"), needed(batch.points_valid, "points_valid")
            voxels = _voxels(points, valid, config.voxels, train=train)
            grid = config.sparse_grid
            of = config.lidar.encoder
            sites = sparse_encoder.tables(voxels["coords"], voxels["count"] > 0, config=of, grid=grid)
        if config.camera is not None:
            view = config.camera.view
            pool = camera_grid.pool_tables(batch, 0, view.grid)
            if view.lidar_depth:
                depth = lift_splat.lidar_depth_map(batch, view.grid.image_size, on_host=True)
    return replace(batch, tables=Tables(voxels, sites, depth, pool))


def apply(
    params: dict,
    state: dict,
    batch: Batch,
    *,
    config: Config,
    train: Train,
    policy: Policy = Policy(),  # noqa: B008
    key: Tensor | None = None,
) -> tuple[dict, dict]:
    """Runs the detector.

    Args:
        batch: see `data.batch.Batch`; camera fields may be None for a LiDAR-only model.
        train: batch statistics (of all replicas with `Replicas`) and training capacities.
        key: dropout and stochastic depth; None switches both off.

    Returns:
        outputs naming every boundary by the path of the parameters that made it ("camera": "backbone", "neck", "view";
        "lidar", "fuser", "bev": "backbone", "neck"; "head"; "voxels", "overflow"), and the new state.
    """
    check_base(batch, Base.LIDAR, "BEVFusion")
    outputs: dict = {"overflow": {}}
    new: dict = {}
    bev = []
    if config.camera is not None:
        camera, new["camera"] = _camera_branch(params["camera"], state["camera"], batch, config, train, policy, key)
        outputs["camera"] = camera
        bev.append(camera["view"]["bev"].to(policy.compute))
    if config.lidar is not None:
        lidar, new["lidar"] = _lidar_branch(params["lidar"], state["lidar"], batch, config, train, policy)
        outputs["overflow"] |= lidar.pop("overflow")
        outputs |= lidar
        bev.append(lidar["lidar"]["bev"])
    x = bev[0]
    if "fuser" in params:
        x, new["fuser"] = conv_norm.apply(params["fuser"], state["fuser"], torch.cat(bev, dim=1), train=train)
        outputs["fuser"] = x
    if config.backbone is not None and config.neck is not None:
        outputs["bev"], new["bev"] = bev_layers(params["bev"], state["bev"], x, config, train)
        x = outputs["bev"]["neck"]
    head_key = None if key is None else rng.fold(key, 1)
    outputs["head"], new["head"] = transfusion.apply(
        params["head"], state["head"], x, config=config.head, train=train, key=head_key
    )
    return outputs, new


def bev_layers(params: dict, state: dict, x: Tensor, config: Config, train: Train) -> tuple[dict, dict]:
    """The layers of the BEV map x [B C X Y] that has them: {"backbone": maps, "neck": [B C' X Y]}, and the new state."""
    assert config.backbone is not None and config.neck is not None
    maps, backbone = second.apply(params["backbone"], state["backbone"], x, config=config.backbone, train=train)
    neck, neck_state = second_fpn.apply(params["neck"], state["neck"], maps, config=config.neck, train=train)
    return {"backbone": maps, "neck": neck}, {"backbone": backbone, "neck": neck_state}


def _camera_branch(
    params: dict, state: dict, batch: Batch, config: Config, train: Train, policy: Policy, key: Tensor | None
) -> tuple[dict, dict]:
    assert config.camera is not None
    outputs, new = image_features(params, state, batch, config, train, policy, key)
    # Upstream forces the view transform to float32 under autocast.
    given = {} if batch.tables is None else {"depth": batch.tables.depth, "pool": batch.tables.pool}
    neck, view = outputs["neck"][0].float(), config.camera.view
    outputs["view"], new["view"] = lift_splat.apply(
        params["view"], state["view"], neck, batch, config=view, train=train, **given
    )
    return outputs, new


def image_features(
    params: dict, state: dict, batch: Batch, config: Config, train: Train, policy: Policy, key: Tensor | None
) -> tuple[dict, dict]:
    """The camera branch before its view transform: {"backbone", "neck"}, maps [B*N C H W] fine to coarse, and their state."""
    assert config.camera is not None
    frames = cameras.images(batch, 1, config.camera.view.grid.image_size)
    images = cameras.normalise(frames[:, 0], order="rgb").to(policy.compute)  # B*N 3 H W
    swin_key = None if key is None else rng.fold(key, 0)
    features = swin.apply(params["backbone"], images, config=config.camera.backbone, train=train, key=swin_key)
    fpn, neck_state = lss_fpn.apply(params["neck"], state["neck"], features, train=train)
    return {"backbone": features, "neck": fpn}, {"backbone": {}, "neck": neck_state}


def _lidar_branch(
    params: dict, state: dict, batch: Batch, config: Config, train: Train, policy: Policy
) -> tuple[dict, dict]:
    if batch.tables is None:
        points, valid = needed(batch.points, "points"), needed(batch.points_valid, "points_valid")
        made, sites = _voxels(points, valid, config.voxels, train=train), None
    else:
        made, sites = batch.tables.voxels, batch.tables.neighbours
        wanted = [batch.base_aug.shape[0], config.voxels.max_voxels[0 if train else 1]]
        if made is None or list(made["count"].shape) != wanted:
            given = "no" if made is None else f"{list(made['count'].shape)}"
            raise ValueError(
                f"the batch's tables have {given} voxels, the model has {wanted} (samples, voxels each, "
                f"{'training' if train else 'evaluation'}); make tables by the config that is run"
            )
        if (features := made["features"]).dtype != torch.float32:
            raise ValueError(
                f"the batch's tables have voxel features of {features.dtype}, the model reads torch.float32; make tables by the "
                "config that is run"
            )
    voxels, overflow = _counted(made)
    sparse, new = encode(params, state, voxels, config, train, policy, sites)
    overflow |= sparse.pop("overflow")
    return {"voxels": voxels, "lidar": sparse, "overflow": overflow}, new


def encode(
    params: dict,
    state: dict,
    voxels: dict,
    config: Config,
    train: Train,
    policy: Policy,
    sites: sparse_encoder.Tables | None = None,
) -> tuple[dict, dict]:
    """`sparse_encoder.apply` of voxels as `voxelise` makes them; those with a count of 0 are none. sites: their tables."""
    assert config.lidar is not None
    return sparse_encoder.apply(
        params,
        state,
        _encoded(voxels["features"], config.lidar).to(policy.compute),
        voxels["coords"],
        voxels["count"] > 0,
        config=config.lidar.encoder,
        grid=config.sparse_grid,
        train=train,
        given=sites,
    )


def _encoded(features: Tensor, config: Lidar) -> Tensor:
    """Means of voxels [B V 5] -> what the encoder reads of them [B V C_in]."""
    if config.features != POINT_FEATURES:
        features = torch.stack([features[..., i] for i in config.features], dim=-1)
    return features if config.fourier is None else fourier_features.apply(features, config.fourier)


def voxelise(points: Tensor, valid: Tensor, config: Voxels, *, train: Train) -> tuple[dict, dict]:
    """points [B P 5] -> {"features" [B V 5], "coords" [B V 3], "count" [B V]}, {"voxels_l0": voxels dropped}."""
    return _counted(_voxels(points, valid, config, train=train))


def _voxels(points: Tensor, valid: Tensor, config: Voxels, *, train: Train) -> dict[str, Tensor]:
    """`voxelize`'s results by their names."""
    made = voxelize(
        points,
        valid,
        lower=config.lower,
        size=config.size,
        grid=config.grid,
        max_points=config.max_points,
        max_voxels=config.max_voxels[0 if train else 1],
    )
    return dict(zip(("features", "coords", "count", "found"), made))


def _counted(voxels: dict[str, Tensor]) -> tuple[dict, dict]:
    """The voxels, and what did not fit."""
    kept = {name: value for name, value in voxels.items() if name != "found"}
    dropped = (voxels["found"] - voxels["count"].shape[1]).clamp(min=0).sum()
    return kept, {"voxels_l0": dropped}


def loss(
    params: dict,
    state: dict,
    batch: Batch,
    key: Tensor | None = None,
    *,
    config: Config,
    policy: Policy = Policy(),  # noqa: B008
    train: Train = True,
    own_normalisers: bool = False,
) -> tuple[Tensor, tuple[dict, dict]]:
    """Training loss, in the form that `train.make_step` takes once config, policy and train are bound.

    train: True, or `Replicas` for batch statistics and loss normalisers over all replicas: their mean loss is then the
    loss of their one big batch. (The published recipe has True on every replica.) own_normalisers: with `Replicas` statistics
    alone are of all, as in AWML's recipes.

    Returns:
        total (0-d float32) and (new state, metrics: loss terms "loss/*", "matched_iou", "num_pos", "overflow/*",
        "bad/targets").
    """
    outputs, new = apply(params, state, batch, config=config, train=train, policy=policy, key=key)
    total, terms = transfusion_loss.loss(
        outputs["head"],
        *annotated_boxes(batch),
        config=config.head,
        train=True if own_normalisers else train,
    )
    metrics = {"loss/total": total.detach(), "matched_iou": terms["matched_iou"], "num_pos": terms["num_pos"]}
    metrics |= {f"loss/{k}": v.detach() for k, v in terms.items() if k.split("/")[-1] in ("heatmap", "cls", "bbox")}
    metrics |= overflow(outputs) | {"bad/targets": terms["bad_boxes"]}
    return total, (new, metrics)


def overflow(outputs: dict) -> dict[str, Tensor]:
    """What did not fit a capacity, by the metric's name: voxels (level 0) and active sites of each level, 0-d."""
    return {f"overflow/{level}": count for level, count in outputs["overflow"].items()}


def decode(outputs: dict, config: Config) -> dict[str, Tensor]:
    """Detections from the outputs, see `heads.transfusion.decode`, and what did not fit: "overflow/*" (0-d)."""
    return transfusion.decode(outputs["head"], config.head) | overflow(outputs)


def predict(
    params: dict,
    state: dict,
    batch: Batch,
    *,
    config: Config,
    policy: Policy = Policy(),  # noqa: B008
) -> dict[str, Tensor]:
    """Detections of a batch in evaluation mode, in the augmented LiDAR frame, and what did not fit: "overflow/*" (0-d)."""
    outputs, _ = apply(params, state, batch, config=config, train=False, policy=policy)
    return decode(outputs, config)
