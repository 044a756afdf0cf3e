"""deform_conv is what a loop over samples says, with its gradients, on every path to a number."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from bevfn.kernels.deform_conv import deform_conv, reference
from bevfn.layers import deform_conv as layer

FORWARD, BACKWARD = torch.ops.bevfn.deform_conv, torch.ops.bevfn.deform_conv_backward


def make(
    *, batch=2, size=(6, 5), groups=2, deform_groups=1, width=(2, 3), kernel=(3, 3), stride=1, padding=1, dilation=1,
    spread=2.0, masked=True, dtype=torch.float64, seed=0,
) -> tuple[tuple, Tensor]:  # fmt: skip
    """((x, offset, mask, weight, stride, padding, dilation), gradient of the output); `width` per group, in and out."""
    g = torch.Generator().manual_seed(seed)
    channels = math.lcm(groups, deform_groups) * width[0]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    x, weight = normal(batch, channels, *size), normal(groups * width[1], channels // groups, *kernel)
    out, planes = reference.out_size(x, weight, stride, padding, dilation), deform_groups * kernel[0] * kernel[1]
    offset = normal(batch, 2 * planes, *out) * spread
    mask = normal(batch, planes, *out) if masked else None
    return (x, offset, mask, weight, stride, padding, dilation), normal(batch, weight.shape[0], *out)


@st.composite
def problems(draw, **fixed) -> tuple[tuple, Tensor]:
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    stride, dilation, padding = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 2))
    size = [draw(st.integers(max(1, dilation * (k - 1) + 1 - 2 * padding), 8)) for k in kernel]
    return make(
        batch=draw(st.integers(0, 3)), size=tuple(size), groups=draw(st.sampled_from([1, 2, 3])),
        deform_groups=draw(st.sampled_from([1, 2])), width=draw(st.tuples(st.integers(1, 20), st.integers(1, 4))),
        kernel=kernel, stride=stride, padding=padding, dilation=dilation, spread=draw(st.sampled_from([0.3, 3.0, 1e9])),
        masked=draw(st.booleans()), seed=draw(st.integers(0, 99)), **fixed,
    )  # fmt: skip


def by_loop(x, offset, mask, weight, stride, padding, dilation) -> Tensor:
    """The definition, one sample at a time."""
    (B, C, H, W), (O, I, kh, kw) = x.shape, weight.shape
    height, width = offset.shape[2:]
    D, K = offset.shape[1] // (2 * kh * kw), kh * kw
    pixel = lambda b, c, i, j: float(x[b, c, i, j]) if 0 <= i < H and 0 <= j < W else 0.0  # noqa: E731
    y = torch.zeros(B, O, height, width, dtype=torch.float64)
    for b, o, i, j, c, k in torch.cartesian_prod(*map(torch.arange, (B, O, height, width, I, K))).tolist():
        channel = o // (O // (C // I)) * I + c
        plane = channel // (C // D) * K + k
        row = i * stride - padding + k // kw * dilation + float(offset[b, 2 * plane, i, j])
        column = j * stride - padding + k % kw * dilation + float(offset[b, 2 * plane + 1, i, j])
        if not (-1 < row < H and -1 < column < W):
            continue
        i0, j0 = math.floor(row), math.floor(column)
        sample = sum(
            (1 - abs(row - p)) * (1 - abs(column - q)) * pixel(b, channel, p, q)
            for p in (i0, i0 + 1) for q in (j0, j0 + 1)
        )  # fmt: skip
        weighted = sample if mask is None else sample * float(mask[b, plane, i, j])
        y[b, o, i, j] += float(weight[o, c, k // kw, k % kw]) * weighted
    return y


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def close(a: Tensor, b: Tensor) -> None:
    scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("forward", [FORWARD, reference.forward], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"masked": False, "groups": 4, "width": (1, 1)},
        {"deform_groups": 2, "groups": 1, "kernel": (3, 1), "padding": 2, "dilation": 2},
        {"deform_groups": 3, "groups": 2, "stride": 2, "padding": 0, "width": (1, 1)},
    ],
)
def test_is_the_definition(forward, change):
    problem, _ = make(batch=1, size=(5, 4), **change)
    torch.testing.assert_close(forward(*problem), by_loop(*problem), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride, padding, dilation, groups", [(1, 1, 1, 4), (2, 0, 1, 1), (1, 2, 2, 2)])
def test_without_offsets_it_is_a_convolution(stride, padding, dilation, groups):
    (x, offset, _, weight, *_), grad = make(
        size=(9, 7), groups=groups, masked=False, stride=stride, padding=padding, dilation=dilation
    )
    x, weight = x.requires_grad_(), weight.requires_grad_()
    step = {"stride": stride, "padding": padding, "dilation": dilation}
    ours = deform_conv(x, torch.zeros_like(offset), None, weight, **step)
    theirs = F.conv2d(x, weight, **step, groups=groups)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, (x, weight), grad), torch.autograd.grad(theirs, (x, weight), grad)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(problem=problems())
def test_kernel_and_reference_agree_with_autograd_through_the_reference(problem):
    operands, grad = problem
    leaves = [t.requires_grad_() if isinstance(t, Tensor) else t for t in operands]
    y = reference.forward(*leaves)
    wanted = torch.autograd.grad(y, [t for t in leaves if isinstance(t, Tensor)], grad)
    with torch.no_grad():
        torch.testing.assert_close(FORWARD(*operands), y, rtol=1e-11, atol=1e-11)
        for backward in (BACKWARD, reference.backward):
            grads = backward(grad, *operands)
            found = [g for g, t in zip(grads, operands) if t is not None]  # in the order of the operands
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@settings(max_examples=30)
@given(problem=problems(dtype=torch.float32))
def test_float32_kernel_is_close_to_float64(problem):
    operands, grad = problem
    wide = [t.double() if isinstance(t, Tensor) else t for t in operands]
    close(FORWARD(*operands), reference.forward(*wide))
    close(BACKWARD(grad, *operands)[0], reference.backward(grad.double(), *wide)[0])
    # A position that float32 rounds across a whole number has another slope: the offsets' gradient, against float32.
    for a, b in zip(BACKWARD(grad, *operands), reference.backward(grad, *operands)):
        close(a, b)


@pytest.mark.parametrize("masked", [True, False])
def test_gradients_pass_gradcheck(masked):
    operands, _ = make(batch=1, size=(2, 3), width=(1, 1), kernel=(3, 2), deform_groups=2, masked=masked)
    x, offset, mask, weight = (None if t is None else t.requires_grad_() for t in operands[:4])
    run = lambda x, offset, weight, mask=None: deform_conv(x, offset, mask, weight, padding=1)  # noqa: E731
    leaves = (x, offset, weight) if mask is None else (x, offset, weight, mask)
    assert torch.autograd.gradcheck(run, leaves)
    bare = lambda x, offset, weight, mask=None: reference.forward(x, offset, mask, weight, 1, 1, 1)  # noqa: E731
    assert torch.autograd.gradcheck(bare, leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_float32_result_once(dtype):
    operands, grad = make(size=(8, 9), width=(24, 10), dtype=dtype)
    wide = [t.float() if isinstance(t, Tensor) else t for t in operands]
    y = FORWARD(*operands)
    assert y.dtype == dtype and torch.equal(y, FORWARD(*wide).to(dtype))
    for a, b in zip(BACKWARD(grad, *operands), BACKWARD(grad.float(), *wide)):
        assert a.dtype == dtype and torch.equal(a, b.to(dtype))
    rounding = torch.finfo(dtype).eps
    assert relative(reference.forward(*operands), y) < rounding
    # Offsets may stay float32 beside a half image: their gradient does too.
    x, offset, mask, weight, *step = operands
    grads = BACKWARD(grad, x, offset.float(), mask, weight, *step)
    assert [g.dtype for g in grads] == [dtype, torch.float32, dtype, dtype]


def test_an_empty_batch_has_an_empty_result_and_no_weight_gradient():
    operands, grad = make(batch=0)
    x, offset, mask, weight = (t.requires_grad_() for t in operands[:4])
    y = deform_conv(x, offset, mask, weight, padding=1)
    assert y.shape == (0, 6, 6, 5)
    grads = torch.autograd.grad(y, (x, offset, mask, weight), grad)
    assert [g.numel() for g in grads[:3]] == [0, 0, 0] and not grads[3].any()


@pytest.mark.parametrize("run", [(FORWARD, BACKWARD), (reference.forward, reference.backward)], ids=["kernel", "torch"])
def test_on_the_edge_and_beyond(run):
    """One pixel, one tap: row and column are the offset."""
    forward, backward = run
    x = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def at(row: float, column: float) -> tuple[float, list[float]]:
        offset = torch.tensor([row, column], dtype=torch.float64).view(1, 2, 1, 1)
        grads = backward(one, x, offset, None, one, 1, 0, 1)
        return float(forward(x, offset, None, one, 1, 0, 1)), grads[1].flatten().tolist()

    assert at(0.0, 0.0) == (2.0, [-2.0, -2.0])  # at a whole position the slope is the one towards larger coordinates
    assert at(-0.25, 0.0) == (1.5, [2.0, -1.5])
    # mmcv leaves a sample at exactly -1 out, so that its slope is 0 (torchvision's is not). Offsets start at 0: with
    # padding 1 every tap beyond the border is such a sample.
    assert at(-1.0, 0.0) == (0.0, [0.0, 0.0])
    for outside in (1.0, -1.5, 1e30, math.inf, -math.inf, math.nan):
        assert at(outside, 0.0) == (0.0, [0.0, 0.0]) and at(0.0, outside) == (0.0, [0.0, 0.0])


@pytest.mark.parametrize("forward", [FORWARD, reference.forward], ids=["kernel", "reference"])
def test_a_pixel_that_is_not_finite_stays_where_it_is(forward):
    (x, offset, mask, weight, *step), _ = make(batch=1, size=(8, 8), spread=0.3)
    x[0, :, 0, 0] = math.inf
    y = forward(x, offset * 0 + 50.0, mask, weight, *step)
    assert torch.isfinite(y).all() and not y.any()  # everything is sampled outside
    assert torch.isfinite(forward(x, offset, mask, weight, *step)[0, :, 4:, 4:]).all()


def test_thread_count_does_not_change_a_bit():
    operands, grad = make(batch=3, size=(9, 11), groups=4, width=(40, 8), dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append([FORWARD(*operands), *BACKWARD(grad, *operands)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_memory_format_does_not_change_a_bit():
    operands, grad = make(size=(7, 9), dtype=torch.float32)
    x, offset, mask, weight, *step = operands
    turned = [t.to(memory_format=torch.channels_last) for t in (x, offset, mask, weight)]
    assert FORWARD(*turned, *step).is_contiguous() and torch.equal(FORWARD(*turned, *step), FORWARD(*operands))
    grads = BACKWARD(grad.to(memory_format=torch.channels_last), *turned, *step)
    assert all(a.is_contiguous() and torch.equal(a, b) for a, b in zip(grads, BACKWARD(grad, *operands)))


@pytest.mark.parametrize("masked", [True, False])
def test_func_grad_compiles_into_one_graph_with_one_op(masked):
    operands, _ = make(dtype=torch.float32, masked=masked)
    x, offset, mask, weight = operands[:4]
    params = {"offset": offset, "weight": weight} | ({"mask": mask} if masked else {})
    counts = []

    def loss(params, x):  # the parameters go straight into the operator: Dynamo would drop their gradients
        return deform_conv(x, params["offset"], params.get("mask"), params["weight"], padding=1).square().sum()

    def count(graph, _):
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        counts.append([sum(name == f"bevfn.{op}.default" for name in names) for op in
                       ("deform_conv", "deform_conv_backward")])  # fmt: skip
        return graph

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    step = torch.func.grad_and_value(loss, argnums=(0, 1))
    compiled = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=count))(params, x)
    torch.testing.assert_close(compiled, step(params, x), rtol=0, atol=0)
    assert counts == [[1, 1]]
    assert all(g.abs().sum() > 0 for g in [*compiled[0][0].values(), compiled[0][1]])


@pytest.mark.parametrize("masked", [True, False])
def test_operators_pass_torchs_own_checks(masked):
    operands, grad = make(dtype=torch.float32, masked=masked)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(FORWARD.default, operands, test_utils=checks)
    torch.library.opcheck(BACKWARD.default, (grad, *operands), test_utils=checks)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(4, 6, 5)}, r"needs x \[B C H W\]"),
        ({"x": torch.zeros(2, 5, 6, 5)}, "with G dividing O and x's C = 5"),
        ({"weight": torch.zeros(5, 2, 3, 3)}, "with G dividing O"),
        ({"weight": torch.zeros(6, 2, 3, 3, dtype=torch.float16)}, "must share one floating dtype"),
        ({"offset": torch.zeros(2, 18, 5, 6)}, r"must be \[B 2DK H' W'\] = \[2 D\*18 6 5\]"),
        ({"offset": torch.zeros(2, 9, 6, 5)}, r"must be \[B 2DK H' W'\]"),
        ({"offset": torch.zeros(2, 54, 6, 5)}, "D dividing C = 4"),
        ({"offset": torch.zeros(2, 18, 6, 5, dtype=torch.int32)}, "offset must be floating"),
        ({"mask": torch.zeros(2, 18, 6, 5)}, r"must be \[B DK H' W'\] = \[2 9 6 5\] as offset says"),
        ({"mask": torch.zeros(2, 9, 6, 5, device="meta")}, "on x's device cpu"),
        ({"stride": 0}, "stride 0 and dilation 1 must be at least 1"),
        ({"padding": 0, "dilation": 3}, "is smaller than the kernel"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    call = {
        "x": torch.zeros(2, 4, 6, 5), "offset": torch.zeros(2, 18, 6, 5), "mask": None,
        "weight": torch.zeros(6, 2, 3, 3), "padding": 1, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        deform_conv(**call)


def test_layer_starts_as_a_convolution_and_learns_its_offsets():
    params = layer.init(8, 12, 3, groups=4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 8, 6, 7, generator=torch.Generator().manual_seed(1))
    y, offset = layer.apply(params, x)
    assert offset.shape == (2, 18, 6, 7) and not offset.any()
    torch.testing.assert_close(y, F.conv2d(x, params["weight"], padding=1, groups=4), rtol=1e-5, atol=1e-6)
    assert 0.95 < float(params["weight"].abs().max()) / (6 / (2 * 9)) ** 0.5 <= 1  # Kaiming uniform over 2 x 9 inputs

    def loss(params):
        return layer.apply(params, x)[0].square().sum()

    grads = torch.func.grad(loss)(params)
    assert all(g.abs().sum() > 0 for g in (grads["weight"], grads["offset"]["weight"], grads["offset"]["bias"]))
    half, half_offset = layer.apply(params, x.half())
    assert half.dtype == half_offset.dtype == torch.float16 and relative(half, y) < 2e-3
