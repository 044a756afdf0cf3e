"""Batch norm (Ioffe & Szegedy 2015), numerically torch's BatchNorm1d and BatchNorm2d, statistics in float32.

Hand-written: the stock Ascend converter of `F.batch_norm(training=True)` returns its outputs in the wrong order
(shared/npu/COVERAGE.md, second risk), and a published model's statistics are state that a step must return.
"""

import torch
from torch import Tensor


def init(channels: int) -> tuple[dict, dict]:
    """(params, state), every leaf float32 [C]."""
    params = {"weight": torch.ones(channels), "bias": torch.zeros(channels)}
    return params, {"mean": torch.zeros(channels), "var": torch.ones(channels)}


def apply(
    params: dict, state: dict, x: Tensor, *, train: bool, momentum: float = 0.1, eps: float = 1e-5,
    valid: Tensor | None = None,
) -> tuple[Tensor, dict]:
    """Normalises the channels of x: [B C H W], or rows [... C] of which `valid` [...] (bool) marks those that count.

    Returns y like x, rows that are not valid set to zero, and the new statistics (the running variance is unbiased,
    the one that normalises is not).
    """
    axis = 1 if x.dim() == 4 and valid is None else x.dim() - 1
    dims = [d for d in range(x.dim()) if d != axis]
    shape = [-1 if d == axis else 1 for d in range(x.dim())]
    mask = None if valid is None else valid[..., None].float()  # ... 1
    mean, var = state["mean"], state["var"]  # C
    wide = x.float()
    if train:
        if mask is None:
            count = x.numel() / x.shape[axis]
            mean = wide.mean(dims)  # C
            centred = wide - mean.view(shape)
            var = (centred * centred).mean(dims)
            unbias = count / max(count - 1, 1)
        else:
            count = mask.sum().clamp(min=1.0)
            mean = (wide * mask).sum(dims) / count
            centred = (wide - mean.view(shape)) * mask
            var = (centred * centred).sum(dims) / count
            unbias = count / (count - 1).clamp(min=1.0)
        seen = {"mean": mean.detach(), "var": var.detach() * unbias}
        state = {k: state[k] + momentum * (seen[k] - state[k]) for k in ("mean", "var")}
    scale = params["weight"] * torch.rsqrt(var + eps)  # C
    y = (wide - mean.view(shape)) * scale.view(shape) + params["bias"].view(shape)
    if mask is not None:
        y = y * mask
    return y.to(x.dtype), state
