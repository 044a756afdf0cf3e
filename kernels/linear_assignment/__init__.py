"""Exact rectangular assignment of padded ground-truth boxes to queries (Hungarian matching), inside the graph."""

from types import ModuleType

import torch
from torch import Tensor

from bevfn.kernels.cuda import lowering
from bevfn.kernels.linear_assignment import cpu, reference

_library = torch.library.Library("bevfn", "FRAGMENT")
_library.define("linear_assignment(Tensor cost, Tensor valid) -> Tensor")


def linear_assignment(cost: Tensor, valid: Tensor) -> Tensor:
    """One query for each valid box, at the least total cost; no query twice. No gradient.

    With more valid boxes than queries every query gets a box and the boxes left over are those that make the total
    least. Among assignments of equal cost any may be returned. A cost that is NaN or infinite (a step that mixed
    precision is about to skip) counts as finite and larger than everything else: as few such pairs as possible are
    used. Costs of magnitude above 1e300 count as infinite.

    Args:
        cost: [B Q G] float, solved in float64.
        valid: [B G] bool, False for padding.

    Returns:
        [B G] int64, the query of each box; -1 for padding and for boxes left over.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Source: the problem as in scipy.optimize.linear_sum_assignment; DETR (arXiv 2005.12872) section 3.1.
    """
    if cost.dim() != 3 or tuple(valid.shape) != (cost.shape[0], cost.shape[2]):
        raise ValueError(
            f"linear_assignment needs cost [B Q G] and valid [B G], got {list(cost.shape)} and {list(valid.shape)}."
        )
    if not cost.dtype.is_floating_point:
        raise ValueError(f"linear_assignment: cost must be floating point, got {cost.dtype}; convert it with .float().")
    if valid.dtype != torch.bool:
        raise ValueError(f"linear_assignment: valid must be bool, got {valid.dtype}; convert it with .bool().")
    if cost.device != valid.device:
        raise ValueError(f"linear_assignment: cost is on {cost.device} but valid on {valid.device}; move one of them.")
    return torch.ops.bevfn.linear_assignment(cost.detach(), valid)


@torch.library.register_fake("bevfn::linear_assignment", lib=_library)
def _fake(cost: Tensor, valid: Tensor) -> Tensor:
    return cost.new_empty(cost.shape[0], cost.shape[2], dtype=torch.int64)


def _cuda() -> ModuleType:
    from bevfn.kernels.linear_assignment import cuda  # needs Triton

    return cuda


_library.impl("linear_assignment", reference.linear_assignment, "CompositeExplicitAutograd")
_library.impl("linear_assignment", cpu.linear_assignment, "CPU")
_library.impl(
    "linear_assignment", lowering(_cuda, "linear_assignment", reference.linear_assignment, float64=True), "CUDA"
)
