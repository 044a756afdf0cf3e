"""Activations and their gradients. The order of a gradient's operands differs from type to type.

Half precision is computed in float32 and rounded once. Source: hicann/ops-nn at e5c3fa93, activation/*/op_graph and
README.md; torchair's ge_ir.proto.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bevfn.ascend.interpret.node import fixed, floating, only, same_dtype, wide


def _rounded_once(function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """function of floating operands of one dtype."""
    same_dtype(*operands)
    floating(*operands)
    dtype = operands[0].dtype
    return function(*(operand.to(wide(dtype)) for operand in operands)).to(dtype)


def relu(x: Tensor) -> Tensor:
    return torch.relu(x)


def relu_grad(gradients: Tensor, features: Tensor) -> Tensor:
    same_dtype(gradients, features)
    return torch.where(features > 0, gradients, torch.zeros((), dtype=gradients.dtype))


def leaky_relu(x: Tensor, *, negative_slope: float = 0.0) -> Tensor:
    return _rounded_once(lambda x: torch.where(x > 0, x, x * negative_slope), x)


def leaky_relu_grad(gradients: Tensor, features: Tensor, *, negative_slope: float = 0.0) -> Tensor:
    return _rounded_once(lambda g, x: torch.where(x > 0, g, g * negative_slope), gradients, features)


@fixed(complex_conj=False)
def sigmoid_grad(y: Tensor, dy: Tensor) -> Tensor:
    return _rounded_once(lambda y, dy: dy * y * (1 - y), y, dy)


@fixed(complex_conj=False)
def tanh_grad(y: Tensor, dy: Tensor) -> Tensor:
    return _rounded_once(lambda y, dy: dy * (1 - y * y), y, dy)


def gelu(x: Tensor) -> Tensor:
    """The tanh form: Gelu has no attribute, and this is the formula that its page publishes (activation/gelu/README).

    So a converter that emits it for torch's exact gelu is off by up to 5e-4; GeluV2 says which formula it means.
    """
    return _rounded_once(lambda x: F.gelu(x, approximate="tanh"), x)


def gelu_grad(dy: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of the tanh form; y, the forward result, only has to be there (torchair passes dy again)."""
    return _rounded_once(lambda dy, x, y: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"), dy, x, y)


def gelu_v2(x: Tensor, *, approximate: str = "none") -> Tensor:
    only("approximate", approximate, "none", "tanh")
    return _rounded_once(lambda x: F.gelu(x, approximate=approximate), x)


def gelu_grad_v2(dy: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    only("approximate", approximate, "none", "tanh")
    return _rounded_once(lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate=approximate), dy, x)


def swish(x: Tensor, *, scale: float = 1.0) -> Tensor:
    """x / (1 + exp(-scale x))."""
    return _rounded_once(lambda x: x * torch.sigmoid(scale * x), x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), without overflow."""
    return _rounded_once(lambda x: torch.logaddexp(x, torch.zeros_like(x)), x)


def hard_swish(x: Tensor) -> Tensor:
    return _rounded_once(F.hardswish, x)


def hard_swish_grad(grad: Tensor, x: Tensor) -> Tensor:
    return _rounded_once(torch.ops.aten.hardswish_backward, grad, x)


def elu(x: Tensor, *, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    return _rounded_once(lambda x: torch.ops.aten.elu(x, alpha, scale, input_scale), x)


def elu_grad_v2(
    grads: Tensor,
    activations: Tensor,
    *,
    alpha: float = 1.0,
    scale: float = 1.0,
    input_scale: float = 1.0,
    is_result: bool = False,
) -> Tensor:
    return _rounded_once(
        lambda g, x: torch.ops.aten.elu_backward(g, alpha, scale, input_scale, is_result, x), grads, activations
    )


OPS: dict[str, Callable] = {
    "Relu": relu,
    "ReluGrad": relu_grad,
    "LeakyRelu": leaky_relu,
    "LeakyReluGrad": leaky_relu_grad,
    "SigmoidGrad": sigmoid_grad,
    "TanhGrad": tanh_grad,
    "Gelu": gelu,
    "GeluGrad": gelu_grad,
    "GeluV2": gelu_v2,
    "GeluGradV2": gelu_grad_v2,
    "Swish": swish,
    "Softplus": softplus,
    "HardSwish": hard_swish,
    "HardSwishGrad": hard_swish_grad,
    "Elu": elu,
    "EluGradV2": elu_grad_v2,
}
