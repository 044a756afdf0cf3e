"""Batch norm (Ioffe & Szegedy 2015), numerically torch's BatchNorm1d and BatchNorm2d, statistics in float32.

Hand-written: the stock Ascend converter of `F.batch_norm(training=True)` returns its outputs in the wrong order
(torch_npu 2.13.0), and a published model's statistics are state that a step must return. The
gradient is the closed form: half the graph nodes of differentiating the forward. Images and masked rows whose statistics are their own
are an operator (`kernels.batch_norm`), for Ascend's sake and that of CPUs.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bevfn import tree
from bevfn.distributed import Groups, Replicas, Train
from bevfn.kernels import batch_norm as kernel
from bevfn.kernels import derivatives
from bevfn.kernels.batch_norm import reference


@tree.register
@dataclass(frozen=True)
class Held:
    """Statistics, both [C], of a batch norm that is not trained: in training too it normalises by them, and keeps them."""

    mean: Tensor
    var: Tensor


def init(channels: int) -> tuple[dict, dict]:
    """(params, state), every leaf float32 [C]."""
    params = {"weight": torch.ones(channels), "bias": torch.zeros(channels)}
    return params, {"mean": torch.zeros(channels), "var": torch.ones(channels)}


def hold(state: Any, paths: Container[str], at: str = "") -> Any:
    """The state of a network whose batch norms at these dotted paths of it are `Held`."""
    if at in paths:
        return Held(**state)
    if isinstance(state, dict):
        return {name: hold(part, paths, f"{at}.{name}" if at else name) for name, part in state.items()}
    if isinstance(state, list):
        return [hold(part, paths, f"{at}.{i}") for i, part in enumerate(state)]
    return state


def apply(
    params: dict,
    state: Any,
    x: Tensor,
    *,
    train: Train,
    momentum: float = 0.1,
    eps: float = 1e-5,
    valid: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Any]:
    """Normalises the channels of x: [B C H W], or rows [R C] of which `valid` [R] (bool) marks those that count; `relu`: and
    cuts what is below 0.

    With `Replicas` as `train` the statistics are those of all replicas' rows (synchronised batch norm): one collective
    forward, one backward. The gradients of weight and bias are this replica's share; the step averages them with all
    others. With `Groups` every part of the batch has its own, and `valid` must be None.

    Returns y like x, rows that are not valid set to zero, and the new statistics (the running variance is unbiased,
    the one that normalises is not). A state that is `Held` stays as it is.
    """
    if isinstance(state, Held):
        y, _ = apply(params, {"mean": state.mean, "var": state.var}, x, train=False, eps=eps, valid=valid, relu=relu)
        return y, state
    if isinstance(train, Groups):
        if valid is not None or len(x) % train.count:
            raise ValueError(f"{len(x)} rows must be {train.count} groups of equal size, without `valid`")
        y, seen = _normalised_apart(params, x, train, eps, relu)
        # r <- r + momentum (s - r) group after group is a sum, since the factors of r and of all s add up to 1.
        powers = [momentum * (1 - momentum) ** i for i in reversed(range(train.count))]
        factors = torch.tensor(powers, device=x.device)[:, None]  # G 1
        return y, {k: state[k] + (factors * (seen[k] - state[k])).sum(0) for k in ("mean", "var")}
    if train:
        y, seen = _normalised(params, x, valid, eps, train if isinstance(train, Replicas) else None, relu)
        return y, {k: state[k] + momentum * (seen[k] - state[k]) for k in ("mean", "var")}
    scale = params["weight"] * torch.rsqrt(state["var"] + eps)  # C
    shift = params["bias"] - state["mean"] * scale
    y = x.float() * _per_channel(scale, x) + _per_channel(shift, x)
    y = (y if valid is None else y * valid[:, None]).to(x.dtype)
    return torch.relu(y) if relu else y, state


def again(before: Any, after: Any, now: Any, *, momentum: float = 0.1) -> Any:
    """The statistics `now` updated once more by the batch that took them from `before` to `after`.

    All three are states of one network whose batch norms have this momentum; those that stood still, stand still.
    """
    return tree.map(lambda old, new, last: last + (new - old) - momentum * (last - old), before, after, now)


def _normalised_apart(
    params: dict, x: Tensor, groups: Groups, eps: float, relu: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """x [B C ...], every group of it by its own statistics, which are [G C]."""
    parts = x.view(groups.count, -1, *x.shape[1:])  # G B/G C ...
    if groups.replicas is None and _by_operator(parts[0], params["weight"], None):
        each, seen = zip(*(_normalised(params, part, None, eps, None, relu) for part in parts.unbind()))
        return torch.cat(each), {name: torch.stack([own[name] for own in seen]) for name in ("mean", "var")}
    weights = {name: leaf.expand(groups.count, -1) for name, leaf in params.items()}
    y, pooled = _normalised(weights, parts, None, eps, groups.replicas, relu)
    return y.reshape(x.shape), pooled


def _normalised(
    params: dict, x: Tensor, valid: Tensor | None, eps: float, replicas: Replicas | None, relu: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """x [B C ...] and params [C], or groups [G B C ...] and [G C], to (y, {"mean", unbiased "var"} like the params)."""
    weight, bias = params["weight"], params["bias"]
    fused = replicas is None and _by_operator(x, weight, valid)
    inside = fused and relu and torch.compiler.is_compiling()  # in eager mode not: Ascend's operators have none
    after = torch.relu if relu and not inside else lambda y: y
    if fused and valid is None:
        y, mean, var = kernel.batch_norm(x, weight, bias, eps, relu=inside)
        counted = x.numel() // x.shape[1]
        return after(y), {"mean": mean, "var": var * (counted / max(counted - 1, 1))}
    mask = torch.ones((), device=x.device) if valid is None else valid[:, None].float()  # R 1
    rows = mask.sum() if valid is not None else mask * (x.numel() // weight.numel())
    if fused:
        y, mean, var = kernel.batch_norm(x, weight, bias, eps, mask, rows.clamp(min=1.0), inside)
        return after(y), {"mean": mean, "var": var * (rows / (rows - 1).clamp(min=1.0))}
    # Under torch.compile, an input of torch.func.grad that goes straight into a Function counts as a constant (torch
    # 2.13, silently): a view of it does not.
    x, weight, bias = (t.view_as(t) for t in (x, weight, bias))
    function = _Normalise if torch.compiler.is_dynamo_compiling() else _NormaliseForward
    y, mean, var, count = function.apply(x, weight, bias, mask, rows, eps, replicas)
    return after(y), {"mean": mean.detach(), "var": var.detach() * (count / (count - 1).clamp(min=1.0))}


def _by_operator(x: Tensor, weight: Tensor, valid: Tensor | None) -> bool:
    """Images, and rows of which some count, a sparse convolution's: in eager mode, in which a step is traced for Ascend too, and
    compiled for a CPU; a compiler for GPUs fuses the closed form that it sees. Not rows of which all count, to which images of one
    pixel belong: on Ascend the operator's variance is a difference of squares (docs/ascend.md), and such rows may be no
    activations: camera matrices are far off 0."""
    images = x.dim() == 4 and x.shape[2:].numel() > 1
    here = x.device.type == "cpu" or not torch.compiler.is_compiling()
    return (images or valid is not None) and weight.dim() == 1 and here


def _per_channel(c: Tensor, x: Tensor) -> Tensor:
    """[C] shaped to broadcast along axis 1 of x, or [G C] along axes 0 and 2."""
    return c.view(*c.shape[:-1], 1, -1, *[1] * (x.dim() - c.dim() - 1))


def _pooled_axes(c: Tensor, x: Tensor) -> list[int]:
    """Axes of x over which statistics shaped like c [C] or [G C] are taken."""
    kept = (1,) if c.dim() == 1 else (0, 2)
    return [axis for axis in range(x.dim()) if axis not in kept]


class _Normalise(torch.autograd.Function):
    """y = (x - mean) rstd weight + bias over the masked rows; mean, var and count are statistics. Shapes: see `_normalised`.

    That of a second derivative goes through mean and var, which the first one reads.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, rows: Tensor, eps: float, replicas: Replicas | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.float()
        mean, var, centred = _moments(wide, mask, rows.clamp(min=1.0), _pooled_axes(weight, x))
        count = rows
        if replicas is not None:
            mean, var, count = _pooled(mean, var, rows, replicas)
            centred = _masked(wide - _per_channel(mean, x), mask)
        scale = weight * torch.rsqrt(var + eps)
        y = centred * _per_channel(scale, x) + _per_channel(bias, x)
        return _masked(y, mask).to(x.dtype), mean, var, count.clamp(min=1.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, _, mask, _, ctx.eps, ctx.replicas = inputs
        _, mean, var, count = output
        ctx.mark_non_differentiable(count)
        ctx.set_materialize_grads(False)  # mean and var have a gradient only in second derivatives
        ctx.save_for_backward(x, weight, mask, count, mean, var)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_mean: Tensor | None, of_var: Tensor | None, _: None) -> tuple:
        # With h = (x - mean) rstd: dx = weight rstd (dy - mean(dy) - h mean(dy h)), means over the counted rows.
        x, weight, mask, count, mean, var = ctx.saved_tensors
        dims = _pooled_axes(mean, x)
        dy = _masked(torch.zeros_like(x, dtype=torch.float32) if grad is None else grad.float(), mask)
        rstd = torch.rsqrt(var + ctx.eps)
        h = (x.float() - _per_channel(mean, x)) * _per_channel(rstd, x)
        grad_bias = sum_dy = dy.sum(dims)
        grad_weight = sum_dyh = (dy * h).sum(dims)
        if ctx.replicas is not None:
            sum_dy, sum_dyh = ctx.replicas.sum(torch.stack([sum_dy, sum_dyh])).unbind()
        dx = dy - _per_channel(sum_dy / count, x) - h * _per_channel(sum_dyh / count, x)
        dx = dx * _per_channel(weight * rstd, x)
        if of_mean is not None or of_var is not None:
            if ctx.replicas is not None:
                raise RuntimeError(
                    "batch norm over replicas has first derivatives only: take second ones in one process (train=True)."
                )
            centred = x.float() - _per_channel(mean, x)
            if of_mean is not None:
                dx = dx + _per_channel(of_mean / count, x)
            if of_var is not None:
                dx = dx + 2 * centred * _per_channel(of_var / count, x)
        return _masked(dx, mask).to(x.dtype), grad_weight, grad_bias, None, None, None, None


class _NormaliseForward(_Normalise):
    """With forward mode, which Dynamo refuses to read."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _Normalise.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:5])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple:
        if ctx.replicas is not None:
            raise RuntimeError("batch norm over replicas has no forward-mode derivative: take it in one process.")
        operands = (*ctx.saved_tensors, ctx.eps, None)
        return *derivatives.pushforward(_Normalise.forward, operands, tangents)[:3], None


def _moments(wide: Tensor, mask: Tensor, count: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, biased variance, masked wide - mean) over `dims`, in two passes: no cancellation."""
    mean = reference.total(_masked(wide, mask), dims) / count
    centred = _masked(wide - _per_channel(mean, wide), mask)
    return mean, reference.total(centred * centred, dims) / count, centred


def _pooled(mean: Tensor, var: Tensor, rows: Tensor, replicas: Replicas) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count over all replicas from each one's own (Chan, Golub & LeVeque 1979): no cancellation."""
    own = torch.cat([rows.reshape(1), mean.reshape(-1), var.reshape(-1)])
    rows, means, variances = replicas.stack(own).split([1, mean.numel(), var.numel()], dim=1)  # count 1, count (G)C
    shape, count = mean.shape, rows.sum()
    divisor = count.clamp(min=1.0)
    mean = (rows * means).sum(0) / divisor
    var = (rows * (variances + (means - mean) ** 2)).sum(0) / divisor
    return mean.view(shape), var.view(shape), count


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    return x * mask if mask.dim() > 0 else x
