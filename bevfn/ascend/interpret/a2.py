"""What the kernels of an Atlas A2 (Ascend 910B) compute where it differs from a type's published meaning.

Source: the operators' published implementations of CANN 8.1.RC1 (`impl/dynamic/*.py`) and hicann/ops-math.
The gradient of a filter in float32 is no difference: it is what the prototype states.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bevfn.ascend.interpret import conv, elementwise, norm
from bevfn.ascend.interpret.node import Invalid, image, same_dtype


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


def floor_mod(x1: Tensor, x2: Tensor) -> Tensor:
    """int32 less the quotient of float32 times the divisor, in int32 (`floor_mod.py`, high performance, its default)."""
    same_dtype(x1, x2)
    return x1 - floor_div(x1, x2) * x2 if x1.dtype == torch.int32 else torch.remainder(x1, x2)


def truncate_div(x1: Tensor, x2: Tensor) -> Tensor:
    """int32 is divided as float32 (`truncate_div.py`)."""
    same_dtype(x1, x2)
    if x1.dtype == torch.int32:
        return torch.trunc(x1.float() / x2.float()).to(torch.int32)
    return torch.div(x1, x2, rounding_mode="trunc")


def mod(x1: Tensor, x2: Tensor) -> Tensor:
    """int32 is float32 all the way (`mod.py`)."""
    same_dtype(x1, x2)
    if x1.dtype == torch.int32:
        x, y = x1.float(), x2.float()
        return (x - torch.trunc(x / y) * y).to(torch.int32)
    return torch.fmod(x1, x2)


def bn_training_update(
    x: Tensor,
    sum: Tensor,
    square_sum: Tensor,
    scale: Tensor,
    offset: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    factor: float,
    epsilon: float,
    image_layout: str,
) -> tuple[Tensor, ...]:
    """The variance is a difference of squares in float32, 0 at least, and y a product and a sum (`bn_training_update.py`)."""
    image(image_layout)
    count = x.numel() // x.shape[1]
    batch_mean = sum * (1 / count)
    batch_variance = (square_sum * (1 / count) - batch_mean * batch_mean).clamp(min=0)
    factor_of_x = scale / torch.sqrt(batch_variance + epsilon)
    f, o = norm.channels(x, factor_of_x, offset - factor_of_x * batch_mean)
    y = (x.float() * f + o).to(x.dtype)
    return y, *norm.updated(x, batch_mean, batch_variance, mean, variance, factor)


def sxpy(x1: Tensor, x2: Tensor, alpha: Tensor | None = None) -> Tensor:
    """In no list of kernels, of the AI Core, the AI CPU or the host."""
    raise Invalid("A2 has no kernel of this type")


def hf32(x: Tensor) -> Tensor:
    """float32 with a mantissa of 11 bits, to the nearest, halves to even; other dtypes as they are.

    Source: hiascend.com, CANN community 9.1.0, `--allow_hf32` (11 bits, the range of float32), and CANN commercial 8.5.0,
    `SetHF32` (transMode 0).
    """
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    kept = bits + 0x7FF + ((bits >> 12) & 1) & ~0xFFF
    return torch.where(x.isfinite(), kept.view(torch.float32), x)


def _of_hf32(function: Callable) -> Callable:
    @functools.wraps(function)  # whose signature and marks `node.bind` reads
    def apply(*operands: Any, **attributes: Any) -> Any:
        rounded = (hf32(x) if isinstance(x, Tensor) else x for x in operands)
        return function(*rounded, **attributes)

    return apply


HF32_OPS: dict[str, Callable] = {name: _of_hf32(function) for name, function in conv.OPS.items()}
OPS: dict[str, Callable] = {
    **{"SelectV2": select_v2, "FloorDiv": floor_div, "FloorMod": floor_mod, "TruncateDiv": truncate_div, "Mod": mod},
    "BNTrainingUpdate": bn_training_update,
    "Sxpy": sxpy,
}
