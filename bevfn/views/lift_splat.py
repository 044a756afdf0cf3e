"""Lift-splat view transform of BEVFusion (Philion & Fidler 2020; Liu et al. 2022, arXiv 2205.13542).

Every pixel of an image feature gets a distribution over depth and a context vector; their product is summed into the BEV
cells that the frustum's points fall into. With `lidar_depth` a sparse depth image of the LiDAR points helps the depth net
(upstream's DepthLSSTransform); without, the depth net is one 1x1 convolution (LSSTransform). Computed in float32 throughout.
Source: mmdetection3d projects/BEVFusion/bevfusion/depth_lss.py; golden case bevfusion_lidar_cam.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bevfn import geometry
from bevfn.data.batch import Batch
from bevfn.kernels.voxel_pool import voxel_pool
from bevfn.layers import batch_norm, conv

_STRIDES = {"depth_transform": (1, 4, 2), "depth_net": (1, 1, 1), "downsample": (1, 2, 1)}


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
    width, bins_and_context = config.channels_in, config.depth_bins + config.channels_out
    layers = {"downsample": [(config.channels_out, config.channels_out, 3, False, True)] * 3}
    if config.lidar_depth:
        layers["depth_transform"] = [(1, 8, 1, True, True), (8, 32, 5, True, True), (32, 64, 5, True, True)]
        layers["depth_net"] = [(width + 64, width, 3, True, True), (width, width, 3, True, True)]
        layers["depth_net"].append((width, bins_and_context, 1, True, False))
    else:
        layers["depth_net"] = [(width, bins_and_context, 1, True, False)]
    params: dict = {}
    state: dict = {}
    for part in sorted(layers):
        params[part], state[part] = [], []
        for channels_in, channels_out, kernel, bias, norm in layers[part]:
            kernels = conv.init(channels_in, channels_out, (kernel, kernel), bias=bias, generator=generator)
            weights, statistics = batch_norm.init(channels_out)
            params[part].append({"conv": kernels, "norm": weights} if norm else {"conv": kernels})
            state[part].append({"norm": statistics} if norm else {})
    return params, state


def apply(
    params: dict, state: dict, feature: Tensor, batch: Batch, *, config: Config, train: bool
) -> tuple[dict[str, Tensor], dict]:
    """feature [B*N C H W] of the batch's cameras -> (outputs, new state), float32.

    Outputs: `depth_map` [B*N image rows, columns] (m, 0 = no point) and `dtransform` [B*N 64 H W] with LiDAR depth;
    `depthnet` [B*N D+C H W] logits and context; `geometry` [B N D H W 3] (m, augmented LiDAR frame); `bev_pool`
    [B C X Y]; `bev` [B C X/2 Y/2]. No gradient flows into geometry or the depth map.

    Raises ValueError if the batch has no cameras or the feature is not 1/8 of `config.image_size`.
    """
    if batch.image_aug is None:
        raise ValueError("Batch.image_aug is None: the view transform needs the camera fields of the batch")
    if tuple(feature.shape[-2:]) != config.feature_size:
        raise ValueError(
            f"feature of {tuple(feature.shape[-2:])} does not fit image_size {config.image_size}: expected {config.feature_size}"
        )
    outputs, new = {}, dict(state)
    B, N = batch.image_aug.shape[:2]
    x = feature.float()
    if config.lidar_depth:
        depth_map = lidar_depth_map(batch, config.image_size).flatten(0, 1)  # BN image rows, columns
        image = depth_map[..., None].permute(0, 3, 1, 2)  # one channel, and channels-last to what decides by strides
        y, new["depth_transform"] = _layers(params, state, "depth_transform", image, train=train)
        outputs |= {"depth_map": depth_map, "dtransform": y}
        x = torch.cat([y, x], 1)
    x, new["depth_net"] = _layers(params, state, "depth_net", x, train=train)  # BN D+C H W
    logits, context = x.split([config.depth_bins, config.channels_out], 1)
    point = frustum_points(batch, config)  # planes B N D H W
    cell = geometry.bev_cells(
        point, (config.x_m, config.y_m, config.z_m), truncate_toward_zero=config.truncate_toward_zero
    )
    rows, columns = config.grid
    pooled = voxel_pool(logits.softmax(1), context.permute(0, 2, 3, 1), cell.flatten(0, 1), B * rows * columns)
    pooled = pooled.view(B, rows, columns, -1).permute(0, 3, 1, 2)  # B C X Y
    bev, new["downsample"] = _layers(params, state, "downsample", pooled, train=train)
    outputs |= {"depthnet": x, "geometry": torch.stack(point, -1), "bev_pool": pooled, "bev": bev}
    return outputs, new


def lidar_depth_map(batch: Batch, image_size: tuple[int, int]) -> Tensor:
    """Depth of the LiDAR points in the input images [B N *image_size], m, 0 where no point falls."""
    point = geometry.project(
        batch.points, undo_lidar_aug=batch.undo_lidar_aug, lidar_aug=batch.lidar_aug,
        image_from_lidar=batch.image_from_lidar, image_aug=batch.image_aug,
    )
    return geometry.depth_map(point, batch.points_valid, image_size)


def frustum_points(batch: Batch, config: Config) -> geometry.Planes:
    """x, y, z of every camera's frustum in the augmented LiDAR frame, each [B N D H W], m."""
    return geometry.frustum_in_lidar(
        geometry.frustum(config.image_size, config.feature_size, config.depth_m, batch.image_aug.device),
        image_aug=batch.image_aug, undo_image_aug=batch.undo_image_aug, lidar_from_pixel=batch.lidar_from_pixel,
        lidar_from_camera=batch.lidar_from_camera, lidar_aug=batch.lidar_aug,
    )


def _layers(params: dict, state: dict, part: str, x: Tensor, *, train: bool) -> tuple[Tensor, list]:
    new = []
    for layer, statistics, stride in zip(params[part], state[part], _STRIDES[part]):
        x = conv.apply(layer["conv"], x, stride=stride, padding=layer["conv"]["weight"].shape[-1] // 2)
        if "norm" in layer:
            x, normed = batch_norm.apply(layer["norm"], statistics["norm"], x, train=train)
            x, statistics = x.relu(), {"norm": normed}
        new.append(statistics)
    return x, new
