"""How close `voxel_pool` comes to the speed of memory, at BEVFusion's size on nuScenes.

The least that must move: depth, cell and context read once, the result written once. The ratio is that many bytes per
second over the bytes per second (read + written) of a plain copy on the same machine with the same threads.
    python -m bevfn.bench.pool
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevfn.bench import frame as frames
from bevfn.bench.machine import best_seconds, seconds_on
from bevfn.experiments import bevfusion as recipe
from bevfn.files import to_json
from bevfn.kernels.cuda import intervals
from bevfn.kernels.voxel_pool import cpu, voxel_pool
from bevfn.models import bevfusion
from bevfn.views import camera_grid

# BEVFusion camera + LiDAR: images 256 × 704 at stride 8, depth 1 .. 59.5 m in 0.5 m, BEV 108 m in 0.3 m cells.
DEPTHS, ROWS, COLUMNS, CHANNELS, GRID = 118, 32, 88, 80, 360
IMAGE_HEIGHT, IMAGE_WIDTH, RESIZE, CROP_X, CROP_Y = 256, 704, 0.48, 32, 176
LOWER_M, CELL_M, LOWER_Z_M, CELL_Z_M = -54.0, 0.3, -10.0, 20.0
# nuScenes' six cameras around the LiDAR: heading in degrees (0 = forward), focal length in pixels of 900 × 1600.
CAMERAS = ((0, 1266), (-56, 1261), (56, 1273), (180, 809), (108, 1257), (-110, 1260))


def frustum_cells(*, tilt_deg: float = 1.3, roll_deg: float = 0.5) -> Tensor:
    """[6 D H W] int32 BEV cell (row x, column y) of every frustum point of a nuScenes-like rig, -1 outside.

    Cells truncate toward zero as the published code does. nuScenes' cameras are upright within about 2 degrees.
    Within 1 % of a real frame's counts: 1,835,478 points inside, 97,325 cells, 137,981 runs along image columns.
    """
    depth = torch.arange(DEPTHS) * 0.5 + 1.0
    u = (torch.linspace(0, IMAGE_WIDTH - 1, COLUMNS) + CROP_X) / RESIZE  # pixels of the original image
    v = (torch.linspace(0, IMAGE_HEIGHT - 1, ROWS) + CROP_Y) / RESIZE
    d, v, u = torch.meshgrid(depth, v, u, indexing="ij")  # D H W
    cells = []
    for heading_deg, focal in CAMERAS:
        right, down, ahead = (u - 812) / focal * d, (v - 490) / focal * d, d  # camera frame, m
        roll, tilt = math.radians(roll_deg), math.radians(tilt_deg)
        right, down = math.cos(roll) * right - math.sin(roll) * down, math.sin(roll) * right + math.cos(roll) * down
        ahead, down = math.cos(tilt) * ahead - math.sin(tilt) * down, math.sin(tilt) * ahead + math.cos(tilt) * down
        heading = math.radians(90 + heading_deg)  # LiDAR frame: x right, y forward, z up
        x = math.cos(heading) * (ahead + 0.6) + math.sin(heading) * right
        y = math.sin(heading) * (ahead + 0.6) - math.cos(heading) * right
        z = -0.3 - down
        i, j = ((x - LOWER_M) / CELL_M).int(), ((y - LOWER_M) / CELL_M).int()
        inside = (i >= 0) & (i < GRID) & (j >= 0) & (j < GRID) & (((z - LOWER_Z_M) / CELL_Z_M).int() == 0)
        cells.append(torch.where(inside, i * GRID + j, -1))
    return torch.stack(cells)


def cells_of(frame: Path) -> Tensor:
    """[6 D H W] int32, of a key frame's own cameras."""
    return camera_grid.cells(frames.batch_of(frame, recipe.EVAL), 0, bevfusion.Camera().view.grid)[0]


def textbook(depth: Tensor, context: Tensor, cell: Tensor, num_cells: int) -> Tensor:
    """The outer product and index_add of the papers, all points at once, points outside in a row of their own."""
    product = depth[..., None] * context[:, None]  # M D H W C
    rows = torch.where(cell < 0, num_cells, cell).reshape(-1).long()
    return depth.new_zeros(num_cells + 1, context.shape[-1]).index_add(0, rows, product.flatten(0, 3))[:num_cells]


def cumsum_trick(depth: Tensor, context: Tensor, cell: Tensor, num_cells: int) -> Tensor:
    """The outer product, sorted by cell and summed by differences of its running sum (Philion & Fidler 2020, 4.2)."""
    product = (depth[..., None] * context[:, None]).flatten(0, 3)  # P C
    rows = cell.flatten().long()
    inside = rows >= 0
    product, rows = product[inside], rows[inside]
    order = rows.argsort()
    sums, hit = _SumOfRuns.apply(product[order], rows[order])
    return depth.new_zeros(num_cells, context.shape[-1]).index_copy(0, hit, sums)


class _SumOfRuns(torch.autograd.Function):
    """x [P C] and its sorted rows [P] -> (sums [R C] over equal rows, these rows [R]), with the paper's own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        last = torch.ones_like(rows, dtype=torch.bool)  # of its run
        last[:-1] = rows[1:] != rows[:-1]
        running, hit = x.cumsum(0)[last], rows[last]
        running[1:] -= running[:-1].clone()
        ctx.save_for_backward(last)
        ctx.mark_non_differentiable(hit)
        return running, hit

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (last,) = ctx.saved_tensors
        return grad.index_select(0, last.cumsum(0) - last.long()), None


def measure(frame: Path | None = None, *, repeats: int = 20) -> dict[str, float]:
    """Figures of the CPU lowering in float32, threads as torch is set; times are the best of `repeats`.

    frame: folder of a key frame, whose cameras count; None: a rig like nuScenes'.
    Returns: copy_gb_per_s, and per direction seconds, GB/s of the bytes that must move, and their ratio to the copy.
        forward: into memory that was used before, as the copy is; op_forward: the whole op, whose 41 MB result lies on
        pages that the system must first clear. forward_effective counts, for every point, a read of its context row
        and a read and write of its cell's row: what a scatter without the product would move. textbook: outer product
        and index_add.
    """
    generator = torch.Generator().manual_seed(0)
    cell = frustum_cells() if frame is None else cells_of(frame)
    num_cells = GRID * GRID
    depth = torch.rand(len(CAMERAS), DEPTHS, ROWS, COLUMNS, generator=generator).softmax(1)
    context = torch.randn(len(CAMERAS), ROWS, COLUMNS, CHANNELS, generator=generator)
    grad = torch.randn(num_cells, CHANNELS, generator=generator)
    out = torch.zeros(num_cells, CHANNELS)
    source = torch.randn(1 << 25, generator=generator)  # 128 MiB
    target = torch.empty_like(source)

    inside = cell[cell >= 0]
    points_inside, cells_hit = inside.numel(), inside.unique().numel()
    row_bytes = 4 * CHANNELS
    operand_bytes = 4 * (depth.numel() + cell.numel() + context.numel())
    forward_bytes = operand_bytes + num_cells * row_bytes
    backward_bytes = operand_bytes + cells_hit * row_bytes + 4 * (depth.numel() + context.numel())
    effective_bytes = operand_bytes + points_inside * row_bytes * 3

    copy_s = best_seconds(lambda: target.copy_(source), repeats=repeats)
    forward_s = best_seconds(lambda: cpu.forward_into(out, depth, context, cell), repeats=repeats)
    op_forward_s = best_seconds(lambda: voxel_pool(depth, context, cell, num_cells), repeats=repeats)
    backward_s = best_seconds(lambda: torch.ops.bevfn.voxel_pool_backward(grad, depth, context, cell), repeats=repeats)
    textbook_s = best_seconds(lambda: textbook(depth, context, cell, num_cells), repeats=max(2, repeats // 10))
    copy_rate = 2e-9 * source.nbytes / copy_s
    return {
        "threads": torch.get_num_threads(),
        "points_inside": points_inside,
        "cells_hit": cells_hit,
        "copy_gb_per_s": copy_rate,
        "forward_s": forward_s,
        "forward_gb_per_s": 1e-9 * forward_bytes / forward_s,
        "forward_over_copy": 1e-9 * forward_bytes / forward_s / copy_rate,
        "forward_effective_gb_per_s": 1e-9 * effective_bytes / forward_s,
        "op_forward_s": op_forward_s,
        "op_forward_over_copy": 1e-9 * forward_bytes / op_forward_s / copy_rate,
        "backward_s": backward_s,
        "backward_gb_per_s": 1e-9 * backward_bytes / backward_s,
        "backward_over_copy": 1e-9 * backward_bytes / backward_s / copy_rate,
        "textbook_forward_s": textbook_s,
        "textbook_over_op_forward": textbook_s / op_forward_s,
    }


def measure_on(
    device: str,
    copy_gb_per_s: float,
    cell: Tensor,
    *,
    channels: int = CHANNELS,
    num_cells: int = GRID**2,
    dtype: torch.dtype = torch.float32,
    repeats: int = 20,
) -> dict[str, float]:
    """Figures of the whole op on a GPU, by its clock (`seconds_on`).

    Args:
        device: of the operands.
        copy_gb_per_s: of a copy there in the same run.
        cell: [M D H W] int32, cell of every point: `frustum_cells` or `cells_of`.
        channels, num_cells, dtype: of the images' features and of the map.
        repeats: timed ones, of which the best counts.

    Returns: as `measure`. sort: the part of the forward pass that sorts points by cell. textbook: outer product and
        index_add, forward, and its autograd backward alone, which adds up in the operands' dtype and in no order.
    """
    generator = torch.Generator().manual_seed(0)
    M, D, H, W = cell.shape
    depth = torch.rand(M, D, H, W, generator=generator).softmax(1).to(device, dtype).requires_grad_()
    context = torch.randn(M, H, W, channels, generator=generator).to(device, dtype).requires_grad_()
    grad = torch.randn(num_cells, channels, generator=generator).to(device, dtype)
    cell = cell.to(device)
    inside = cell[cell >= 0]
    points_inside, cells_hit = inside.numel(), inside.unique().numel()
    operand_bytes = (depth.numel() + context.numel()) * grad.element_size() + cell.numel() * cell.element_size()
    row_bytes = channels * grad.element_size()
    forward_bytes = operand_bytes + num_cells * row_bytes
    backward_bytes = operand_bytes + cells_hit * row_bytes + (depth.numel() + context.numel()) * grad.element_size()
    leaves, plain = (depth, context), (depth.detach(), context.detach())

    expected = textbook(*leaves, cell, num_cells)
    forward_s, backward_s, sort_s, textbook_s, textbook_backward_s = seconds_on(
        device,
        lambda: voxel_pool(*plain, cell, num_cells),
        lambda: torch.ops.bevfn.voxel_pool_backward(grad, *plain, cell),
        lambda: intervals(cell.reshape(-1), num_cells),
        lambda: textbook(*plain, cell, num_cells),
        lambda: torch.autograd.grad(expected, leaves, grad, retain_graph=True),
        repeats=repeats,
    )
    found = [voxel_pool(*plain, cell, num_cells), *torch.ops.bevfn.voxel_pool_backward(grad, *plain, cell)]
    wanted = [expected.detach(), *torch.autograd.grad(expected, leaves, grad)]
    return {
        "points_inside": points_inside,
        "cells_hit": cells_hit,
        "forward_s": forward_s,
        "forward_gb_per_s": 1e-9 * forward_bytes / forward_s,
        "forward_over_copy": 1e-9 * forward_bytes / forward_s / copy_gb_per_s,
        "sort_s": sort_s,
        "backward_s": backward_s,
        "backward_gb_per_s": 1e-9 * backward_bytes / backward_s,
        "backward_over_copy": 1e-9 * backward_bytes / backward_s / copy_gb_per_s,
        "textbook_forward_s": textbook_s,
        "textbook_over_forward": textbook_s / forward_s,
        "textbook_backward_s": textbook_backward_s,
        "textbook_over_backward": textbook_backward_s / backward_s,
        "worst_relative_difference": max(
            float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, wanted)
        ),
    }


if __name__ == "__main__":
    print(to_json(measure(), indent=2).decode())
