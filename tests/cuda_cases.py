"""The CUDA lowerings in Triton's interpreter: each equals its reference, forward and gradients, empty, full, overflowing.

test_cuda.py runs this file in a process of its own, since TRITON_INTERPRET must be set before Triton is imported. There
the operators' CPU lowerings are replaced, so that what is tested lies behind autograd as it does on a GPU. bfloat16 is
not tested: the interpreter's products of it are garbage.
"""

import importlib
import itertools
import os

import pytest
import torch
from torch import Tensor

from bevfn.kernels import cuda, neighbours, sparse_conv, voxel_pool

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: see test_cuda.py", allow_module_level=True)

GRID = (7, 6, 5)
LOWERINGS = {
    "voxelize": ("voxelize", "voxelize"),
    "submanifold_neighbours": ("neighbours", "submanifold"),
    "strided_neighbours": ("neighbours", "strided"),
    "sparse_conv": ("sparse_conv", "sparse_conv"),
    "sparse_conv_weight_grad": ("sparse_conv", "weight_grad"),
    "sparse_conv_tiled": ("sparse_conv", "tiled"),
    "sparse_conv_tiled_weight_grad": ("sparse_conv", "tiled_weight_grad"),
    "sparse_conv_tiles": ("sparse_conv", "tiles"),
    "voxel_pool": ("voxel_pool", "forward"),
    "voxel_pool_backward": ("voxel_pool", "backward"),
    "deform_conv": ("deform_conv", "forward"),
    "deform_conv_backward": ("deform_conv", "backward"),
    "deform_attn": ("deform_attn", "forward"),
    "deform_attn_backward": ("deform_attn", "backward"),
    "linear_assignment": ("linear_assignment", "linear_assignment"),
}
REFERENCES = {
    name: getattr(importlib.import_module(f"bevfn.kernels.{op}.reference"), function)
    for name, (op, function) in LOWERINGS.items()
}
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}  # relative to the whole result


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """The lowerings for CUDA take the CPU's place."""
    library = torch.library.Library("bevfn", "IMPL")
    for name, (op, function) in LOWERINGS.items():
        lowering = getattr(importlib.import_module(f"bevfn.kernels.{op}.cuda"), function)
        library.impl(name, lowering, "CPU", allow_override=True)
    yield
    library._destroy()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def run(name: str, *operands: object) -> list[Tensor]:
    """Results of the operator."""
    made = getattr(torch.ops.bevfn, name)(*operands)
    return list(made) if isinstance(made, tuple | list) else [made]


def check(name: str, *operands: object) -> None:
    """The operator equals its reference in float64."""
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in operands]
    wanted = REFERENCES[name](*wide)
    dtypes = {x.dtype for x in operands if isinstance(x, Tensor) and x.is_floating_point()}
    tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
    for made, right in zip(run(name, *operands), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        assert made.shape == right.shape and made.dtype in dtypes
        assert float((made.double() - right).norm()) <= tolerance * float(right.norm())


def sites(rows: int, used: int) -> tuple[Tensor, Tensor]:
    cells = torch.tensor(list(itertools.product(range(2), *map(range, GRID))), dtype=torch.int32)
    return cells[torch.randperm(len(cells), generator=generator())[:rows]], torch.arange(rows) < used


def check_bits(name: str, *operands: object) -> list[Tensor]:
    """The operator equals its reference bit for bit."""
    made, wanted = run(name, *operands), REFERENCES[name](*operands)
    for a, b in zip(made, wanted if isinstance(wanted, tuple) else (wanted,)):
        assert a.dtype == b.dtype and torch.equal(a, b)
    return made


def cloud(points: int, columns: int) -> Tensor:
    """[2 points columns], dense enough that cells hold several, some outside, some not finite."""
    made = torch.rand(2, points, columns, generator=generator()) * 5 - 0.5
    made[0, 3, 1], made[1, 5, 2], made[1, 6, columns - 1] = float("nan"), float("inf"), -float("inf")
    made[:, 10:14, :3] = torch.tensor([0.3, 0.6, 3.9])  # on a cell's edge as float32 sees it
    return made


@pytest.mark.parametrize("columns, max_points, max_voxels", [(5, 4, 40), (3, 1, 7), (4, 10, 300)])
def test_voxels(columns, max_points, max_voxels):
    points = cloud(150, columns)
    valid = torch.rand(points.shape[:2], generator=generator(1)) < 0.9
    setting = [0.0, 0.0, 0.0], [0.3, 0.6, 1.3], [14, 6, 3], max_points, max_voxels
    *_, count, found = check_bits("voxelize", points, valid, *setting)
    assert (int(found[0]) > max_voxels) == (max_voxels < 300)  # overflow
    assert int(count.max()) == min(max_points, int(count.max())) and int(found.min()) > 7


@pytest.mark.parametrize("points, used", [(0, False), (9, False), (1, True)])
def test_voxels_of_nothing_and_of_one_point(points, used):
    valid = torch.full((2, points), used)
    setting = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1, 1, 1], 2, 3
    check_bits("voxelize", torch.full((2, points, 4), 0.5), valid, *setting)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 5), (2, 1, 1)])
@pytest.mark.parametrize("rows, used", [(420, 420), (150, 130), (1, 1), (5, 0), (0, 0)])
def test_submanifold_tables(kernel, rows, used):
    if rows == 420 and kernel != (3, 3, 3):
        return
    coords, valid = sites(rows, used)
    (table,) = check_bits("submanifold_neighbours", coords, valid, list(kernel), list(GRID), 2)
    assert rows < 420 or int((table >= 0).sum()) == 2 * 19 * 16 * 13  # of a full grid: 3 n - 2 pairs along an axis


@pytest.mark.parametrize(
    "kernel, stride, padding",
    [((3, 3, 3), (2, 2, 2), (1, 1, 1)), ((3, 3, 3), (2, 2, 2), (1, 1, 0)), ((1, 1, 3), (1, 1, 2), (0, 0, 0)),
     ((2, 2, 2), (3, 3, 3), (0, 1, 2))],
)  # fmt: skip
@pytest.mark.parametrize("rows, used, capacity", [(100, 90, 200), (100, 90, 9), (4, 0, 3), (0, 0, 3), (1, 1, 1)])
def test_strided_tables(kernel, stride, padding, rows, used, capacity):
    if rows in (1, 4) and kernel != (3, 3, 3):
        return
    coords, valid = sites(rows, used)
    rule = [list(kernel), list(stride), list(padding), list(GRID), capacity, 2]
    *_, found = check_bits("strided_neighbours", coords, valid, *rule)
    assert (int(found) > capacity) == (capacity == 9 or (capacity == 1 and int(found) > 1))


def tables(kind: str, rows: int, used: int) -> tuple[Tensor, Tensor]:
    """(table, inverse)."""
    coords, valid = sites(rows, used)
    kernel = (3, 3, 3)
    if kind == "submanifold":
        table = neighbours.submanifold(coords, valid, kernel=kernel, grid=GRID)
        return table, table.flip(0)
    step = {"kernel": kernel, "stride": (2, 2, 2), "padding": (1, 1, 1), "grid": GRID, "batch": 2}
    capacity = 20 if kind == "overflow" else 90
    _, valid, table, inverse, found = neighbours.strided(coords, valid, **step, capacity=capacity)
    assert (int(found) > capacity) == (kind == "overflow")
    return table, inverse


@pytest.mark.parametrize(
    "kind, channels", [("submanifold", (5, 16)), ("strided", (16, 24)), ("overflow", (5, 16)), ("overflow", (70, 130))]
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sparse_convolution(kind, channels, dtype):
    table, inverse = tables(kind, 100, 90)
    x, weight = randn(100, channels[0], dtype=dtype), randn(27, *channels, seed=1, dtype=dtype) / 8
    grad = randn(table.shape[1], channels[1], seed=2, dtype=dtype)
    check("sparse_conv", x, weight, table)
    check("sparse_conv", grad, weight.transpose(1, 2), inverse)  # the input's gradient
    check("sparse_conv_weight_grad", x, grad, table)


@pytest.mark.parametrize("offsets, used", [(27, 0), (3, 70), (1, 40), (61, 20)])
def test_sparse_convolution_over_empty_and_full_tables_of_other_kernels(offsets, used):
    table = torch.where(torch.arange(70) < used, torch.arange(70), -1).to(torch.int32).repeat(offsets, 1)
    x, weight, grad = randn(70, 16), randn(offsets, 16, 16), randn(70, 16)
    check("sparse_conv", x, weight, table)
    check("sparse_conv_weight_grad", x, grad, table)


def test_sparse_convolution_without_rows():
    table = torch.zeros(27, 0, dtype=torch.int32)
    check("sparse_conv", randn(4, 8), randn(27, 8, 3), table)
    check("sparse_conv_weight_grad", randn(4, 8), randn(0, 3), table)


@pytest.mark.parametrize("offsets, rows", [(27, 200), (27, 64), (3, 70), (1, 1), (61, 130), (27, 0)])
def test_rows_are_grouped_by_the_offsets_that_they_read(offsets, rows):
    table = tables("submanifold", 200, 180)[0][:, :rows].repeat(3, 1)[:offsets]
    for order, lists, counts in (torch.ops.bevfn.sparse_conv_tiles(table), REFERENCES["sparse_conv_tiles"](table)):
        parts = counts.shape[0]
        per_part = -(-offsets // parts)
        assert parts == (1 if offsets <= 16 else 3 if offsets == 61 else 2) and counts.shape[1] == -(-rows // 64)
        for part in range(parts):
            assert order[part].sort().values.tolist() == list(range(rows))
            for tile in range(counts.shape[1]):
                of = order[part, tile * 64 : (tile + 1) * 64].long()
                within = range(part * per_part, min(offsets, (part + 1) * per_part))
                read = [k for k in within if (table[k, of] >= 0).any()]
                assert lists[part, tile, : counts[part, tile]].tolist() == read


def test_derivatives_of_a_sparse_convolution_in_one_graph():
    table, inverse = tables("overflow", 40, 35)
    x, weight = randn(40, 8), randn(27, 8, 12) / 8
    shared = *torch.ops.bevfn.sparse_conv_tiles(table), *torch.ops.bevfn.sparse_conv_tiles(inverse)

    def loss(x, weight, table, inverse, tiles):
        return torch.relu(sparse_conv.sparse_conv(x, weight, table, inverse, tiles)).square().sum()

    step = torch.func.grad(loss, (0, 1))
    made = step(x, weight, table, inverse, shared)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, weight, table, inverse, shared)
    alone = step(x, weight, table, inverse, ())
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(made, compiled, alone))

    def plain(x, weight):
        y = sparse_conv.reference.sparse_conv(x, weight, table)
        return torch.relu(y).square().sum()

    for a, b in zip(made, torch.func.grad(plain, (0, 1))(x.double(), weight.double())):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [3, 80])
def test_voxel_pooling(dtype, channels):
    depth, context = randn(2, 5, 3, 7, dtype=dtype).softmax(1), randn(2, 3, 7, channels, seed=1, dtype=dtype)
    cell = torch.randint(-6, 25, depth.shape, dtype=torch.int32, generator=generator())  # 20 and more are outside
    cell[0] = torch.where(cell[0] % 2 == 0, 7, cell[0])  # one full cell
    check("voxel_pool", depth, context, cell, 20)
    check("voxel_pool_backward", randn(20, channels, seed=2, dtype=dtype), depth, context, cell)


@pytest.mark.parametrize("images", [0, 1])
def test_voxel_pooling_of_nothing(images):
    depth, context = randn(images, 2, 3, 3), randn(images, 3, 3, 4)
    cell = torch.full(depth.shape, -1, dtype=torch.int32)
    check("voxel_pool", depth, context, cell, 5)
    check("voxel_pool_backward", randn(5, 4), depth, context, cell)


def test_derivatives_of_voxel_pooling_in_one_graph():
    depth, context = randn(1, 4, 2, 3).softmax(1), randn(1, 2, 3, 5)
    cell = torch.randint(-1, 6, depth.shape, dtype=torch.int32, generator=generator())

    def loss(depth, context, cell):
        return voxel_pool.voxel_pool(depth, context, cell, 6).square().sum()

    step = torch.func.grad(loss, (0, 1))
    made = step(depth, context, cell)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(depth, context, cell)
    assert all(torch.equal(a, b) for a, b in zip(made, compiled))
    wide = depth.double(), context.double()
    wanted = torch.func.grad(lambda d, c: REFERENCES["voxel_pool"](d, c, cell, 6).square().sum(), (0, 1))(*wide)
    for a, b in zip(made, wanted):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_intervals_hold_each_row_s_entries_in_order():
    rows = torch.tensor([3, -1, 0, 3, 9, 0, 2, 4], dtype=torch.int32)
    order, starts = cuda.intervals(rows, 4)
    assert [order[a:b].tolist() for a, b in itertools.pairwise(starts.tolist())] == [[2, 5], [], [6], [0, 3]]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "channels, groups, deformable, masked, step",
    [(8, 2, 1, False, (1, 1, 1)), (6, 1, 2, True, (2, 1, 1)), (72, 1, 1, True, (1, 2, 2))],
)
def test_deformable_convolution(dtype, channels, groups, deformable, masked, step):
    x, weight = randn(2, channels, 4, 3, dtype=dtype), randn(4, channels // groups, 3, 3, seed=1, dtype=dtype) / 6
    size = reference_size(x, weight, step)
    offset = 2 * randn(2, 18 * deformable, *size, seed=2, dtype=dtype)  # many samples outside the image
    offset[0, :2, 0, 0] = float("nan")
    offset[1, :, 0, 0] = 0.0  # whole positions
    mask = randn(2, 9 * deformable, *size, seed=3, dtype=dtype) if masked else None
    check("deform_conv", x, offset, mask, weight, *step)
    check("deform_conv_backward", randn(2, 4, *size, seed=4, dtype=dtype), x, offset, mask, weight, *step)


def reference_size(x: Tensor, weight: Tensor, step: tuple[int, int, int]) -> tuple[int, int]:
    return importlib.import_module("bevfn.kernels.deform_conv.reference").out_size(x, weight, *step)


def test_deformable_convolution_of_no_image():
    x, offset, weight = randn(0, 4, 5, 5), randn(0, 18, 5, 5), randn(2, 4, 3, 3)
    check("deform_conv", x, offset, None, weight, 1, 1, 1)
    check("deform_conv_backward", randn(0, 2, 5, 5), x, offset, None, weight, 1, 1, 1)


def test_deformable_convolution_in_parts(monkeypatch):
    from bevfn.kernels import parts

    monkeypatch.setattr(parts, "BYTES", 1)
    x, offset, weight = randn(2, 4, 3, 2), randn(2, 18, 3, 2), randn(2, 4, 3, 3)
    check("deform_conv", x, offset, None, weight, 1, 1, 1)
    check("deform_conv_backward", randn(2, 2, 3, 2), x, offset, None, weight, 1, 1, 1)


@pytest.mark.parametrize(
    "value_dtype, dtype, masked, sizes",
    [
        (torch.float32, torch.float32, True, [5, 4, 1, 3]),
        (torch.float16, torch.float16, False, [5, 4]),
        (torch.float16, torch.float32, True, [2, 3]),
    ],
)
def test_deformable_attention(value_dtype, dtype, masked, sizes):
    L, S = len(sizes) // 2, sum(h * w for h, w in zip(sizes[::2], sizes[1::2]))
    value, locations = randn(2, S, 2, 10, dtype=value_dtype), (randn(2, 9, 2, L, 3, 2, seed=1) + 0.5).to(dtype)
    weights, mask = randn(2, 9, 2, L, 3, seed=2, dtype=dtype), None
    if masked:
        mask = torch.rand(2, 9, generator=generator()) < 0.6
        locations[~mask], weights[~mask] = float("nan"), float("inf")
    check("deform_attn", value, locations, weights, mask, sizes)
    grad = randn(2, 9, 20, seed=3, dtype=value_dtype)
    check("deform_attn_backward", grad, value, locations, weights, mask, sizes)


def test_deformable_attention_of_no_query():
    value, locations, weights = randn(1, 6, 2, 4), randn(1, 0, 2, 1, 3, 2), randn(1, 0, 2, 1, 3)
    check("deform_attn", value, locations, weights, None, [2, 3])
    check("deform_attn_backward", randn(1, 0, 8), value, locations, weights, None, [2, 3])


@pytest.mark.parametrize("queries, boxes, used", [(12, 7, 5), (5, 9, 8), (6, 6, 6), (1, 3, 3), (3, 1, 1), (4, 3, 0)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_assignments(queries, boxes, used, dtype):
    cost = randn(2, queries, boxes, dtype=dtype)
    valid = torch.rand(2, boxes, generator=generator(1)).argsort(1) < used
    made, wanted = run("linear_assignment", cost, valid)[0], REFERENCES["linear_assignment"](cost, valid)
    assert made.dtype == wanted.dtype and total(made, cost) == pytest.approx(total(wanted, cost), rel=1e-12)
    check_pairs(made, valid, queries)


def test_assignments_avoid_what_is_not_finite():
    cost = randn(3, 5, 4)
    cost[0, :4] = float("nan")  # one query is left: three boxes take what they must
    cost[1, 1, 2], cost[1, 2, 0], cost[1, 0] = float("inf"), -float("inf"), float("nan")
    cost[2] = float("inf")
    valid = torch.tensor([[True, True, True, True], [True, True, False, True], [True, False, True, True]])
    made, wanted = run("linear_assignment", cost, valid)[0], REFERENCES["linear_assignment"](cost, valid)
    check_pairs(made, valid, 5)
    for sample in range(3):
        pairs = [(int(m), g) for g, m in enumerate(made[sample]) if m >= 0]
        right = [(int(m), g) for g, m in enumerate(wanted[sample]) if m >= 0]
        found, best = ([float(cost[sample, q, g]) for q, g in some] for some in (pairs, right))
        known, best_known = ([v for v in some if abs(v) < float("inf")] for some in (found, best))
        assert len(known) == len(best_known) and sum(known) == pytest.approx(sum(best_known), rel=1e-12)


def test_equal_costs_are_assigned_too():
    valid = torch.ones(1, 20, dtype=torch.bool)
    check_pairs(run("linear_assignment", torch.zeros(1, 20, 20), valid)[0], valid, 20)


def test_no_query_or_box_is_assigned():
    for cost in (torch.zeros(2, 0, 3), torch.zeros(2, 3, 0), torch.zeros(0, 2, 3)):
        valid = torch.ones(cost.shape[0], cost.shape[2], dtype=torch.bool)
        assert torch.equal(run("linear_assignment", cost, valid)[0], torch.full(valid.shape, -1))


def total(match: Tensor, cost: Tensor) -> float:
    return sum(float(cost[b, q, g]) for b, row in enumerate(match) for g, q in enumerate(row) if q >= 0)


def check_pairs(match: Tensor, valid: Tensor, queries: int) -> None:
    """No query twice, none for padding, as many pairs as there can be."""
    for row, used in zip(match, valid):
        queries_of = row[row >= 0].tolist()
        assert len(set(queries_of)) == len(queries_of) == min(queries, int(used.sum()))
        assert not (row[~used] >= 0).any() and all(0 <= q < queries for q in queries_of)
