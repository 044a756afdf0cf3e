"""Lift-splat view transform of BEVFusion (Philion & Fidler 2020; Liu et al. 2022, arXiv 2205.13542).

Every pixel of an image feature gets a distribution over depth and a context vector; their product is summed into the
BEV cells that the frustum's points fall into. With `lidar_depth` a sparse depth image of the LiDAR points helps the
depth net (upstream's DepthLSSTransform); without, the depth net is one 1x1 convolution (LSSTransform). All in float32.

Source: mmdetection3d projects/BEVFusion/bevfusion/depth_lss.py; golden case bevfusion_lidar_cam.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bevfn import geometry, tree
from bevfn.data.batch import Batch
from bevfn.distributed import Train
from bevfn.layers import conv, conv_norm, remat
from bevfn.views import camera_grid

_STRIDES = {"depth_transform": (1, 4, 2), "depth_net": (1, 1), "downsample": (1, 2, 1)}
_DEPTH_CHANNELS = 64  # of the depth image's feature


@dataclass(frozen=True)
class Config:
    """The defaults are those of BEVFusion camera + LiDAR on nuScenes."""

    channels_in: int = 256
    channels_out: int = 80
    grid: camera_grid.Config = field(
        default_factory=lambda: camera_grid.Config(
            stride=8,
            depth_m=(1.0, 60.0, 0.5),
            x_m=(-54.0, 54.0, 0.3),
            y_m=(-54.0, 54.0, 0.3),
            z_m=(-10.0, 10.0, 20.0),
            rows="x",
        )
    )
    """of the pooled map; the output has half as many cells along each axis"""
    lidar_depth: bool = True
    bias: bool = True
    """of the convolutions before batch norms that the depth image passes"""
    wide_depth_net: bool = False
    """its hidden layers are as wide as what they read, the features of image and depth together; else as the image's"""
    recompute: bool = False
    """the convolutions before and behind the pooling once more for the gradient, see `layers.remat`"""

    def __post_init__(self) -> None:
        stride = math.prod(_STRIDES["depth_transform"])
        if self.lidar_depth and self.grid.stride != stride:
            raise ValueError(
                f"LiDAR depth comes to the image feature at stride {stride}, grid.stride is {self.grid.stride}"
            )
        if self.wide_depth_net and not self.lidar_depth:
            raise ValueError("a depth net that sees no depth has no hidden layers: leave wide_depth_net off")
        if any(count % 2 for count in self.grid.cells):
            raise ValueError(f"the grid's {self.grid.cells} cells are halved; make both numbers even")


def init(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state) with torch's default initialisation: lists of {conv, norm} per part, see `apply`."""
    width = config.channels_in + (_DEPTH_CHANNELS if config.wide_depth_net else 0)
    parts = {"downsample": [(config.channels_out, config.channels_out, 3)] * 3}  # (channels in, out, kernel)
    if config.lidar_depth:
        parts["depth_transform"] = [(1, 8, 1), (8, 32, 5), (32, _DEPTH_CHANNELS, 5)]
        parts["depth_net"] = [(config.channels_in + _DEPTH_CHANNELS, width, 3), (width, width, 3)]
    made: dict = {"depth_net": []}
    for part in sorted(parts):
        bias = config.bias and part != "downsample"
        made[part] = [conv_norm.init(*layer, bias=bias, generator=generator) for layer in parts[part]]
    last = conv.init(width, config.grid.depth_bins + config.channels_out, 1, bias=True, generator=generator)
    made["depth_net"].append({"conv": last})
    return tree.unzip(made)


def apply(
    params: dict,
    state: dict,
    feature: Tensor,
    batch: Batch,
    *,
    config: Config,
    train: Train,
    depth: Tensor | None = None,
    pool: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict]:
    """feature [B*N C H W] of the batch's cameras -> (outputs, new state), float32.

    depth: the `lidar_depth_map` [B N image rows, columns]; pool: `camera_grid.pool_tables`; None: they are made here.

    Outputs: `depth_map` [B*N image rows, columns] (m, 0 = no point) and `depth_transform` [B*N 64 H W] with LiDAR depth;
    `depth_net` [B*N D+C H W] logits and context; `geometry` [B N D H W 3] (m, augmented base frame); `bev_pool`
    [B C X Y]; `bev` [B C X/2 Y/2]. No gradient flows into geometry or the depth map.

    Raises ValueError if the batch has no cameras, if the feature is not of `config.grid.feature_size`, or depth or pool of another
    size.
    """
    size = tuple(feature.shape[-2:])
    grid = config.grid
    if size != grid.feature_size:
        raise ValueError(f"feature of {size} does not fit image_size {grid.image_size}: expected {grid.feature_size}")
    outputs: dict[str, Tensor] = {}
    new = dict(state)
    through = partial(_layers, params, state, new, train=train, recompute=config.recompute)
    x = feature.float()
    if config.lidar_depth:
        depth = lidar_depth_map(batch, grid.image_size) if depth is None else depth
        if depth.shape[2:] != grid.image_size or len(x) != depth.shape[0] * depth.shape[1]:
            raise ValueError(
                f"the batch's depth maps are {list(depth.shape)}, the model's are of {len(x)} images of {grid.image_size}; "
                "make tables by the config that is run"
            )
        depth_map = depth.flatten(0, 1)  # BN image rows, columns
        image = depth_map[..., None].permute(0, 3, 1, 2)  # one channel, and channels-last to what decides by strides
        y = through("depth_transform", image)
        outputs |= {"depth_map": depth_map, "depth_transform": y}
        x = torch.cat([y, x], 1)
    x = through("depth_net", x)  # BN D+C H W
    logits, context = x.split([grid.depth_bins, config.channels_out], 1)
    point = camera_grid.frustum_points(batch, 0, grid)  # planes B N D H W
    cell, intervals = camera_grid.located(point, grid, pool)
    pooled = camera_grid.pool(logits.softmax(1), context, cell, grid, intervals)  # B C X Y
    bev = through("downsample", pooled)
    outputs |= {"depth_net": x, "geometry": torch.stack(point, -1), "bev_pool": pooled, "bev": bev}
    return outputs, new


def depths(outputs: dict[str, Tensor], config: Config) -> Tensor:
    """Where along its ray the features of every image cell are put: probabilities [B*N D H W] of the depth bins, of `apply`'s
    outputs; bin d is at low + d step metres of `config.grid.depth_m`."""
    return outputs["depth_net"][:, : config.grid.depth_bins].softmax(1)


def lidar_depth_map(batch: Batch, image_size: tuple[int, int], *, on_host: bool = False) -> Tensor:
    """Depth of the LiDAR points in the key frame's images [B N *image_size], m, 0 where no point falls.

    on_host: written point by point, the same bits; not for graphs.
    """
    cloud = camera_grid.of_frame(batch, 0, "points", "points_valid")
    fields = camera_grid.of_frame(batch, 0, "undo_base_aug", "base_aug", "image_from_base", "image_aug")
    drawn = geometry.depth_map_on_host if on_host else geometry.depth_map
    return drawn(geometry.project(cloud["points"], **fields), cloud["points_valid"], image_size)


def _layers(params: dict, state: dict, new: dict, part: str, x: Tensor, *, train: Train, recompute: bool) -> Tensor:
    """x through the convolutions of a part; its new statistics go into `new`."""
    count = len(state.get(part, ()))  # the depth net's last convolution has no norm
    if count:
        through = partial(conv_norm.chain, train=train, strides=_STRIDES[part])
        x, new[part] = remat.apply(through, params[part][:count], state[part], x, recompute=recompute)
    return conv.apply(params[part][count]["conv"], x) if count < len(params[part]) else x
