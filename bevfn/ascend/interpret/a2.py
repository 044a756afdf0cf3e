"""What the kernels of an Atlas A2 (Ascend 910B) compute where it differs from a type's published meaning.

Source: the operators' published implementations of CANN 8.1.RC1 (`impl/dynamic/*.py`, ops-math), read in ../shared/npu/A2.md.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bevfn.ascend.interpret import elementwise
from bevfn.ascend.interpret.node import Invalid, same_dtype


def select_v2(condition: Tensor, then: Tensor, else_: Tensor) -> Tensor:
    """int32 goes through float32, as the vector unit selects floats only (`select_v2.py`): exact to 2^24."""
    if then.dtype == else_.dtype == torch.int32:
        return elementwise.select_v2(condition, then.float(), else_.float()).to(torch.int32)
    return elementwise.select_v2(condition, then, else_)


def floor_div(x1: Tensor, x2: Tensor) -> Tensor:
    """int32 is divided as float32 (`floor_div.py`): exact where the quotient is as float32 rounds it."""
    same_dtype(x1, x2)
    if x1.dtype == torch.int32:
        return torch.floor(x1.float() / x2.float()).to(torch.int32)
    return torch.div(x1, x2, rounding_mode="floor")


def sxpy(x1: Tensor, x2: Tensor, alpha: Tensor | None = None) -> Tensor:
    """In no list of kernels, of the AI Core, the AI CPU or the host."""
    raise Invalid("A2 has no kernel of this type")


OPS: dict[str, Callable] = {"SelectV2": select_v2, "FloorDiv": floor_div, "Sxpy": sxpy}
