"""CPU lowering of `linear_assignment`: cpu.cpp, one sample per thread at a time."""

import torch
from torch import Tensor

from bevfn.kernels import native


def linear_assignment(cost: Tensor, valid: Tensor) -> Tensor:
    """cost [B Q G] float, valid [B G] bool -> [B G] int64, query of each box or -1."""
    B, Q, G = cost.shape
    match = torch.empty(B, G, dtype=torch.int64, device="cpu")
    costs = cost.to(torch.float64).contiguous()
    native.call("linear_assignment", "linear_assignment", costs, valid.contiguous(), match, B, Q, G)
    return match
