"""Batch norm (Ioffe & Szegedy 2015), numerically torch's BatchNorm1d and BatchNorm2d, statistics in float32.

Hand-written: the stock Ascend converter of `F.batch_norm(training=True)` returns its outputs in the wrong order
(shared/npu/COVERAGE.md, second risk), and a published model's statistics are state that a step must return. The
gradient is the closed form: half the graph nodes of differentiating the forward.
"""

from typing import Any

import torch
from torch import Tensor


def init(channels: int) -> tuple[dict, dict]:
    """(params, state), every leaf float32 [C]."""
    params = {"weight": torch.ones(channels), "bias": torch.zeros(channels)}
    return params, {"mean": torch.zeros(channels), "var": torch.ones(channels)}


def apply(
    params: dict,
    state: dict,
    x: Tensor,
    *,
    train: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    valid: Tensor | None = None,
) -> tuple[Tensor, dict]:
    """Normalises the channels of x: [B C H W], or rows [R C] of which `valid` [R] (bool) marks those that count.

    Returns y like x, rows that are not valid set to zero, and the new statistics (the running variance is unbiased,
    the one that normalises is not).
    """
    if train:
        mask = torch.ones((), device=x.device) if valid is None else valid[:, None].float()  # R 1
        count = mask.sum().clamp(min=1.0) if valid is not None else mask * (x.numel() // x.shape[1])
        # Under torch.compile, an input of torch.func.grad that goes straight into a Function counts as a constant (torch
        # 2.13, silently): a view of it does not.
        x, weight, bias = (t.view_as(t) for t in (x, params["weight"], params["bias"]))
        y, mean, var = _Normalise.apply(x, weight, bias, mask, count, eps)
        seen = {"mean": mean.detach(), "var": var.detach() * (count / (count - 1).clamp(min=1.0))}
        return y, {k: state[k] + momentum * (seen[k] - state[k]) for k in ("mean", "var")}
    scale = params["weight"] * torch.rsqrt(state["var"] + eps)  # C
    shift = params["bias"] - state["mean"] * scale
    y = x.float() * _per_channel(scale, x) + _per_channel(shift, x)
    return (y if valid is None else y * valid[:, None]).to(x.dtype), state


def _per_channel(c: Tensor, x: Tensor) -> Tensor:
    """[C] shaped to broadcast along axis 1 of x."""
    return c.view(1, -1, *[1] * (x.dim() - 2))


class _Normalise(torch.autograd.Function):
    """y = (x - mean) rstd weight + bias over the masked rows; mean and var [C] carry no gradient of their own."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, count: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dims = [d for d in range(x.dim()) if d != 1]
        wide = x.float()
        masked = mask.dim() > 0
        mean = ((wide * mask) if masked else wide).sum(dims) / count  # C
        centred = wide - _per_channel(mean, x)
        centred = centred * mask if masked else centred
        var = (centred * centred).sum(dims) / count  # two passes: no cancellation
        scale = weight * torch.rsqrt(var + eps)
        y = centred * _per_channel(scale, x) + _per_channel(bias, x)
        return (y * mask if masked else y).to(x.dtype), mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, _, mask, count, ctx.eps = inputs
        _, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        ctx.save_for_backward(x, weight, mask, count, mean, var)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
        # With h = (x - mean) rstd: dx = weight rstd (dy - mean(dy) - h mean(dy h)), means over the counted rows.
        x, weight, mask, count, mean, var = ctx.saved_tensors
        dims = [d for d in range(x.dim()) if d != 1]
        masked = mask.dim() > 0
        dy = grad.float() * mask if masked else grad.float()
        rstd = torch.rsqrt(var + ctx.eps)
        h = (x.float() - _per_channel(mean, x)) * _per_channel(rstd, x)
        grad_bias = dy.sum(dims)
        grad_weight = (dy * h).sum(dims)
        dx = dy - _per_channel(grad_bias / count, x) - h * _per_channel(grad_weight / count, x)
        dx = dx * _per_channel(weight * rstd, x)
        return (dx * mask if masked else dx).to(x.dtype), grad_weight, grad_bias, None, None, None
