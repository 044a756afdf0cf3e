"""sparse_conv equals dense conv3d on the active sites, forward and gradients, in every precision."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from bevfn.bench import sparse as sparse_bench
from bevfn.kernels import neighbours
from bevfn.kernels.sparse_conv import reference, sparse_conv

GRID, BATCH = (6, 5, 7), 2


def make_sites(rows: int = 120, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    cells = torch.tensor(list(itertools.product(range(BATCH), *map(range, GRID))), dtype=torch.int32)
    coords = cells[torch.randperm(len(cells), generator=g)][:rows]
    valid = torch.arange(rows) < rows - 20  # the last 20 rows are padding
    return torch.where(valid[:, None], coords, torch.full_like(coords, -1)), valid


def make_table(offsets: int, inputs: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random (table, inverse) in which every input feeds at most one output per offset."""
    g = torch.Generator().manual_seed(seed)
    table = torch.full((offsets, outputs), -1, dtype=torch.int32)
    inverse = torch.full((offsets, inputs), -1, dtype=torch.int32)
    for k in range(offsets):
        n = int(torch.randint(0, min(inputs, outputs) + 1, (), generator=g))
        reads, writes = torch.randperm(inputs, generator=g)[:n], torch.randperm(outputs, generator=g)[:n]
        table[k, writes], inverse[k, reads] = reads.int(), writes.int()
    return table, inverse


def dense(x: Tensor, coords: Tensor, valid: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """[B C X Y Z] grid of the valid rows, zeros elsewhere."""
    b, i, j, k = coords[valid].long().unbind(1)
    volume = x.new_zeros(BATCH, *grid, x.shape[1]).index_put((b, i, j, k), x[valid])
    return volume.permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize(
    "kernel, stride, padding",
    [
        ((3, 3, 3), None, (1, 1, 1)),  # submanifold
        ((1, 3, 5), None, (0, 1, 2)),
        ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
        ((3, 3, 3), (2, 2, 2), (1, 1, 0)),
        ((1, 1, 3), (1, 1, 2), (0, 0, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_dense_convolution_with_gradients(kernel, stride, padding, dtype):
    coords, valid = make_sites()
    if stride is None:
        table = neighbours.submanifold(coords, valid, kernel=kernel, grid=GRID)
        out_coords, out_valid, inverse, out_grid = coords, valid, table.flip(0), GRID
    else:
        rule = {"kernel": kernel, "stride": stride, "padding": padding, "grid": GRID}
        out_coords, out_valid, table, inverse, _ = neighbours.strided(coords, valid, **rule, capacity=300, batch=BATCH)
        out_grid = neighbours.out_grid(GRID, kernel, stride, padding)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(len(coords), 5, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(table.shape[0], 5, 7, generator=g, dtype=dtype).requires_grad_()
    y = sparse_conv(x, weight, table, inverse)
    volume = F.conv3d(
        dense(x, coords, valid, GRID), weight.reshape(*kernel, 5, 7).permute(4, 3, 0, 1, 2), None, stride or 1, padding
    )
    assert volume.shape[2:] == out_grid and not y[~out_valid].any()
    b, i, j, k = out_coords[out_valid].long().unbind(1)
    wanted = volume.permute(0, 2, 3, 4, 1)[b, i, j, k]
    if stride is not None:  # and where there is no output site the dense result is zero
        others = volume.detach().permute(0, 2, 3, 4, 1).index_put((b, i, j, k), torch.zeros((), dtype=dtype))
        assert not others.any()
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype is torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y[out_valid], wanted, **tolerance)
    slope = torch.randn(wanted.shape, generator=g, dtype=dtype)
    ours = torch.autograd.grad((y[out_valid] * slope).sum(), (x, weight))
    theirs = torch.autograd.grad((wanted * slope).sum(), (x, weight))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, **tolerance)


@settings(max_examples=40)
@given(
    offsets=st.sampled_from([1, 3, 27]), inputs=st.integers(0, 90), outputs=st.integers(0, 150),
    channels_in=st.sampled_from([1, 5, 16, 33, 64]), channels_out=st.sampled_from([1, 7, 16, 32, 48, 65, 128]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_cpu_equals_reference_in_float64(offsets, inputs, outputs, seed, channels_in, channels_out):
    table, _ = make_table(offsets, inputs, outputs, seed)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(inputs, channels_in, generator=g)
    weight = torch.randn(offsets, channels_in, channels_out, generator=g)
    grad = torch.randn(outputs, channels_out, generator=g)
    y = torch.ops.bevfn.sparse_conv(x, weight, table)
    torch.testing.assert_close(
        y.double(), reference.sparse_conv(x.double(), weight.double(), table), rtol=1e-5, atol=1e-4
    )
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)  # other strides, same values
    assert torch.equal(y, torch.ops.bevfn.sparse_conv(x, turned, table))
    torch.testing.assert_close(
        torch.ops.bevfn.sparse_conv_weight_grad(x, grad, table).double(),
        reference.weight_grad(x.double(), grad.double(), table), rtol=1e-5, atol=1e-4,
    )  # fmt: skip


def test_gradients_pass_gradcheck():
    table, inverse = make_table(4, 9, 11, 0)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 3, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(4, 3, 2, generator=g, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: sparse_conv(x, w, table, inverse), (x, weight))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_rounds_the_float32_result_once(dtype, tolerance):
    table, inverse = make_table(27, 60, 50, 0)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 24, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(27, 24, 40, generator=g).to(dtype).requires_grad_()
    grad = torch.randn(50, 40, generator=g).to(dtype)
    y = sparse_conv(x, weight, table, inverse)
    wide = torch.ops.bevfn.sparse_conv(x.detach().float(), weight.detach().float(), table)
    assert y.dtype == dtype and torch.equal(y, wide.to(dtype))
    grads = torch.autograd.grad(y, (x, weight), grad)
    assert [v.dtype for v in grads] == [dtype, dtype]
    assert torch.equal(grads[1], torch.ops.bevfn.sparse_conv_weight_grad(x.float(), grad.float(), table).to(dtype))
    # The reference rounds every offset's product, hence the tolerance: a rounding of the largest terms.
    by_reference = reference.sparse_conv(x, weight, table)
    torch.testing.assert_close(by_reference, y, rtol=tolerance, atol=tolerance * float(y.detach().abs().max()))


def test_order_of_the_rows_does_not_matter():
    coords, valid = make_sites()
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(len(coords), 16, generator=g), torch.randn(27, 16, 32, generator=g)
    order = torch.randperm(len(coords), generator=g)

    def run(x, coords, valid):
        table = neighbours.submanifold(coords, valid, kernel=(3, 3, 3), grid=GRID)
        return sparse_conv(x, weight, table, table.flip(0))

    assert torch.equal(run(x, coords, valid)[order], run(x[order], coords[order], valid[order]))


def test_thread_count_does_not_change_a_bit():
    table, _ = make_table(27, 700, 900, 0)
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(700, 20, generator=g), torch.randn(27, 20, 33, generator=g)
    grad = torch.randn(900, 33, generator=g)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            y = torch.ops.bevfn.sparse_conv(x, weight, table)
            results.append((y, torch.ops.bevfn.sparse_conv_weight_grad(x, grad, table)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_func_grad_compiles_into_one_graph():
    coords, valid = make_sites()
    g = torch.Generator().manual_seed(0)
    params = {"a": torch.randn(27, 5, 16, generator=g), "b": torch.randn(27, 16, 8, generator=g)}
    x = torch.randn(len(coords), 5, generator=g)

    def loss(params, x, coords, valid):
        table = neighbours.submanifold(coords, valid, kernel=(3, 3, 3), grid=GRID)
        x = torch.relu(sparse_conv(x, params["a"], table, table.flip(0)))
        rule = {"kernel": (3, 3, 3), "stride": (2, 2, 2), "padding": (1, 1, 1), "grid": GRID}
        _, _, table, inverse, _ = neighbours.strided(coords, valid, **rule, capacity=90, batch=BATCH)
        return sparse_conv(x, params["b"], table, inverse).square().sum()

    step = torch.func.grad_and_value(loss)
    grads, value = torch.compile(step, fullgraph=True, backend="aot_eager")(params, x, coords, valid)
    eager_grads, eager_value = step(params, x, coords, valid)
    assert torch.equal(value, eager_value) and all(torch.equal(grads[k], eager_grads[k]) for k in params)
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        plain = torch.autograd.grad(run(leaves, x, coords, valid), list(leaves.values()))
        assert all(torch.equal(a, b) for a, b in zip(plain, grads.values()))


def test_compiled_func_grad_reaches_inputs_that_nothing_else_touched():
    table, inverse = make_table(3, 6, 7, 0)
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 4, generator=g), torch.randn(3, 4, 5, generator=g)

    def loss(x, weight):  # both arguments go straight into the operator: Dynamo would drop their gradients
        return sparse_conv(x, weight, table, inverse).square().sum()

    for argnums in (0, 1, (0, 1)):
        step = torch.func.grad(loss, argnums=argnums)
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, weight)
        torch.testing.assert_close(compiled, step(x, weight), rtol=0, atol=0)


def test_operators_pass_torchs_own_checks():
    table, _ = make_table(3, 10, 12, 0)
    x, weight, grad = torch.randn(10, 4), torch.randn(3, 4, 5), torch.randn(12, 5)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.bevfn.sparse_conv.default, (x, weight, table), test_utils=checks)
    torch.library.opcheck(torch.ops.bevfn.sparse_conv_weight_grad.default, (x, grad, table), test_utils=checks)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(6, 3)}, "must agree in C_in and dtype"),
        ({"weight": torch.zeros(3, 4, 5, dtype=torch.float16)}, "must agree in C_in and dtype"),
        ({"table": torch.zeros(2, 7, dtype=torch.int32)}, r"table must be int32 \[3, rows\]"),
        ({"inverse": torch.zeros(3, 7, dtype=torch.int32)}, "were table and inverse swapped"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    call = {
        "x": torch.zeros(6, 4), "weight": torch.zeros(3, 4, 5), "table": torch.zeros(3, 7, dtype=torch.int32),
        "inverse": torch.zeros(3, 6, dtype=torch.int32), **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        sparse_conv(**call)


def test_a_table_of_other_features_is_refused():
    table = torch.tensor([[0, 6]], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="beyond x's 6 rows"):
        sparse_conv(torch.zeros(6, 4), torch.zeros(1, 4, 5), table, torch.full((1, 6), -1, dtype=torch.int32))


@pytest.mark.slow
def test_bench_figures_keep_their_promises():
    figures = sparse_bench.measure()["one sweep"]
    share = figures["gemm_share"]["share"]
    assert min(share.values()) >= 0.5
    assert figures["encoder_backward_vs_torch"]["speedup"] >= 2
    forward = figures["encoder_forward_vs_spconv"]
    if "omitted" not in forward:
        assert forward["relative_difference"] < 1e-5 and forward["speedup"] > 1.5
