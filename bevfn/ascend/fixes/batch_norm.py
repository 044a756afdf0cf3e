"""Batch norm of images in training, by the four operators that Ascend has for it.

torch's operator gives the reciprocal deviation and takes it for the gradient; Ascend's give and take the variance. So torch's
becomes two of ours while the step is traced, with the variance between them, and `variances` takes out what turns the one
into the other and back. On the device the variance is a difference of squares, see `interpret.a2`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import get_decompositions

aten = torch.ops.aten
_FORWARD, _BACKWARD = aten._native_batch_norm_legit.no_stats, aten.native_batch_norm_backward.default
_TORCH = get_decompositions([_FORWARD, _BACKWARD])

FUSED = True
"""Whether they are used. If not, the closed form is, which is slower on paper: for who finds them wrong on a device."""

_library = torch.library.Library("bevfn", "FRAGMENT")
_library.define("batch_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)")
_library.define(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor var, float eps)"
    " -> (Tensor, Tensor, Tensor)"
)


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [B C H W], weight and bias [C] float32 -> y like x, mean and biased variance [C] float32."""
    y, mean, rstd = _written_out(x, weight, bias, True, 0.0, eps)
    return y, mean, rstd.pow(-2) - eps


def batch_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; grad is of y."""
    return _TORCH[_BACKWARD](grad, x, weight, None, None, mean, torch.rsqrt(var + eps), True, eps, [True] * 3)


_library.impl("batch_norm", batch_norm, "CompositeExplicitAutograd")
_library.impl("batch_norm_backward", batch_norm_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("bevfn::batch_norm", lib=_library)
def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


@torch.library.register_fake("bevfn::batch_norm_backward", lib=_library)
def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _written_out(x: Tensor, *more: Any) -> tuple[Tensor, ...]:
    """Torch's, of float32: it rounds the statistics to x's dtype on a CPU (2.13), which its operator does not."""
    y, *statistics = _TORCH[_FORWARD](x.float(), *more)
    return y.to(x.dtype), *statistics


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float) -> Any:
    if not training or bias is None or not _takes(x, weight):
        return _written_out(x, weight, bias, training, momentum, eps)
    y, mean, var = torch.ops.bevfn.batch_norm(x, weight, bias, eps)
    return y, mean, torch.rsqrt(var + eps)


def _backward(grad: Tensor, x: Tensor, weight: Tensor | None, *more: Any) -> Any:
    _, _, mean, rstd, training, eps, _ = more
    if not training or not _takes(x, weight):
        return _TORCH[_BACKWARD](grad, x, weight, *more)
    return torch.ops.bevfn.batch_norm_backward(grad.to(x.dtype), x, weight, mean, rstd.pow(-2) - eps, eps)


def _takes(x: Tensor, weight: Tensor | None) -> bool:
    """Whether A2's kernels take it: images of at most float32, with float32 per channel."""
    return x.dim() == 4 and x.element_size() <= 4 and weight is not None and weight.dtype == torch.float32


def decompositions() -> dict[Any, Callable]:
    """{overload: function}, over torch's own."""
    return {_FORWARD: _forward, _BACKWARD: _backward} if FUSED else {_FORWARD: _written_out}


def variances(module: fx.GraphModule) -> None:
    """rsqrt(var + eps) ** -2 - eps is var: without cancellation, and without nodes."""
    for node in list(module.graph.nodes):
        power = _operand(node, aten.sub.Tensor, *node.args[1:])
        total = _operand(_operand(power, aten.pow.Tensor_Scalar, -2), aten.rsqrt.default)
        if (var := _operand(total, aten.add.Tensor, *node.args[1:])) is not None:
            node.replace_all_uses_with(var)


def _operand(node: fx.Node | None, target: Any, *constants: Any) -> fx.Node | None:
    """The first operand of a node of this target and of these constants beside it; None if it is no such node."""
    if node is None or node.target is not target or node.args[1:] != constants:
        return None
    operand = node.args[0]
    return operand if isinstance(operand, fx.Node) else None


def converters() -> dict[Any, Callable]:
    """{overload: converter}; torchair must be loaded."""
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair._ge_concrete_graph.utils import specific_op_input_layout, specific_op_output_layout
    from torchair.ge._ge_graph import DataType

    def images(node: Any, operands: int, results: int) -> None:
        specific_op_input_layout(node, indices=list(range(operands)), layout="NCHW")
        specific_op_output_layout(node, indices=list(range(results)), layout="NCHW")

    def forward(x: Any, weight: Any, bias: Any, eps: float, meta_outputs: Any = None) -> Any:
        total, squares = ge.BNTrainingReduce(x)
        images(total, 1, 2)
        # The running statistics that it writes to are nobody's: the step's are of any `train`, and are updated by it.
        channels = meta_outputs[1].size[0]
        running = [ge.TensorMove(ge.Const([n] * channels, dtype=DataType.DT_FLOAT)) for n in (0.0, 1.0)]
        made = ge.BNTrainingUpdate(x, total, squares, weight, bias, *running, factor=0.0, epsilon=eps)
        images(made[0], 7, 5)
        return made[0], made[3], made[4]

    def backward(grad: Any, x: Any, weight: Any, mean: Any, var: Any, eps: float, meta_outputs: Any = None) -> Any:
        of_weight, of_bias = ge.BNTrainingUpdateGrad(grad, x, mean, var, epsilon=eps)
        images(of_weight, 4, 2)
        of_x = ge.BNTrainingReduceGrad(grad, x, of_weight, of_bias, weight, mean, var, epsilon=eps)
        images(of_x, 7, 1)
        return of_x, of_weight, of_bias

    return {
        torch.ops.bevfn.batch_norm.default: forward,
        torch.ops.bevfn.batch_norm_backward.default: backward,
    }
