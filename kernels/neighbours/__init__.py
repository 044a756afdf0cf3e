"""Which input rows each output row of a sparse convolution reads, as static-size tables.

A *site* is a row (b, x, y, z) of integer coordinates. A table entry [k, row] is the row at the other end of kernel
offset k, or -1. Offsets are numbered row-major over (kx, ky, kz). Sites must be distinct.
"""

from types import ModuleType

import torch
from torch import Tensor

from bevfn.kernels.cuda import lowering
from bevfn.kernels.neighbours import cpu, reference
from bevfn.kernels.neighbours.reference import Axes
from bevfn.kernels.neighbours.reference import out_grid as out_grid

_library = torch.library.Library("bevfn", "FRAGMENT")
_library.define(
    "submanifold_neighbours(Tensor coords, Tensor valid, int[] kernel, int[] grid, int? batch=None) -> Tensor"
)
_library.define(
    "strided_neighbours(Tensor coords, Tensor valid, int[] kernel, int[] stride, int[] padding, int[] grid,"
    " int capacity, int batch)"
    " -> (Tensor out_coords, Tensor out_valid, Tensor table, Tensor inverse, Tensor found)"
)


def submanifold(
    coords: Tensor,
    valid: Tensor,
    *,
    kernel: tuple[int, int, int],
    grid: tuple[int, int, int],
    batch: int | None = None,
) -> Tensor:
    """Table of a submanifold convolution: outputs are the inputs' own sites.

    Args:
        coords: [V 4] int32 sites (b, x, y, z), distinct where valid, inside `grid`.
        valid: [V] bool.
        kernel: extent per axis; offset k reads p - kernel // 2 + k.
        grid: (X, Y, Z).
        batch: number of samples, b < batch; only Ascend's lowering asks for it, and is slow without it.

    Returns:
        table [K V] int32: row of the active input under offset k, -1 if none. For odd kernels `table.flip(0)` is the
        inverse table that `sparse_conv` asks for.

    Raises:
        ValueError: a shape, dtype or setting that the contract excludes.

    Source: Graham, Engelcke, van der Maaten 2018 (submanifold sparse convolution).
    """
    _check("submanifold", coords, valid, kernel=kernel, grid=grid)
    if batch is not None and batch < 1:
        raise ValueError(f"neighbours.submanifold: batch must be at least 1, got {batch}.")
    return torch.ops.bevfn.submanifold_neighbours(coords, valid, list(kernel), list(grid), batch)


def strided(
    coords: Tensor,
    valid: Tensor,
    *,
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
    grid: tuple[int, int, int],
    capacity: int,
    batch: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output sites and tables of a strided sparse convolution: every output that some active input feeds.

    Output p reads input p * stride - padding + k. Output sites ascend in (b, x, y, z); those beyond `capacity` (the
    largest) are dropped with all their table entries.

    Args:
        coords: [V 4] int32 sites (b, x, y, z), distinct where valid, inside `grid`.
        valid: [V] bool.
        kernel, stride, padding: per axis.
        grid: (X, Y, Z) of the inputs; outputs live on `out_grid(...)`.
        capacity: W, output rows.
        batch: number of samples; b < batch.

    Returns:
        out_coords [W 4] int32, -1 in empty rows;
        out_valid [W] bool;
        table [K W] int32, input row that output w reads under offset k, or -1;
        inverse [K V] int32, output row that input v feeds under offset k, or -1;
        found [] int32, output sites before the limit.

    Raises:
        ValueError: a shape, dtype or setting that the contract excludes.
    """
    _check("strided", coords, valid, kernel=kernel, stride=stride, padding=padding, grid=grid)
    if capacity < 1 or batch < 1:
        raise ValueError(f"neighbours.strided: capacity and batch must be at least 1, got {capacity} and {batch}.")
    out = out_grid(grid, kernel, stride, padding)
    if min(out) < 1:
        raise ValueError(
            f"neighbours.strided: grid {tuple(grid)} with kernel {tuple(kernel)}, stride {tuple(stride)}, padding "
            f"{tuple(padding)} leaves no output cells ({out}): use a smaller kernel or more padding."
        )
    return torch.ops.bevfn.strided_neighbours(
        coords, valid, list(kernel), list(stride), list(padding), list(grid), capacity, batch
    )


def _check(name: str, coords: Tensor, valid: Tensor, **triples: tuple[int, ...]) -> None:
    if coords.ndim != 2 or coords.shape[1] != 4 or coords.dtype != torch.int32:
        raise ValueError(
            f"neighbours.{name}: coords must be int32 [V, 4] (b, x, y, z), got {coords.dtype} {list(coords.shape)}."
        )
    if valid.shape != coords.shape[:1] or valid.dtype != torch.bool:
        raise ValueError(
            f"neighbours.{name}: valid must be bool [{coords.shape[0]}] like coords, "
            f"got {valid.dtype} {list(valid.shape)}."
        )
    for field, value in triples.items():
        low = 0 if field == "padding" else 1
        if len(value) != 3 or min(value) < low:
            raise ValueError(
                f"neighbours.{name}: {field} needs 3 numbers of at least {low} (x, y, z), got {tuple(value)}."
            )
    if max(triples["grid"]) > 1 << 16:
        raise ValueError(f"neighbours.{name}: a grid axis holds at most {1 << 16} cells, got {tuple(triples['grid'])}.")


def _offsets(kernel: Axes) -> int:
    return kernel[0] * kernel[1] * kernel[2]


@torch.library.register_fake("bevfn::submanifold_neighbours", lib=_library)
def _submanifold_fake(coords: Tensor, valid: Tensor, kernel: Axes, grid: Axes, batch: int | None = None) -> Tensor:
    return coords.new_empty(_offsets(kernel), coords.shape[0])


@torch.library.register_fake("bevfn::strided_neighbours", lib=_library)
def _strided_fake(
    coords: Tensor, valid: Tensor, kernel: Axes, stride: Axes, padding: Axes, grid: Axes, capacity: int, batch: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    K = _offsets(kernel)
    return (
        coords.new_empty(capacity, 4),
        valid.new_empty(capacity),
        coords.new_empty(K, capacity),
        coords.new_empty(K, coords.shape[0]),
        coords.new_empty(()),
    )


def _cuda() -> ModuleType:
    from bevfn.kernels.neighbours import cuda  # needs Triton

    return cuda


_library.impl("submanifold_neighbours", reference.submanifold, "CompositeExplicitAutograd")
_library.impl("submanifold_neighbours", cpu.submanifold, "CPU")
_library.impl("strided_neighbours", reference.strided, "CompositeExplicitAutograd")
_library.impl("strided_neighbours", cpu.strided, "CPU")
_library.impl("submanifold_neighbours", lowering(_cuda, "submanifold", reference.submanifold), "CUDA")
_library.impl("strided_neighbours", lowering(_cuda, "strided", reference.strided), "CUDA")
