"""BEVDepth's and MatrixVT's view transforms beside the textbook's: seconds and peak memory of one frame of six cameras.

    bevfn bench views --frame FRAME_FOLDER

All variants take the depth [6 112 16 44] and the context [6 80 16 44] of one frame to its BEV map [1 80 128 128], in
eager mode and float32. "train" is forward and backward to depth and context, and to the parameters of MatrixVT.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bevfn import tree
from bevfn.bench import frame as frames
from bevfn.bench import machine, pool
from bevfn.data.batch import Batch, needed
from bevfn.experiments import bevdepth as recipe
from bevfn.models import bevdepth
from bevfn.views import camera_grid, matrixvt

# Name: what is measured; every ratio is to the first.
VARIANTS = {
    "voxel_pool": "depth x context pooled without the product",
    "voxel_pool and cells": "the same, cells computed from the calibration",
    "outer product, index_add": "textbook, unsorted",
    "outer product, sort, cumsum": "textbook: Lift-Splat's cumsum trick",
    "MatrixVT": "prime extraction and both products, matrices given",
    "MatrixVT and matrices": "the same, matrices built from the calibration",
    "MatrixVT, products only": "what stands in the place of the pooling",
}


@dataclass(frozen=True)
class Problem:
    """One frame's view transform: depth [N D H W], context [N C H W] (channels-last memory)."""

    config: bevdepth.Config
    batch: Batch
    depth: Tensor
    context: Tensor
    grad: Tensor  # 1 C Y X, of the BEV map


def problem(config: bevdepth.Config, batch: Batch) -> Problem:
    """Random depth and context for the cameras of the batch's first sample. `config` is a MatrixVT."""
    grid, C = config.grid, config.depth.context
    N, generator = needed(batch.images, "images").shape[2], torch.Generator().manual_seed(0)
    depth = torch.randn(N, grid.depth_bins, *grid.feature_size, generator=generator).softmax(1)
    context = torch.randn(N, C, *grid.feature_size, generator=generator)
    grad = torch.randn(1, C, *grid.cells, generator=generator)
    return Problem(config, batch, depth, context.contiguous(memory_format=torch.channels_last), grad)


def measure(frame: Path | None, *, repeats: int = 5, threads: int = 1) -> dict:
    """{variant: milliseconds and MiB, forward and train, and their ratios to voxel_pool's} at the published size."""
    config = bevdepth.matrix_vt()
    made = problem(config, frames.batch_of(frame, recipe.fitted(recipe.Config(), config, recipe.EVAL)))
    figures: dict = {
        "points": made.depth.numel(),
        "points_inside": int((camera_grid.cells(made.batch, 0, config.grid) >= 0).sum()),
        "outer_product_mib": made.depth.numel() * config.depth.context * 4 / 2**20,
        "gemm_gflops": machine.gemm_gflops(),
        "copy_gbps": machine.copy_gbps(),
    }
    for name in VARIANTS:
        figures[name] = machine.in_process(figures_of, made, name, repeats, threads)
    for name in VARIANTS:
        for figure in ("forward_ms", "train_ms", "forward_mib", "train_mib"):
            if figures[name][figure] is not None:
                figures[name][f"{figure}_over_voxel_pool"] = figures[name][figure] / figures["voxel_pool"][figure]
    least = 4e-9 * (2 * made.depth.numel() + made.context.numel() + made.grad.numel())  # GB, of depth and cells
    figures["voxel_pool"]["forward_share_of_copy"] = (
        least / (1e-3 * figures["voxel_pool"]["forward_ms"]) / figures["copy_gbps"]
    )
    return figures


def figures_of(made: Problem, name: str, repeats: int, threads: int) -> dict[str, float | None]:
    """Milliseconds and MiB of one variant, in this process; the error of pooling, relative to float64."""
    torch.set_num_threads(threads)
    transform, weights = variant(made, name)
    inputs = [x.requires_grad_() for x in (made.depth, made.context, *weights)]

    def forward() -> Tensor:
        with torch.no_grad():
            return transform(made.depth, made.context)

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(transform(made.depth, made.context), inputs, made.grad)

    figures: dict[str, float | None] = {
        "forward_mib": machine.extra_mib(forward),
        "train_mib": machine.extra_mib(train),
        "forward_ms": 1e3 * machine.best_seconds(forward, repeats=repeats),
        "train_ms": 1e3 * machine.best_seconds(train, repeats=repeats),
    }
    if not name.startswith("MatrixVT"):
        exact = variant(made, "voxel_pool")[0](made.depth.detach().double(), made.context.detach().double())
        figures["relative_error"] = float((forward() - exact).norm() / exact.norm())
    return figures


Transform = Callable[[Tensor, Tensor], Tensor]


def variant(made: Problem, name: str) -> tuple[Transform, list[Tensor]]:
    """(function of depth and context to the BEV map, its parameters)."""
    batch, grid = made.batch, made.config.grid
    if name == "voxel_pool and cells":
        return lambda depth, context: camera_grid.pool(depth, context, camera_grid.cells(batch, 0, grid), grid), []
    if name.startswith("MatrixVT"):
        return _matrix_variant(made, name)
    cell = camera_grid.cells(batch, 0, grid)
    if name == "voxel_pool":
        return lambda depth, context: camera_grid.pool(depth, context, cell, grid), []
    pooled = {"outer product, index_add": pool.textbook, "outer product, sort, cumsum": pool.cumsum_trick}[name]
    (Y, X), flat = grid.cells, cell.flatten(0, 1)

    def transform(depth: Tensor, context: Tensor) -> Tensor:
        return pooled(depth, context.permute(0, 2, 3, 1), flat, Y * X).view(1, Y, X, -1).permute(0, 3, 1, 2)

    return transform, []


def _matrix_variant(made: Problem, name: str) -> tuple[Transform, list[Tensor]]:
    config, grid = made.config, made.config.grid
    assert config.matrix is not None
    params, state = matrixvt.init(config.matrix, torch.Generator().manual_seed(0))

    def build() -> tuple[Tensor, Tensor]:
        return matrixvt.matrices(matrixvt.ray_cells(made.batch, 0, grid), grid)

    def transform(depth: Tensor, context: Tensor) -> Tensor:
        given = build() if name == "MatrixVT and matrices" else matrices
        return matrixvt.apply(params, state, depth, context, given, grid=grid, train=True)[0]["bev"]

    def products(depth: Tensor, context: Tensor) -> Tensor:
        ring, ray = matrices
        by_ray, feature = depth.mean(2), context.amax(2)  # N D W and N C W: stand-ins of the prime extraction's results
        by_ray, feature = (x.transpose(1, 2).flatten(0, 1) for x in (by_ray, feature))  # R D, R C
        return (feature.T @ (by_ray @ ring[0] * ray[0])).view(1, -1, *grid.cells)

    matrices = build()
    return (products, []) if name == "MatrixVT, products only" else (transform, tree.leaves(params))
