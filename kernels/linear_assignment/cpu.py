"""CPU lowering of `linear_assignment`: cpu.cpp, one sample per thread at a time."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from bevfn.kernels import native


def linear_assignment(cost: Tensor, valid: Tensor) -> Tensor:
    """cost [B Q G] float, valid [B G] bool -> [B G] int64, query of each box or -1."""
    B, Q, G = cost.shape
    match = torch.empty(B, G, dtype=torch.int64, device="cpu")
    operands = [cost.to(torch.float64).contiguous(), valid.contiguous(), match]
    sizes = [ctypes.c_int64(n) for n in (B, Q, G, torch.get_num_threads())]
    native.load(Path(__file__).with_name("cpu.cpp")).linear_assignment(*map(native.pointer, operands), *sizes)
    return match
