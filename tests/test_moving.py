"""Batches on their way to the device: in order, equal, none twice and none before its time."""

import pytest
import torch

from bevfn import tree
from bevfn.data import loader
from bevfn.data.batch import Base, make
from bevfn.training.moving import Mover


def loaded(number: int) -> loader.Loaded:
    """A batch of points that say its number."""
    points = torch.full((2, 3, 5), float(number))
    batch = make(
        base=Base.LIDAR, base_aug=torch.eye(4).repeat(2, 1, 1), points=points, points_valid=points[..., 0] >= 0
    )
    return loader.Loaded(batch, {}, [str(number)] * 2, [])


def steps(read: list[int], count: int = 3, parts: int = 2):
    """(step, its microbatches), noting in `read` what has been asked for."""
    for step in range(1, count + 1):
        read.append(step)
        yield step, [loaded(10 * step + part) for part in range(parts)]


def taken(mover: Mover, fetches: bool) -> list:
    items = []
    while (item := mover.take()) is not None:
        items.append(item)
        if fetches:
            mover.fetch()
    return items


@pytest.mark.parametrize("fetches", [False, True])
def test_on_a_cpu_batches_come_in_order_as_they_are_and_when_they_are_due(fetches):
    read: list[int] = []
    mover = Mover(steps(read), "cpu")
    done, _, first = mover.take()
    if fetches:
        mover.fetch()
    assert done == 1 and read == [
        1
    ]  # a damaged sample of the second step must not end the run before the first is made
    items = [(done, _, first), *taken(mover, fetches)]
    assert [done for done, _, _ in items] == [1, 2, 3] and read == [1, 2, 3]
    for done, given, batches in items:
        assert [float(batch.points[0, 0, 0]) for batch in batches] == [10 * done, 10 * done + 1]
        for item, batch in zip(given, batches):  # the very tensors: nothing is copied
            pairs = zip(tree.leaves(item.batch), tree.leaves(batch), strict=True)
            assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert mover.take() is None and mover.take() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is there")
@pytest.mark.parametrize("fetches", [False, True])
def test_on_cuda_batches_are_whole_when_a_step_reads_them_and_one_is_ahead(fetches):
    read: list[int] = []
    mover, sums, held = Mover(steps(read, count=50), "cuda"), [], torch.randn(4096, 4096, device="cuda")
    while (item := mover.take()) is not None:
        done, _, batches = item
        held = torch.tanh(held @ held)  # the device is busy while the next batch comes, and these are read late
        sums.append(torch.stack([batch.points.mean() for batch in batches]))
        if fetches:
            mover.fetch()
            assert read[-1] == min(done + 1, 50)
        del item, batches  # their memory is free for later copies
    expected = [[10.0 * step, 10.0 * step + 1] for step in range(1, 51)]
    assert torch.stack(sums).tolist() == expected
