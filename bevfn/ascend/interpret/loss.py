"""Softmax and losses with their gradients.

Source: hicann/ops-nn at e5c3fa93, activation/*softmax*, loss/*/op_graph; torchair's ge_ir.proto.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bevfn.ascend.interpret.node import Unsupported, floating, of_dtype, only, same_dtype, wide

_REDUCTION = {"none": 0, "mean": 1, "sum": 2}  # aten's numbers


def _one_axis(axes: list[int]) -> int:
    if len(axes) != 1:
        raise Unsupported(f"axes {axes}: only one is known")
    return axes[0]


def softmax_v2(x: Tensor, *, axes: list[int] = [-1], half_to_float: bool = False) -> Tensor:  # noqa: B006
    """half_to_float: float32 of float16."""
    floating(x)
    y = torch.softmax(x.to(wide(x.dtype)), _one_axis(axes))
    return y if half_to_float and x.dtype == torch.float16 else y.to(x.dtype)


def softmax_grad(softmax: Tensor, grad_softmax: Tensor, *, axes: list[int] = [-1]) -> Tensor:  # noqa: B006
    same_dtype(softmax, grad_softmax)
    y, g = softmax.to(wide(softmax.dtype)), grad_softmax.to(wide(softmax.dtype))
    return ((g - (g * y).sum(_one_axis(axes), keepdim=True)) * y).to(softmax.dtype)


def log_softmax_v2(logits: Tensor, *, axes: list[int] = [-1]) -> Tensor:  # noqa: B006
    floating(logits)
    return torch.log_softmax(logits, _one_axis(axes))


def log_softmax_grad(grad: Tensor, x: Tensor, *, axis: list[int] = [-1]) -> Tensor:  # noqa: B006
    """x is the forward result."""
    same_dtype(grad, x)
    g, y = grad.to(wide(x.dtype)), x.to(wide(x.dtype))
    return (g - torch.exp(y) * g.sum(_one_axis(axis), keepdim=True)).to(x.dtype)


def nll_loss(
    x: Tensor, target: Tensor, weight: Tensor | None = None, *, reduction: str = "mean", ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """-> loss, sum of the weights of the targets that count."""
    only("reduction", reduction, *_REDUCTION)
    of_dtype(target, torch.int32, torch.int64)
    return torch.ops.aten.nll_loss_forward(x, target.long(), weight, _REDUCTION[reduction], ignore_index)


def nll_loss_grad(
    x: Tensor,
    y_grad: Tensor,
    target: Tensor,
    weight: Tensor,
    total_weight: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    only("reduction", reduction, *_REDUCTION)
    return torch.ops.aten.nll_loss_backward(
        y_grad, x, target.long(), weight, _REDUCTION[reduction], ignore_index, total_weight
    )


def mse_loss(predict: Tensor, label: Tensor, *, reduction: str = "mean") -> Tensor:
    only("reduction", reduction, *_REDUCTION)
    same_dtype(predict, label)
    return F.mse_loss(predict.to(wide(predict.dtype)), label.to(wide(label.dtype)), reduction=reduction).to(
        predict.dtype
    )


def mse_loss_grad(predict: Tensor, label: Tensor, dout: Tensor, *, reduction: str = "mean") -> Tensor:
    only("reduction", reduction, *_REDUCTION)
    same_dtype(predict, label, dout)
    dtype = wide(predict.dtype)
    count = predict.numel() if reduction == "mean" else 1
    return (2 * (predict.to(dtype) - label.to(dtype)) * dout.to(dtype) / count).to(predict.dtype)


OPS: dict[str, Callable] = {
    "SoftmaxV2": softmax_v2,
    "SoftmaxGrad": softmax_grad,
    "LogSoftmaxV2": log_softmax_v2,
    "LogSoftmaxGrad": log_softmax_grad,
    "NLLLoss": nll_loss,
    "NLLLossGrad": nll_loss_grad,
    "MseLoss": mse_loss,
    "MseLossGrad": mse_loss_grad,
}
