"""Geometry buffers that published lift-splat checkpoints store though they follow from the configuration."""

from typing import Protocol

import torch
from torch import Tensor

Bounds = tuple[float, float, float]


class View(Protocol):
    """What the view transforms' configurations have in common; bounds are (low, high, step) in m."""

    @property
    def image_size(self) -> tuple[int, int]: ...
    @property
    def feature_size(self) -> tuple[int, int]: ...
    @property
    def x_m(self) -> Bounds: ...
    @property
    def y_m(self) -> Bounds: ...
    @property
    def z_m(self) -> Bounds: ...


def grid(view: View) -> tuple[Tensor, Tensor, Tensor]:
    """(step, centre of the first cell, both float32 m; number of cells, int64), each [3] in x, y, z."""
    bounds = view.x_m, view.y_m, view.z_m
    step, first = torch.tensor([s for _, _, s in bounds]), torch.tensor([low + s / 2 for low, _, s in bounds])
    return step, first, torch.tensor([round((high - low) / s) for low, high, s in bounds])


def frustum(view: View, depth: Tensor) -> Tensor:
    """[D H W 3] float32 of depth [D] m: pixel x, pixel y, depth; outer cells' centres lie on the image's border pixels."""
    (rows, columns), (H, W) = view.image_size, view.feature_size
    shape = (len(depth), H, W)
    x = torch.linspace(0, columns - 1, W).expand(shape)
    y = torch.linspace(0, rows - 1, H)[:, None].expand(shape)
    return torch.stack((x, y, depth[:, None, None].expand(shape)), -1)
