"""kernels/batch_norm: the CPU's kernel against the closed form in float64, in every layout."""

from functools import partial

import pytest
import torch
from torch import Tensor

from bevfn.kernels.batch_norm import batch_norm, reference

OPS = torch.ops.bevfn
EPS = 1e-3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def case(name: str) -> tuple[Tensor, Tensor | None]:
    """x and the mask of its rows."""
    if name == "images":
        return 3 * drawn(3, 5, 7, 13) + 2, None
    if name == "images over several chunks":
        return drawn(2, 3, 161, 83) - 5, None
    if name == "channels last":
        return (2 * drawn(2, 21, 40, 50) + 1).contiguous(memory_format=torch.channels_last), None
    if name == "neither layout":
        return drawn(2, 6, 7, 5).transpose(2, 3), None
    mask = (drawn(9_000, 1) > -0.5).float()
    if name == "no row counts":
        mask = torch.zeros_like(mask)
    return drawn(9_000, 11) + 0.3, mask


CASES = ("images", "images over several chunks", "channels last", "neither layout", "rows", "no row counts")
cases = pytest.mark.parametrize("name", CASES)
relus = pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])


def near(found: Tensor, exact: Tensor, within: float = 3e-6) -> None:
    assert found.shape == exact.shape
    assert (found.double() - exact).abs().max() <= within * exact.abs().max().clamp(min=1e-9)


@cases
@relus
def test_the_kernel_computes_the_closed_form_and_its_gradient(name, relu):
    x, mask = case(name)
    weight, bias, grad = drawn(x.shape[1]), drawn(x.shape[1], seed=1), drawn(*x.shape, seed=2)
    rows = None if mask is None else mask.sum().clamp(min=1.0)
    wide = [None if t is None else t.double() for t in (x, weight, bias, grad, mask, rows)]
    y, mean, var = OPS.batch_norm(x, weight, bias, EPS, mask, rows, relu)
    exact = exactly(*wide[:3], *wide[4:], relu)
    for found, wanted in zip((y, mean, var), exact):
        near(found, wanted)
    assert y.stride() == torch.empty_like(x).stride()
    slopes = OPS.batch_norm_backward(grad, x, weight, mean, var, EPS, mask, rows, bias if relu else None)
    leaves = [t.requires_grad_() for t in wide[:3]]
    wanted = torch.autograd.grad((exactly(*leaves, *wide[4:], relu)[0] * wide[3]).sum(), leaves)
    for found, slope in zip(slopes, wanted):
        near(found, slope)
    assert slopes[0].stride() == torch.empty_like(x).stride()


def exactly(x, weight, bias, mask, rows, relu) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, which the closed form of the package is not."""
    axes, at = [i for i in range(x.dim()) if i != 1], (slice(None), *[None] * (x.dim() - 2))
    counts, n = (torch.ones(()), x.numel() / x.shape[1]) if mask is None else (mask, rows)
    mean = (x * counts).sum(axes) / n
    centred = (x - mean[at]) * counts
    var = (centred * centred).sum(axes) / n
    y = (centred * (weight / (var + EPS).sqrt())[at] + bias[at]) * counts
    return y.relu() if relu else y, mean, var


@pytest.mark.parametrize("name", ["images over several chunks", "channels last", "rows"])
def test_the_number_of_threads_does_not_show(name):
    x, mask = case(name)
    assert x.numel() > 2 * 2**15  # of which more than one thread is made
    operands = (
        x,
        drawn(x.shape[1]),
        drawn(x.shape[1]),
        EPS,
        mask,
        None if mask is None else mask.sum().clamp(min=1.0),
        True,
    )
    before = torch.get_num_threads()
    try:
        made = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y, mean, var = OPS.batch_norm(*operands)
            slopes = OPS.batch_norm_backward(x.cos(), x, operands[1], mean, var, *operands[3:6], operands[2])
            made.append((y, mean, var, *slopes))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*made))


def test_the_mean_of_many_equal_numbers_is_almost_that_number():
    for x, mask in ((torch.full((4, 2, 300, 500), 0.7), None), (torch.full((300_000, 2), 0.7), torch.ones(300_000, 1))):
        rows = None if mask is None else mask.sum()
        _, mean, var = OPS.batch_norm(x, torch.ones(2), torch.zeros(2), EPS, mask, rows, False)
        torch.testing.assert_close(mean, torch.full((2,), 0.7), rtol=2e-6, atol=0)
        assert var.max() < 1e-11


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_no_number_stays_none_behind_a_relu(layout):
    x = drawn(2, 3, 8, 8).contiguous(memory_format=layout)
    x[1, 1, 3, 4] = float("nan")
    y, mean, _ = OPS.batch_norm(x, torch.ones(3), torch.zeros(3), EPS, None, None, True)
    assert y[:, 1].isnan().all() and y[:, [0, 2]].isfinite().all() and mean.isnan().tolist() == [False, True, False]


def test_other_dtypes_are_computed_in_float32_or_by_the_closed_form():
    x, weight, bias = drawn(2, 3, 8, 9), drawn(3), drawn(3)
    wanted = OPS.batch_norm(x.half().float(), weight, bias, EPS, None, None, True)
    found = OPS.batch_norm(x.half(), weight, bias, EPS, None, None, True)
    assert found[0].dtype == torch.float16 and torch.equal(found[0], wanted[0].half())
    assert torch.equal(found[2], wanted[2]) and found[2].dtype == torch.float32
    double = OPS.batch_norm(x.double(), weight, bias, EPS, None, None, True)
    assert all(map(torch.equal, double, reference.forward(x.double(), weight, bias, EPS, None, None, True)))
    halves = OPS.batch_norm(x, weight.half(), bias.bfloat16(), EPS, None, None, True)
    wanted = OPS.batch_norm(x, weight.half().float(), bias.bfloat16().float(), EPS, None, None, True)
    assert all(map(torch.equal, halves, wanted))
    assert OPS.batch_norm(x[:0], weight, bias, EPS, None, None, True)[0].shape == (0, 3, 8, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [False, True])
def test_torchs_own_checks_of_an_operator_pass(rows, dtype):
    x, mask = case("rows" if rows else "images")
    x, mask = (x[:40], mask[:40]) if rows else (x, mask)
    x, wide = x.to(dtype), torch.float64 if dtype == torch.float64 else torch.float32
    operands = (
        x,
        drawn(x.shape[1]).to(wide),
        drawn(x.shape[1]).to(wide),
        EPS,
        mask,
        None if mask is None else mask.sum(),
        True,
    )
    torch.library.opcheck(OPS.batch_norm.default, operands, test_utils=("test_schema", "test_faketensor"))
    y, mean, var = OPS.batch_norm(*operands)
    backward = y, x, operands[1], mean, var, EPS, mask, operands[5], operands[2]
    torch.library.opcheck(OPS.batch_norm_backward.default, backward, test_utils=("test_schema", "test_faketensor"))


def test_a_compiled_layer_is_one_call_forward_and_one_backward():
    """With the ReLU inside; nothing is left of it that inductor would write."""
    from bevfn.layers import conv_norm

    params, state = conv_norm.init(4, 8, 3, generator=torch.Generator().manual_seed(0))
    x, names = drawn(2, 4, 9, 10), []

    def loss(params, x):
        return conv_norm.apply(params, state, x, train=True)[0].square().sum()

    def backend(graph, inputs):
        from torch._dynamo.backends.common import aot_autograd

        def listed(module, _):
            names.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
            return module

        return aot_autograd(fw_compiler=listed)(graph, inputs)

    grads = torch.func.grad(loss, argnums=(0, 1))
    found = torch.compile(grads, backend=backend, fullgraph=True)(params, x)
    assert names.count("bevfn.batch_norm.default") == names.count("bevfn.batch_norm_backward.default") == 1
    assert not [name for name in names if "relu" in name or "threshold" in name or "rsqrt" in name]
    for ours, wanted in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(grads(params, x))):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_its_derivatives_of_every_order_are_those_of_norm_and_relu():
    x, weight, bias = drawn(2, 2, 3, 2), drawn(2), drawn(2)

    def loss(relu, x, weight, bias):
        y = batch_norm(x, weight, bias, EPS, relu=relu)[0]
        return torch.sin(y if relu else y.relu()).sum()

    inside, behind = (torch.func.hessian(partial(loss, relu), argnums=(0, 1, 2)) for relu in (True, False))
    torch.testing.assert_close(inside(x, weight, bias), behind(x, weight, bias), rtol=1e-4, atol=1e-5)
