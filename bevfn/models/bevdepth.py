"""BEVDepth (Li et al. 2022, arXiv 2206.10092): camera-only detection in bird's-eye view, depth supervised by LiDAR,
earlier key frames beside the current one. MatrixVT (Zhou et al. 2022, arXiv 2211.10593) is the same model with another
view transform.

    config = bevdepth.two_key()
    params, state = bevdepth.init(config, seed=0)
    outputs, state = bevdepth.apply(params, state, batch, config=config, train=False, policy=Policy())
    detections = bevdepth.decode(outputs, config)

Source: BEVDepth at d78c7b5 (behaviour; goldens bevdepth_r50_2key, matrixvt_r50).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from bevfn import rng, tree
from bevfn.backbones import resnet
from bevfn.data.batch import Base, Batch, annotated_boxes, check_base
from bevfn.data.reading import Needs
from bevfn.distributed import Replicas, Train
from bevfn.heads import centerpoint, centerpoint_loss
from bevfn.layers import remat
from bevfn.models import cameras
from bevfn.necks import second_fpn
from bevfn.precision import Policy
from bevfn.views import camera_grid, depth_aggregation, depth_net, matrixvt


@dataclass(frozen=True)
class Config:
    """The defaults are the published two-key-frame model; the functions below give the others."""

    frames: int = 2
    """key frames, the current one first"""
    backbone: resnet.Config = field(default_factory=lambda: resnet.Config(frozen_stages=0))
    neck: second_fpn.Config = field(
        default_factory=lambda: second_fpn.Config(
            channels_in=(256, 512, 1024, 2048), channels=(128,) * 4, strides=(0.25, 0.5, 1, 2), kaiming_normal=True
        )
    )
    grid: camera_grid.Config = field(default_factory=camera_grid.Config)
    depth: depth_net.Config = field(default_factory=depth_net.Config)
    aggregation: bool = False
    """refine the lifted volume before pooling ("da")"""
    matrix: matrixvt.Config | None = None
    """MatrixVT's view transform instead of pooling"""
    bev_channels: int = 160
    """of the BEV backbone's first stage"""
    neck_channels: int = 64
    """of each of the BEV neck's four stages"""
    head: centerpoint.Config = field(default_factory=lambda: centerpoint.Config(code_weights=(1.0,) * 10))
    depth_loss_weight: float = 3.0

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"frames {self.frames} must be at least 1, the current key frame")
        if self.grid.depth_bins != self.depth.depth_bins:
            raise ValueError(
                f"grid.depth_m {self.grid.depth_m} has {self.grid.depth_bins} bins, depth.depth_bins is "
                f"{self.depth.depth_bins}"
            )
        if self.head.cells != self.grid.cells:
            raise ValueError(f"the grid has {self.grid.cells} cells, head.cells is {self.head.cells}")
        if self.matrix is not None and (self.aggregation or self.matrix.context != self.depth.context):
            raise ValueError("MatrixVT needs aggregation=False and matrix.context equal to depth.context")

    @property
    def bev_backbone(self) -> resnet.Config:
        """ResNet-18 without its last stage and without pooling, on the key frames' maps side by side."""
        return resnet.Config(
            channels_in=self.frames * self.depth.context,
            channels=self.bev_channels,
            blocks=(2, 2, 2),
            strides=(1, 2, 2),
            bottleneck=False,
            pool=False,
            recompute=self.backbone.recompute,
        )

    @property
    def bev_neck(self) -> second_fpn.Config:
        """The BEV map itself and the backbone's stages, all brought to the map's resolution."""
        backbone = self.bev_backbone
        return second_fpn.Config(
            channels_in=(backbone.channels_in, *backbone.stage_channels),
            channels=(self.neck_channels,) * 4,
            strides=(1, 2, 4, 8),
            kaiming_normal=True,
            norm_momentum=self.neck.norm_momentum,
        )

    @property
    def frozen(self) -> tuple[str, ...]:
        """Path patterns of the leaves that are not trained, for `optim.Group`."""
        return tuple(f"image.backbone.{path}" for path in self.backbone.frozen)


def two_key() -> Config:
    """Two key frames (bev_depth_lss_r50_256x704_128x128_24e_2key; EMA is the recipe's)."""
    return Config()


def key_frames(count: int) -> Config:
    """Any number of key frames; one is bev_depth_lss_r50_256x704_128x128_24e_ema, which keeps the base's code weights.

    The published "key4" experiments are two frames, the second one an earlier camera sweep: `two_key` on other data.
    """
    return two_key() if count == 2 else replace(Config(), frames=count, head=_base_head(count))


def _base_head(count: int) -> centerpoint.Config:
    return centerpoint.Config() if count == 1 else centerpoint.Config(code_weights=(1.0,) * 10)


def two_key_aggregated() -> Config:
    """The network of bev_depth_lss_r50_256x704_128x128_20e_cbgs_2key_da(_ema)."""
    return replace(two_key(), aggregation=True)


def matrix_vt() -> Config:
    """MatrixVT, one frame (matrixvt_bev_depth_lss_r50_256x704_128x128_24e_ema)."""
    return replace(key_frames(1), matrix=matrixvt.Config())


def mini(config: Config) -> Config:
    """The same model at a size for demos and CI: 128 x 352 images seen at stride 8, 64 x 64 cells of 1.6 m, narrow layers,
    a stem that is trained."""
    span, C = (-51.2, 51.2, 1.6), 32
    depth = depth_net.Config(
        channels_in=128, channels=64, context=C, depth_bins=56, blocks=1, dilations=(1, 2, 3), dropout=0.1
    )
    return replace(
        config,
        backbone=replace(config.backbone, channels=16, blocks=(2, 2, 2, 2), frozen_stages=-1),
        neck=replace(config.neck, channels_in=(64, 128, 256, 512), channels=(32,) * 4, strides=(0.5, 1, 2, 4)),
        grid=replace(config.grid, image_size=(128, 352), stride=8, depth_m=(2.0, 58.0, 1.0), x_m=span, y_m=span),
        depth=depth,
        matrix=None if config.matrix is None else replace(config.matrix, context=C, channels=64),
        bev_channels=48,
        neck_channels=24,
        head=replace(config.head, channels_in=96, channels=24, cell=(1.6, 1.6), cells=(64, 64)),
    )


def with_norm_momentum(config: Config, momentum: float) -> Config:
    """Another momentum of both necks' batch norms (published: 0.01)."""
    return replace(config, neck=replace(config.neck, norm_momentum=momentum))


def init(config: Config, seed: int) -> tuple[dict, dict]:
    """(params, state): the pytrees of float32 parameters and batch-norm statistics; same seed, same bytes."""
    generator = torch.Generator().manual_seed(seed)
    view: dict = {"depth_net": depth_net.init(config.depth, generator)}
    if config.aggregation:
        view["aggregation"] = depth_aggregation.init(config.depth.context, generator)
    if config.matrix is not None:
        view["matrix"] = matrixvt.init(config.matrix, generator)
    made = {
        "image": {
            "backbone": resnet.init(config.backbone, generator),
            "neck": second_fpn.init(config.neck, generator),
        },
        "view": view,
        "bev": {
            "backbone": resnet.init(config.bev_backbone, generator),
            "neck": second_fpn.init(config.bev_neck, generator),
        },
        "head": centerpoint.init(config.head, generator),
    }
    return tree.unzip(made)


Place = Tensor | tuple[Tensor, Tensor]


def place(batch: Batch, frame: int, config: Config) -> Place:
    """Where frame t's features go: the cell of every frustum point, or MatrixVT's ring and ray matrices.

    It follows from the calibration and the augmentation alone; a fixed rig can make it once and give it to `apply`.
    """
    if config.matrix is None:
        return camera_grid.cells(batch, frame, config.grid)
    return matrixvt.matrices(matrixvt.ray_cells(batch, frame, config.grid), config.grid)


def apply(
    params: dict,
    state: dict,
    batch: Batch,
    *,
    config: Config,
    train: Train,
    policy: Policy = Policy(),  # noqa: B008
    key: Tensor | None = None,
    places: Sequence[Place] | None = None,
) -> tuple[dict, dict]:
    """Runs the detector.

    Only the current key frame carries a gradient. Earlier ones run after it, with its statistics already updated, and
    in training normalise by their own batch and update the running statistics once more, as upstream.

    Args:
        batch: see `data.batch.Batch`; at least `config.frames` frames.
        train: batch statistics (of all replicas with `Replicas`).
        key: dropout; None switches it off.
        places: of every frame instead of `place`.

    Returns:
        outputs naming every boundary by the path of the parameters that made it ("frames": per frame "image":
        "backbone", "neck"; "view": "depth_net", "depth", "place", "bev"; then "bev": "map", "backbone", "neck"; "head"),
        and the new state.

    Raises ValueError if the batch has fewer frames or images of another size than the configuration.
    """
    check_base(batch, Base.EGO_AT_CAMERAS, _name(config))
    images = cameras.images(batch, config.frames, config.grid.image_size)

    def one(params: dict, state: dict, t: int, train: Train) -> tuple[dict, dict]:
        where = place(batch, t, config) if places is None else places[t]
        site = None if key is None else rng.fold(key, t)
        return _frame(params, state, images[:, t], known, where, config=config, train=train, policy=policy, key=site)

    known = depth_net.camera_vectors(batch)
    weights, statistics = ({part: made[part] for part in ("image", "view")} for made in (params, state))
    frames, image_side = cameras.over_frames(one, weights, statistics, order=range(config.frames), train=train)
    # Upstream forces everything behind the view transform to float32 under autocast.
    bev = torch.cat([frame["view"]["bev"] for frame in frames], 1).float()  # B T*C Y X
    trunk, trunk_state = resnet.apply(
        params["bev"]["backbone"], state["bev"]["backbone"], bev, config=config.bev_backbone, train=train
    )
    x, neck_state = second_fpn.apply(
        params["bev"]["neck"], state["bev"]["neck"], [bev, *trunk[1:]], config=config.bev_neck, train=train
    )
    head, head_state = centerpoint.apply(params["head"], state["head"], x, config=config.head, train=train)
    new = {**image_side, "bev": {"backbone": trunk_state, "neck": neck_state}, "head": head_state}
    return {"frames": frames, "bev": {"map": bev, "backbone": trunk, "neck": x}, "head": head}, new


def _name(config: Config) -> str:
    return "BEVDepth" if config.matrix is None else "MatrixVT"


def needs(config: Config) -> Needs:
    """What the model reads of a batch."""
    return Needs(
        model=_name(config),
        base=Base.EGO_AT_CAMERAS,
        classes=sum(config.head.tasks),
        image_size=config.grid.image_size,
        frames=config.frames,
        depth=config.depth_loss_weight > 0,
    )


def _frame(
    params: dict,
    state: dict,
    images: Tensor,
    known: Tensor,
    where: Place,
    *,
    config: Config,
    train: Train,
    policy: Policy,
    key: Tensor | None,
) -> tuple[dict, dict]:
    """uint8 images [B N H W 3] of a frame, and what is known of the cameras, to its BEV map in the key frame's base."""
    x = cameras.normalise(images, order="bgr").to(policy.compute)  # B*N 3 H W
    image, weights = params["image"], params["view"]
    maps, backbone_state = resnet.apply(
        image["backbone"], state["image"]["backbone"], x, config=config.backbone, train=train
    )
    x, neck_state = second_fpn.apply(image["neck"], state["image"]["neck"], maps[1:], config=config.neck, train=train)
    net, net_state = depth_net.apply(
        weights["depth_net"], state["view"]["depth_net"], x, known, config=config.depth, train=train, key=key
    )
    depth, context = torch.softmax(net["logits"].float(), 1), net["context"].float()
    new = {"image": {"backbone": backbone_state, "neck": neck_state}, "view": {"depth_net": net_state}}
    if config.matrix is not None:
        assert isinstance(where, tuple)
        made, new["view"]["matrix"] = matrixvt.apply(
            weights["matrix"], state["view"]["matrix"], depth, context, where, grid=config.grid, train=train
        )
    elif config.aggregation:
        assert isinstance(where, Tensor)
        through = partial(depth_aggregation.apply, train=train)
        refine, statistics = weights["aggregation"], state["view"]["aggregation"]
        volume, new["view"]["aggregation"] = remat.apply(
            through, refine, statistics, depth, context, recompute=config.depth.recompute
        )
        made = {"bev": camera_grid.pool_volume(volume, where, config.grid)}
    else:
        assert isinstance(where, Tensor)
        made = {"bev": camera_grid.pool(depth, context, where, config.grid)}
    view = {"depth_net": net, "depth": depth, "place": where, **made}
    return {"image": {"backbone": maps, "neck": x}, "view": view}, new


def loss(
    params: dict,
    state: dict,
    batch: Batch,
    key: Tensor | None = None,
    *,
    config: Config,
    policy: Policy = Policy(),  # noqa: B008
    train: Train = True,
    replicas: Replicas | None = None,
) -> tuple[Tensor, tuple[dict, dict]]:
    """Training loss, in the form that `train.make_step` takes once config, policy, train and replicas are bound.

    train: True, or `Replicas` for batch statistics and loss normalisers over all replicas.
    replicas: the detection losses' normalisers alone, with each process' own batch statistics: the published recipe.

    Returns:
        total (0-d float32) and (new state, metrics: loss terms "loss/*", "num_pos", "bad/targets").

    Raises ValueError if the batch has no annotations, or no depth while the depth loss counts.
    """
    annotated = annotated_boxes(batch)
    outputs, new = apply(params, state, batch, config=config, train=train, policy=policy, key=key)
    pooled = train if isinstance(train, Replicas) else None
    detection = centerpoint_loss.loss(
        outputs["head"]["tasks"], *annotated, config=config.head, replicas=replicas or pooled
    )
    depth = cameras.key_frame_depth_loss(outputs, batch, config, pooled)
    total, metrics = cameras.total_loss(detection, depth)
    return total, (new, metrics)


def decode(outputs: dict, config: Config) -> dict[str, Tensor]:
    """Detections from the outputs: see `heads.centerpoint.decode`."""
    return centerpoint.decode(outputs["head"]["tasks"], config.head)


def predict(
    params: dict,
    state: dict,
    batch: Batch,
    *,
    config: Config,
    policy: Policy = Policy(),  # noqa: B008
) -> dict[str, Tensor]:
    """Detections of a batch in evaluation mode, in the augmented ego frame of the key frame."""
    outputs, _ = apply(params, state, batch, config=config, train=False, policy=policy)
    return decode(outputs, config)
