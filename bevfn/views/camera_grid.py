"""The frustums of all cameras over the BEV grid in the vehicle's frame, and the sum of lifted features per cell.

BEVDepth's view transform without its depth net: every pixel's context, weighted by its distribution over depth, is
summed into the cells that the frustum's points fall into (Philion & Fidler 2020; BEVDepth, Li et al. 2022). Earlier
frames are lifted with their own camera poses straight into the key frame's vehicle frame: that is the whole temporal
alignment. BEV maps are [B C Y X], rows = y, columns = x, index 0 most negative.

Source: BEVDepth bevdepth/layers/backbones/base_lss_fpn.py and ops/voxel_pooling_*; golden case bevdepth_r50_2key.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bevfn import geometry
from bevfn.data.batch import Batch
from bevfn.kernels.voxel_pool import voxel_pool

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
    def cells(self) -> tuple[int, int]:
        """Y and X cells of the BEV map."""
        return geometry.num_cells(self.y_m), geometry.num_cells(self.x_m)


def frustum_points(batch: Batch, frame: int, config: Config) -> geometry.Planes:
    """x, y, z of the frustums of frame t's cameras in the augmented key ego frame, each [B N D H W], m."""
    frustum = geometry.frustum(config.image_size, config.feature_size, config.depth_m, batch.image_aug.device)
    return geometry.frustum_in_base(
        frustum,
        image_aug=batch.image_aug[:, frame],
        undo_image_aug=batch.undo_image_aug[:, frame],
        base_from_pixel=batch.base_from_pixel[:, frame],
        base_from_camera=batch.base_from_camera[:, frame],
        base_aug=batch.base_aug,
    )


def cells(batch: Batch, frame: int, config: Config) -> Tensor:
    """The cell of every frustum point: int32 [B N D H W], (b Y + y) X + x, or -1 outside the grid.

    By truncation toward zero, as upstream: points up to one cell below the grid land in cell 0, and with one cell of
    8 m in z everything from -13 m to 3 m counts.
    """
    x, y, z = frustum_points(batch, frame, config)
    return geometry.bev_cells((y, x, z), (config.y_m, config.x_m, config.z_m), truncate_toward_zero=True)


def pool(depth: Tensor, context: Tensor, cell: Tensor, config: Config) -> Tensor:
    """Sums depth x context per cell.

    Args:
        depth: [B*N D H W] float32, softmax over D; context: [B*N C H W] float32.
        cell: [B N D H W] int32, see `cells`.

    Returns:
        [B C Y X] float32; the D x C product is never stored.
    """
    rows, columns = config.cells
    B = cell.shape[0]
    pooled = voxel_pool(depth, context.permute(0, 2, 3, 1), cell.flatten(0, 1), B * rows * columns)
    return pooled.view(B, rows, columns, -1).permute(0, 3, 1, 2)


def pool_volume(volume: Tensor, cell: Tensor, config: Config) -> Tensor:
    """Sums a lifted volume [B*N C D H W] float32 per cell [B N D H W]: [B C Y X]."""
    M, C, D, H, W = volume.shape
    context = volume.reshape(M, C, D * H, W)
    ones = torch.ones(M, 1, D * H, W, dtype=volume.dtype, device=volume.device)  # every point is a pixel of one bin
    return pool(ones, context, cell.reshape(*cell.shape[:2], 1, D * H, W), config)
