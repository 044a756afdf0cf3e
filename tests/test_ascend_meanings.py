"""The meaning of GE types for which bevfn wrote both the converter and the interpreter, against numpy and plain Python.

Elsewhere the interpreter is compared with torch, from which the converter comes: were both wrong alike, nothing would show.
The operands here are written down or made by numpy, and expectations never use torch or the interpreter. docs/ascend.md
says which of CANN's documents each meaning comes from.
"""

import math

import ge_graphs
import numpy as np
import pytest
import torch

from bevfn.ascend import interpret
from bevfn.ascend.interpret import a2

ge_graphs.need_torchair()
RANDOM = np.random.default_rng(0)
REAL = RANDOM.standard_normal((3, 4, 5)).astype(np.float32)
WORDS = np.array([0, 1, -1, 77777, 2**31 - 1, -(2**31), 0x5BD1E995], dtype=np.int64)
KEYS = np.array([[3, 1, 2, 1, 3, 1], [0, 0, 5, -2, 5, 0]], dtype=np.float32)


def gelu(x, approximate):
    if approximate == "none":
        return x / 2 * (1 + math.erf(x / math.sqrt(2)))
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x, approximate):
    step = 1e-5
    return (gelu(x + step, approximate) - gelu(x - step, approximate)) / (2 * step)


def each(function, x):
    return np.array([function(float(v)) for v in x.reshape(-1)]).reshape(x.shape)


def added(var, index, updates, factor):
    made = var.copy()
    np.add.at(made, (slice(None), index), updates * factor)
    return made


def adjoint(size, weight, grad, stride, pad):
    """The gradient of a convolution's input, one product after the other."""
    made = np.zeros((size[0], size[1], size[2] + 2 * pad, size[3] + 2 * pad))
    for n, o, i, j in np.ndindex(*grad.shape):
        rows, columns = (slice(p * stride, p * stride + weight.shape[2 + a]) for a, p in enumerate((i, j)))
        made[n, :, rows, columns] += grad[n, o, i, j] * weight[o]
    return made[:, :, pad : pad + size[2], pad : pad + size[3]]


def constant(ge, values):
    return ge.Const(values, dtype=9)  # GE's int64


def gradient_of_the_input(ge, weight, grad):
    from torchair._ge_concrete_graph.utils import specific_op_input_layout, specific_op_output_layout

    y = ge.Conv2DBackpropInput(
        ge.Const([2, 3, 5, 5], dtype=3), weight, grad, strides=[1, 1, 2, 2], pads=[1, 1, 1, 1], dilations=[1, 1, 1, 1],
        groups=1, data_format="NCHW",
    )  # fmt: skip
    specific_op_input_layout(y, indices=[1, 2], layout="NCHW")
    specific_op_output_layout(y, indices=0, layout="NCHW")
    return y


INDEX = np.array([0, 3, 3, 1, 0, 3], dtype=np.int64)
WEIGHT, GRAD = RANDOM.standard_normal((4, 3, 3, 3)), RANDOM.standard_normal((2, 4, 3, 3))
# {name: (the node, its operands, what it is to give)}
CASES = {
    **{
        f"GeluV2 {form}": (lambda ge, x, form=form: ge.GeluV2(x, approximate=form), [REAL], each(lambda v, f=form: gelu(v, f), REAL))
        for form in ("none", "tanh")
    },
    **{
        f"GeluGradV2 {form}": (
            lambda ge, dy, x, form=form: ge.GeluGradV2(dy, x, approximate=form), [REAL[::-1].copy(), REAL],
            REAL[::-1] * each(lambda v, f=form: gelu_slope(v, f), REAL),
        )
        for form in ("none", "tanh")
    },
    "Roll": (lambda ge, x: ge.Roll(x, shifts=[-2, 1], dims=[1, 2]), [REAL], np.roll(REAL, (-2, 1), (1, 2))),
    "Trunc": (lambda ge, x: ge.Trunc(x), [REAL * 5], np.trunc(REAL * 5)),
    "Atan2": (lambda ge, y, x: ge.Atan2(y, x), [REAL, -REAL[::-1].copy()], np.arctan2(REAL, -REAL[::-1])),
    "BitwiseAnd": (lambda ge, x, y: ge.BitwiseAnd(x, y), [WORDS, WORDS[::-1].copy()], WORDS & WORDS[::-1]),
    "BitwiseOr": (lambda ge, x, y: ge.BitwiseOr(x, y), [WORDS, WORDS[::-1].copy()], WORDS | WORDS[::-1]),
    "BitwiseXor": (lambda ge, x, y: ge.BitwiseXor(x, y), [WORDS, WORDS[::-1].copy()], WORDS ^ WORDS[::-1]),
    "RightShift": (lambda ge, x, y: ge.RightShift(x, y), [WORDS, np.full_like(WORDS, 13)], WORDS // 2**13),
    "ReduceMax": (lambda ge, x: ge.ReduceMax(x, constant(ge, [0, 2]), keep_dims=True), [REAL], REAL.max((0, 2), keepdims=True)),
    "ReduceMin": (lambda ge, x: ge.ReduceMin(x, constant(ge, [1]), keep_dims=False), [REAL], REAL.min(1)),
    "ReduceAll": (lambda ge, x: ge.ReduceAll(x, constant(ge, [2]), keep_dims=False), [REAL > -1], (REAL > -1).all(2)),
    "Sort": (
        lambda ge, x: ge.Sort(x, axis=1, descending=False, stable=True), [KEYS],
        (np.sort(KEYS, 1), np.argsort(KEYS, 1, kind="stable").astype(np.int32)),
    ),
    "Sort, falling": (
        lambda ge, x: ge.Sort(x, axis=1, descending=True, stable=True), [KEYS],
        (-np.sort(-KEYS, 1), np.argsort(-KEYS, 1, kind="stable").astype(np.int32)),
    ),
    "InplaceIndexAdd": (
        lambda ge, x, i, s: ge.InplaceIndexAdd(ge.TensorMove(x), i, s, None, axis=1), [REAL, INDEX, RANDOM.random((3, 6, 5))],
        None,
    ),
    "InplaceIndexAdd, scaled": (
        lambda ge, x, i, s, a: ge.InplaceIndexAdd(ge.TensorMove(x), i, s, a, axis=1),
        [REAL, INDEX, RANDOM.random((3, 6, 5)), np.array([2.5])], None,
    ),
    "Range": (
        lambda ge, x: (ge.Range(constant(ge, 2**24), constant(ge, 2**24 + 9), constant(ge, 3)), x), [REAL],
        (np.arange(2**24, 2**24 + 9, 3), REAL),
    ),
    "Conv2DBackpropInput": (gradient_of_the_input, [WEIGHT, GRAD], adjoint((2, 3, 5, 5), WEIGHT, GRAD, 2, 1)),
}  # fmt: skip
for name, factor in (("InplaceIndexAdd", 1), ("InplaceIndexAdd, scaled", 2.5)):
    build, operands, _ = CASES[name]
    CASES[name] = build, operands, added(REAL.astype(np.float64), INDEX, operands[2], factor)


@pytest.mark.parametrize("device", ge_graphs.DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_a_type_means_what_its_document_says(name, device):
    build, operands, expected = CASES[name]
    tensors = [torch.from_numpy(x.astype(np.float32) if x.dtype == np.float64 else x) for x in operands]
    graph = ge_graphs.node_graph(build, *tensors)
    found = interpret.run(interpret.prepare(graph, device=device), tensors)
    for ours, theirs in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert ours.shape == theirs.shape and ours.dtype.is_floating_point == (theirs.dtype.kind == "f")
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=2e-5, atol=2e-5 if theirs.dtype.kind == "f" else 0)


def test_the_converters_make_these_types():
    integers = torch.ones(2, dtype=torch.int64)
    for types, f, operand in (
        ({"GeluV2"}, lambda x: torch.nn.functional.gelu(x), torch.zeros(2)),
        ({"BitwiseXor", "BitwiseAnd", "BitwiseOr"}, lambda x: (x ^ 5) & 3 | 8, integers),
        ({"RightShift"}, lambda x: x >> 1, integers),
        ({"Sort"}, lambda x: torch.sort(x, stable=True)[0], torch.zeros(2)),
        ({"Range"}, lambda x: x + torch.arange(2), torch.zeros(2)),
    ):
        assert types <= ge_graphs.round_trip(f, operand)


# ------------------------------------------------------------------------------------------------- only an A2's kernels


def test_integers_through_float32_are_what_ieee_says():
    x = np.array([2**24 + 1, 2**31 - 1, -(2**24) - 3, 7], dtype=np.int64)
    through = x.astype(np.float32).astype(np.int64).clip(max=2**31 - 1)
    tensors = torch.tensor([True] * 4), torch.from_numpy(x.astype(np.int32)), torch.zeros(4, dtype=torch.int32)
    graph = ge_graphs.node_graph(lambda ge, c, a, b: ge.SelectV2(c, a, b), *tensors)
    (found,) = interpret.run(interpret.prepare(graph, device="a2"), tensors)
    assert found[:1].tolist() == through[:1].tolist() == [2**24] and found[2:].tolist() == through[2:].tolist()
    (exact,) = interpret.run(interpret.prepare(graph), tensors)
    assert exact.tolist() == x.tolist()


@pytest.mark.parametrize(
    "kind, rounding", [("FloorDiv", np.floor), ("TruncateDiv", np.trunc), ("FloorMod", np.floor), ("Mod", np.trunc)]
)
def test_divisions_of_int32_are_made_in_float32(kind, rounding):
    """Of numbers below 2^24 they are the mathematics; above, the quotient is float32's, and so is `Mod` as a whole."""
    x = np.array([7, -7, 2**24 - 1, -(2**24) + 1, 2**24 + 1, 340_000_001, -83_000_003], dtype=np.int64)
    y = np.array([3, 3, -5, 7, 1, 3, 7], dtype=np.int64)
    quotient = rounding(x.astype(np.float32) / y.astype(np.float32))
    through = {"FloorDiv": quotient, "TruncateDiv": quotient, "FloorMod": x - quotient.astype(np.int64) * y}
    through["Mod"] = (x.astype(np.float32) - quotient * y.astype(np.float32)).astype(np.int64)
    whole = np.floor_divide(x, y) if rounding is np.floor else np.trunc(x.astype(np.float64) / y).astype(np.int64)
    exact = whole if kind.endswith("Div") else x - whole * y
    tensors = torch.from_numpy(x.astype(np.int32)), torch.from_numpy(y.astype(np.int32))
    graph = ge_graphs.node_graph(lambda ge, a, b: getattr(ge, kind)(a, b), *tensors)
    (found,) = interpret.run(interpret.prepare(graph, device="a2"), tensors)
    assert found.dtype == torch.int32 and found.tolist() == through[kind].astype(np.int64).tolist()
    assert found[:4].tolist() == exact[:4].tolist() and found.tolist() != exact.tolist()
    (published,) = interpret.run(interpret.prepare(graph), tensors)
    assert published.tolist() == exact.tolist()


def test_hf32_keeps_eleven_bits_of_the_mantissa_halves_to_even():
    one, step = 1.0, 2.0**-11
    x = [one + step / 2, one + 3 * step / 2, one + step * 0.51, -(one + step * 0.49), 3e38, math.inf, 0.0, 1e-3]
    found = a2.hf32(torch.tensor(x)).tolist()
    assert found[:4] == [one, one + 2 * step, one + step, -one]
    for value, rounded in zip(x[4:], found[4:]):
        mantissa, exponent = math.frexp(value) if math.isfinite(value) else (0, 0)
        assert rounded == (value if not mantissa else math.ldexp(round(mantissa * 2**12) / 2**12, exponent))
    assert math.isnan(a2.hf32(torch.tensor(math.nan)).item())
    assert a2.hf32(torch.tensor(0.1).half()) == torch.tensor(0.1).half()


def test_convolutions_in_hf32_are_those_of_rounded_operands():
    x, w = torch.from_numpy(REAL.reshape(1, 3, 4, 5)), torch.from_numpy(WEIGHT.astype(np.float32))[:, :, :2, :2]
    from bevfn.ascend.lower import lower

    lowered = lower(lambda x, w: torch.nn.functional.conv2d(x, w), (x, w))

    def run(device, *operands):
        program = interpret.prepare(lowered.graph, device=device)
        return lowered.results(interpret.run(program, lowered.arguments(*operands)))

    assert torch.equal(run("a2", x, w), run("published", x, w))
    rounded = run("a2-hf32", x, w)
    assert torch.equal(rounded, run("published", a2.hf32(x), a2.hf32(w)))
    assert 1e-6 < float((rounded - run("a2", x, w)).norm() / rounded.norm()) < 1e-3
