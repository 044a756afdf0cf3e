"""Operators that torchair converts to something else than they mean, and that have no replacement here."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def reason(node: fx.Node) -> str | None:
    """Why this node of an aten graph must not be converted, with the way out; None if it may."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if "scaled_dot_product" in node.target.name():
        return "the fused attention of a CPU has no Ascend type; write it out as bevfn.layers.attention does"
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return "its seed would be a constant of the graph, the same numbers every step; use bevfn.rng"
    if (
        node.target._schema.is_mutable
    ):  # tracing resolves what a step writes in place, but not what a decomposition does
        return "it writes in place, and a GE graph is made of values; use the operator that returns a new one"
    check = _CHECKS.get(node.target)
    return check(node) if check is not None else None


def _max_pool(node: fx.Node) -> str | None:
    indices = [user for user in node.users if user.args[1] == 1]
    if any(u.target is not aten.max_pool2d_with_indices_backward.default for i in indices for u in i.users):
        return "torchair returns the maxima, cast to integers, as their indices; use the values only"
    return None


def _nearest(node: fx.Node) -> str | None:
    return _other_pixels(_operand(node).shape[2:], node)


def _nearest_backward(node: fx.Node) -> str | None:
    return _other_pixels(_argument(node, "input_size")[2:], node)


def _other_pixels(sizes: Any, node: fx.Node) -> str | None:
    """Pixel i is a copy of floor(i / scale) in torch, if a scale was given; of floor(i * in / out) in GE."""
    for size, out, name in zip(sizes, _argument(node, "output_size"), ("scales_h", "scales_w")):
        scale = _argument(node, name)
        if scale is None:
            continue
        theirs = (torch.arange(out, dtype=torch.float32) * torch.tensor(1 / scale, dtype=torch.float32)).long()
        if not torch.equal(theirs.clamp(max=size - 1), torch.arange(out) * size // out):
            return (
                f"scale_factor {scale} takes {size} to {out} pixels, of which Ascend copies others; give size= instead"
            )
    return None


def _as_strided(node: fx.Node) -> str | None:
    if _operand(node).is_contiguous():
        return None
    return "it reads memory by strides, and on the device memory is in the order of the axes; use permute and reshape"


def _matmul_backward(node: fx.Node) -> str:
    return "only a trace on an NPU has it, and torchair does not sum its gradient over the batch; trace on the CPU"


def _operand(node: fx.Node) -> torch.Tensor:
    """The fake tensor of its first argument."""
    source: Any = node.args[0]
    return source.meta["val"]


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of the node by its schema's name."""
    target: Any = node.target
    for i, argument in enumerate(target._schema.arguments):
        if argument.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, argument.default_value)
    raise KeyError(name)


_CHECKS: dict[Any, Callable[[fx.Node], str | None]] = {
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.upsample_nearest2d.default: _nearest,
    aten.upsample_nearest2d_backward.default: _nearest_backward,
    aten.as_strided.default: _as_strided,
    aten.matmul_backward.default: _matmul_backward,
}
