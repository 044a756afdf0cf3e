"""Neighbour tables: equal to a brute-force search, to the reference, and to the published encoder's active sites."""

import itertools
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file
from torch import Tensor

from bevfn.kernels import neighbours
from bevfn.kernels.neighbours import reference

GOLDEN = Path(__file__).parents[1].parent / "shared" / "goldens" / "bevfusion_lidar"
STRIDES = [  # kernel, stride, padding
    ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2), (1, 1, 0)),
    ((1, 1, 3), (1, 1, 2), (0, 0, 0)),
    ((2, 3, 1), (3, 1, 2), (0, 2, 0)),
]


def make_sites(rows: int, grid: tuple[int, int, int], batch: int, fill: float, seed: int) -> tuple[Tensor, Tensor]:
    """Distinct sites in random order; rows that are not valid hold -1."""
    g = torch.Generator().manual_seed(seed)
    cells = torch.tensor(list(itertools.product(range(batch), *map(range, grid))), dtype=torch.int32)
    coords = torch.full((rows, 4), -1, dtype=torch.int32)
    chosen = cells[torch.randperm(len(cells), generator=g)][:rows]
    coords[: len(chosen)] = chosen
    valid = (torch.arange(rows) < len(chosen)) & (torch.rand(rows, generator=g) < fill)
    return torch.where(valid[:, None], coords, torch.full_like(coords, -1)), valid


def brute_force(coords: Tensor, valid: Tensor, out: list[tuple], kernel, stride, padding) -> Tensor:
    """[K, len(out)] input rows, by looking every position up in a dict."""
    rows = {tuple(c): v for v, (c, ok) in enumerate(zip(coords.tolist(), valid.tolist())) if ok}
    table = [
        [rows.get((b, *(p * s - q + o for p, s, q, o in zip(site, stride, padding, k))), -1) for b, *site in out]
        for k in itertools.product(*map(range, kernel))
    ]
    return torch.tensor(table, dtype=torch.int32).reshape(len(table), len(out))


@settings(max_examples=30)
@given(
    rows=st.integers(0, 60), fill=st.sampled_from([0.0, 0.5, 1.0]), batch=st.integers(1, 3), seed=st.integers(0, 99),
    kernel=st.sampled_from([(3, 3, 3), (1, 1, 3), (5, 3, 1), (2, 2, 2)]),
)  # fmt: skip
def test_submanifold_table_equals_brute_force_and_reference(rows, fill, batch, seed, kernel):
    grid = (4, 5, 3)
    coords, valid = make_sites(rows, grid, batch, fill, seed)
    table = neighbours.submanifold(coords, valid, kernel=kernel, grid=grid)
    wanted = brute_force(coords, valid, coords.tolist(), kernel, (1, 1, 1), [k // 2 for k in kernel])
    wanted = torch.where(valid, wanted, torch.full_like(wanted, -1))
    assert table.dtype == torch.int32 and torch.equal(table, wanted)
    assert torch.equal(reference.submanifold(coords, valid, list(kernel), list(grid)), wanted)


@settings(max_examples=30)
@given(
    rows=st.integers(0, 60), fill=st.sampled_from([0.0, 0.5, 1.0]), batch=st.integers(1, 3), seed=st.integers(0, 99),
    rule=st.sampled_from(STRIDES), capacity=st.integers(1, 80),
)  # fmt: skip
def test_strided_tables_equal_brute_force_and_reference(rows, fill, batch, seed, rule, capacity):
    grid, (kernel, stride, padding) = (4, 5, 7), rule
    coords, valid = make_sites(rows, grid, batch, fill, seed)
    rule = {"kernel": kernel, "stride": stride, "padding": padding, "grid": grid}
    out_coords, out_valid, table, inverse, found = neighbours.strided(
        coords, valid, **rule, capacity=capacity, batch=batch
    )

    cells = list(itertools.product(range(batch), *map(range, neighbours.out_grid(grid, kernel, stride, padding))))
    active = (brute_force(coords, valid, cells, kernel, stride, padding) >= 0).any(0).tolist()
    sites = [cell for cell, used in zip(cells, active) if used]  # ascending, as product() counts
    kept = sites[:capacity]
    assert int(found) == len(sites) and found.shape == ()
    assert out_coords[: len(kept)].tolist() == [list(site) for site in kept] and (out_coords[len(kept) :] == -1).all()
    assert torch.equal(out_valid, torch.arange(capacity) < len(kept))
    assert torch.equal(table[:, : len(kept)], brute_force(coords, valid, kept, kernel, stride, padding))
    assert (table[:, len(kept) :] == -1).all()
    wanted = torch.full_like(inverse, -1)
    k, w = torch.nonzero(table >= 0, as_tuple=True)
    wanted[k, table[k, w].long()] = w.int()
    assert torch.equal(inverse, wanted)
    for ours, theirs in zip(
        (out_coords, out_valid, table, inverse, found),
        reference.strided(coords, valid, *map(list, rule.values()), capacity, batch),
    ):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_flipped_submanifold_table_is_its_inverse():
    coords, valid = make_sites(50, (4, 5, 6), 2, 0.8, 0)
    table = neighbours.submanifold(coords, valid, kernel=(3, 3, 3), grid=(4, 5, 6))
    k, v = torch.nonzero(table >= 0, as_tuple=True)
    assert len(k) > 100 and torch.equal(table.flip(0)[k, table[k, v].long()], v.int())


def test_samples_of_a_batch_do_not_see_each_other():
    coords = torch.tensor([[0, 3, 3, 3], [1, 3, 3, 4], [1, 0, 0, 0], [0, 3, 3, 2]], dtype=torch.int32)
    table = neighbours.submanifold(coords, torch.ones(4, dtype=torch.bool), kernel=(3, 3, 3), grid=(4, 4, 5))
    assert table[13].tolist() == [0, 1, 2, 3] and table[14].tolist() == [-1, -1, -1, 0]
    assert int((table >= 0).sum()) == 6  # themselves, and rows 0 and 3 each other


@pytest.mark.skipif(not GOLDEN.exists(), reason="shared/goldens/bevfusion_lidar is not at hand")
def test_real_sweep_gives_the_published_active_sites_and_pairs():
    golden = load_file(GOLDEN / "outputs.safetensors")
    coords = golden["eval/voxel/coords"].int()
    coords, grid = torch.cat([torch.zeros(len(coords), 1, dtype=torch.int32), coords], 1), (1440, 1440, 41)
    valid = torch.ones(len(coords), dtype=torch.bool)
    pairs = []
    rules = [STRIDES[0], STRIDES[0], STRIDES[1], STRIDES[2]]
    for stage, (kernel, stride, padding) in zip(
        ("encoder_layer1", "encoder_layer2", "encoder_layer3", "conv_out"), rules
    ):
        table = neighbours.submanifold(coords, valid, kernel=(3, 3, 3), grid=grid)
        pairs.append(int((table >= 0).sum()))
        coords, valid, table, inverse, found = neighbours.strided(
            coords, valid, kernel=kernel, stride=stride, padding=padding, grid=grid, capacity=30_000, batch=1
        )
        pairs.append(int((table >= 0).sum()))
        wanted = golden[f"eval/sparse/{stage}/coords"].int()
        assert int(found) == len(wanted) == int(valid.sum()) and int((inverse >= 0).sum()) == pairs[-1]
        assert torch.equal(coords[: len(wanted), 1:], wanted)
        grid = neighbours.out_grid(grid, kernel, stride, padding)
    assert grid == (180, 180, 2)
    assert pairs == [55_517, 58_336, 282_806, 98_238, 267_243, 71_304, 153_870, 15_121]


def test_thread_count_does_not_change_an_entry():
    coords, valid = make_sites(900, (12, 11, 9), 2, 0.9, 0)
    rule = {"kernel": (3, 3, 3), "stride": (2, 2, 2), "padding": (1, 1, 1), "grid": (12, 11, 9)}
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 3):
            torch.set_num_threads(n)
            table = neighbours.submanifold(coords, valid, kernel=(3, 3, 3), grid=(12, 11, 9))
            results.append((table, *neighbours.strided(coords, valid, **rule, capacity=500, batch=2)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_compiles_into_one_graph():
    coords, valid = make_sites(40, (4, 5, 6), 2, 0.8, 0)

    def both(coords, valid):
        table = neighbours.submanifold(coords, valid, kernel=(3, 3, 3), grid=(4, 5, 6))
        rule = {"kernel": (3, 3, 3), "stride": (2, 2, 2), "padding": (1, 1, 1), "grid": (4, 5, 6)}
        return table, *neighbours.strided(coords, valid, **rule, capacity=30, batch=2)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(both(coords, valid), compiled(coords, valid)))


def test_operators_pass_torchs_own_checks():
    coords, valid = make_sites(20, (4, 5, 6), 1, 0.8, 0)
    checks = ("test_schema", "test_faketensor")
    triples = ([3, 3, 3], [2, 2, 2], [1, 1, 1], [4, 5, 6])
    torch.library.opcheck(
        torch.ops.bevfn.submanifold_neighbours.default, (coords, valid, [3, 3, 3], [4, 5, 6]), test_utils=checks
    )
    torch.library.opcheck(
        torch.ops.bevfn.strided_neighbours.default, (coords, valid, *triples, 9, 1), test_utils=checks
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"coords": torch.zeros(3, 4)}, "coords must be int32"),
        ({"valid": torch.ones(3)}, "valid must be bool"),
        ({"stride": (2, 0, 2)}, "stride needs 3 numbers of at least 1"),
        ({"capacity": 0}, "capacity and batch must be at least 1"),
        ({"padding": (0, 0, 0), "kernel": (7, 3, 3)}, "leaves no output cells"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    call = {
        "coords": torch.zeros(3, 4, dtype=torch.int32), "valid": torch.ones(3, dtype=torch.bool), "kernel": (3, 3, 3),
        "stride": (2, 2, 2), "padding": (1, 1, 1), "grid": (5, 5, 5), "capacity": 4, "batch": 1, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        neighbours.strided(call.pop("coords"), call.pop("valid"), **call)


def test_a_valid_site_outside_the_grid_is_named():
    coords, valid = torch.tensor([[0, 1, 1, 1], [0, 5, 1, 1]], dtype=torch.int32), torch.ones(2, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"valid row 1 has .* \(0, 5, 1, 1\), outside grid \(5, 5, 5\)"):
        neighbours.submanifold(coords, valid, kernel=(3, 3, 3), grid=(5, 5, 5))
