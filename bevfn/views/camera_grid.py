"""The frustums of all cameras over a BEV grid: the one place that turns a calibration into cells.

Every pixel's context, weighted by its distribution over depth, is summed into the cells that the frustum's points fall
into (Philion & Fidler 2020; BEVDepth, Li et al. 2022). Points of any frame are lifted with that frame's camera poses
straight into the key frame's base: that is the whole temporal alignment. Index 0 of a BEV map is most negative; whether
its rows are y (BEVDepth) or x (BEVFusion) is the grid's `rows`.

Sources: BEVDepth bevdepth/layers/backbones/base_lss_fpn.py and ops/voxel_pooling_*; mmdetection3d
projects/BEVFusion/bevfusion/depth_lss.py; golden cases bevdepth_r50_2key, bevfusion_lidar_cam.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from bevfn import geometry
from bevfn.data.batch import CAMERA_FIELDS, Batch, needed
from bevfn.kernels.voxel_pool import intervals, voxel_pool

Bounds = tuple[float, float, float]


@dataclass(frozen=True)
class Config:
    """The defaults are BEVDepth's on nuScenes. Bounds are (low, high, step) in m."""

    image_size: tuple[int, int] = (256, 704)
    """rows, columns of the network's input"""
    stride: int = 16
    """input pixels per feature pixel"""
    depth_m: Bounds = (2.0, 58.0, 0.5)
    """the last is not reached: 2.0 .. 57.5"""
    x_m: Bounds = (-51.2, 51.2, 0.8)
    y_m: Bounds = (-51.2, 51.2, 0.8)
    z_m: Bounds = (-5.0, 3.0, 8.0)
    rows: Literal["x", "y"] = "y"
    """what the rows of a BEV map are; the other axis is its columns"""
    truncate_toward_zero: bool = True
    """Cell of a coordinate by truncation, as upstream, or by floor. Truncated, points up to one cell below the grid land in
    cell 0, and with one cell of 8 m in z everything from -13 m to 3 m counts."""

    def __post_init__(self) -> None:
        if any(size % self.stride for size in self.image_size):
            raise ValueError(f"image_size {self.image_size} must be multiples of the feature's stride {self.stride}")
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
        return self.image_size[0] // self.stride, self.image_size[1] // self.stride

    @property
    def depth_bins(self) -> int:
        """D."""
        return geometry.num_cells(self.depth_m)

    @property
    def bounds_m(self) -> tuple[Bounds, Bounds, Bounds]:
        """Of rows, columns and height."""
        return (self.x_m, self.y_m, self.z_m) if self.rows == "x" else (self.y_m, self.x_m, self.z_m)

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the BEV map."""
        rows, columns, _ = self.bounds_m
        return geometry.num_cells(rows), geometry.num_cells(columns)

    def ordered(self, point: geometry.Planes) -> geometry.Planes:
        """Planes x, y, z in the order rows, columns, height."""
        x, y, z = point
        return (x, y, z) if self.rows == "x" else (y, x, z)


def of_frame(batch: Batch, frame: int, *names: str) -> dict[str, Tensor]:
    """Camera fields of one frame [B N ...] and fields that all frames share; raises ValueError if one is None."""
    fields = {name: needed(getattr(batch, name), name) for name in names}
    return {name: value[:, frame] if name in CAMERA_FIELDS else value for name, value in fields.items()}


def frustum_points(batch: Batch, frame: int, config: Config) -> geometry.Planes:
    """x, y, z of the frustums of frame t's cameras in the augmented key base frame, each [B N D H W], m."""
    fields = of_frame(batch, frame, "image_aug", "undo_image_aug", "base_from_pixel", "base_from_camera", "base_aug")
    frustum = geometry.frustum(config.image_size, config.feature_size, config.depth_m, batch.base_aug.device)
    return geometry.frustum_in_base(frustum, **fields)


def cells(batch: Batch, frame: int, config: Config) -> Tensor:
    """The cell of every frustum point of frame t: int32 [B N D H W], see `locate`."""
    return locate(frustum_points(batch, frame, config), config)


def locate(point: geometry.Planes, config: Config) -> Tensor:
    """The cell of points whose planes x, y, z are [B ...]: int32 [B ...], (b rows + row) columns + column, -1 outside."""
    return geometry.bev_cells(config.ordered(point), config.bounds_m, truncate_toward_zero=config.truncate_toward_zero)


def pool_tables(batch: Batch, frame: int, config: Config) -> dict[str, Tensor]:
    """What `pool` can be given of frame t, on the CPU: "cell" [B N D H W], and "points" and "cells" of its `Intervals`."""
    cell = cells(batch, frame, config)
    return {"cell": cell, **intervals.made(cell, math.prod(config.cells))._asdict()}


def located(
    point: geometry.Planes, config: Config, tables: dict[str, Tensor] | None
) -> tuple[Tensor, intervals.Intervals | None]:
    """The cells [B N D H W] of points and their intervals, of `pool_tables` where they are given.

    Raises ValueError if those are of another size; what they say is believed.
    """
    if tables is None:
        return locate(point, config), None
    if (given := tables["cell"].shape) != point[0].shape:
        raise ValueError(
            f"the batch's cells of frustum points are {list(given)}, the model's are {list(point[0].shape)}; make tables by the "
            "config that is run"
        )
    return tables["cell"], intervals.Intervals(tables["points"], tables["cells"])


def pool(
    depth: Tensor, context: Tensor, cell: Tensor, config: Config, of_cell: intervals.Intervals | None = None
) -> Tensor:
    """Sums depth x context per cell.

    Args:
        depth: [B*N D H W] float32, softmax over D; context: [B*N C H W] float32.
        cell: [B N D H W] int32, see `cells`; of_cell: its intervals, if they are known.

    Returns:
        [B C rows columns] float32; the D x C product is never stored.
    """
    rows, columns = config.cells
    B = cell.shape[0]
    pooled = voxel_pool(depth, context.permute(0, 2, 3, 1), cell.flatten(0, 1), B * rows * columns, of_cell)
    return rearrange(pooled, "(b r c) k -> b k r c", b=B, r=rows)


def pool_volume(volume: Tensor, cell: Tensor, config: Config) -> Tensor:
    """Sums a lifted volume [B*N C D H W] float32 per cell [B N D H W]: [B C rows columns]."""
    M, C, D, H, W = volume.shape
    context = volume.reshape(M, C, D * H, W)
    ones = torch.ones(M, 1, D * H, W, dtype=volume.dtype, device=volume.device)  # every point is a pixel of one bin
    return pool(ones, context, cell.reshape(*cell.shape[:2], 1, D * H, W), config)
