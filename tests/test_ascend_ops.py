"""kernels/*/ascend.py: the lowered ops are the ops, and what they leave in the graph fits the device."""

import contextlib
import ctypes
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file
from test_deform_attn import make as attention
from test_deform_attn import problems as attentions
from test_deform_conv import make as deformable
from test_deform_conv import problems as deformables
from test_linear_assignment import assert_as_good_as_scipy
from test_neighbours import STRIDES, make_sites
from test_voxel_pool import assert_close, problem
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from bevfn.bench import sparse
from bevfn.kernels import ascend, neighbours
from bevfn.kernels import parts as in_parts
from bevfn.kernels.deform_attn import ascend as deform_attn_ascend
from bevfn.kernels.deform_conv import ascend as deform_conv_ascend
from bevfn.kernels.linear_assignment import ascend as linear_assignment
from bevfn.kernels.linear_assignment import linear_assignment as assign
from bevfn.kernels.neighbours import ascend as neighbours_ascend
from bevfn.kernels.sparse_conv import ascend as sparse_conv_ascend
from bevfn.kernels.sparse_conv import sparse_conv
from bevfn.kernels.voxel_pool import ascend as voxel_pool_ascend
from bevfn.kernels.voxel_pool import intervals, voxel_pool
from bevfn.kernels.voxelize import ascend as voxelize_ascend

needs_torchair = pytest.mark.skipif(importlib.util.find_spec("torch_npu") is None, reason="needs torch_npu: make npu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
CANN = Path(linear_assignment.__file__).parent / "cann"
OPS = torch.ops.bevfn
KERNEL, GRID, BATCH = [3, 3, 3], [6, 5, 7], 2
VOXELS = ([-1.0, 0.0, 0.0], [1.0, 2.0, 2.5], [9, 5, 4], 3)  # lower, size, grid, points per voxel
AT_ONCE = st.sampled_from([in_parts.BYTES, 10_000, 1])  # everything, or a few images at a time, or one


@contextlib.contextmanager
def storing(stored):
    """Lowerings that store so many bytes at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_parts, "BYTES", stored)
        yield


def lowered(overload, *arguments, ops="stock"):
    return ascend.table(ops)[overload](*arguments)


def assert_equal(actual, expected):
    actual, expected = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b), (a, b)


def make_points(samples: int, points: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points in and around the grid of VOXELS, some not finite, some not valid."""
    g = torch.Generator().manual_seed(seed)
    made = torch.rand(samples, points, 5, generator=g) * 13 - 2
    strange = torch.rand(made.shape, generator=g)
    made = torch.where(strange < 0.01, float("nan"), torch.where(strange > 0.99, float("inf"), made))
    return made, torch.rand(samples, points, generator=g) < 0.9


# ------------------------------------------------------------------------------------------------- equal to the op


@settings(max_examples=60)
@given(
    samples=st.integers(1, 3), points=st.sampled_from([0, 1, 2, 30, 400]), seed=st.integers(0, 999),
    max_points=st.sampled_from([1, 3, 10]), max_voxels=st.sampled_from([1, 7, 60, 300]),
)  # fmt: skip
def test_voxelize_is_the_op(samples, points, seed, max_points, max_voxels):
    arguments = (*make_points(samples, points, seed), *VOXELS[:3], max_points, max_voxels)
    (features, *rest), expected = lowered(OPS.voxelize.default, *arguments), OPS.voxelize(*arguments)
    assert_equal(tuple(rest), expected[1:])  # which voxels, in which order, how many points, how many did not fit
    assert_close(features, expected[0], 1e-6)  # sums of up to ten numbers, in another order


def test_voxelize_keeps_the_first_points_of_a_full_voxel():
    points = torch.zeros(1, 50, 5)
    points[0, :, 4] = torch.arange(50)
    features, _, count, found = lowered(OPS.voxelize.default, points, torch.ones(1, 50) > 0, *VOXELS[:3], 10, 4)
    assert (count[0, 0], found[0], features[0, 0, 4]) == (10, 1, 4.5)  # 0 .. 9


@settings(max_examples=60)
@given(
    rows=st.sampled_from([0, 1, 20, 100]), fill=st.sampled_from([0.0, 0.5, 1.0]), batch=st.integers(1, 3),
    kernel=st.sampled_from([(3, 3, 3), (1, 1, 3), (5, 3, 1), (2, 2, 2)]), seed=st.integers(0, 999),
)  # fmt: skip
def test_submanifold_is_the_op(rows, fill, batch, kernel, seed):
    arguments = (*make_sites(rows, tuple(GRID), batch, fill, seed), list(kernel), GRID, batch)
    assert_equal(
        lowered(OPS.submanifold_neighbours.default, *arguments), OPS.submanifold_neighbours(*arguments)
    )  # fmt: skip


@settings(max_examples=80)
@given(
    rows=st.sampled_from([0, 1, 20, 100]), fill=st.sampled_from([0.0, 0.5, 1.0]), batch=st.integers(1, 3),
    setting=st.sampled_from(STRIDES), capacity=st.sampled_from([1, 9, 500]), seed=st.integers(0, 999),
)  # fmt: skip
def test_strided_is_the_op_with_its_order_and_overflow(rows, fill, batch, setting, capacity, seed):
    arguments = (*make_sites(rows, tuple(GRID), batch, fill, seed), *map(list, setting), GRID, capacity, batch)
    assert_equal(lowered(OPS.strided_neighbours.default, *arguments), OPS.strided_neighbours(*arguments))


def test_a_grid_or_cloud_beyond_int32_is_sorted_instead(monkeypatch):
    monkeypatch.setattr(neighbours_ascend, "INDEX", 8)
    monkeypatch.setattr(voxelize_ascend, "INFINITY", voxelize_ascend.NORMAL + 8)
    coords, valid = make_sites(30, tuple(GRID), BATCH, 0.7, 1)
    cases = {
        OPS.submanifold_neighbours: (coords, valid, KERNEL, GRID, BATCH),
        OPS.strided_neighbours: (coords, valid, KERNEL, [2, 2, 2], [1, 1, 0], GRID, 20, BATCH),
        OPS.voxelize: (*make_points(2, 60, 0), *VOXELS, 20),
    }
    for op, arguments in cases.items():
        assert_equal(lowered(op.default, *arguments), op(*arguments))
        assert "aten.searchsorted" in targets(op.default, arguments)
    unknown = (coords, valid, KERNEL, GRID)  # no batch size: no dense table
    assert_equal(lowered(OPS.submanifold_neighbours.default, *unknown), OPS.submanifold_neighbours(*unknown))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.float64, 1e-12)])
@pytest.mark.parametrize("channels", [(5, 16), (16, 8), (1, 1)])
@pytest.mark.parametrize("columns", [1 << 29, 27 * 16 * 7])  # at once, and in parts of 7 rows or more
def test_sparse_conv_is_the_op_over_strided_tables(dtype, tolerance, channels, columns, monkeypatch):
    monkeypatch.setattr(sparse_conv_ascend, "COLUMNS", columns)
    g = torch.Generator().manual_seed(0)
    coords, valid = make_sites(60, tuple(GRID), BATCH, 0.7, 2)
    table, inverse = OPS.strided_neighbours(coords, valid, KERNEL, [2, 2, 2], [1, 1, 1], GRID, 40, BATCH)[2:4]
    x, grad = torch.randn(60, channels[0], generator=g).to(dtype), torch.randn(40, channels[1], generator=g).to(dtype)
    weight = (torch.randn(27, *channels, generator=g) / 5).to(dtype)
    for op, operands in {
        OPS.sparse_conv: (x, weight, table),
        OPS.sparse_conv_weight_grad: (x, grad, table),
    }.items():
        assert_close(lowered(op.default, *operands), op(*operands), tolerance)
    back = (grad, weight.transpose(1, 2), inverse)  # the input gradient
    assert_close(lowered(OPS.sparse_conv.default, *back), OPS.sparse_conv(*back), tolerance)


@settings(max_examples=30)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 4), channels=st.sampled_from([1, 8, 13, 80]), num_cells=st.integers(1, 30),
    ops=st.sampled_from(["stock", "drivingsdk"]), seed=st.integers(0, 999),
    case=st.sampled_from([(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.float64, 1e-12)]),
    stored=AT_ONCE,
)  # fmt: skip
def test_voxel_pool_is_the_op(shape, channels, num_cells, ops, seed, case, stored):
    dtype, tolerance = case
    depth, context, cell = problem(*shape, channels, num_cells, seed=seed, dtype=dtype)
    cell = torch.where(cell == 0, num_cells + 3, cell)  # outside above as well as below
    with storing(stored):
        ours = lowered(OPS.voxel_pool.default, depth, context, cell, num_cells, ops=ops)
    assert ours.dtype == dtype and ours.shape == (num_cells, channels)
    assert_close(ours, OPS.voxel_pool(depth, context, cell, num_cells), tolerance)
    for samples in {1, len(cell)} if num_cells % len(cell) == 0 else {1}:
        per_sample = num_cells // samples
        sample = torch.arange(samples).repeat_interleave(len(cell) // samples).view(-1, 1, 1, 1)
        of_own = torch.where((cell < 0) | (cell >= num_cells), cell, cell % per_sample + sample * per_sample).int()
        own = intervals.made(of_own.unflatten(0, (samples, -1)), per_sample)
        ours = lowered(OPS.voxel_pool_intervals.default, depth, context, of_own, num_cells, *own, ops=ops)
        assert ours.dtype == dtype
        assert_close(ours, OPS.voxel_pool(depth, context, of_own, num_cells), tolerance)
    grad = torch.randn(num_cells, channels, generator=torch.Generator().manual_seed(seed)).to(dtype)
    expected = OPS.voxel_pool_backward(grad, depth, context, cell)
    with storing(stored):
        ours = lowered(OPS.voxel_pool_backward.default, grad, depth, context, cell, ops=ops)
    for a, b in zip(ours, expected):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert_close(a, b, tolerance)


@settings(max_examples=40)
@given(problem=deformables(), stored=AT_ONCE)
def test_deform_conv_is_the_op(problem, stored):
    operands, grad = problem
    close = {"rtol": 1e-11, "atol": 1e-11}
    with storing(stored):
        ours = lowered(OPS.deform_conv.default, *operands), *lowered(OPS.deform_conv_backward.default, grad, *operands)
    expected = OPS.deform_conv(*operands), *OPS.deform_conv_backward(grad, *operands)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("masked", [True, False])
def test_deform_conv_sums_half_precision_in_float32_and_an_image_beyond_int32_is_the_references(masked, monkeypatch):
    operands, grad = deformable(masked=masked, groups=4, dtype=torch.float16)
    expected = OPS.deform_conv(*operands), *OPS.deform_conv_backward(grad, *operands)
    for index in (1 << 31, 8):
        monkeypatch.setattr(deform_conv_ascend, "INDEX", index)
        ours = (
            lowered(OPS.deform_conv.default, *operands),
            *lowered(OPS.deform_conv_backward.default, grad, *operands),
        )
        for a, b in zip(ours, expected, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert b.numel() == 0 or float((a.float() - b.float()).abs().max()) <= 1e-3 * float(b.abs().max())


@settings(max_examples=40)
@given(problem=attentions(), stored=AT_ONCE)
def test_deform_attn_is_the_op(problem, stored):
    operands, grad = problem
    close = {"rtol": 1e-11, "atol": 1e-11}
    with storing(stored):
        ours = lowered(OPS.deform_attn.default, *operands), *lowered(OPS.deform_attn_backward.default, grad, *operands)
    expected = OPS.deform_attn(*operands), *OPS.deform_attn_backward(grad, *operands)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("attending", [None, 0.5])
def test_deform_attn_sums_half_precision_in_float32_and_a_table_beyond_int32_is_the_references(attending, monkeypatch):
    operands, grad = attention(attending=attending, dtype=torch.float16)
    expected = OPS.deform_attn(*operands), *OPS.deform_attn_backward(grad, *operands)
    for index in (1 << 31, 8):
        monkeypatch.setattr(deform_attn_ascend, "INDEX", index)
        ours = (
            lowered(OPS.deform_attn.default, *operands),
            *lowered(OPS.deform_attn_backward.default, grad, *operands),
        )
        for a, b in zip(ours, expected, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert float((a.float() - b.float()).abs().max()) <= 1e-3 * float(b.abs().max())


def test_deform_attn_spreads_samples_that_do_not_count_over_spare_rows_of_zeros():
    (value, locations, weights, _, sizes), _ = attention(batch=2, queries=3, heads=1, points=1)
    locations[:, 1] = -5.0
    mask = torch.tensor([[True, True, False]] * 2)
    table, spare = deform_attn_ascend._table(value, weights, sizes, (0, 1)), 2 * (5 * 6 + 4 * 3)  # quads of two images
    rows = deform_attn_ascend._samples(value, locations, mask, sizes).row.flatten(2)
    assert len(table) == spare + 3 and not table[spare:].any() and rows.dtype == torch.int32
    assert (rows[:, 1] == spare + 1).all() and (rows[:, 2] == spare + 2).all()


def test_an_unknown_choice_of_operators_is_named():
    with pytest.raises(ValueError, match="ops = 'cuda' is not known; choose one of stock, drivingsdk"):
        ascend.table("cuda")


def test_a_batch_size_that_the_sites_exceed_is_named():
    coords, valid = make_sites(10, tuple(GRID), 3, 1.0, 0)
    with pytest.raises(RuntimeError, match=r"outside grid .* or the batch of 1"):
        neighbours.submanifold(coords, valid, kernel=(3, 3, 3), grid=tuple(GRID), batch=1)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        neighbours.submanifold(coords, valid, kernel=(3, 3, 3), grid=tuple(GRID), batch=0)


# ------------------------------------------------------------------------------------------------- traced, any machine


def targets(overload, arguments, ops="stock") -> set[str]:
    """Operators of the traced call, without overload names."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]

    def call(*given):
        rest = iter(given)
        return overload(*[next(rest) if isinstance(x, Tensor) else x for x in arguments])

    graph = make_fx(call, decomposition_table=ascend.table(ops), tracing_mode="fake")(*tensors).graph
    return {str(node.target).rsplit(".", 1)[0] for node in graph.nodes if node.op == "call_function"}


def small_cases() -> dict:
    """{operator: arguments}."""
    coords, valid = make_sites(30, tuple(GRID), BATCH, 0.7, 1)
    table = OPS.submanifold_neighbours(coords, valid, KERNEL, GRID, BATCH)
    g = torch.Generator().manual_seed(0)
    x, grad = torch.randn(30, 16, generator=g), torch.randn(30, 8, generator=g)
    depth, context, cell = problem(2, 5, 3, 4, 8, 12)
    deform, slopes = deformable(groups=4, dtype=torch.float32)
    attended, attended_slopes = attention(dtype=torch.float32)
    return {
        OPS.voxelize.default: (*make_points(2, 60, 0), *VOXELS, 20),
        OPS.submanifold_neighbours.default: (coords, valid, KERNEL, GRID, BATCH),
        OPS.strided_neighbours.default: (coords, valid, KERNEL, [2, 2, 2], [1, 1, 0], GRID, 20, BATCH),
        OPS.sparse_conv.default: (x, torch.randn(27, 16, 8, generator=g), table),
        OPS.sparse_conv_weight_grad.default: (x, grad, table),
        OPS.voxel_pool.default: (depth, context, cell, 12),
        OPS.voxel_pool_backward.default: (torch.randn(12, 8, generator=g), depth, context, cell),
        OPS.deform_conv.default: deform,
        OPS.deform_conv_backward.default: (slopes, *deform),
        OPS.deform_attn.default: attended,
        OPS.deform_attn_backward.default: (attended_slopes, *attended),
        OPS.linear_assignment.default: (torch.randn(2, 10, 4, generator=g), torch.tensor([[True] * 3 + [False]] * 2)),
    }


def test_nothing_traced_sorts_integers_searches_scatters_or_depends_on_values():
    made = {overload: targets(overload, arguments) for overload, arguments in small_cases().items()}
    found = set().union(*made.values())
    assert not found & {"aten.searchsorted", "aten.scatter", "aten.scatter_add", "aten.nonzero", "aten.index"}
    assert {name for name in found if not name.startswith("aten.") and "getitem" not in name} == {
        "bevfn.linear_assignment"
    }
    assert [overload for overload, names in made.items() if "aten.sort" in names] == [OPS.voxelize.default]
    assert not any(name.endswith("_") for name in found), "in place"


# ------------------------------------------------------------------------------------------------- GE graphs


def ge(overload, arguments, ops="stock", device="published"):
    """(lowered, the graph's results as the interpreter's `device` computes them) of one operator call."""
    from bevfn.ascend import interpret
    from bevfn.ascend.lower import lower

    tensors = tuple(x for x in arguments if isinstance(x, Tensor))

    def call(*given):
        rest = iter(given)
        return overload(*[next(rest) if isinstance(x, Tensor) else x for x in arguments])

    made = lower(call, tensors, ops=ops)
    program = interpret.prepare(made.graph, ascend.meanings(), device=device)
    return made, made.results(interpret.run(program, made.arguments(*tensors)))


@needs_torchair
def test_cells_beyond_float32s_integers_are_found_on_an_a2():
    """BEVFusion's cells reach 83 M and, of a batch of four, 340 M; A2's int32 selects are exact to 2^24."""
    grid = [160, 320, 400]  # 20 M cells a sample
    coords, valid = make_sites(200, (4, 4, 4), 2, 0.7, 1)
    coords = torch.where(valid[:, None], coords + torch.tensor([0, 150, 301, 395], dtype=torch.int32), coords)
    lower, size, cells, most = [-54.0, -54.0, -5.0], [0.075, 0.075, 0.2], [1440, 1440, 41], 10
    points = torch.rand(2, 300, 5, generator=torch.Generator().manual_seed(0)) * 2 + torch.tensor([50.0, 50, 0, 0, 0])
    for op, arguments in (
        (OPS.submanifold_neighbours, (coords, valid, KERNEL, grid, 2)),
        (OPS.strided_neighbours, (coords, valid, KERNEL, [2, 2, 2], [1, 1, 1], grid, 200, 2)),
        (OPS.voxelize, (points, points[..., 0] > 0, lower, size, cells, most, 300)),
    ):
        (found, *others), (expected, *rest) = (
            x if isinstance(x, tuple) else (x,) for x in (ge(op.default, arguments, device="a2")[1], op(*arguments))
        )
        assert_close(found, expected, 1e-6)
        assert_equal(tuple(others), tuple(rest))


IN_PARTS = [overload for overload in small_cases() if "pool" in str(overload) or "deform" in str(overload)]


@needs_torchair
@pytest.mark.parametrize(
    "overload, stored",
    [(overload, in_parts.BYTES) for overload in small_cases()] + [(overload, 1) for overload in IN_PARTS],
    ids=str,
)
def test_the_ge_graph_computes_the_op_on_the_ai_core(overload, stored):
    from bevfn.ascend import interpret, report

    arguments = small_cases()[overload]
    with storing(stored):
        made, actual = ge(overload, arguments)
    expected = overload(*arguments)
    program = interpret.prepare(made.graph, ascend.meanings(), device="a2")
    on_a2 = made.results(interpret.run(program, made.arguments(*(x for x in arguments if isinstance(x, Tensor)))))
    for found in (actual, on_a2):
        for a, b in zip(*[x if isinstance(x, (tuple, list)) else [x] for x in (found, expected)], strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            if b.dtype.is_floating_point:
                assert_close(a, b, 1e-6)
            else:
                assert torch.equal(a, b)
    told = report.report(str(overload), made)
    assert told.complete and told.no_kernel == told.unlisted == []
    off_core = [line for line in told.off_core if linear_assignment.TYPE not in line]
    assert off_core == [] and bool(told.off_core) == (overload == OPS.linear_assignment.default)


@needs_torchair
def test_gradients_through_the_lowered_ops_are_eagers():
    from bevfn.ascend import interpret
    from bevfn.ascend.lower import lower

    coords, valid = make_sites(40, tuple(GRID), BATCH, 0.8, 3)
    depth, context, cell = problem(2, 5, 3, 4, 8, 60)
    g = torch.Generator().manual_seed(0)
    weight, target = torch.randn(27, 8, 8, generator=g) / 5, torch.randn(20, 8, generator=g)

    def loss(weight, depth, context, coords, valid, cell, target):
        sites, active, table, inverse, _ = neighbours.strided(
            coords, valid, kernel=(3, 3, 3), stride=(2, 2, 2), padding=(1, 1, 1), grid=tuple(GRID), capacity=20, batch=2
        )
        again = neighbours.submanifold(sites, active, kernel=(3, 3, 3), grid=(3, 3, 4), batch=2)
        x = voxel_pool(depth, context, cell, 60)[:40]
        y = sparse_conv(torch.relu(sparse_conv(x, weight, table, inverse)), weight, again, again.flip(0))
        return ((y - target) ** 2 * active[:, None]).sum()

    step = torch.func.grad_and_value(loss, argnums=(0, 1, 2))
    operands = (weight, depth, context, coords, valid, cell, target)
    (grads, value) = step(*operands)
    made = lower(step, operands)
    (ours, our_value) = made.results(interpret.run(made.graph, made.arguments(*operands)))
    assert_close(our_value, value, 1e-6)
    for a, b in zip(ours, grads):
        assert_close(a, b, 1e-6)


# DrivingSDK at e667017, kernels/bev_pool_v3/op_host/bev_pool_v3.cpp
BEV_POOL_V3 = {
    "inputs": {"depth": 1, "feat": 1, "ranks_depth": 7, "ranks_feat": 7, "ranks_bev": 7},  # protobuf: float32, int32
    "attributes": {"with_depth": "b", "b": "i", "d": "i", "h": "i", "w": "i", "c": "i"},
    "outputs": ["out"],
}


@needs_torchair
@pytest.mark.filterwarnings("error:infer and generate sym shape failed")  # torchair would have run the operator itself
@pytest.mark.parametrize("channels,used", [(8, True), (80, True), (7, False), (368, False)])
def test_drivingsdk_pools_by_the_published_prototype_or_not_at_all(channels, used):
    depth, context, cell = problem(3, 5, 3, 4, channels, 12)
    made, actual = ge(OPS.voxel_pool.default, (depth, context, cell, 12), ops="drivingsdk")
    assert_close(actual, OPS.voxel_pool(depth, context, cell, 12), 1e-6)
    nodes = [op for op in made.graph.op if op.type == "BEVPoolV3"]
    assert len(nodes) == used
    assert used != ("InplaceIndexAdd" in {op.type for op in made.graph.op})
    for op in nodes:
        own = {name: value.WhichOneof("value") for name, value in op.attr.items() if not name.startswith("_")}
        assert own == BEV_POOL_V3["attributes"]
        assert [d.name for d in op.input_desc] == list(BEV_POOL_V3["inputs"])
        assert [d.name for d in op.output_desc] == BEV_POOL_V3["outputs"]
        given = {name: made_by(made.graph, source) for name, source in zip(BEV_POOL_V3["inputs"], op.input)}
        ranks = [given[name] for name in ("ranks_depth", "ranks_feat", "ranks_bev")]
        assert all(ranks), "every operand is fed"
        sizes = {name: op.attr[name].i for name in "bdhwc"}
        assert sizes == {"b": 1, "d": 1, "h": 1, "w": 12 + 4, "c": channels}  # the spare rows are cut off later


def made_by(graph, source: str):
    return next(op for op in graph.op if op.name == source.rsplit(":", 1)[0])


# ------------------------------------------------------------------------------------------------- linear_assignment


@needs_torchair
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_linear_assignment_is_a_node_of_the_packages_prototype(dtype):
    cost, valid = small_cases()[OPS.linear_assignment.default]
    made, match = ge(OPS.linear_assignment.default, (cost.to(dtype), valid))
    assert torch.equal(match, assign(cost.to(dtype), valid))
    (node,) = [op for op in made.graph.op if op.type == linear_assignment.TYPE]
    prototype = (CANN / "op_graph" / "bevfn_linear_assignment_proto.h").read_text()
    declared = re.findall(r"\.(INPUT|OUTPUT)\((\w+), TensorType\(\{(.*?)\}\)\)", prototype)
    assert re.search(r"REG_OP\((\w+)\)", prototype)[1] == node.type
    assert [d.name for d in node.input_desc] == [name for kind, name, _ in declared if kind == "INPUT"]
    assert [d.name for d in node.output_desc] == [name for kind, name, _ in declared if kind == "OUTPUT"]
    (info,) = json.loads((CANN / "op_kernel_aicpu" / "bevfn_linear_assignment.json").read_text()).items()
    listed = {entry["name"]: entry["type"] for key, entry in info[1].items() if key != "opInfo"}
    assert info[0] == node.type
    assert listed == {name: dtypes.replace(" ", "") for _, name, dtypes in declared}
    cast = [op for op in made.graph.op if op.type == "Cast"]
    assert bool(cast) == (dtype in (torch.float16, torch.bfloat16))  # the prototype has no half precision


@pytest.fixture(scope="module")
def match(tmp_path_factory):
    """match(cost, valid) by the AI CPU kernel's core, built without CANN."""
    folder = tmp_path_factory.mktemp("match")
    source, library = folder / "match.cpp", folder / "match.so"
    source.write_text(
        '#include "match.h"\n'
        'extern "C" void match32(const float* c, const uint8_t* v, int64_t* m, int64_t B, int64_t Q, int64_t G) '
        "{ bevfn::match(c, v, m, B, Q, G); }\n"
        'extern "C" void match64(const double* c, const uint8_t* v, int64_t* m, int64_t B, int64_t Q, int64_t G) '
        "{ bevfn::match(c, v, m, B, Q, G); }\n"
    )
    include = [f"-I{CANN / 'op_kernel_aicpu'}", f"-I{CANN.parent}"]
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", *include, source, "-o", library]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    loaded = ctypes.CDLL(str(library))

    def run(cost: Tensor, valid: Tensor) -> Tensor:
        made = torch.full(valid.shape, -7, dtype=torch.int64)
        function = loaded.match32 if cost.dtype == torch.float32 else loaded.match64
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (cost.contiguous(), valid.contiguous(), made)]
        function(*pointers, *map(ctypes.c_int64, cost.shape))
        return made

    return run


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ai_cpu_core_builds_without_cann_and_matches_as_the_op(match, dtype):
    g = torch.Generator().manual_seed(0)
    for B, Q, G in [(4, 200, 60), (2, 5, 9), (1, 1, 1), (2, 0, 3), (2, 4, 0)]:
        cost = torch.randn(B, Q, G, generator=g).to(dtype)
        for share in (0.0, 0.6, 1.0):
            valid = torch.rand(B, G, generator=g) < share
            assert torch.equal(match(cost, valid), assign(cost, valid))
    cost[:] = 0
    strange = torch.randn(2, 6, 5, generator=g).to(dtype)
    strange[0, 1, 2], strange[1, 3] = float("nan"), float("inf")
    valid = torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(match(strange, valid), assign(strange, valid))


def test_the_converters_core_is_as_good_as_scipy():
    g = torch.Generator().manual_seed(1)
    cost, valid = torch.randn(3, 20, 30, generator=g), torch.rand(3, 30, generator=g) < 0.8
    assert_as_good_as_scipy(cost, valid)
    assert torch.equal(linear_assignment.meaning(cost, valid), assign(cost, valid))
    with pytest.raises(ValueError, match="float32 or float64"):
        linear_assignment.meaning(cost.half(), valid)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_build_script_says_what_it_lacks(tmp_path):
    def build(*arguments, **environment):
        return subprocess.run(
            ["bash", str(CANN / "build.sh"), *arguments], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"} | environment
        )  # fmt: skip

    assert "a checkout of hicann/ops-nn" in build(str(tmp_path)).stderr
    (tmp_path / "build.sh").touch()
    told = build(str(tmp_path))
    assert told.returncode == 2 and "ASCEND_HOME_PATH is not set" in told.stderr


# ------------------------------------------------------------------------------------------------- published size


@needs_torchair
def test_published_convolutions_multiply_less_than_three_times_the_real_pairs():
    from bevfn.bench import ascend as cost

    layers = list(cost.encoder())
    assert len(layers) == 21
    chosen = {layer.part: layer for layer in layers if layer.part in ("level1", "level2", "level3")}
    ratios = [
        [ours.gflop / best.gflop for ours, best in layer.costs(torch.float16).values()] for layer in chosen.values()
    ]
    assert all(1 <= ratio < 3 for ratio in itertools.chain(*ratios)), ratios


@needs_torchair
def test_published_tables_and_view_transform_are_static_graphs():
    from bevfn.bench import ascend as cost

    assert len(list(cost.tables())) == 8
    stock, fused = (cost.view_transform()[name][0] for name in ("forward", "forward, BEVPoolV3"))
    assert fused.gigabytes < stock.gigabytes / 5  # the outer product is not stored


@needs_torchair
def test_published_deformable_convolution_multiplies_what_it_must_and_moves_less_than_the_reference():
    from bevfn.bench import ascend as cost

    made = cost.deformable()
    for name in ("forward", "backward"):
        ours, best = made[name]
        assert ours.gflop < 1.1 * best.gflop
    assert made["forward"][0].gigabytes < made["forward, a gather per corner"][0].gigabytes / 2


@needs_torchair
def test_published_attention_gathers_whole_quads():
    from bevfn.bench import ascend as cost

    made = cost.attention()
    assert made["forward"][0].gigabytes < made["forward, a gather per corner"][0].gigabytes / 2


@pytest.mark.slow
@pytest.mark.skipif(not sparse.GOLDEN.exists(), reason="needs shared/goldens/bevfusion_lidar")
def test_published_size_on_a_real_frame_is_the_op():
    scan = load_file(sparse.GOLDEN)["points"]
    points = torch.zeros(2, 60_000, 5)
    points[:, : len(scan)] = torch.stack([scan, scan.flip(0) * torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0])])
    valid = torch.arange(60_000).expand(2, -1) < len(scan)
    arguments = (points, valid, [-54.0, -54.0, -5.0], [0.075, 0.075, 0.2], [1440, 1440, 40], 10, 120_000)
    made = OPS.voxelize(*arguments)
    assert_equal(lowered(OPS.voxelize.default, *arguments), made)
    sample = torch.arange(2, dtype=torch.int32)[:, None, None].expand(2, 120_000, 1)
    coords, active = torch.cat([sample, made[1]], 2).flatten(0, 1), (made[2] > 0).flatten()
    grid = list(sparse.GRID)
    for (kernel, stride, padding), capacity in zip(sparse.DOWN, (200_000, 150_000, 80_000, 64_800)):
        same = (coords, active, KERNEL, grid, 2)
        assert_equal(lowered(OPS.submanifold_neighbours.default, *same), OPS.submanifold_neighbours(*same))
        down = (coords, active, list(kernel), list(stride), list(padding), grid, 2 * capacity, 2)
        expected = OPS.strided_neighbours(*down)
        assert_equal(lowered(OPS.strided_neighbours.default, *down), expected)
        coords, active = expected[:2]
        grid = list(neighbours.out_grid(grid, kernel, stride, padding))


def test_voxel_pool_spreads_points_outside_over_spare_rows():
    cell = torch.tensor([-1, 5, 12, 11], dtype=torch.int32).reshape(1, 1, 1, 4)
    assert voxel_pool_ascend._rows(cell, 12).flatten().tolist() == [12, 5, 14, 11]
