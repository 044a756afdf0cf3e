"""Points to voxels: hard voxelization with the mean of each voxel's first points.

`voxelize` is opaque to the compiler (`torch.ops.bevfn.voxelize`): inside, the number of voxels depends on the data;
outside, every shape is static and what does not fit is counted.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bevfn.kernels import derivatives
from bevfn.kernels.cuda import lowering
from bevfn.kernels.voxelize import cpu, reference
from bevfn.kernels.voxelize.reference import Extent

_library = torch.library.Library("bevfn", "FRAGMENT")
_library.define(
    "voxelize(Tensor points, Tensor valid, float[] lower, float[] size, int[] grid, int max_points, int max_voxels)"
    " -> (Tensor features, Tensor coords, Tensor count, Tensor found)"
)


def voxelize(
    points: Tensor,
    valid: Tensor,
    *,
    lower: tuple[float, float, float],
    size: tuple[float, float, float],
    grid: tuple[int, int, int],
    max_points: int,
    max_voxels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean of the first `max_points` points of every occupied cell; any derivative of the features in `points`.

    The cell is floor((p - lower) / size), each step rounded to float32 and the division a true one. A point outside
    the grid, or with a NaN or infinite value in any column, is ignored. Voxels are numbered in the order of their first
    point; voxels beyond `max_voxels` are dropped with their points.

    Args:
        points: [B P C] float32, columns x y z [m] and C - 3 further ones.
        valid: [B P] bool.
        lower: the grid's lower corner [m].
        size: extent of a cell [m].
        grid: number of cells (X, Y, Z).
        max_points: points kept per voxel.
        max_voxels: V, voxel slots per sample.

    Returns:
        features [B V C] float32, mean of the kept points, 0 in empty slots;
        coords [B V 3] int32, cell (x, y, z), -1 in empty slots;
        count [B V] int32, points kept, 0 in empty slots;
        found [B] int32, occupied cells before the limit (overflow = found - V where positive).

    Raises:
        ValueError: a shape, dtype or setting that the contract excludes.

    Source: mmdetection3d v1.4.0 `projects/BEVFusion/bevfusion/ops/voxel`, rule as in goldens/bevfusion_lidar/README.md.
    """
    if points.ndim != 3 or points.shape[2] < 3 or points.dtype != torch.float32:
        raise ValueError(f"voxelize: points must be float32 [B, P, C >= 3], got {points.dtype} {list(points.shape)}.")
    if valid.shape != points.shape[:2] or valid.dtype != torch.bool:
        raise ValueError(
            f"voxelize: valid must be bool {list(points.shape[:2])} like points, got {valid.dtype} {list(valid.shape)}."
        )
    if not (len(lower) == len(size) == len(grid) == 3) or min(size) <= 0 or min(grid) <= 0:
        raise ValueError(
            "voxelize: lower, size and grid need 3 numbers (x, y, z), size and grid positive; "
            f"got {lower}, {size}, {grid}."
        )
    if grid[0] * grid[1] * grid[2] * max(points.shape[1], 1) >= 1 << 62:  # the reference sorts by cell * P + point
        raise ValueError(f"voxelize: grid {tuple(grid)} times {points.shape[1]} points exceeds 2^62: use larger cells.")
    if max_points < 1 or max_voxels < 1:
        raise ValueError(f"voxelize: max_points and max_voxels must be at least 1, got {max_points} and {max_voxels}.")
    return _voxelize(
        points, valid, [float(v) for v in lower], [float(v) for v in size], list(grid), max_points, max_voxels
    )


def _features(*operands: Any) -> Tensor:
    return reference.voxelize(*operands)[0]


class _Voxelize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.bevfn.voxelize(*operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        derivatives.save(ctx, inputs)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return derivatives.pullback(_features, derivatives.saved(ctx), grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None, None, None]:
        return derivatives.pushforward(_features, derivatives.saved(ctx), tangents), None, None, None


@derivatives.one_node
def _voxelize(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _Voxelize.apply(*operands)


@torch.library.register_fake("bevfn::voxelize", lib=_library)
def _fake(
    points: Tensor, valid: Tensor, lower: Extent, size: Extent, grid: list[int], max_points: int, max_voxels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, _, C = points.shape
    return (
        points.new_empty(B, max_voxels, C),
        points.new_empty(B, max_voxels, 3, dtype=torch.int32),
        points.new_empty(B, max_voxels, dtype=torch.int32),
        points.new_empty(B, dtype=torch.int32),
    )


def _cuda() -> ModuleType:
    from bevfn.kernels.voxelize import cuda  # needs Triton

    return cuda


_library.impl("voxelize", reference.voxelize, "CompositeExplicitAutograd")
_library.impl("voxelize", cpu.voxelize, "CPU")
_library.impl("voxelize", lowering(_cuda, "voxelize", reference.voxelize), "CUDA")
