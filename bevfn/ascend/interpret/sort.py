"""Sorting, the largest elements, binary search.

Source: hicann/ops-math at c4193324, math/{sort,top_k_v2,search_sorted}/op_graph; torchair's ge_ir.proto.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bevfn.ascend.interpret.node import Invalid, fixed, one_int, only, same_dtype


def sort(
    x: Tensor,
    *,
    axis: int = -1,
    descending: bool = False,
    stable: bool = False,
    y2_dtype: torch.dtype = torch.int32,
) -> tuple[Tensor, Tensor]:
    """Sorted values and where they were. Unless stable, equal keys come in the reverse of their order.

    Their order is then undefined, torch's CPU sort keeps it, and so a step that relies on it shows a difference.
    """
    if stable:
        values, order = torch.sort(x, dim=axis, descending=descending, stable=True)
    else:
        values, order = torch.sort(x.flip(axis), dim=axis, descending=descending, stable=True)
        order = x.shape[axis] - 1 - order if x.dim() else order
    return values, order.to(y2_dtype)


@fixed(sorted=True, sort_policy=1)
def top_k_v2(
    x: Tensor,
    k: Tensor,
    *,
    dim: int = -1,
    largest: bool = True,
    indices_dtype: torch.dtype = torch.int32,
) -> tuple[Tensor, Tensor]:
    """The k largest elements of the last axis, in order. Which of equal ones come first is undefined: as torch's here.

    sort_policy 1 is what torchair always writes; dim is published as reserved, so it can only be the last axis.
    """
    only("dim", dim, -1, x.dim() - 1)
    count = one_int(k)
    if not 0 <= count <= x.shape[-1]:
        raise Invalid(f"{count} of {x.shape[-1]} elements")
    values, order = torch.topk(x, count, -1, largest, True)
    return values, order.to(indices_dtype)


def search_sorted(
    sorted_sequence: Tensor,
    values: Tensor,
    sorter: None = None,
    *,
    dtype: torch.dtype = torch.int64,
    right: bool = False,
) -> Tensor:
    """Where each value would go in its row of the sequence: before equal ones, or (right) after them."""
    same_dtype(sorted_sequence, values)
    return torch.searchsorted(sorted_sequence, values, right=right).to(dtype)


OPS: dict[str, Callable] = {"Sort": sort, "TopKV2": top_k_v2, "SearchSorted": search_sorted}
