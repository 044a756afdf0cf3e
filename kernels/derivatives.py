"""Derivatives of the package's operators: any order, forward and reverse, batched.

The first gradient is an operator of its own, made for speed. All others (jvp, second and higher order) are those of the
op's meaning, its `reference` in plain torch, which autograd differentiates as often as asked. `vmap` runs the operators
once per sample (torch warns that this is slow), and the plain formula as one. So `torch.func`'s jvp, jacfwd, jacrev,
hessian, vmap and `create_graph=True` give right numbers through every op.
"""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd.forward_ad import _set_fwd_grad_enabled, unpack_dual


def differentiable(forward: Callable, backward: Callable, plain: Callable) -> Callable:
    """`forward` with all its derivatives, as a function of the same positional operands (tensors, None and numbers).

    Args:
        forward: the operator, operands -> Tensor, or a tuple of it and of what `backward` takes after the operands, which
            has no derivative.
        backward: (wanted, grad, *operands) -> one gradient per operand, by operators too; those whose place is not
            in `wanted` may be anything.
        plain: the Tensor that `forward` computes, in torch functions that autograd differentiates twice; it gets all that
            `backward` does.
    """

    gradients_of = _gradients(backward, plain)

    class Value(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*operands: Any) -> Any:
            return forward(*operands)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            kept = output[1:] if isinstance(output, tuple) else ()
            ctx.mark_non_differentiable(*kept)
            ctx.kept = len(kept)
            save(ctx, inputs, kept)

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
            wanted = frozenset(i for i, needed in enumerate(ctx.needs_input_grad) if needed)
            gradients = iter(gradients_of.apply(wanted, grad, *saved(ctx)))
            return tuple(next(gradients) if i in wanted else None for i in range(len(ctx.needs_input_grad)))

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            y = pushforward(plain, saved(ctx), tangents)
            return (y, *(None for _ in range(ctx.kept))) if ctx.kept else y

    return one_node(lambda *operands: Value.apply(*operands))


def one_node(f: Callable) -> Callable:
    """f(*operands), which Dynamo does not read but keeps as one node, as `torch.compiler.allow_in_graph` says it.

    Dynamo reads neither a custom jvp nor the gradient of a gradient (torch 2.13: zeros, silently), and it drops the
    gradient of an input of torch.func.grad that goes straight into a Function. It is told when it first comes here, and not
    on import: to tell it is to import it, 1.2 s of CPU for everyone who compiles nothing.
    """

    def told() -> None:
        torch.compiler.allow_in_graph(f)

    told._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result's: called, not read

    def apply(*operands: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            told()
        return f(*operands)

    return apply


def _gradients(backward: Callable, plain: Callable) -> Any:
    """The Function (wanted, grad, *operands) -> the wanted gradients of `plain`."""

    def plain_gradients(wanted: frozenset[int], grad: Tensor, *operands: Any) -> tuple[Tensor, ...]:
        return _at(wanted, pullback(plain, operands, grad))

    class Gradients(torch.autograd.Function):
        """The wanted gradients, differentiable themselves."""

        generate_vmap_rule = True

        @staticmethod
        def forward(wanted: frozenset[int], *operands: Any) -> tuple[Tensor, ...]:
            return _at(wanted, backward(wanted, *operands))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
            save(ctx, inputs)

        @staticmethod
        def backward(ctx: Any, *slopes: Tensor) -> tuple:
            return pullback(plain_gradients, saved(ctx), slopes)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
            return pushforward(plain_gradients, saved(ctx), tangents)

    return Gradients


def save(ctx: Any, operands: tuple, kept: tuple = ()) -> None:
    """Keeps a Function's operands for `backward` and `jvp`, and for `backward` what else is `kept`."""
    tensors = [x if isinstance(x, Tensor) else None for x in operands]
    ctx.save_for_backward(*tensors, *kept)
    ctx.save_for_forward(*tensors)
    ctx.others = tuple(None if isinstance(x, Tensor) else x for x in operands)


def saved(ctx: Any) -> tuple:
    """What `save` kept."""
    return tuple(other if tensor is None else tensor for tensor, other in zip_longest(ctx.saved_tensors, ctx.others))


def _at(places: frozenset[int], values: tuple) -> tuple[Tensor, ...]:
    return tuple(values[i] for i in sorted(places))


def pullback(f: Callable, operands: tuple, slopes: Any, wanted: frozenset[int] | None = None) -> tuple:
    """Gradients of f's result times `slopes`, None for operands that are not floating tensors, or not `wanted`."""
    floating = frozenset(i for i, x in enumerate(operands) if isinstance(x, Tensor) and x.is_floating_point())
    floating = floating if wanted is None else floating & wanted
    pull = torch.func.vjp(_of(f, operands, floating), *_at(floating, operands))[1]
    gradients = iter(pull(slopes, retain_graph=torch.is_grad_enabled()))
    return tuple(next(gradients) if i in floating else None for i in range(len(operands)))


def pushforward(f: Callable, operands: tuple, tangents: tuple) -> Any:
    """The derivative of f's result along `tangents`, None where an operand does not move.

    By the transpose of the transpose, since torch nests no forward mode in `torch.autograd.forward_ad`'s.
    """
    moving = frozenset(i for i, t in enumerate(tangents) if t is not None)
    operands = tuple(_primal(x) if isinstance(x, Tensor) else x for x in operands)
    with _set_fwd_grad_enabled(True):  # torch switches it off around a Function's jvp: a jvp of it would be wrong
        y, pull = torch.func.vjp(_of(f, operands, moving), *_at(moving, operands))[:2]
        push = torch.func.vjp(pull, pytree.tree_map(torch.zeros_like, y))[1]
        return push(_at(moving, tangents))[0]


def _primal(x: Tensor) -> Tensor:
    """x without the tangent of this level; outer levels keep theirs. `unpack_dual` knows no vmap."""
    if not functorch.is_batchedtensor(x):
        return unpack_dual(x).primal
    level = functorch.maybe_get_level(x)
    value, axis = functorch._unwrap_batched(x, level)
    return functorch._add_batch_dim(_primal(value), axis, level)  # type: ignore[arg-type]


def _of(f: Callable, operands: tuple, places: frozenset[int]) -> Callable:
    """f as a function of the operands at these places."""

    def g(*some: Tensor) -> Any:
        values = iter(some)
        return f(*(next(values) if i in places else x for i, x in enumerate(operands)))

    return g
