"""Lift-splat pooling: the sum of depth × context over the frustum points of each BEV cell.

    out[cell[m, d, h, w]] += depth[m, d, h, w] * context[m, h, w]        for every point inside the grid

The D × C outer product of the textbook formulation (630 MB for BEVFusion on nuScenes) is never stored.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bevfn.kernels.cuda import lowering
from bevfn.kernels.derivatives import differentiable
from bevfn.kernels.voxel_pool import cpu, reference
from bevfn.kernels.voxel_pool.intervals import LENGTH, Intervals, room

_library = torch.library.Library("bevfn", "FRAGMENT")
_library.define("voxel_pool(Tensor depth, Tensor context, Tensor cell, int num_cells) -> Tensor")
_library.define(
    "voxel_pool_intervals(Tensor depth, Tensor context, Tensor cell, int num_cells, Tensor points, Tensor cells) -> Tensor"
)
_library.define("voxel_pool_backward(Tensor grad, Tensor depth, Tensor context, Tensor cell) -> (Tensor, Tensor)")


def voxel_pool(
    depth: Tensor, context: Tensor, cell: Tensor, num_cells: int, intervals: Intervals | None = None
) -> Tensor:
    """Pools lifted image features into BEV cells. Any derivative in `depth` and `context` (`kernels.derivatives`).

    Args:
        depth: [M D H W] float, weight of each depth bin (a softmax over D); M = images of all samples.
        context: [M H W C] in the dtype of `depth`, feature of each pixel, channels last.
        cell: [M D H W] int32, row of the output that the point falls into, the sample's offset included;
            anything outside 0 .. num_cells - 1 (by convention -1) is not pooled.
        num_cells: rows of the output, for all samples.
        intervals: of the same cells, for who can use them (Ascend); the sums are the same but for rounding.

    Returns:
        [num_cells C], dtype of `depth`. Sums are float32 (float64 for float64) and, on a CPU, in an order that does
        not depend on the number of threads.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Source: Philion & Fidler 2020 (arXiv 2008.05711) section 3; Liu et al. 2022 (arXiv 2205.13542) section 3.2.
    """
    _check(depth, context, cell, num_cells)
    if intervals is None:
        return _voxel_pool(depth, context, cell, num_cells)
    _check_intervals(intervals, cell, num_cells)
    return _by_intervals(depth, context, cell, num_cells, *intervals)


def _check(depth: Tensor, context: Tensor, cell: Tensor, num_cells: int) -> None:
    if depth.dim() != 4 or context.dim() != 4:
        raise ValueError(
            f"voxel_pool needs depth [M D H W] and context [M H W C], got {list(depth.shape)} and "
            f"{list(context.shape)}."
        )
    M, D, H, W = depth.shape
    if tuple(context.shape[:3]) != (M, H, W):
        raise ValueError(
            f"voxel_pool: context {list(context.shape)} must be [M H W C] = [{M} {H} {W} C] as depth "
            f"{list(depth.shape)} says; channels come last."
        )
    if tuple(cell.shape) != (M, D, H, W):
        raise ValueError(f"voxel_pool: cell {list(cell.shape)} must have the shape of depth, {list(depth.shape)}.")
    if cell.dtype != torch.int32:
        raise ValueError(f"voxel_pool: cell must be int32, got {cell.dtype}; convert it with .to(torch.int32).")
    if not depth.dtype.is_floating_point or depth.dtype != context.dtype:
        raise ValueError(
            f"voxel_pool: depth and context must share one floating dtype, got {depth.dtype} and {context.dtype}; "
            "cast one of them."
        )
    if not depth.device == context.device == cell.device:
        raise ValueError(
            f"voxel_pool: operands must be on one device, got depth on {depth.device}, context on {context.device}, "
            f"cell on {cell.device}."
        )
    if num_cells < 1:
        raise ValueError(f"voxel_pool: num_cells must be at least 1, got {num_cells}.")


def _check_intervals(intervals: Intervals, cell: Tensor, num_cells: int) -> None:
    points, cells = intervals
    samples = len(points)
    given = [*points.shape], [*cells.shape]
    if samples == 0 or len(cell) % samples or num_cells % samples:
        raise ValueError(
            f"voxel_pool: intervals of {samples} samples do not fit {len(cell)} images and {num_cells} cells."
        )
    count = room(cell.numel() // samples, num_cells // samples)
    if given != ([samples, count, LENGTH], [samples, count]):
        raise ValueError(
            f"voxel_pool: intervals of cell {list(cell.shape)} and {num_cells} cells are points {[samples, count, LENGTH]} and "
            f"cells {[samples, count]}, got {given[0]} and {given[1]}; make them of this cell."
        )
    if points.dtype != torch.int32 or cells.dtype != torch.int32 or not points.device == cells.device == cell.device:
        raise ValueError(
            f"voxel_pool: intervals must be int32 on {cell.device}, got {points.dtype} on {points.device} and {cells.dtype} on "
            f"{cells.device}."
        )


def _operator(depth: Tensor, context: Tensor, cell: Tensor, num_cells: int) -> Tensor:
    return torch.ops.bevfn.voxel_pool(depth, context, cell, num_cells)


def _gradients(
    wanted: frozenset[int], grad: Tensor, depth: Tensor, context: Tensor, cell: Tensor, num_cells: int
) -> tuple[Tensor | None, ...]:
    return *torch.ops.bevfn.voxel_pool_backward(grad, depth, context, cell), None, None


def _operator_of_intervals(
    depth: Tensor, context: Tensor, cell: Tensor, num_cells: int, points: Tensor, cells: Tensor
) -> Tensor:
    return torch.ops.bevfn.voxel_pool_intervals(depth, context, cell, num_cells, points, cells)


def _gradients_of_intervals(wanted: frozenset[int], grad: Tensor, *operands: Any) -> tuple[Tensor | None, ...]:
    return *_gradients(wanted, grad, *operands[:4]), None, None


def _plain_of_intervals(depth: Tensor, context: Tensor, cell: Tensor, num_cells: int, *_: Tensor) -> Tensor:
    return reference.forward(depth, context, cell, num_cells)


_voxel_pool = differentiable(_operator, _gradients, reference.forward)
_by_intervals = differentiable(_operator_of_intervals, _gradients_of_intervals, _plain_of_intervals)


@torch.library.register_fake("bevfn::voxel_pool", lib=_library)
@torch.library.register_fake("bevfn::voxel_pool_intervals", lib=_library)
def _forward_fake(depth: Tensor, context: Tensor, cell: Tensor, num_cells: int, *_: Tensor) -> Tensor:
    return context.new_empty(num_cells, context.shape[-1])


@torch.library.register_fake("bevfn::voxel_pool_backward", lib=_library)
def _backward_fake(grad: Tensor, depth: Tensor, context: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    return depth.new_empty(depth.shape), context.new_empty(context.shape)


def _cuda() -> ModuleType:
    from bevfn.kernels.voxel_pool import cuda  # needs Triton

    return cuda


def _whatever_the_intervals(
    depth: Tensor, context: Tensor, cell: Tensor, num_cells: int, points: Tensor, cells: Tensor
) -> Tensor:
    """Where rows are added as fast as they are read the cells alone do."""
    return torch.ops.bevfn.voxel_pool(depth, context, cell, num_cells)


_library.impl("voxel_pool", reference.forward, "CompositeExplicitAutograd")
_library.impl("voxel_pool_intervals", _whatever_the_intervals, "CompositeExplicitAutograd")
_library.impl("voxel_pool_backward", reference.backward, "CompositeExplicitAutograd")
_library.impl("voxel_pool", cpu.forward, "CPU")
_library.impl("voxel_pool_backward", cpu.backward, "CPU")
_library.impl("voxel_pool", lowering(_cuda, "forward", reference.forward), "CUDA")
_library.impl("voxel_pool_backward", lowering(_cuda, "backward", reference.backward), "CUDA")
