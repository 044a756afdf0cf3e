"""Resizing and sampling of images in NCHW.

Source: hicann/ops-cv at 6ae87653, image/*/op_graph and resize_nearest_neighbor_v2/README; torchair's ge_ir.proto.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bevfn.ascend.interpret.node import (
    Invalid,
    Unsupported,
    fixed,
    floating,
    image,
    ints,
    of_dtype,
    only,
    same_dtype,
    wide,
)


def _nearest(size: int, source: int) -> Tensor:
    """int64 [size]: min(floor(i source / size), source - 1), the published rule.

    It is computed from a rounded quotient; Unsupported where rounding in float32 would choose another pixel.
    """
    i = torch.arange(size)
    exact = i * source // size
    rounded = (i.float() * torch.tensor(source / size, dtype=torch.float32)).floor().long().clamp(max=source - 1)
    if not torch.equal(exact, rounded):
        raise Unsupported(f"resizing {source} to {size} pixels: rounding decides which one is the nearest")
    return exact


@fixed(align_corners=False, half_pixel_centers=False, scales=[0.0, 0.0])
def resize_nearest(x: Tensor, size: Tensor, *, image_layout: str) -> Tensor:
    image(image_layout)
    height, width = _height_width(size)
    rows = x.index_select(2, _nearest(height, x.shape[2]))
    return rows.index_select(3, _nearest(width, x.shape[3]))


@fixed(align_corners=False, half_pixel_centers=False, scales=[0.0, 0.0])
def resize_nearest_grad(grads: Tensor, size: Tensor, *, image_layout: str) -> Tensor:
    """Sum of the gradients of the pixels copied from each one; size is that of the result."""
    image(image_layout)
    floating(grads)
    height, width = _height_width(size)
    B, C, H, W = grads.shape
    g = grads.to(wide(grads.dtype))
    rows = torch.zeros(B, C, height, W, dtype=g.dtype).index_add_(2, _nearest(H, height), g)
    return torch.zeros(B, C, height, width, dtype=g.dtype).index_add_(3, _nearest(W, width), rows).to(grads.dtype)


def _height_width(size: Tensor) -> tuple[int, int]:
    of_dtype(size, torch.int32)
    sizes = ints(size)
    if len(sizes) != 2 or min(sizes) < 1:
        raise Invalid(f"size {sizes} is not a height and a width")
    return sizes[0], sizes[1]


def _corners(align_corners: bool, half_pixel_centers: bool) -> None:
    if align_corners == half_pixel_centers:
        raise Unsupported(f"align_corners and half_pixel_centers are both {align_corners}: only one of them is known")


@fixed(scales=[0.0, 0.0])  # zeros: from the sizes
def resize_bilinear_v2(
    x: Tensor,
    size: Tensor,
    *,
    align_corners: bool = False,
    half_pixel_centers: bool = False,
    dtype: torch.dtype = torch.float32,
    image_layout: str,
) -> Tensor:
    _corners(align_corners, half_pixel_centers)
    image(image_layout)
    wanted = list(_height_width(size))
    return F.interpolate(x.to(wide(x.dtype)), wanted, mode="bilinear", align_corners=align_corners).to(dtype)


@fixed(scales=[0.0, 0.0])
def resize_bilinear_v2_grad(
    grads: Tensor,
    original_image: Tensor,
    *,
    align_corners: bool = False,
    half_pixel_centers: bool = False,
    image_layout: str,
) -> Tensor:
    """The gradient of the original image, of which only shape and dtype are read."""
    _corners(align_corners, half_pixel_centers)
    image(image_layout)
    g = grads.to(wide(grads.dtype)).contiguous()
    dx = torch.ops.aten.upsample_bilinear2d_backward(
        g, list(g.shape[2:]), list(original_image.shape), align_corners, None, None
    )
    return dx.to(original_image.dtype)


_MODE = {"bilinear": 0, "nearest": 1, "bicubic": 2}  # aten's numbers
_PADDING = {"zeros": 0, "border": 1, "reflection": 2}


def grid_sampler_2d(
    x: Tensor,
    grid: Tensor,
    *,
    interpolation_mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> Tensor:
    only("interpolation_mode", interpolation_mode, *_MODE)
    only("padding_mode", padding_mode, *_PADDING)
    same_dtype(x, grid)
    return torch.ops.aten.grid_sampler_2d(x, grid, _MODE[interpolation_mode], _PADDING[padding_mode], align_corners)


def grid_sampler_2d_grad(
    grad: Tensor,
    x: Tensor,
    grid: Tensor,
    *,
    interpolation_mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> tuple[Tensor, Tensor]:
    """-> gradients of x and of the grid."""
    only("interpolation_mode", interpolation_mode, *_MODE)
    only("padding_mode", padding_mode, *_PADDING)
    same_dtype(grad, x, grid)
    return torch.ops.aten.grid_sampler_2d_backward(
        grad, x, grid, _MODE[interpolation_mode], _PADDING[padding_mode], align_corners, [True, True]
    )


OPS: dict[str, Callable] = {
    "ResizeNearestNeighborV2": resize_nearest,
    "ResizeNearestNeighborV2Grad": resize_nearest_grad,
    "ResizeBilinearV2": resize_bilinear_v2,
    "ResizeBilinearV2Grad": resize_bilinear_v2_grad,
    "GridSampler2D": grid_sampler_2d,
    "GridSampler2DGrad": grid_sampler_2d_grad,
}
