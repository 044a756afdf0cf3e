"""Sparse convolution over a neighbour table: gather, multiply, sum; differentiable in features and weight."""

from types import ModuleType

import torch
from torch import Tensor

from bevfn.kernels.cuda import lowering
from bevfn.kernels.derivatives import differentiable
from bevfn.kernels.sparse_conv import cpu, reference

_library = torch.library.Library("bevfn", "FRAGMENT")
_library.define("sparse_conv(Tensor x, Tensor weight, Tensor table) -> Tensor")
_library.define("sparse_conv_weight_grad(Tensor x, Tensor grad, Tensor table) -> Tensor")
_TILES = "Tensor order, Tensor offsets, Tensor counts"
_library.define(f"sparse_conv_tiled(Tensor x, Tensor weight, Tensor table, {_TILES}) -> Tensor")
_library.define(f"sparse_conv_tiled_weight_grad(Tensor x, Tensor grad, Tensor table, {_TILES}) -> Tensor")
_library.define("sparse_conv_tiles(Tensor table) -> (Tensor, Tensor, Tensor)")


Tiles = tuple[Tensor, ...]


def tiles(table: Tensor, inverse: Tensor) -> Tiles:
    """What all convolutions over a table share on a GPU: the rows of both, sorted by the offsets that they read; () elsewhere.

    Args: see `sparse_conv`. Returns the `reference.tiles` of table, then of inverse, int32.
    """
    if not table.is_cuda:
        return ()
    return *torch.ops.bevfn.sparse_conv_tiles(table), *torch.ops.bevfn.sparse_conv_tiles(inverse)


def sparse_conv(x: Tensor, weight: Tensor, table: Tensor, inverse: Tensor, tiles: Tiles = ()) -> Tensor:
    """y[w] = sum over k of x[table[k, w]] @ weight[k], leaving out entries of -1.

    Sums run in float32 for half-precision inputs. Any derivative in x and weight (`kernels.derivatives`).

    Args:
        x: [V C_in] features, float16, bfloat16, float32 or float64.
        weight: [K C_in C_out], dtype of x.
        table: [K W] int32, input row of output row w under offset k, or -1 (see `bevfn.kernels.neighbours`).
        inverse: [K V] int32, output row that input row v feeds under offset k, or -1; the same pairs as `table`,
            read only by the gradient. For a submanifold convolution with odd kernel `table.flip(0)`.
        tiles: those of table and inverse, where several convolutions read them; without, a GPU makes them in each.

    Returns:
        [W C_out], dtype of x.

    Raises:
        ValueError: shapes or dtypes do not fit together.
        RuntimeError: a table entry is not a row (CPU).
    """
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ValueError(
            f"sparse_conv: x [V, C_in] and weight [K, C_in, C_out] must agree in C_in and dtype, "
            f"got {x.dtype} {list(x.shape)} and {weight.dtype} {list(weight.shape)}."
        )
    K = weight.shape[0]
    for name, index in (("table", table), ("inverse", inverse)):
        if index.ndim != 2 or index.shape[0] != K or index.dtype != torch.int32:
            raise ValueError(
                f"sparse_conv: {name} must be int32 [{K}, rows] for {K} kernel offsets, "
                f"got {index.dtype} {list(index.shape)}."
            )
    if inverse.shape[1] != x.shape[0]:
        raise ValueError(
            f"sparse_conv: inverse has {inverse.shape[1]} columns for {x.shape[0]} input rows; "
            "were table and inverse swapped?"
        )
    return _sparse_conv(x, weight, table, inverse, *tiles)


def _operator(x: Tensor, weight: Tensor, table: Tensor, inverse: Tensor, *tiles: Tensor) -> Tensor:
    if tiles:
        return torch.ops.bevfn.sparse_conv_tiled(x, weight, table, *tiles[:3])
    return torch.ops.bevfn.sparse_conv(x, weight, table)


def _plain(x: Tensor, weight: Tensor, table: Tensor, inverse: Tensor, *tiles: Tensor) -> Tensor:
    return reference.sparse_conv(x, weight, table)


def _gradients(
    wanted: frozenset[int], grad: Tensor, x: Tensor, weight: Tensor, table: Tensor, inverse: Tensor, *tiles: Tensor
) -> tuple[Tensor | None, ...]:
    grad_x = grad_weight = None
    if 0 in wanted:  # an input feeds along `inverse` what its outputs read along `table`
        grad_x = _operator(grad, weight.transpose(1, 2), inverse, table, *tiles[3:])
    if 1 in wanted and tiles:
        grad_weight = torch.ops.bevfn.sparse_conv_tiled_weight_grad(x, grad, table, *tiles[:3])
    elif 1 in wanted:
        grad_weight = torch.ops.bevfn.sparse_conv_weight_grad(x, grad, table)
    return grad_x, grad_weight, *(None for _ in (table, inverse, *tiles))


_sparse_conv = differentiable(_operator, _gradients, _plain)


@torch.library.register_fake("bevfn::sparse_conv_tiled", lib=_library)
@torch.library.register_fake("bevfn::sparse_conv", lib=_library)
def _forward_fake(x: Tensor, weight: Tensor, table: Tensor, *tiles: Tensor) -> Tensor:
    return x.new_empty(table.shape[1], weight.shape[2])


@torch.library.register_fake("bevfn::sparse_conv_tiled_weight_grad", lib=_library)
@torch.library.register_fake("bevfn::sparse_conv_weight_grad", lib=_library)
def _weight_grad_fake(x: Tensor, grad: Tensor, table: Tensor, *tiles: Tensor) -> Tensor:
    return x.new_empty(table.shape[0], x.shape[1], grad.shape[1])


@torch.library.register_fake("bevfn::sparse_conv_tiles", lib=_library)
def _tiles_fake(table: Tensor) -> Tiles:
    S, T, N = reference.tile_shape(table)
    return table.new_empty(S, table.shape[1]), table.new_empty(S, T, N), table.new_empty(S, T)


def _cuda() -> ModuleType:
    from bevfn.kernels.sparse_conv import cuda  # needs Triton

    return cuda


_library.impl("sparse_conv", cpu.sparse_conv, "CPU")
_library.impl("sparse_conv_weight_grad", cpu.weight_grad, "CPU")
for _name, _function in {
    "sparse_conv": "sparse_conv",
    "sparse_conv_weight_grad": "weight_grad",
    "sparse_conv_tiled": "tiled",
    "sparse_conv_tiled_weight_grad": "tiled_weight_grad",
    "sparse_conv_tiles": "tiles",
}.items():
    _meaning = getattr(reference, _function)
    _library.impl(_name, _meaning, "CompositeExplicitAutograd")
    _library.impl(_name, lowering(_cuda, _function, _meaning), "CUDA")
