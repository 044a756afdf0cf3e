"""Aten operators that torch.onnx 2.13 cannot translate to ONNX, or translates wrongly, in ONNX operators.

What is wrong there, without a word (tests/test_export.py holds each against torch): a quotient of integers is computed in
float32, which is exact below 2^24 only; int32 indices (`index_add`, `index`, `index_put`) make a graph that no runtime loads.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import ir, opset18
from torch import Tensor

aten = torch.ops.aten
op: Any = opset18  # whose annotations are of ONNX's tensors, not of what stands for them while a graph is built
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def sort_stable(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """TopK over the whole axis. Of equal elements it gives the one with the lower index first, so it is stable."""
    length = op.Shape(self, start=dim, end=dim + 1 or None)
    return op.TopK(self, length, axis=dim, largest=int(descending), sorted=1)


def index_add(self: Any, dim: int, index: Any, source: Any, alpha: float = 1) -> Any:
    """ScatterND, which adds rows of the first axis; in float32 for float16, which onnxruntime's CPU does not add."""
    if dim != 0 or alpha != 1:
        raise NotImplementedError("index_add is translated along the first axis and without a factor")
    places = op.Unsqueeze(op.Cast(index, to=ir.DataType.INT64), [-1])
    if self.dtype != HALF:
        return op.ScatterND(self, places, source, reduction="add")
    sums = op.ScatterND(op.Cast(self, to=FLOAT), places, op.Cast(source, to=FLOAT), reduction="add")
    return op.Cast(sums, to=HALF)


def divide(self: Any, other: Any, rounding_mode: str) -> Any:
    """A quotient of integers rounded down or towards zero. ONNX's Div rounds towards zero: one less where a remainder has
    another sign than the divisor."""
    if not self.dtype.is_integer():
        raise NotImplementedError("div with a rounding mode is translated of integers")
    other, zero = op.CastLike(other, self), op.CastLike(0, self)
    quotient = op.Div(self, other)
    if rounding_mode == "trunc":
        return quotient
    rest = op.Sub(self, op.Mul(quotient, other))
    below = op.And(op.Not(op.Equal(rest, zero)), op.Xor(op.Less(rest, zero), op.Less(other, zero)))
    return op.Sub(quotient, op.CastLike(below, self))


def clamp(x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    """An integer and a float as bounds of a float tensor, with which torch.onnx's promotion of types fails: both as floats."""
    if not x.is_floating_point() or not (isinstance(min, int) or isinstance(max, int)):
        return NotImplemented
    return aten.clamp.default(x, *(None if bound is None else float(bound) for bound in (min, max)))


def index(x: Tensor, indices: list[Tensor | None]) -> Tensor:
    """Indices of int32 as int64, which ONNX's GatherND asks for."""
    return aten.index.Tensor(x, _int64(indices)) if _int32(indices) else NotImplemented


def index_put(x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """As `index`, for ScatterND; halves are added in float32, as of `index_add`."""
    if accumulate and x.dtype == torch.float16:
        return aten.index_put.default(x.float(), indices, values.float(), True).half()
    return aten.index_put.default(x, _int64(indices), values, accumulate) if _int32(indices) else NotImplemented


def _int32(indices: list[Tensor | None]) -> bool:
    return any(one is not None and one.dtype == torch.int32 for one in indices)


def _int64(indices: list[Tensor | None]) -> list[Tensor | None]:
    return [one.long() if one is not None and one.dtype == torch.int32 else one for one in indices]


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.clamp.default: clamp,
    aten.index.Tensor: index,
    aten.index_put.default: index_put,
}
"""{overload: the same in others}, while the model is traced; a function that gives NotImplemented leaves it as it is."""
TABLE: dict[Any, Callable[..., Any]] = {
    aten.sort.stable: sort_stable,
    aten.index_add.default: index_add,
    aten.div.Tensor_mode: divide,
    aten.div.Scalar_mode: divide,
}
"""{overload: the same in ONNX's operators}, in the place of torch.onnx's own or where it has none, see `onnx.write`."""
