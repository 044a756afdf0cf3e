"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): of a block only its operands are kept for the backward
pass, which computes the block once more.

    y, new_state = remat.apply(partial(block, train=train), params, state, x, recompute=config.recompute)

The block runs again in plain sight, as nodes of the step's one graph: `torch.utils.checkpoint` works by hooks on saved
tensors, of which `torch.func` and a graph traced for inference know nothing. Its inputs `wait_for` the gradient that asks
for it, so that no compiler merges the two runs or moves the second one forward.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from bevfn.kernels import derivatives
from bevfn.kernels.wait_for import wait_for

SWITCH = "recompute"  # the field of a config


def apply(f: Callable, params: Any, state: Any, *inputs: Any, recompute: bool) -> tuple[Any, Any]:
    """f(params, state, *inputs) -> (outputs, new state); with `recompute` twice, for the same bits in both directions.

    All derivatives, as without; `torch.func.grad` keeps what it needs for a second one, so only `torch.func.vjp` under
    `torch.no_grad` (the train step) saves memory. Collectives in f run once more too, on all replicas in one order.

    Args:
        f: pure. No gradient flows through the new state. Every tensor is an argument: to one that f holds none would flow.
        params, state, inputs: pytrees; so are the outputs and the new state, of tensors.

    Raises ValueError if f holds a tensor.
    """
    if not recompute:
        # As with it, the gradients of an input's uses are added up in the block before those of other blocks: sums of
        # three depend on their order.
        return f(params, state, *pytree.tree_map_only(Tensor, _alias, inputs))
    if _holds_tensors(f):
        raise ValueError(f"{_plain(f).__qualname__} holds tensors, which get no gradient: pass them as inputs")
    leaves, spec = pytree.tree_flatten((params, state, inputs))
    tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    weights = len(pytree.tree_leaves((params, state)))
    block = _Block(f, leaves, spec, tuple(tensors), first_input=sum(i < weights for i in tensors))
    return block.returned(_Recomputed.apply(block, *tensors.values()))


def switched_on(config: Any) -> Any:
    """A network's config with every `recompute` in it on. Raises ValueError if there is none."""
    switched, found = _switched_on(config)
    if not found:
        raise ValueError(f"{type(config).__module__} recomputes no block; leave --checkpoint-activations out")
    return switched


def _switched_on(config: Any) -> tuple[Any, bool]:
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config, False
    parts = {field.name: _switched_on(getattr(config, field.name)) for field in dataclasses.fields(config)}
    changes: dict[str, Any] = {name: part for name, (part, found) in parts.items() if found}
    if SWITCH in parts:
        changes[SWITCH] = True
    return (dataclasses.replace(config, **changes), True) if changes else (config, False)


def _alias(x: Tensor) -> Tensor:
    return torch.ops.aten.alias(x) if x.is_floating_point() else x


def _plain(f: Callable) -> Any:
    return _plain(f.func) if isinstance(f, partial) else f


def _holds_tensors(f: Callable) -> bool:
    held: list[Any] = [cell.cell_contents for cell in getattr(_plain(f), "__closure__", None) or ()]
    while isinstance(f, partial):
        held += [f.args, f.keywords]
        f = f.func
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(held))


class _Block:
    """f as a function of a flat list of tensors; what it returned last, as pytrees again."""

    def __init__(
        self, f: Callable, leaves: list, spec: pytree.TreeSpec, tensors: tuple[int, ...], first_input: int
    ) -> None:
        self.f, self.spec, self.tensors, self.first_input = f, spec, tensors, first_input
        self.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.outputs = 0  # leaves of the outputs; the others that f returned are the new state's

    def __call__(self, *operands: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(outputs, new state), flat."""
        given = list(self.others)
        for i, operand in zip(self.tensors, operands):
            given[i] = operand
        params, state, inputs = pytree.tree_unflatten(given, self.spec)
        outputs, new = self.f(params, state, *inputs)
        outputs, self.outputs_spec = pytree.tree_flatten(outputs)
        new, self.new_spec = pytree.tree_flatten(new)
        self.outputs = len(outputs)
        return tuple(outputs), tuple(new)

    def returned(self, results: tuple[Tensor, ...]) -> tuple[Any, Any]:
        """What f returned, of its leaves."""
        outputs, new = results[: self.outputs], results[self.outputs :]
        return pytree.tree_unflatten(outputs, self.outputs_spec), pytree.tree_unflatten(new, self.new_spec)


class _Recomputed(torch.autograd.Function):
    """(block, *operands) -> (*outputs, *new state)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(block: _Block, *operands: Tensor) -> tuple[Tensor, ...]:
        outputs, new = block(*operands)
        given = {id(x) for x in operands}
        return *outputs, *(x.clone() if id(x) in given else x for x in new)  # statistics that are kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[inputs[0].outputs :])
        derivatives.save(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        block, *operands = derivatives.saved(ctx)
        slopes = {i: grad for i, grad in enumerate(grads[: block.outputs]) if grad is not None}
        if not slopes:
            return (None,) * (1 + len(operands))

        def outputs(*operands: Tensor) -> tuple[Tensor, ...]:
            made, _ = block(*operands)
            return tuple(made[i] for i in slopes)

        cue = next(iter(slopes.values()))
        again = [_again(x, cue) if i >= block.first_input else x for i, x in enumerate(operands)]
        wanted = frozenset(i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed)
        return None, *derivatives.pullback(outputs, tuple(again), tuple(slopes.values()), wanted)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple:
        block, *operands = derivatives.saved(ctx)
        moved = derivatives.pushforward(lambda *operands: block(*operands)[0], tuple(operands), tangents)
        return *moved, *(None for _ in range(block.new_spec.num_leaves))


def _again(x: Tensor, cue: Tensor) -> Tensor:
    """An input of the second run. A table of indices is not copied: what follows from it alone is small."""
    return wait_for(x, cue) if x.is_floating_point() or x.dim() == 0 else x
