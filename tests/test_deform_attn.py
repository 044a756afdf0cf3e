"""deform_attn is what a loop over samples and what torch's grid_sample say, with its gradients, on every path to a number."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from bevfn.bench.attention import by_grid_sample
from bevfn.kernels.deform_attn import deform_attn, reference

FORWARD, BACKWARD = torch.ops.bevfn.deform_attn, torch.ops.bevfn.deform_attn_backward
LEVELS = ((4, 5), (3, 2))


def make(
    *,
    batch=2,
    queries=7,
    heads=3,
    width=5,
    points=4,
    sizes=LEVELS,
    attending=0.5,
    spread=0.3,
    dtype=torch.float64,
    seed=0,
) -> tuple[tuple, Tensor]:
    """((value, locations, weights, mask, sizes in a row), gradient of the output).

    attending: share of the rows that the mask keeps, None without a mask; spread: how far beyond 0 .. 1 locations go.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    value = normal(batch, sum(height * width for height, width in sizes), heads, width)
    samples = (batch, queries, heads, len(sizes), points)
    places = torch.rand(*samples, 2, generator=g, dtype=torch.float64) * (1 + 2 * spread) - spread
    weights = normal(*samples)
    mask = None if attending is None else torch.rand(batch, queries, generator=g) < attending
    operands = (value, places.to(dtype), weights, mask, [n for size in sizes for n in size])
    return operands, normal(batch, queries, heads * width)


SIZES = st.tuples(st.integers(1, 6), st.integers(1, 6))


@st.composite
def problems(draw, **fixed) -> tuple[tuple, Tensor]:
    return make(
        batch=draw(st.integers(0, 3)),
        queries=draw(st.sampled_from([0, 1, 5, 70])),
        heads=draw(st.integers(1, 4)),
        width=draw(st.sampled_from([1, 2, 3, 10, 16, 20, 33, 70])),
        points=draw(st.sampled_from([1, 2, 5, 8, 17])),
        sizes=tuple(draw(st.lists(SIZES, min_size=1, max_size=3))),
        attending=draw(st.sampled_from([None, 0.0, 0.3, 1.0])),
        spread=draw(st.sampled_from([0.0, 0.5, 1e9])),
        seed=draw(st.integers(0, 99)),
        **fixed,
    )


def by_loop(value, locations, weights, mask, sizes) -> Tensor:
    """The definition, one sample at a time."""
    (B, Q, h, L, P), d = weights.shape, value.shape[3]
    out = torch.zeros(B, Q, h, d, dtype=torch.float64)
    for b, q, k, level, p in torch.cartesian_prod(*map(torch.arange, (B, Q, h, L, P))).tolist():
        height, width = sizes[2 * level : 2 * level + 2]
        first = sum(a * b for a, b in zip(sizes[: 2 * level : 2], sizes[1 : 2 * level : 2]))
        column, row = (float(locations[b, q, k, level, p, i]) * n - 0.5 for i, n in enumerate((width, height)))
        if not (-1 < row < height and -1 < column < width) or (mask is not None and not mask[b, q]):
            continue
        for i, j in ((math.floor(row) + i, math.floor(column) + j) for i in (0, 1) for j in (0, 1)):
            if 0 <= i < height and 0 <= j < width:
                share = (1 - abs(row - i)) * (1 - abs(column - j)) * weights[b, q, k, level, p]
                out[b, q, k] += share * value[b, first + i * width + j, k]
    return out.flatten(2)


def called(value, locations, weights, mask, sizes) -> Tensor:
    """By the public function."""
    return deform_attn(value, locations, weights, mask, sizes=tuple(zip(sizes[::2], sizes[1::2])))


def changed(operands: tuple, change) -> list:
    """The operands, the floating ones through `change`."""
    return [change(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in operands]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("forward", [FORWARD, reference.forward], ids=["kernel", "reference"])
@pytest.mark.parametrize("change", [{}, {"attending": None, "sizes": ((1, 1),)}, {"heads": 1, "width": 1, "points": 1}])
def test_is_the_definition(forward, change):
    operands, _ = make(**change)
    torch.testing.assert_close(forward(*operands), by_loop(*operands), rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(problem=problems())
def test_kernel_and_reference_agree_with_autograd_through_the_reference(problem):
    operands, grad = problem
    leaves = changed(operands, lambda x: x.requires_grad_())
    y = reference.forward(*leaves)
    wanted = torch.autograd.grad(y, leaves[:3], grad)
    with torch.no_grad():
        torch.testing.assert_close(FORWARD(*operands), y, rtol=1e-11, atol=1e-11)
        for backward in (BACKWARD, reference.backward):
            for a, b in zip(backward(grad, *operands), wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@settings(max_examples=25)
@given(problem=problems())
def test_is_the_grid_sample_formulation(problem):
    operands, grad = problem
    if not operands[2].numel():
        return  # grid_sample takes no empty batch
    leaves = changed(operands, lambda x: x.requires_grad_())
    results = []
    for f in (called, by_grid_sample):
        y = f(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves[:3], grad)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(problem=problems(dtype=torch.float32))
def test_float32_kernel_is_close_to_the_reference(problem):
    operands, grad = problem
    pairs = [(FORWARD(*operands), reference.forward(*operands))]
    pairs += zip(BACKWARD(grad, *operands), reference.backward(grad, *operands))
    for a, b in pairs:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("size", [(7, 11), (32, 88), (3, 300)])
def test_a_pixel_edge_is_met_or_missed_as_the_product_rounds(size):
    """Positions that are whole but for rounding: a fused product would put them beside the pixel and take its slope."""
    height, width = size
    value = torch.randn(1, height * width, 1, 3, generator=torch.Generator().manual_seed(0))
    x, y = ((torch.arange(-1, n + 1) + 0.5) / n for n in (width, height))
    places = torch.stack([torch.cat([x, x[:1].expand(len(y))]), torch.cat([y[:1].expand(len(x)), y])], -1)
    operands = (value, places[None, :, None, None, None], torch.ones(1, len(places), 1, 1, 1), None, list(size))
    grad = torch.randn(1, len(places), 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(FORWARD(*operands), reference.forward(*operands), rtol=1e-6, atol=1e-6)
    for a, b in zip(BACKWARD(grad, *operands), reference.backward(grad, *operands)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(size))


@pytest.mark.parametrize("attending", [None, 0.6])
def test_gradients_pass_gradcheck(attending):
    operands, _ = make(batch=1, queries=3, heads=2, width=2, points=2, sizes=((2, 3), (1, 2)), attending=attending)
    leaves, rest = [t.requires_grad_() for t in operands[:3]], operands[3:]
    assert torch.autograd.gradcheck(lambda *x: called(*x, *rest), leaves)
    assert torch.autograd.gradcheck(lambda *x: reference.forward(*x, *rest), leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_float32_result_once(dtype):
    operands, grad = make(width=20, queries=30, sizes=((9, 11),), dtype=dtype)
    wide = changed(operands, Tensor.float)
    y = FORWARD(*operands)
    assert y.dtype == dtype and torch.equal(y, FORWARD(*wide).to(dtype))
    for a, b in zip(BACKWARD(grad, *operands), BACKWARD(grad.float(), *wide)):
        assert a.dtype == dtype and torch.equal(a, b.to(dtype))
    assert relative(reference.forward(*operands), y) < torch.finfo(dtype).eps
    # Places and weights may stay float32 beside half values: their gradients do too.
    value, locations, weights, mask, sizes = operands
    grads = BACKWARD(grad, value, locations.float(), weights.float(), mask, sizes)
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("run", [(FORWARD, BACKWARD), (reference.forward, reference.backward)], ids=["kernel", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_the_mask_leaves_out_neither_shows_nor_counts(run, dtype):
    forward, backward = run
    (value, locations, weights, mask, sizes), grad = make(queries=9, dtype=dtype)
    assert mask.any() and not mask.all()
    y, grads = forward(value, locations, weights, mask, sizes), backward(grad, value, locations, weights, mask, sizes)
    away = ~mask
    assert not y[away].any() and not grads[1][away].any() and not grads[2][away].any()
    for filling in (math.nan, math.inf, 0.5):
        operands = [
            x.masked_fill(away.reshape(*away.shape, *[1] * (x.dim() - 2)), filling) for x in (locations, weights)
        ]
        slopes = grad.masked_fill(away[..., None], filling)
        assert torch.equal(y, forward(value, *operands, mask, sizes))
        for a, b in zip(grads, backward(slopes, value, *operands, mask, sizes)):
            assert torch.equal(a, b)
    kept = [x[:1, mask[0]] for x in (locations, weights)]
    torch.testing.assert_close(y[:1, mask[0]], forward(value[:1], *kept, None, sizes))


@pytest.mark.parametrize("run", [(FORWARD, BACKWARD), (reference.forward, reference.backward)], ids=["kernel", "torch"])
def test_on_the_edge_and_beyond(run):
    """One pixel of value 2: row and column are the location less a half."""
    forward, backward = run
    value = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    one = torch.ones(1, 1, 1, dtype=torch.float64)

    def at(row: float, column: float) -> tuple[float, list[float]]:
        place = torch.tensor([column + 0.5, row + 0.5], dtype=torch.float64).view(1, 1, 1, 1, 1, 2)
        operands = (value, place, one.view(1, 1, 1, 1, 1), None, [1, 1])
        return float(forward(*operands)), backward(one, *operands)[1].flatten().tolist()

    assert at(0.0, 0.0) == (2.0, [-2.0, -2.0])  # at a whole position the slope is the one towards larger coordinates
    assert at(-0.25, 0.0) == (1.5, [-1.5, 2.0])
    assert at(-1.0, 0.0) == (0.0, [0.0, 0.0])  # as mmcv's kernel, not grid_sample: there the slope is 2
    for outside in (1.0, -1.5, 1e30, math.inf, -math.inf, math.nan):
        assert at(outside, 0.0) == (0.0, [0.0, 0.0]) and at(0.0, outside) == (0.0, [0.0, 0.0])


@pytest.mark.parametrize("forward", [FORWARD, reference.forward], ids=["kernel", "reference"])
def test_a_pixel_that_is_not_finite_stays_where_it_is(forward):
    (value, locations, weights, _, sizes), _ = make(batch=1, sizes=((8, 8), (4, 4)))
    value[0, 0] = value[0, -1] = math.inf  # the first and the last pixel
    y = forward(value, torch.full_like(locations, -3.0), weights, None, sizes)
    assert torch.isfinite(y).all() and not y.any()  # everything is sampled outside
    assert torch.isfinite(forward(value, torch.full_like(locations, 0.3), weights, None, sizes)).all()


@pytest.mark.parametrize("forward", [FORWARD, reference.forward], ids=["kernel", "reference"])
def test_heads_levels_and_images_are_apart(forward):
    (value, locations, weights, mask, sizes), _ = make(attending=None)
    y = forward(value, locations, weights, mask, sizes)
    for head in range(3):
        part = [x[:, :, head : head + 1] for x in (value, locations, weights)]
        torch.testing.assert_close(forward(*part, None, sizes), y[..., 5 * head : 5 * head + 5])
    levels = [(value[:, :20], 0, [4, 5]), (value[:, 20:], 1, [3, 2])]
    each = [forward(v, locations[..., n : n + 1, :, :], weights[..., n : n + 1, :], None, s) for v, n, s in levels]
    torch.testing.assert_close(sum(each), y)
    torch.testing.assert_close(forward(value[1:], locations[1:], weights[1:], None, sizes), y[1:])


@pytest.mark.parametrize("attending", [None, 0.2])
def test_thread_count_does_not_change_a_bit(attending):
    operands, grad = make(queries=300, width=10, heads=2, attending=attending, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append([FORWARD(*operands), *BACKWARD(grad, *operands)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_memory_layout_does_not_change_a_bit():
    (value, locations, weights, mask, sizes), grad = make(dtype=torch.float32)
    operands = (value, locations, weights, mask)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in operands]
    assert torch.equal(FORWARD(*turned, sizes), FORWARD(*operands, sizes))
    grads = BACKWARD(grad.transpose(1, 2).contiguous().transpose(1, 2), *turned, sizes)
    assert all(a.is_contiguous() and torch.equal(a, b) for a, b in zip(grads, BACKWARD(grad, *operands, sizes)))


@pytest.mark.parametrize("attending", [None, 0.5])
def test_func_grad_compiles_into_one_graph_with_one_op(attending):
    (value, locations, weights, mask, sizes), _ = make(dtype=torch.float32, attending=attending)
    params = {"locations": locations, "weights": weights}
    counts = []

    def loss(params, value, mask):  # the parameters go straight into the operator: Dynamo would drop their gradients
        return called(value, params["locations"], params["weights"], mask, sizes).square().sum()

    def count(graph, _):
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        counts.append(
            [sum(name == f"bevfn.{op}.default" for name in names) for op in ("deform_attn", "deform_attn_backward")]
        )
        return graph

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    step = torch.func.grad_and_value(loss, argnums=(0, 1))
    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=count))(params, value, mask)
    torch.testing.assert_close(compiled, step(params, value, mask), rtol=0, atol=0)
    assert counts == [[1, 1]]
    assert all(g.abs().sum() > 0 for g in [*compiled[0][0].values(), compiled[0][1]])


@pytest.mark.parametrize("attending", [None, 0.5])
def test_operators_pass_torchs_own_checks(attending):
    operands, grad = make(dtype=torch.float32, attending=attending)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(FORWARD.default, operands, test_utils=checks)
    torch.library.opcheck(BACKWARD.default, (grad, *operands), test_utils=checks)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"value": torch.zeros(2, 26, 15)}, r"needs value \[B S h d\] and locations \[B Q h L P 2\]"),
        ({"locations": torch.zeros(2, 7, 3, 8, 2)}, r"needs value \[B S h d\] and locations"),
        ({"value": torch.zeros(2, 26, 3, 0)}, "at least one head, channel and point"),
        ({"sizes": ()}, "at least one level"),
        ({"sizes": ((26, 0), (3, 2))}, "at least one level and one pixel"),
        ({"value": torch.zeros(2, 25, 3, 5)}, r"with S = 26, the pixels of sizes \(\(4, 5\), \(3, 2\)\)"),
        ({"sizes": ((26, 1),)}, r"must be \[B Q h L P 2\] = \[2 Q 3 1 P 2\] as value .* and 1 sizes say"),
        ({"locations": torch.zeros(2, 7, 3, 2, 4, 3)}, r"must be \[B Q h L P 2\]"),
        ({"weights": torch.zeros(2, 7, 3, 8)}, r"must be \[B Q h L P\] = \[2 7 3 2 4\] as locations say"),
        ({"mask": torch.ones(2, 8, dtype=torch.bool)}, r"mask \[2, 8\] must be \[B Q\] = \[2 7\]"),
        ({"mask": torch.ones(2, 7)}, "mask must be bool, got torch.float32"),
        ({"value": torch.zeros(2, 26, 3, 5, dtype=torch.int32)}, "value must be floating, got torch.int32"),
        ({"weights": torch.zeros(2, 7, 3, 2, 4, dtype=torch.bool)}, "weights must be floating"),
        ({"locations": torch.zeros(2, 7, 3, 2, 4, 2, device="meta")}, "locations must be on value's device cpu"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    call = {
        "value": torch.zeros(2, 26, 3, 5),
        "locations": torch.zeros(2, 7, 3, 2, 4, 2),
        "weights": torch.zeros(2, 7, 3, 2, 4),
        "sizes": LEVELS,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        deform_attn(**call)
