"""kernels.linear_assignment: total cost equal to scipy's on every sample, whatever the padding, ties or non-numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from bevfn.kernels.linear_assignment import linear_assignment, reference


def assert_as_good_as_scipy(cost, valid):
    match = linear_assignment(cost, valid)
    assert match.dtype == torch.int64 and match.shape == valid.shape
    assert (match[~valid] == -1).all()
    for values, used, queries in zip(cost.double().numpy(), valid.numpy(), match.numpy()):
        rows, columns = linear_sum_assignment(values[:, used])
        taken = queries[queries >= 0]
        assert len(taken) == len(rows) == len(set(taken.tolist()))
        best = values[:, used][rows, columns].sum()
        ours = values[taken, np.flatnonzero(queries >= 0)].sum()
        scale = max(1e-300, np.abs(values[:, used]).max(initial=0))
        assert abs(ours - best) <= 1e-12 * scale * max(1, len(rows))


def costs(rng, kind, shape):
    if kind == "normal":
        return rng.normal(size=shape)
    if kind == "integers":  # many ties
        return rng.integers(0, 4, shape).astype(float)
    if kind == "equal":
        return np.full(shape, rng.normal())
    if kind == "ranges":  # float32 from denormal to almost overflow
        return rng.normal(size=shape) * 10.0 ** rng.integers(-30, 37, shape)
    return rng.random((*shape[:2], 1)) + rng.random((shape[0], 1, shape[2]))  # "separable": every matching ties


@settings(max_examples=300)
@given(
    kind=st.sampled_from(["normal", "integers", "equal", "ranges", "separable"]),
    shape=st.tuples(st.integers(1, 4), st.integers(0, 12), st.integers(0, 12)),
    share=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_total_cost_equals_scipy(kind, shape, share, dtype, seed):
    rng = np.random.default_rng(seed)
    cost = torch.from_numpy(costs(rng, kind, shape)).to(dtype)
    valid = torch.from_numpy(rng.random((shape[0], shape[2])) < share)  # padding anywhere
    assert_as_good_as_scipy(cost, valid)


@pytest.mark.parametrize("kind", ["normal", "integers", "equal", "ranges", "separable"])
@pytest.mark.parametrize("queries,boxes", [(200, 60), (200, 256), (100, 100)])
def test_total_cost_equals_scipy_at_training_size(kind, queries, boxes):
    rng = np.random.default_rng(queries + boxes)
    cost = torch.from_numpy(costs(rng, kind, (2, queries, boxes))).float()
    assert_as_good_as_scipy(cost, torch.from_numpy(rng.random((2, boxes)) < 0.9))


@pytest.mark.parametrize("seed", range(20))
def test_a_thousand_small_problems_equal_scipy(seed):
    rng = np.random.default_rng(seed)
    queries, boxes = rng.integers(1, 7, 2)
    cost = torch.from_numpy(rng.integers(-2, 3, (1000, queries, boxes)).astype(np.float32))
    assert_as_good_as_scipy(cost, torch.from_numpy(rng.random((1000, boxes)) < 0.8))


def test_left_over_boxes_are_the_expensive_ones():
    cost = torch.tensor([[[5.0, 1.0, 9.0], [2.0, 8.0, 7.0]]])  # 2 queries, 3 boxes
    assert linear_assignment(cost, torch.tensor([[True, True, True]])).tolist() == [[1, 0, -1]]
    assert linear_assignment(cost, torch.tensor([[True, False, True]])).tolist() == [[1, -1, 0]]
    assert linear_assignment(cost, torch.tensor([[False, False, False]])).tolist() == [[-1, -1, -1]]


def test_padding_does_not_influence_the_match_whatever_its_cost():
    rng = np.random.default_rng(0)
    cost = torch.from_numpy(rng.normal(size=(3, 10, 8))).float()
    valid = torch.tensor([True, False, True, True, False, True, False, True]).expand(3, 8)
    match = linear_assignment(cost, valid)
    for padding in (float("nan"), float("-inf"), -1e30):
        assert torch.equal(linear_assignment(torch.where(valid[:, None], cost, padding), valid), match)
    compact = linear_assignment(cost[:, :, valid[0]], torch.ones(3, 5, dtype=torch.bool))
    assert torch.equal(match[:, valid[0]], compact)


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.1, 0.5, 1.0]), scale=st.sampled_from([1e-3, 1.0, 1e30]))
def test_not_a_number_and_infinity_are_used_as_rarely_as_possible(seed, share, scale):
    rng = np.random.default_rng(seed)
    shape = (1, *rng.integers(1, 8, 2))
    bad = rng.random(shape) < share
    cost = rng.normal(size=shape) * scale
    cost[bad] = rng.choice([np.nan, np.inf, -np.inf], bad.sum())
    cost, valid = torch.from_numpy(cost), torch.ones(1, shape[2], dtype=torch.bool)
    match, expected = linear_assignment(cost, valid), reference.linear_assignment(cost, valid)
    used, used_expected = [torch.nonzero(m[0] >= 0)[:, 0] for m in (match, expected)]
    ours, best = cost[0, match[0, used], used], cost[0, expected[0, used_expected], used_expected]
    assert len(used) == min(shape[1:]) and ours.isfinite().sum() == best.isfinite().sum()
    torch.testing.assert_close(ours[ours.isfinite()].sum(), best[best.isfinite()].sum(), rtol=1e-9, atol=1e-9 * scale)


def test_result_does_not_depend_on_threads_strides_or_precision_of_exact_costs():
    rng = np.random.default_rng(1)
    cost = torch.from_numpy(rng.integers(-50, 50, (5, 12, 9)).astype(np.float32))
    valid = torch.from_numpy(rng.random((5, 9)) < 0.7)
    match = linear_assignment(cost, valid)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            assert torch.equal(linear_assignment(cost, valid), match)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(linear_assignment(cost.mT.contiguous().mT, valid.T.contiguous().T), match)
    assert torch.equal(linear_assignment(cost.half(), valid), match)


def test_it_stays_in_a_compiled_graph_and_stops_the_gradient():
    valid = torch.tensor([[True, True, False]])

    def loss(cost):
        match = linear_assignment(cost, valid)
        picked = torch.gather(cost, 1, match.clamp(min=0)[:, None])[:, 0]
        return (picked * valid).sum()

    cost = torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(0))
    step = torch.func.grad_and_value(loss)
    grad, value = torch.compile(step, fullgraph=True, backend="aot_eager")(cost)
    expected_grad, expected = step(cost)
    assert torch.equal(value, expected) and torch.equal(grad, expected_grad)
    assert grad.sum() == 2 and (grad.sum(1) == valid).all()
    assert not linear_assignment(cost.requires_grad_(), valid).requires_grad


def test_fake_and_schema_agree_with_the_kernel():
    operands = (torch.rand(2, 4, 3), torch.ones(2, 3, dtype=torch.bool))
    torch.library.opcheck(
        torch.ops.bevfn.linear_assignment.default, operands, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    "cost,valid,message",
    [
        (torch.rand(4, 3), torch.ones(3).bool(), r"needs cost \[B Q G\] and valid \[B G\], got \[4, 3\] and \[3\]"),
        (torch.rand(1, 4, 3), torch.ones(1, 4).bool(), r"got \[1, 4, 3\] and \[1, 4\]"),
        (torch.ones(1, 4, 3).int(), torch.ones(1, 3).bool(), "cost must be floating point, got torch.int32"),
        (torch.rand(1, 4, 3), torch.ones(1, 3), r"valid must be bool, got torch.float32; convert it with .bool"),
        (torch.rand(1, 4, 3), torch.ones(1, 3, device="meta").bool(), "cost is on cpu but valid on meta; move one"),
    ],
)
def test_wrong_operands_are_refused_by_name(cost, valid, message):
    with pytest.raises(ValueError, match=message):
        linear_assignment(cost, valid)
