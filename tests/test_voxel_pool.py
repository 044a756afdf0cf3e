"""kernels.voxel_pool: the CPU lowering is the reference, in values and gradients, whatever threads, order or layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bevfn.bench.pool import frustum_cells, textbook
from bevfn.kernels.voxel_pool import intervals, reference, voxel_pool
from bevfn.kernels.voxel_pool.intervals import Intervals


def problem(M, D, H, W, C, num_cells, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    depth = torch.rand(M, D, H, W, generator=generator).to(dtype)
    context = torch.randn(M, H, W, C, generator=generator).to(dtype)
    cell = torch.randint(-1, num_cells, (M, D, H, W), generator=generator, dtype=torch.int32)
    return depth, context, cell


def gradients(depth, context, cell, num_cells, weight):
    depth, context = depth.clone().requires_grad_(), context.clone().requires_grad_()
    out = voxel_pool(depth, context, cell, num_cells)
    (out * weight).sum().backward()
    return out.detach(), depth.grad, context.grad


def assert_close(actual, expected, tolerance):
    """Largest error over the largest value: sums of different order round differently."""
    error = (actual.double() - expected.double()).abs().max() if actual.numel() else torch.tensor(0.0)
    assert error <= tolerance * max(1.0, expected.abs().max().item() if expected.numel() else 1.0)


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 35)),
    channels=st.sampled_from([1, 3, 15, 16, 17, 80, 128, 129, 150]),
    num_cells=st.integers(1, 200),
    seed=st.integers(0, 1000),
)
def test_cpu_equals_reference_for_any_shape(shape, channels, num_cells, seed):
    depth, context, cell = problem(*shape, channels, num_cells, seed=seed)
    weight = torch.randn(num_cells, channels, generator=torch.Generator().manual_seed(seed))
    out, grad_depth, grad_context = gradients(depth, context, cell, num_cells, weight)
    assert_close(out, reference.forward(depth.double(), context.double(), cell, num_cells), 1e-5)
    expected = reference.backward(weight.double(), depth.double(), context.double(), cell)
    assert_close(grad_depth, expected[0], 1e-5)
    assert_close(grad_context, expected[1], 1e-5)


def test_reference_is_the_textbook_formula_in_slabs(monkeypatch):
    depth, context, cell = problem(2, 9, 4, 5, 6, 30, dtype=torch.float64)
    expected = textbook(depth, context, cell, 30)
    monkeypatch.setattr(reference, "SLAB", 1)  # one depth bin at a time
    torch.testing.assert_close(reference.forward(depth, context, cell, 30), expected)


def test_gradients_are_those_of_finite_differences():
    depth, context, cell = problem(1, 3, 2, 4, 3, 7, dtype=torch.float64)
    depth.requires_grad_(), context.requires_grad_()
    assert torch.autograd.gradcheck(lambda d, c: voxel_pool(d, c, cell, 7), (depth, context))


def test_frustum_of_upright_cameras_is_pooled_exactly_and_the_same_for_any_number_of_threads():
    cell = frustum_cells()[:, ::3, :, ::2].contiguous()  # runs of equal cells along columns, as in a real frame
    M, D, H, W = cell.shape
    depth, context, _ = problem(M, D, H, W, 20, 1)
    weight = torch.randn(360 * 360, 20)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(gradients(depth, context, cell, 360 * 360, weight))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    assert_close(results[0][0], reference.forward(depth.double(), context.double(), cell, 360 * 360), 1e-6)


def test_more_threads_than_cells_give_the_same_bits():
    depth, context, cell = problem(1, 4, 3, 5, 6, 2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = voxel_pool(depth, context, cell, 2)
        torch.set_num_threads(5)
        assert torch.equal(voxel_pool(depth, context, cell, 2), one)
    finally:
        torch.set_num_threads(threads)


def test_benchmark_frustum_is_like_a_real_frame():
    cell = frustum_cells()
    inside = cell[cell >= 0]
    assert inside.numel() == pytest.approx(1_835_478, rel=0.01)  # shared/goldens/bevfusion_lidar_cam
    assert inside.unique().numel() == pytest.approx(97_325, rel=0.01)


def test_no_point_inside_gives_zeros_and_zero_gradients():
    depth, context, cell = problem(2, 3, 4, 5, 7, 9)
    out, grad_depth, grad_context = gradients(depth, context, torch.full_like(cell, -1), 9, torch.ones(9, 7))
    assert out.shape == (9, 7)
    assert not out.any() and not grad_depth.any() and not grad_context.any()


def test_cells_beyond_the_grid_are_outside_too():
    depth, context, cell = problem(1, 3, 4, 5, 7, 9)
    beyond = torch.where(cell < 0, 2**31 - 1, cell)
    below = torch.where(cell < 0, -(2**31), cell)
    expected = voxel_pool(depth, context, cell, 9)
    assert torch.equal(voxel_pool(depth, context, beyond, 9), expected)
    assert torch.equal(voxel_pool(depth, context, below, 9), expected)


def test_all_points_in_one_cell_give_the_total():
    depth, context, cell = problem(2, 11, 6, 7, 5, 4)
    out = voxel_pool(depth, context, torch.full_like(cell, 3), 4)
    total = (depth.double()[..., None] * context.double()[:, None]).sum((0, 1, 2, 3))
    assert not out[:3].any()
    assert_close(out[3], total, 1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 4, 5, 0), (2, 3, 0, 5, 6), (2, 3, 4, 0, 6)])
def test_empty_operands_pool_to_zeros(shape):
    depth, context, cell = problem(*shape, 8)
    out, grad_depth, grad_context = gradients(depth, context, cell, 8, torch.ones(8, shape[-1]))
    assert out.shape == (8, shape[-1]) and not out.any()
    assert grad_depth.shape == depth.shape and not grad_context.any()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_sums_in_float32_and_rounds_once(dtype, tolerance):
    depth, context, cell = problem(2, 30, 4, 5, 20, 6, dtype=dtype)
    weight = torch.randn(6, 20).to(dtype)
    out, grad_depth, grad_context = gradients(depth, context, cell, 6, weight)
    assert out.dtype == grad_depth.dtype == grad_context.dtype == dtype
    assert torch.equal(out, voxel_pool(depth.float(), context.float(), cell, 6).to(dtype))
    assert_close(out, reference.forward(depth.double(), context.double(), cell, 6), tolerance)


def test_operands_of_any_strides_are_accepted():
    depth, context, cell = problem(2, 6, 4, 10, 5, 12)
    strided = (
        depth.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        context.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        cell.repeat_interleave(2, dim=3)[..., ::2],
    )
    assert not any(x.is_contiguous() for x in strided)
    weight = torch.randn(5, 12).T
    for a, b in zip(gradients(*strided, 12, weight), gradients(depth, context, cell, 12, weight.contiguous())):
        assert torch.equal(a, b)


def test_permuting_images_and_pixels_does_not_change_the_sums():
    depth, context, cell = problem(3, 8, 6, 9, 4, 15)
    images, columns, bins = torch.randperm(3), torch.randperm(9), torch.randperm(8)
    permuted = voxel_pool(
        depth[images][:, bins][..., columns], context[images][:, :, columns], cell[images][:, bins][..., columns], 15
    )
    assert_close(permuted, voxel_pool(depth, context, cell, 15), 1e-6)


def test_inputs_are_never_mutated():
    operands = problem(2, 6, 4, 10, 5, 12)
    before = [x.clone() for x in operands]
    gradients(*operands, 12, torch.ones(12, 5))
    assert all(torch.equal(a, b) for a, b in zip(operands, before))


def test_compiled_whole_with_its_gradient_it_equals_eager():
    depth, context, cell = problem(2, 6, 4, 10, 5, 12)

    def loss(operands):
        return voxel_pool(operands["depth"].softmax(1), operands["context"], cell, 12).square().sum()

    step = torch.func.grad_and_value(loss)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    operands = {"depth": depth, "context": context}
    (grads, value), (expected_grads, expected) = compiled(operands), step(operands)
    assert torch.equal(value, expected)
    for name in operands:
        torch.testing.assert_close(grads[name], expected_grads[name])


def test_fake_and_schema_agree_with_the_kernels():
    depth, context, cell = problem(2, 6, 4, 10, 5, 12)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.bevfn.voxel_pool.default, (depth, context, cell, 12), test_utils=checks)
    grad = torch.randn(12, 5)
    torch.library.opcheck(torch.ops.bevfn.voxel_pool_backward.default, (grad, depth, context, cell), test_utils=checks)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda d, c, k: (d[0], c, k, 9), r"needs depth \[M D H W\] and context \[M H W C\]"),
        (lambda d, c, k: (d, c.permute(0, 3, 1, 2), k, 9), "channels come last"),
        (lambda d, c, k: (d, c, k[:, :-1], 9), "cell .* must have the shape of depth"),
        (lambda d, c, k: (d, c, k.long(), 9), "cell must be int32, got torch.int64; convert it"),
        (lambda d, c, k: (d, c.half(), k, 9), "depth and context must share one floating dtype"),
        (lambda d, c, k: (d, c, k.to("meta"), 9), "operands must be on one device"),
        (lambda d, c, k: (d, c, k, 0), "num_cells must be at least 1, got 0"),
    ],
)
def test_wrong_operands_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        voxel_pool(*change(*problem(2, 3, 4, 5, 7, 9)))


@settings(max_examples=40)
@given(
    shape=st.tuples(*[st.integers(1, 5)] * 2, *[st.integers(1, 9)] * 3),
    num_cells=st.integers(1, 200),
    seed=st.integers(0, 1000),
)
def test_every_point_of_the_grid_is_in_one_interval_of_its_cell(shape, num_cells, seed):
    B, N, _, H, W = shape
    generator = torch.Generator().manual_seed(seed)
    few = torch.randint(1, num_cells + 1, (), generator=generator)  # of the cells some are full
    own = torch.randint(-1, int(few), shape, generator=generator, dtype=torch.int32)
    start = num_cells * torch.arange(B, dtype=torch.int32).view(B, 1, 1, 1, 1)
    points, cells = intervals.made(torch.where(own < 0, own, own + start), num_cells)
    padded = torch.cat([own, torch.full((B, N, 1, H, W), -1, dtype=torch.int32)], 2).view(B, -1)
    of_point = padded.gather(1, points.view(B, -1).long()).view(points.shape)
    assert torch.equal(of_point.amax(-1), cells)  # who has points
    assert ((of_point == cells[..., None]) | (of_point == -1)).all()
    for sample, listed in zip(padded, points.view(B, -1)):
        listed = listed[sample[listed.long()] >= 0]
        assert torch.equal(listed.sort()[0], (sample >= 0).nonzero()[:, 0].int())


def test_intervals_change_nothing_on_a_cpu_and_those_of_other_points_are_refused():
    depth, context, cell = problem(4, 9, 4, 5, 6, 30)
    cell = torch.where(
        cell < 0, cell, cell % 15 + 15 * (torch.arange(4) // 2).view(4, 1, 1, 1)
    ).int()  # two samples of two
    own = intervals.made(cell.unflatten(0, (2, 2)), 15)
    weight = torch.randn(30, 6)

    def slopes(*given):
        return torch.func.grad(lambda d, c: (voxel_pool(d, c, cell, 30, *given) * weight).sum(), (0, 1))(depth, context)

    assert all(torch.equal(a, b) for a, b in zip(slopes(own), slopes(), strict=True))
    assert torch.equal(voxel_pool(depth, context, cell, 30, own), voxel_pool(depth, context, cell, 30))
    with pytest.raises(ValueError, match=r"cell must be int32, got torch.int64"):
        intervals.made(cell.unflatten(0, (2, 2)).long(), 15)
    for wrong, sentence in (
        (Intervals(own.points[:, :-1], own.cells), "got .* make them of this cell"),
        (Intervals(own.points.long(), own.cells), "must be int32 on cpu, got torch.int64"),
        (Intervals(own.points.repeat(2, 1, 1)[:3], own.cells), "of 3 samples do not fit 4 images and 30 cells"),
    ):
        with pytest.raises(ValueError, match=sentence):
            voxel_pool(depth, context, cell, 30, wrong)
