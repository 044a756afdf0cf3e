"""voxelize: the published rule on a real sweep, and CPU lowering equal to the reference bit for bit."""

from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

from bevfn.kernels.voxelize import reference, voxelize

GOLDEN = Path(__file__).parents[1].parent / "shared" / "goldens" / "bevfusion_lidar"
SMALL = {"lower": (-1.0, -2.0, -0.5), "size": (0.1, 0.25, 0.3), "grid": (20, 16, 4), "max_points": 3, "max_voxels": 40}


def make_points(batch: int, number: int, columns: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    points = torch.randn(batch, number, columns, generator=g)
    return points, torch.rand(batch, number, generator=g) < 0.8


def by_reference(points, valid, **settings):
    return reference.voxelize(points, valid, *settings.values())


@pytest.mark.skipif(not GOLDEN.exists(), reason="shared/goldens/bevfusion_lidar is not at hand")
def test_real_sweep_gives_the_published_voxels():
    points, golden = load_file(GOLDEN / "inputs.safetensors")["points"], load_file(GOLDEN / "outputs.safetensors")
    padded = torch.full((1, 40_000, 5), torch.nan)
    padded[0, : len(points)] = points
    valid = torch.arange(40_000)[None] < len(points)
    range_ = {"lower": (-54.0, -54.0, -5.0), "size": (0.075, 0.075, 0.2), "grid": (1440, 1440, 40)}
    features, coords, count, found = voxelize(padded, valid, **range_, max_points=10, max_voxels=20_000)
    V = int(found)
    assert len(golden["eval/voxel/coords"]) == V and (count[0, V:] == 0).all() and (coords[0, V:] == -1).all()
    x, y, z = coords[0, :V].long().unbind(1)
    order = torch.argsort((x * 1440 + y) * 40 + z)
    assert torch.equal(coords[0, order], golden["eval/voxel/coords"].int())
    assert torch.equal(count[0, order], golden["eval/voxel/num_points"].int())
    torch.testing.assert_close(features[0, order], golden["eval/voxel/features"], rtol=1e-6, atol=1e-6)


@settings(max_examples=30)
@given(
    batch=st.integers(1, 3), number=st.integers(0, 300), columns=st.integers(3, 6), max_points=st.integers(1, 4),
    max_voxels=st.integers(1, 80), seed=st.integers(0, 99),
)  # fmt: skip
def test_cpu_equals_reference_bit_for_bit(batch, number, columns, max_points, max_voxels, seed):
    points, valid = make_points(batch, number, columns, seed)
    setting = {**SMALL, "max_points": max_points, "max_voxels": max_voxels}
    for ours, wanted in zip(voxelize(points, valid, **setting), by_reference(points, valid, **setting)):
        assert ours.dtype == wanted.dtype and torch.equal(ours, wanted)


def test_first_points_survive_and_voxels_are_numbered_by_their_first_point():
    a, b = [0.05, 0.05, 0.05], [0.55, 0.05, 0.05]
    points = torch.tensor([[[*b, 1.0], [*a, 2.0], [*a, 3.0], [*a, 4.0], [*a, 500.0], [*b, 3.0]]])
    features, coords, count, found = voxelize(points, torch.ones(1, 6, dtype=torch.bool), **SMALL)
    assert coords[0, :2].tolist() == [[15, 8, 1], [10, 8, 1]] and found.tolist() == [2]
    assert count[0, :3].tolist() == [2, 3, 0]
    assert features[0, :2, 3].tolist() == [2.0, 3.0]  # the fourth point of `a` does not count


def test_voxels_beyond_the_limit_are_dropped_and_counted():
    points = torch.tensor([[[0.05, 0.0, 0.0], [0.35, 0.0, 0.0], [0.75, 0.0, 0.0], [0.06, 0.0, 0.0]]])
    _, coords, count, found = voxelize(points, torch.ones(1, 4, dtype=torch.bool), **{**SMALL, "max_voxels": 2})
    assert found.tolist() == [3] and coords[0, :, 0].tolist() == [10, 13]
    assert count.tolist() == [[2, 1]]  # a full table still takes points of its own voxels


def test_points_that_are_invalid_nan_infinite_or_outside_are_ignored():
    inside = [0.05, 0.05, 0.05, 1.0]
    rows = [
        inside, [torch.nan, 0.0, 0.0, 1.0], [0.0, torch.inf, 0.0, 1.0], [*inside[:3], torch.nan],
        [*inside[:3], -torch.inf], [1.0, 0.0, 0.0, 1.0], [-1.0001, 0.0, 0.0, 1.0], [3e38, -3e38, 0.0, 1.0], inside,
    ]  # fmt: skip
    points, valid = torch.tensor([rows]), torch.ones(1, len(rows), dtype=torch.bool)
    valid[0, -1] = False
    for run in (voxelize, by_reference):
        features, _, count, found = run(points, valid, **SMALL)
        assert found.tolist() == [1] and int(count.sum()) == 1
        assert features[0, 0].tolist() == torch.tensor(inside).tolist() and torch.isfinite(features).all()


@pytest.mark.parametrize("number", [0, 7])
def test_no_valid_point_gives_empty_slots(number):
    features, coords, count, found = voxelize(
        torch.zeros(2, number, 5), torch.zeros(2, number, dtype=torch.bool), **SMALL
    )
    assert not features.any() and (coords == -1).all() and not count.any() and found.tolist() == [0, 0]


def test_cells_are_distinct_and_padding_rows_change_nothing():
    points, valid = make_points(2, 500)
    points = torch.where(valid[..., None], points, torch.full_like(points, 1e9))
    out = voxelize(points, valid, **{**SMALL, "max_voxels": 1300})
    for b in range(2):
        used = out[1][b][out[2][b] > 0]
        assert len(used) == int(out[3][b]) == len(used.unique(dim=0))
    longer = torch.cat([points, torch.full((2, 9, 5), torch.nan)], 1)
    padded = voxelize(longer, torch.cat([valid, valid.new_zeros(2, 9)], 1), **{**SMALL, "max_voxels": 1300})
    assert all(torch.equal(a, b) for a, b in zip(out, padded))


def test_thread_count_does_not_change_a_bit():
    points, valid = make_points(3, 400)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = voxelize(points, valid, **SMALL)
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(one, voxelize(points, valid, **SMALL)))
    finally:
        torch.set_num_threads(threads)


def test_compiles_into_one_graph_and_strides_do_not_matter():
    points, valid = make_points(2, 100)
    compiled = torch.compile(lambda p, v: voxelize(p, v, **SMALL), fullgraph=True, backend="aot_eager")
    turned = points.transpose(1, 2).contiguous().transpose(1, 2)
    for a, b, c in zip(voxelize(points, valid, **SMALL), compiled(points, valid), voxelize(turned, valid, **SMALL)):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_operator_passes_torchs_own_checks():
    points, valid = make_points(1, 50)
    args = (points, valid, *(list(SMALL[name]) for name in ("lower", "size", "grid")), 3, 40)
    torch.library.opcheck(torch.ops.bevfn.voxelize.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"points": torch.zeros(1, 4, 5, dtype=torch.float64)}, "points must be float32"),
        ({"valid": torch.zeros(1, 3, dtype=torch.bool)}, "valid must be bool"),
        ({"size": (0.1, 0.0, 0.1)}, "size and grid positive"),
        ({"grid": (1 << 20, 1 << 20, 1 << 20)}, "use larger cells"),
        ({"max_voxels": 0}, "max_points and max_voxels must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    call = {"points": torch.zeros(1, 4, 5), "valid": torch.zeros(1, 4, dtype=torch.bool), **SMALL, **change}
    with pytest.raises(ValueError, match=message):
        voxelize(call.pop("points"), call.pop("valid"), **call)
