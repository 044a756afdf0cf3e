"""Multi-tensor arithmetic: one node for a list of tensors.

Source: torchair's ge_ir.proto; prototypes in torchair's builders.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def add_scalar(x: list[Tensor], scalar: Tensor) -> list[Tensor]:
    return [t + scalar.item() for t in x]


def mul_scalar(x: list[Tensor], scalar: Tensor) -> list[Tensor]:
    return [t * scalar.item() for t in x]


def lerp_scalar(x1: list[Tensor], x2: list[Tensor], weight: Tensor) -> list[Tensor]:
    return [torch.lerp(a, b, weight.item()) for a, b in zip(x1, x2)]


def addcmul_scalar(x1: list[Tensor], x2: list[Tensor], x3: list[Tensor], scalar: Tensor) -> list[Tensor]:
    return [torch.addcmul(a, b, c, value=scalar.item()) for a, b, c in zip(x1, x2, x3)]


def addcdiv_scalar(x1: list[Tensor], x2: list[Tensor], x3: list[Tensor], scalar: Tensor) -> list[Tensor]:
    return [torch.addcdiv(a, b, c, value=scalar.item()) for a, b, c in zip(x1, x2, x3)]


def norm(x: list[Tensor], scalar: Tensor) -> list[Tensor]:
    return [torch.linalg.vector_norm(t, scalar.item()) for t in x]


OPS: dict[str, Callable] = {
    "ForeachAddScalar": add_scalar,
    "ForeachMulScalar": mul_scalar,
    "ForeachLerpScalar": lerp_scalar,
    "ForeachAddcmulScalar": addcmul_scalar,
    "ForeachAddcdivScalar": addcdiv_scalar,
    "ForeachNorm": norm,
}
