"""Gathering by index and scattering to it. An index outside is Invalid: the device would read or write anywhere.

Where several updates meet in one cell without being added, the order of writing is undefined: cells whose updates differ
are poisoned. Source: hicann/ops-nn at e5c3fa93, index/*/op_graph; torchair's ge_ir.proto.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bevfn.ascend.interpret.node import Invalid, Unsupported, fixed, of_dtype, one_int, only, poison, same_dtype

_INDEX = (torch.int32, torch.int64)


def _indices(indices: Tensor, size: int, *, negative: bool = False) -> Tensor:
    """int64 indices into an axis of `size`; negative ones count from its end where the type supports them."""
    of_dtype(indices, *_INDEX)
    indices = indices.long()
    if not indices.numel():
        return indices
    low, high = int(indices.min()), int(indices.max())
    if low < (-size if negative else 0) or high >= size:
        raise Invalid(f"indices from {low} to {high} into an axis of {size}")
    return torch.where(indices < 0, indices + size, indices) if low < 0 else indices


@fixed(batch_dims=0, is_preprocessed=False)
def gather(
    x: Tensor, indices: Tensor, *, validate_indices: bool = True, negative_index_support: bool = False
) -> Tensor:
    """Rows of x; validate_indices is published as not in use."""
    return _gather(x, indices, 0, negative_index_support)


@fixed(batch_dims=0, is_preprocessed=False)
def gather_v2(x: Tensor, indices: Tensor, axis: Tensor, *, negative_index_support: bool = False) -> Tensor:
    """Slices of x along `axis`; the shape of `indices` takes the axis' place."""
    return _gather(x, indices, one_int(axis), negative_index_support)


def _gather(x: Tensor, indices: Tensor, axis: int, negative: bool) -> Tensor:
    if not -x.dim() <= axis < x.dim():
        raise Invalid(f"axis {axis} of {x.dim()}")
    axis %= x.dim()
    chosen = _indices(indices, x.shape[axis], negative=negative)
    flat = x.index_select(axis, chosen.reshape(-1))
    return flat.reshape(x.shape[:axis] + chosen.shape + x.shape[axis + 1 :])


def gather_elements(x: Tensor, index: Tensor, *, dim: int = 0) -> Tensor:
    return torch.gather(x, dim, _indices(index, x.shape[dim]))


def index_by_tensor(x: Tensor, indices: list[Tensor], *, indices_mask: list[int] = []) -> Tensor:  # noqa: B006
    """torch's advanced indexing: an axis with mask 1 takes the next index tensor, one with 0 is taken whole."""
    if len(indices_mask) > x.dim() or sum(indices_mask) != len(indices) or not set(indices_mask) <= {0, 1}:
        raise Invalid(f"indices_mask {indices_mask} does not fit {len(indices)} index tensors and {x.dim()} axes")
    for tensor in indices:
        of_dtype(tensor, torch.int64)
    rest = iter(indices)
    return x[tuple(next(rest) if masked else slice(None) for masked in indices_mask)]


def scatter_elements(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """A copy of data with updates written at (…, index, …) along `axis`, or combined with what is there."""
    only("reduction", reduction, "none", "add", "mul")
    same_dtype(data, updates)
    if indices.shape != updates.shape:
        raise Invalid(f"indices {list(indices.shape)} and updates {list(updates.shape)} differ in shape")
    chosen = _indices(indices, data.shape[axis])
    if reduction == "add":
        return data.scatter_add(axis, chosen, updates)
    if reduction == "mul":
        return data.scatter_reduce(axis, chosen, updates, "prod")
    written = data.scatter(axis, chosen, updates)
    lost = ~_same(written.gather(axis, chosen), updates)
    if not bool(lost.any()):
        return written
    ambiguous = torch.zeros(data.shape, dtype=torch.uint8).scatter_add(axis, chosen, lost.to(torch.uint8)) > 0
    return torch.where(ambiguous, poison(torch.Size(), data.dtype), written)


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Equal, NaN being equal to NaN."""
    return (a == b) | ((a != a) & (b != b))


def tensor_scatter(reduction: str, first: str = "x") -> Callable[..., Tensor]:
    """TensorScatter*: updates for the slices at indices [..., k] into the first k axes."""

    def apply(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        same_dtype(x, updates)
        cells, flat = _flat_cells(x, indices)
        rows = updates.reshape(cells.numel(), flat.shape[1])
        return _combine(flat, cells, rows, reduction).reshape(x.shape)

    def apply_input(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        return apply(input, indices, updates)

    return apply if first == "x" else apply_input


def _flat_cells(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The number of each indexed slice, and x as [slices, elements of one]."""
    depth = indices.shape[-1]
    if not 1 <= depth <= x.dim():
        raise Invalid(f"indices of {depth} axes into {x.dim()}")
    cells = torch.zeros(math.prod(indices.shape[:-1]), dtype=torch.int64)
    for axis in range(depth):
        cells = cells * x.shape[axis] + _indices(indices[..., axis], x.shape[axis]).reshape(-1)
    return cells, x.reshape(math.prod(x.shape[:depth]), math.prod(x.shape[depth:]))


def _combine(flat: Tensor, cells: Tensor, rows: Tensor, reduction: str) -> Tensor:
    where = cells[:, None].expand_as(rows)
    if reduction == "update":
        return scatter_elements(flat, where, rows)
    if reduction == "sub":
        return flat.scatter_add(0, where, -rows)
    return flat.scatter_reduce(0, where, rows, {"add": "sum", "max": "amax", "min": "amin"}[reduction])


def inplace_index_add(
    var: Tensor, indices: Tensor, updates: Tensor, alpha: Tensor | None = None, *, axis: int
) -> Tensor:
    """var[..., indices[i], ...] += alpha updates[..., i, ...], in place."""
    same_dtype(var, updates, alpha)
    if not 0 <= axis < var.dim() or indices.dim() != 1:
        raise Invalid(f"axis {axis} of {var.dim()}, indices of {indices.dim()} axes")
    wanted = [*var.shape[:axis], indices.shape[0], *var.shape[axis + 1 :]]
    if list(updates.shape) != wanted:
        raise Invalid(f"updates {list(updates.shape)} should have the shape {wanted}")
    chosen = _indices(indices, var.shape[axis])
    factor = 1 if alpha is None else alpha.reshape(()).item()
    return var.contiguous().index_add_(axis, chosen, updates, alpha=factor)


@fixed(scale_grad_by_freq=False)
def embedding_dense_grad(grad: Tensor, indices: Tensor, *, num_weights: int, padding_idx: int = -1) -> Tensor:
    """Sum of the gradients of each row of a table; those of the row padding_idx are left out."""
    if padding_idx >= num_weights:
        raise Unsupported(f"attribute 'padding_idx' = {padding_idx} beyond {num_weights} rows")
    chosen = _indices(indices, num_weights)
    return torch.ops.aten.embedding_dense_backward(grad, chosen, num_weights, padding_idx, False)


OPS: dict[str, Callable] = {
    "Gather": gather,
    "GatherV2": gather_v2,
    "GatherElements": gather_elements,
    "IndexByTensor": index_by_tensor,
    "ScatterElements": scatter_elements,
    "TensorScatterUpdate": tensor_scatter("update"),
    "TensorScatterAdd": tensor_scatter("add"),
    "TensorScatterSub": tensor_scatter("sub"),
    "TensorScatterMax": tensor_scatter("max", "input"),
    "TensorScatterMin": tensor_scatter("min", "input"),
    "InplaceIndexAdd": inplace_index_add,
    "EmbeddingDenseGrad": embedding_dense_grad,
}
