"""Every derivative through the operators is that of the formula: second order, jvp, vmap, and what is made of them."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from bevfn.kernels.deform_attn import deform_attn
from bevfn.kernels.deform_conv import deform_conv
from bevfn.kernels.linear_assignment import linear_assignment
from bevfn.kernels.neighbours import submanifold
from bevfn.kernels.sparse_conv import sparse_conv
from bevfn.kernels.voxel_pool import voxel_pool
from bevfn.kernels.voxelize import voxelize
from bevfn.layers import batch_norm


def sparse_case() -> tuple[Callable, tuple[Tensor, ...]]:
    table = torch.tensor([[0, 1, -1, 2], [3, -1, 0, 1]], dtype=torch.int32)  # K W
    inverse = torch.tensor([[0, 1, 3, -1], [2, 3, -1, 0]], dtype=torch.int32)  # K V
    return lambda x, w: sparse_conv(x, w, table, inverse), operands((4, 3), (2, 3, 2))


def pool_case() -> tuple[Callable, tuple[Tensor, ...]]:
    cell = torch.randint(-1, 4, (1, 2, 2, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return lambda depth, context: voxel_pool(depth, context, cell, 4), operands((1, 2, 2, 3), (1, 2, 3, 2))


def deform_case() -> tuple[Callable, tuple[Tensor, ...]]:
    def f(x, offset, mask, weight):
        return deform_conv(x, offset, mask, weight, padding=1)

    x, offset, mask, weight = operands((1, 2, 2, 2), (1, 8, 3, 3), (1, 4, 3, 3), (2, 2, 2, 2))
    return f, (x, 0.3 + 0.1 * offset.clamp(-2, 2), mask, weight)  # not near the kinks at whole positions


def plain_deform_case() -> tuple[Callable, tuple[Tensor, ...]]:
    x, offset, weight = operands((1, 2, 2, 2), (1, 8, 3, 3), (2, 1, 2, 2))
    return lambda x, o, w: deform_conv(x, o, None, w, padding=1), (x, 0.3 + 0.1 * offset.clamp(-2, 2), weight)


def attention_case(mask: Tensor | None = None) -> tuple[Callable, tuple[Tensor, ...]]:
    def f(value, locations, weights):
        return deform_attn(value, locations, weights, mask, sizes=((2, 2), (1, 3)))

    value, locations, weights = operands((1, 7, 2, 2), (1, 2, 2, 2, 1, 2), (1, 2, 2, 2, 1))
    return f, (0.5 * value, 0.45 + 0.1 * locations.clamp(-2, 2), 0.5 * weights)  # third derivatives stay moderate


def masked_attention_case() -> tuple[Callable, tuple[Tensor, ...]]:
    return attention_case(torch.tensor([[True, False]]))


def voxels() -> tuple[Callable, Tensor]:
    """Features of six float32 points, five of them in two voxels, of which one is full."""
    places = [[0.2, 0.3, 0.5], [0.6, 0.4, 0.5], [1.5, 0.5, 0.5], [0.5, 0.5, 0.5], [1.2, 0.1, 0.9], [9.0, 0.5, 0.5]]
    points = torch.cat([torch.tensor(places), torch.arange(1.0, 7.0)[:, None]], 1)[None]

    def f(points: Tensor) -> Tensor:
        valid = torch.ones(points.shape[:2], dtype=torch.bool)
        rule = {"lower": (0.0,) * 3, "size": (1.0,) * 3, "grid": (2, 1, 1), "max_points": 2, "max_voxels": 3}
        return voxelize(points, valid, **rule)[0]

    return f, points


def norm_case(valid: Tensor | None, *shape: int) -> tuple[Callable, tuple[Tensor, ...]]:
    """Batch norm of rows, or of images in float32, which torch's own operator computes."""

    def f(x, weight, bias):
        state = {"mean": torch.zeros(2), "var": torch.ones(2)}
        return batch_norm.apply({"weight": weight, "bias": bias}, state, x, train=True, valid=valid)[0]

    return f, tuple(t if len(shape) == 2 else t.float() for t in operands(shape, (2,), (2,)))


def operands(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes)


NORMS = {
    "rows": partial(norm_case, torch.tensor([True, True, False, True, True]), 5, 2),
    "images": partial(norm_case, None, 2, 2, 2, 2),
}
norms = pytest.mark.parametrize("case", NORMS.values(), ids=NORMS)
OPS = {
    "sparse_conv": sparse_case,
    "voxel_pool": pool_case,
    "deform_conv": deform_case,
    "no mask": plain_deform_case,
    "deform_attn": attention_case,
    "masked deform_attn": masked_attention_case,
}
ops = pytest.mark.parametrize("case", OPS.values(), ids=OPS)


def loss(f: Callable) -> Callable:
    """A scalar with second derivatives between all operands."""
    return lambda *x: torch.sin(f(*x)).sum()


def flat(f: Callable, x: tuple[Tensor, ...]) -> tuple[Callable, Tensor]:
    """f as a function of one vector."""
    sizes = [t.numel() for t in x]

    def g(vector: Tensor) -> Tensor:
        return f(*(part.reshape(t.shape) for part, t in zip(vector.split(sizes), x)))

    return g, torch.cat([t.reshape(-1) for t in x])


def differences(f: Callable, x: Tensor, step: float = 1e-5) -> Tensor:
    """The Jacobian [... N] of f at the vector x [N] by central differences."""
    rows = torch.eye(len(x), dtype=x.dtype) * step
    return torch.stack([(f(x + row) - f(x - row)) / (2 * step) for row in rows], -1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@ops
def test_first_and_second_order_pass_torchs_checks(case):
    f, x = case()
    x = tuple(t.requires_grad_() for t in x)
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, x)


@ops
def test_forward_and_reverse_jacobians_and_hessians_are_those_of_finite_differences(case):
    f, x = flat(*case())
    expected = differences(f, x)
    close(jacrev(f)(x), expected)
    close(jacfwd(f)(x), expected)
    expected = differences(grad(loss(f)), x)
    assert expected.abs().max() > 0.1
    close(hessian(loss(f))(x), expected)
    close(jacrev(grad(loss(f)))(x), expected)
    close(jacfwd(jacfwd(loss(f)))(x), expected)
    along = torch.ones_like(x)
    close(jvp(grad(loss(f)), (x,), (along,))[1], expected @ along)
    third = grad(lambda x: jvp(grad(loss(f)), (x,), (along,))[1].square().sum())
    close(third(x), 2 * differences(lambda x: jvp(grad(loss(f)), (x,), (along,))[1], x, 1e-4).T @ (expected @ along))


@ops
def test_gradients_per_sample_are_those_of_each_sample_alone(case):
    f, x = case()
    many = [torch.stack([t, 0.5 * t, t * t]) for t in x]
    assert torch.equal(vmap(f)(*many), torch.stack([f(*sample) for sample in zip(*many)]))
    g = grad(loss(f), argnums=tuple(range(len(x))))
    for actual, *alone in zip(vmap(g)(*many), *(g(*sample) for sample in zip(*many))):
        close(actual, torch.stack(alone))
    shared = vmap(g, in_dims=(0, *[None] * (len(x) - 1)))(many[0], *x[1:])  # one operand differs per sample
    for actual, *alone in zip(shared, *(g(sample, *x[1:]) for sample in many[0])):
        close(actual, torch.stack(alone))


@ops
def test_a_penalty_on_the_gradient_has_its_gradient_when_compiled(case):
    f, x = flat(*case())
    penalty = grad(lambda x: grad(loss(f))(x).square().sum())
    hessian_ = differences(grad(loss(f)), x)
    expected = 2 * hessian_ @ grad(loss(f))(x)
    close(penalty(x), expected)
    torch._dynamo.reset()
    close(torch.compile(penalty, fullgraph=True, backend="aot_eager")(x), expected)


def test_one_operand_that_needs_no_gradient_gets_none_made():
    f, (x, weight) = sparse_case()
    names = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            names.append(str(op))
            return op(*args, **(kwargs or {}))

    with Names():
        grad(lambda w: f(x, w).sum())(weight)
    assert [n for n in names if "bevfn" in n] == ["bevfn.sparse_conv.default", "bevfn.sparse_conv_weight_grad.default"]


@norms
def test_forward_mode_and_second_derivatives_of_batch_norm_go_through_its_statistics(case):
    f, x = flat(*case())
    torch.testing.assert_close(jacfwd(f)(x), jacrev(f)(x), rtol=1e-5, atol=1e-5)
    g = grad(loss(f))
    expected = differences(g, x, 3e-3 if x.dtype == torch.float64 else 1e-2)  # the layer computes in float32
    assert expected.abs().max() > 0.1
    for actual in (jacrev(g)(x), hessian(loss(f))(x), jacfwd(jacfwd(loss(f)))(x)):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)


@norms
def test_gradients_per_sample_through_batch_norm(case):
    f, (x, weight, bias) = case()
    many = torch.stack([x, x * x])
    g = grad(lambda x: loss(f)(x, weight, bias))
    torch.testing.assert_close(vmap(g)(many), torch.stack([g(sample) for sample in many]))


def test_voxel_features_are_linear_in_the_points_they_keep():
    f, points = voxels()
    expected = torch.zeros(1, 3, 4, 1, 6, 4)
    for voxel, kept in ((0, (0, 1)), (1, (2, 4))):  # the fourth point finds its voxel full, the last is outside
        for point in kept:
            expected[0, voxel, :, 0, point] = 0.5 * torch.eye(4)
    for jacobian in (jacrev(f), jacfwd(f)):
        torch.testing.assert_close(jacobian(points), expected)
    quadratic = torch.tensordot(expected.flatten(0, 2), expected.flatten(0, 2), ([0], [0]))
    for second in (hessian(lambda p: f(p).square().sum()), jacrev(grad(lambda p: f(p).square().sum()))):
        torch.testing.assert_close(second(points), 2 * quadratic)
    many = torch.stack([points, points * 0.9])
    g = grad(lambda p: f(p).square().sum())
    torch.testing.assert_close(vmap(g)(many), torch.stack([g(p) for p in many]))
    compiled = torch.compile(g, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(points), g(points))


def test_whole_numbers_have_no_derivative_and_are_batched():
    cost = torch.rand(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 4, dtype=torch.bool)
    match = vmap(lambda c: linear_assignment(c, valid))(cost)
    assert torch.equal(match, torch.stack([linear_assignment(c, valid) for c in cost]))
    coords = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.int32)
    many = torch.stack([coords, coords.flip(0)])
    rule = {"kernel": (3, 3, 1), "grid": (3, 3, 1)}
    tables = vmap(lambda c: submanifold(c, torch.ones(3, dtype=torch.bool), **rule))(many)
    alone = [submanifold(c, torch.ones(3, dtype=torch.bool), **rule) for c in many]
    assert torch.equal(tables, torch.stack(alone))
