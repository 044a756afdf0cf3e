"""Geometry buffers that published lift-splat checkpoints store though they follow from the configuration."""

import torch
from torch import Tensor

from bevfn.views import camera_grid


def grid(view: camera_grid.Config) -> tuple[Tensor, Tensor, Tensor]:
    """(step, centre of the first cell, both float32 m; number of cells, int64), each [3] in x, y, z."""
    bounds = view.x_m, view.y_m, view.z_m
    step, first = torch.tensor([s for _, _, s in bounds]), torch.tensor([low + s / 2 for low, _, s in bounds])
    return step, first, torch.tensor([round((high - low) / s) for low, high, s in bounds])


def frustum(view: camera_grid.Config, depth: Tensor) -> Tensor:
    """[D H W 3] float32 of depth [D] m: pixel x, pixel y, depth; outer cells' centres lie on the image's border pixels."""
    (rows, columns), (H, W) = view.image_size, view.feature_size
    shape = (len(depth), H, W)
    x = torch.linspace(0, columns - 1, W).expand(shape)
    y = torch.linspace(0, rows - 1, H)[:, None].expand(shape)
    return torch.stack((x, y, depth[:, None, None].expand(shape)), -1)
