"""Element-wise arithmetic, comparison, selection and casts. Operands broadcast as torch's; dtypes must agree.

Source: op_graph/*_proto.h of CANN's hicann/ops-math at c4193324; torchair's ge_ir.proto.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bevfn.ascend.interpret.node import Invalid, Unsupported, floating, of_dtype, same_dtype, short, wide


def unary(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A type with one operand x of any numeric dtype."""

    def apply(x: Tensor) -> Tensor:
        return function(x)

    return apply


def smooth(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A type with one floating operand x."""

    def apply(x: Tensor) -> Tensor:
        floating(x)
        return function(x)

    return apply


def binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A type with two operands of one dtype."""

    def apply(x1: Tensor, x2: Tensor) -> Tensor:
        same_dtype(x1, x2)
        return function(x1, x2)

    return apply


def logical(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A type with two bool operands."""

    def apply(x1: Tensor, x2: Tensor) -> Tensor:
        of_dtype(x1, torch.bool)
        of_dtype(x2, torch.bool)
        return function(x1, x2)

    return apply


def logical_not(x: Tensor) -> Tensor:
    of_dtype(x, torch.bool)
    return torch.logical_not(x)


def promoted(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A type with two operands whose prototype promotes them to their common dtype."""

    def apply(x1: Tensor, x2: Tensor) -> Tensor:
        dtype = torch.promote_types(x1.dtype, x2.dtype)
        return function(x1.to(dtype), x2.to(dtype))

    return apply


def real_div(x1: Tensor, x2: Tensor) -> Tensor:
    """x1 / x2. Of integers the published result is an integer too, by a rounding that is not published."""
    same_dtype(x1, x2)
    floating(x1)
    return x1 / x2


def trunc(input_x: Tensor) -> Tensor:
    return torch.trunc(input_x)


def shift(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """RightShift, LeftShift of integers x by y bits; to the right of a signed integer its sign moves in."""

    def apply(x: Tensor, y: Tensor) -> Tensor:
        same_dtype(x, y)
        bits = 8 * x.element_size()
        if y.numel() and (int(y.min()) < 0 or int(y.max()) >= bits):
            raise Invalid(f"shifts from {int(y.min())} to {int(y.max())} of {bits} bits")
        return function(x, y)

    return apply


def exp(x: Tensor, *, base: float = -1.0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """base ^ (scale x + shift); base -1 stands for e."""
    floating(x)
    _base(base)
    if (base, scale, shift) == (-1.0, 1.0, 0.0):
        return torch.exp(x)
    exponent = scale * x.to(wide(x.dtype)) + shift
    return torch.exp(exponent * (1.0 if base == -1.0 else math.log(base))).to(x.dtype)


def log(x: Tensor, *, base: float = -1.0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """log of (scale x + shift) to a base; base -1 stands for e."""
    floating(x)
    _base(base)
    if (base, scale, shift) == (-1.0, 1.0, 0.0):
        return torch.log(x)
    value = torch.log(scale * x.to(wide(x.dtype)) + shift)
    return (value / (1.0 if base == -1.0 else math.log(base))).to(x.dtype)


def _base(base: float) -> None:
    if base != -1.0 and base <= 0:
        raise Unsupported(f"attribute 'base' = {base!r} is not known, only -1 (e) and positive bases")


def round_(x: Tensor, *, decimals: int = 0) -> Tensor:
    """To the nearest integer, halves to the even one."""
    if decimals:
        raise Unsupported(f"attribute 'decimals' = {decimals} is not known, only 0")
    return torch.round(x)


def muls(x: Tensor, *, value: float) -> Tensor:
    return (x.to(wide(x.dtype)) * value).to(x.dtype)


def adds(x: Tensor, *, value: float) -> Tensor:
    return (x.to(wide(x.dtype)) + value).to(x.dtype)


def axpy_v2(x1: Tensor, x2: Tensor, alpha: Tensor) -> Tensor:
    """x1 + alpha x2, promoted."""
    dtype = torch.promote_types(torch.promote_types(x1.dtype, x2.dtype), alpha.dtype)
    return x1.to(dtype) + _one(alpha).to(dtype) * x2.to(dtype)


def sxpy(x1: Tensor, x2: Tensor, alpha: Tensor | None = None) -> Tensor:
    """x1 - alpha x2."""
    same_dtype(x1, x2, alpha)
    return x1 - (x2 if alpha is None else _one(alpha) * x2)


def addcmul(input_data: Tensor, x1: Tensor, x2: Tensor, value: Tensor) -> Tensor:
    """input_data + value x1 x2."""
    same_dtype(input_data, x1, x2, value)
    dtype = wide(x1.dtype)
    return (input_data.to(dtype) + _one(value).to(dtype) * x1.to(dtype) * x2.to(dtype)).to(x1.dtype)


def addcdiv(input_data: Tensor, x1: Tensor, x2: Tensor, value: Tensor) -> Tensor:
    """input_data + value x1 / x2."""
    same_dtype(input_data, x1, x2, value)
    floating(x1)
    dtype = wide(x1.dtype)
    return (input_data.to(dtype) + _one(value).to(dtype) * x1.to(dtype) / x2.to(dtype)).to(x1.dtype)


def _one(value: Tensor) -> Tensor:
    """A factor: one element, whatever its rank."""
    if value.numel() != 1:
        raise Invalid(f"a factor has one element, got {list(value.shape)}")
    return value.reshape(())


def lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """start + weight (end - start)."""
    same_dtype(start, end, weight)
    floating(start)
    return torch.lerp(*torch.broadcast_tensors(start, end, weight))


def clip_by_value_v2(x: Tensor, clip_value_min: Tensor, clip_value_max: Tensor) -> Tensor:
    same_dtype(x, clip_value_min, clip_value_max)
    return torch.minimum(torch.maximum(x, clip_value_min), clip_value_max)


def select_v2(condition: Tensor, then: Tensor, else_: Tensor) -> Tensor:
    of_dtype(condition, torch.bool)
    same_dtype(then, else_)
    return torch.where(condition, then, else_)


def masked_fill(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """value is converted to the dtype of x, as published."""
    of_dtype(mask, torch.bool)
    return torch.where(mask, value.to(x.dtype), x)


def nan_to_num(x: Tensor, *, nan: float, posinf: float, neginf: float) -> Tensor:
    floating(x)
    return torch.nan_to_num(x, nan, posinf, neginf)


def cast(x: Tensor, *, dst_type: torch.dtype) -> Tensor:
    """Float to integer truncates; what does not fit saturates, and NaN becomes 0 (published for infinities of float16).

    An integer that does not fit a narrower integer is Invalid: the result is not published.
    """
    if x.dtype == dst_type or dst_type.is_floating_point or torch.bool in (dst_type, x.dtype):
        return x.to(dst_type)
    target = torch.iinfo(dst_type)
    if x.is_floating_point():
        return _saturated(x.to(wide(x.dtype)), dst_type, target)
    own = torch.iinfo(x.dtype)
    if x.numel() and (own.min < target.min or own.max > target.max):
        low, high = int(x.min()), int(x.max())
        if low < target.min or high > target.max:
            raise Invalid(f"integers from {low} to {high} do not fit {short(dst_type)}")
    return x.to(dst_type)


def _saturated(x: Tensor, dtype: torch.dtype, limits: torch.iinfo) -> Tensor:
    low, beyond = float(limits.min), float(limits.max + 1)  # powers of two: exact in every floating dtype
    below, above = x < low, x >= beyond
    inside = ~(below | above | (x != x))
    if bool(inside.all()):
        return x.to(dtype)
    y = torch.where(inside, x, 0.0).to(dtype)
    y = torch.where(above, torch.tensor(limits.max, dtype=dtype), y)
    return torch.where(below, torch.tensor(limits.min, dtype=dtype), y)


_UNARY: dict[str, Callable] = {
    "Abs": torch.abs,
    "Neg": torch.neg,
    "Sign": torch.sign,
    "Square": torch.square,
    "Invert": torch.bitwise_not,
}
_SMOOTH: dict[str, Callable] = {
    "Sqrt": torch.sqrt,
    "Rsqrt": torch.rsqrt,
    "Reciprocal": torch.reciprocal,
    "Expm1": torch.expm1,
    "Log1p": torch.log1p,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Tan": torch.tan,
    "Atan": torch.atan,
    "Erf": torch.erf,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "IsNan": torch.isnan,
    "IsInf": torch.isinf,
    "IsFinite": torch.isfinite,
}
_BINARY: dict[str, Callable] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "FloorDiv": lambda x1, x2: torch.div(x1, x2, rounding_mode="floor"),
    "TruncateDiv": lambda x1, x2: torch.div(x1, x2, rounding_mode="trunc"),
    "FloorMod": torch.remainder,
    "Mod": torch.fmod,
    "Maximum": torch.maximum,
    "Minimum": torch.minimum,
    "Atan2": torch.atan2,
    "Equal": torch.eq,
    "NotEqual": torch.ne,
    "Less": torch.lt,
    "LessEqual": torch.le,
    "Greater": torch.gt,
    "GreaterEqual": torch.ge,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
}
OPS: dict[str, Callable] = {
    **{name: unary(function) for name, function in _UNARY.items()},
    **{name: smooth(function) for name, function in _SMOOTH.items()},
    **{name: binary(function) for name, function in _BINARY.items()},
    "LogicalAnd": logical(torch.logical_and),
    "LogicalOr": logical(torch.logical_or),
    "LogicalNot": logical_not,
    "Mul": promoted(torch.mul),
    "Pow": promoted(torch.pow),
    "RealDiv": real_div,
    "Exp": exp,
    "Log": log,
    "Round": round_,
    "Trunc": trunc,
    "RightShift": shift(torch.bitwise_right_shift),
    "LeftShift": shift(torch.bitwise_left_shift),
    "Muls": muls,
    "Adds": adds,
    "AxpyV2": axpy_v2,
    "Sxpy": sxpy,
    "Addcmul": addcmul,
    "Addcdiv": addcdiv,
    "Lerp": lerp,
    "ClipByValueV2": clip_by_value_v2,
    "SelectV2": select_v2,
    "MaskedFill": masked_fill,
    "NanToNum": nan_to_num,
    "Cast": cast,
}
