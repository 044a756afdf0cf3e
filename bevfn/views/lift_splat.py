"""Lift-splat view transform of BEVFusion (Philion & Fidler 2020; Liu et al. 2022, arXiv 2205.13542).

Every pixel of an image feature gets a distribution over depth and a context vector; their product is summed into the
BEV cells that the frustum's points fall into. With `lidar_depth` a sparse depth image of the LiDAR points helps the
depth net (upstream's DepthLSSTransform); without, the depth net is one 1x1 convolution (LSSTransform). All in float32.

Source: mmdetection3d projects/BEVFusion/bevfusion/depth_lss.py; golden case bevfusion_lidar_cam.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bevfn import geometry, tree
from bevfn.data.batch import Batch
from bevfn.distributed import Train
from bevfn.kernels.voxel_pool import voxel_pool
from bevfn.layers import conv, conv_norm

_STRIDES = {"depth_transform": (1, 4, 2), "depth_net": (1, 1), "downsample": (1, 2, 1)}


@dataclass(frozen=True)
class Config:
    """The defaults are those of BEVFusion camera + LiDAR on nuScenes. Bounds are (low, high, step) in m."""

    channels_in: int = 256
    channels_out: int = 80
    image_size: tuple[int, int] = (256, 704)  # rows, columns; a feature pixel is 8 x 8 image pixels
    depth_m: tuple[float, float, float] = (1.0, 60.0, 0.5)  # the last is not reached: 1.0 .. 59.5
    x_m: tuple[float, float, float] = (-54.0, 54.0, 0.3)
    y_m: tuple[float, float, float] = (-54.0, 54.0, 0.3)
    z_m: tuple[float, float, float] = (-10.0, 10.0, 20.0)
    lidar_depth: bool = True
    truncate_toward_zero: bool = True
    """Cell of a coordinate by truncation, as upstream, or by floor; see geometry.bev_cells."""

    def __post_init__(self):
        if self.image_size[0] % 8 or self.image_size[1] % 8:
            raise ValueError(f"image_size {self.image_size} must be multiples of 8, the stride of the image feature")
        for name in ("depth_m", "x_m", "y_m", "z_m"):
            low, high, step = getattr(self, name)
            if step <= 0 or high <= low:
                raise ValueError(f"{name} {(low, high, step)} must be (low, high, step) with low < high and step > 0")
            if abs((high - low) / step - geometry.num_cells((low, high, step))) > 1e-6:
                raise ValueError(f"{name} {(low, high, step)} must hold a whole number of steps; change its step")
        if geometry.num_cells(self.z_m) != 1:
            raise ValueError(f"z_m {self.z_m} must hold one cell; make its step {self.z_m[1] - self.z_m[0]}")

    @property
    def feature_size(self) -> tuple[int, int]:
        """Rows and columns of the image feature."""
        return self.image_size[0] // 8, self.image_size[1] // 8

    @property
    def depth_bins(self) -> int:
        """D."""
        return geometry.num_cells(self.depth_m)

    @property
    def grid(self) -> tuple[int, int]:
        """X and Y cells of the pooled map; the output has half as many."""
        return geometry.num_cells(self.x_m), geometry.num_cells(self.y_m)


def init(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state) with torch's default initialisation: lists of {conv, norm} per part, see `apply`."""
    width = config.channels_in
    parts = {"downsample": [(config.channels_out, config.channels_out, 3)] * 3}  # (channels in, out, kernel)
    if config.lidar_depth:
        parts["depth_transform"] = [(1, 8, 1), (8, 32, 5), (32, 64, 5)]
        parts["depth_net"] = [(width + 64, width, 3), (width, width, 3)]
    made: dict = {"depth_net": []}
    for part in sorted(parts):
        made[part] = [conv_norm.init(*layer, bias=part != "downsample", generator=generator) for layer in parts[part]]
    last = conv.init(width, config.depth_bins + config.channels_out, 1, bias=True, generator=generator)
    made["depth_net"].append({"conv": last})
    return tree.unzip(made)


def apply(
    params: dict, state: dict, feature: Tensor, batch: Batch, *, config: Config, train: Train
) -> tuple[dict[str, Tensor], dict]:
    """feature [B*N C H W] of the batch's cameras -> (outputs, new state), float32.

    Outputs: `depth_map` [B*N image rows, columns] (m, 0 = no point) and `depth_transform` [B*N 64 H W] with LiDAR depth;
    `depth_net` [B*N D+C H W] logits and context; `geometry` [B N D H W 3] (m, augmented LiDAR frame); `bev_pool`
    [B C X Y]; `bev` [B C X/2 Y/2]. No gradient flows into geometry or the depth map.

    Raises ValueError if the batch has no cameras or the feature is not 1/8 of `config.image_size`.
    """
    size = tuple(feature.shape[-2:])
    if size != config.feature_size:
        raise ValueError(
            f"feature of {size} does not fit image_size {config.image_size}: expected {config.feature_size}"
        )
    outputs: dict[str, Tensor] = {}
    new, B = dict(state), len(batch.base_aug)
    x = feature.float()
    if config.lidar_depth:
        depth_map = lidar_depth_map(batch, config.image_size).flatten(0, 1)  # BN image rows, columns
        image = depth_map[..., None].permute(0, 3, 1, 2)  # one channel, and channels-last to what decides by strides
        y = _layers(params, state, new, "depth_transform", image, train=train)
        outputs |= {"depth_map": depth_map, "depth_transform": y}
        x = torch.cat([y, x], 1)
    x = _layers(params, state, new, "depth_net", x, train=train)  # BN D+C H W
    logits, context = x.split([config.depth_bins, config.channels_out], 1)
    point = frustum_points(batch, config)  # planes B N D H W
    cell = geometry.bev_cells(
        point, (config.x_m, config.y_m, config.z_m), truncate_toward_zero=config.truncate_toward_zero
    )
    rows, columns = config.grid
    pooled = voxel_pool(logits.softmax(1), context.permute(0, 2, 3, 1), cell.flatten(0, 1), B * rows * columns)
    pooled = pooled.view(B, rows, columns, -1).permute(0, 3, 1, 2)  # B C X Y
    bev = _layers(params, state, new, "downsample", pooled, train=train)
    outputs |= {"depth_net": x, "geometry": torch.stack(point, -1), "bev_pool": pooled, "bev": bev}
    return outputs, new


def lidar_depth_map(batch: Batch, image_size: tuple[int, int]) -> Tensor:
    """Depth of the LiDAR points in the input images [B N *image_size], m, 0 where no point falls."""
    fields = _fields(batch, "undo_base_aug", "base_aug", "image_from_base", "image_aug")
    return geometry.depth_map(geometry.project(batch.points, **fields), batch.points_valid, image_size)


def frustum_points(batch: Batch, config: Config) -> geometry.Planes:
    """x, y, z of every camera's frustum in the augmented LiDAR frame, each [B N D H W], m."""
    fields = _fields(batch, "image_aug", "undo_image_aug", "base_from_pixel", "base_from_camera", "base_aug")
    frustum = geometry.frustum(config.image_size, config.feature_size, config.depth_m, fields["image_aug"].device)
    return geometry.frustum_in_base(frustum, **fields)


def _fields(batch: Batch, *names: str) -> dict[str, Tensor]:
    """Fields of the batch; of those of every frame, the key frame's."""
    fields = {name: getattr(batch, name) for name in names}
    for name, value in fields.items():
        if value is None:
            raise ValueError(f"Batch.{name} is None: the view transform needs the camera fields of the batch")
    return {name: value if name.endswith("base_aug") else value[:, 0] for name, value in fields.items()}


def _layers(params: dict, state: dict, new: dict, part: str, x: Tensor, *, train: Train) -> Tensor:
    """x through the convolutions of a part; its new statistics go into `new`."""
    count = len(state.get(part, ()))  # the depth net's last convolution has no norm
    if count:
        layers, strides = params[part][:count], _STRIDES[part]
        x, new[part] = conv_norm.chain(layers, state[part], x, train=train, strides=strides)
    return conv.apply(params[part][count]["conv"], x) if count < len(params[part]) else x
