"""The loader: the same batches however they are made, damaged samples named, workers that end when they should."""

import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nuscenes_counts import KEY_FRAMES

from bevfn import tree
from bevfn.data import loader
from bevfn.data.batch import Base, Capacities, Sample

CAPACITIES = Capacities(points=8, boxes=4)


def sample(index: int, generator: np.random.Generator) -> Sample:
    """Points that say which sample it is and what its generator drew."""
    points = np.full((5, 5), index, np.float32)
    points[:, 1:] = generator.random((5, 4))
    boxes = np.ones((1, 9), np.float32)
    return Sample(
        base=Base.LIDAR,
        base_aug=np.eye(4, dtype=np.float32),
        points=points,
        boxes=boxes,
        labels=np.zeros(1, np.int64),
        token=f"t{index}",
    )


def damaged(*bad: int):
    """A load whose samples `bad` are damaged."""

    def load(index: int, generator: np.random.Generator) -> Sample:
        whole = sample(index, generator)  # draws, as a load that fails late
        if index in bad:
            raise ValueError(f"samples/{index}.bin has 7 bytes, not a multiple of 20; copy it again")
        return whole

    return load


def read(load=sample, order=None, *, batch_size=2, workers=0, on_damaged="stop", **options) -> list[loader.Loaded]:
    config = loader.Config(batch_size, workers, on_damaged)
    order = np.arange(10) if order is None else order
    return list(loader.batches(load, order, config, **{"seed": 3, "epoch": 1, "capacities": CAPACITIES, **options}))


def counted(batch):
    return replace(batch, tables={"points": batch.points_valid.sum(1)})


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_batch_is_finished_with_is_done_where_it_is_read(workers):
    for item in read(workers=workers, finish=counted):
        assert torch.equal(item.batch.tables["points"], item.batch.points_valid.sum(1))


def tokens(items: list[loader.Loaded]) -> list[str]:
    return [token for item in items for token in item.tokens]


def points(items: list[loader.Loaded]) -> list[torch.Tensor]:
    """Per sample, in order."""
    return list(torch.cat([item.batch.points for item in items]))


def same(a: list[loader.Loaded], b: list[loader.Loaded]) -> bool:
    def equal(x: loader.Loaded, y: loader.Loaded) -> bool:
        arrays = zip(tree.leaves(x.batch), tree.leaves(y.batch))
        return all(torch.equal(p, q) for p, q in arrays) and vars(x) | OTHER == vars(y) | OTHER

    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))


OTHER = {"batch": None, "waited": None}


# -------------------------------------------------------------------------------------------------- which batches


def test_an_epoch_is_its_order_in_batches_that_validate():
    items = read(order=np.array([4, 2, 0, 1, 3, 5]))
    assert [item.tokens for item in items] == [["t4", "t2"], ["t0", "t1"], ["t3", "t5"]]
    for item in items:
        item.batch.validate()
        assert item.counts["bad/samples"] == 0 and item.problems == [] and item.waited >= 0


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_workers(workers):
    load = damaged(3, 4)
    assert same(read(load, workers=workers, on_damaged="skip"), read(load, on_damaged="skip"))


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_batches_do_not_depend_on_how_workers_start(start):
    config = loader.Config(batch_size=2, workers=1, start=start)
    made = list(loader.batches(sample, np.arange(4), config, seed=3, epoch=1, capacities=CAPACITIES))
    assert same(made, read(order=np.arange(4)))


@given(n=st.integers(1, 30), batch_size=st.integers(1, 4), accumulate=st.integers(1, 3), stop=st.integers(0, 30))
@settings(max_examples=40)
def test_an_epoch_entered_at_any_step_goes_on_as_the_one_that_was_never_left(n, batch_size, accumulate, stop):
    arguments = {"order": np.arange(n), "batch_size": batch_size, "accumulate": accumulate}
    whole = read(**arguments)
    assert same(read(start_step=stop, **arguments), whole[stop * accumulate :])
    assert len(whole) == accumulate * loader.steps_per_epoch(n, batch_size, accumulate=accumulate)


@given(
    n=st.integers(1, 40), batch_size=st.integers(1, 3), replicas=st.integers(1, 4), accumulate=st.integers(1, 3),
    wrap=st.booleans(),
)  # fmt: skip
@settings(max_examples=40)
def test_replicas_and_accumulations_share_the_epoch_without_loss(n, batch_size, replicas, accumulate, wrap):
    order = np.random.default_rng(n).permutation(n)
    parts = [
        read(order=order, batch_size=batch_size, replicas=replicas, accumulate=accumulate, rank=rank, wrap=wrap)
        for rank in range(replicas)
    ]
    assert len({len(part) for part in parts}) == 1
    # Step by step, the microbatches of all ranks in order are the epoch's order, filled up behind its end.
    steps = len(parts[0]) // accumulate
    seen = [t for s in range(steps) for part in parts for t in tokens(part[s * accumulate : (s + 1) * accumulate])]
    filled = [order[p % n if wrap else min(p, n - 1)] for p in range(len(seen))]
    assert seen == [f"t{index}" for index in filled] and 0 <= len(seen) - n < batch_size * replicas * accumulate
    # R processes and A accumulations with equal R * A have the same microbatches.
    alone = read(order=order, batch_size=batch_size, accumulate=replicas * accumulate, wrap=wrap)
    rows = [part[s * accumulate + a] for s in range(steps) for part in parts for a in range(accumulate)]
    assert same(rows, alone)


def test_every_position_and_epoch_draws_its_own_numbers():
    order = np.zeros(6, int)  # one frame six times, as CBGS repeats rare ones
    drawn = points(read(order=order)) + points(read(order=order, epoch=2)) + points(read(order=order, seed=4))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))
    assert all(torch.equal(a, b) for a, b in zip(drawn, points(read(order=order))))


def test_torchs_and_numpys_global_generators_are_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = torch.rand(1), np.random.rand()  # noqa: NPY002
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    read(workers=1)
    assert (torch.rand(1), np.random.rand()) == expected  # noqa: NPY002


@pytest.mark.parametrize(
    "length, batch_size, replicas, accumulate, steps", [(KEY_FRAMES, 4, 8, 1, 880), (32, 4, 8, 1, 1), (33, 4, 1, 8, 2), (1, 4, 2, 2, 1)]
)  # fmt: skip
def test_steps_of_an_epoch_are_rounded_up(length, batch_size, replicas, accumulate, steps):
    assert loader.steps_per_epoch(length, batch_size, replicas, accumulate) == steps


@pytest.mark.parametrize(
    ("length", "batch_size", "replicas", "steps"), [(KEY_FRAMES, 8, 8, 439), (64, 8, 8, 1), (127, 8, 8, 2), (121, 8, 8, 2), (120, 8, 8, 1), (3, 8, 8, 1)]
)  # fmt: skip
def test_an_incomplete_last_step_may_be_left_out(length, batch_size, replicas, steps):
    """Incomplete as torch judges it: 121 samples are filled up to 128 of 8 processes first."""
    assert loader.steps_per_epoch(length, batch_size, replicas, drop_last=True) == steps


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"loader\.Config\.batch_size is 0 but must be at least 1"):
        loader.Config(batch_size=0)
    with pytest.raises(ValueError, match=r"The epoch's order has no samples; check the split"):
        read(order=np.zeros(0, int))
    with pytest.raises(ValueError, match=r"Rank 2 is not one of 2 replicas"):
        read(rank=2, replicas=2)


# ------------------------------------------------------------------------------------------------ damaged samples


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_raises_the_samples_own_sentence_after_the_batches_before_it(workers):
    config = loader.Config(2, workers)
    stream = loader.batches(damaged(5), np.arange(10), config, seed=3, epoch=1, capacities=CAPACITIES)
    assert tokens([next(stream), next(stream)]) == ["t0", "t1", "t2", "t3"]
    with pytest.raises(ValueError) as error:
        next(stream)
    assert str(error.value) == "samples/5.bin has 7 bytes, not a multiple of 20; copy it again"
    assert "in load" in str(error.value.__cause__)  # where, for who debugs a reader


def test_skip_takes_the_next_of_the_order_drawn_with_the_positions_own_generator():
    order = np.array([7, 1, 2, 3])
    items, whole = read(damaged(1, 2), order, on_damaged="skip"), read(order=order)
    assert tokens(items) == ["t7", "t3", "t3", "t3"]
    assert [item.counts["bad/samples"] for item in items] == [2, 1]
    assert items[0].problems == [f"samples/{i}.bin has 7 bytes, not a multiple of 20; copy it again" for i in (1, 2)]
    for replaced, original in zip(points(items), points(whole)):
        assert torch.equal(replaced[:, 1:], original[:, 1:])  # the draws of the position, whoever takes it
    assert tokens(read(damaged(3), order, on_damaged="skip"))[-1] == "t7"  # the order is a ring


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("n, tries", [(3, 3), (1000, loader.TRIES)])
def test_where_all_are_damaged_skipping_ends(workers, n, tries):
    with pytest.raises(
        ValueError, match=rf"{tries} samples in a row are damaged; .*; the last one: samples/{tries - 1}\.bin"
    ):
        read(damaged(*range(n)), np.arange(n), workers=workers, on_damaged="skip")


def spoilt(change, *bad: int):
    """A load whose samples `bad` are changed."""

    def load(index: int, generator: np.random.Generator) -> Sample:
        whole = sample(index, generator)
        return change(whole) if index in bad else whole

    return load


def with_points(column: int, value: float):
    def change(whole: Sample) -> Sample:
        whole.points[2, column] = value
        return whole

    return change


SPOILT = {
    "far": (with_points(0, 1e30), "Batch.points has positions that must be from -10000 to 10000 m"),
    "dark": (with_points(3, -5.0), "Batch.points has intensities that must be from 0 to 255"),
    "from the future": (with_points(4, -0.1), "Batch.points has time lags that must be from 0 to 30 s"),
    "nan": (with_points(1, np.nan), "Batch.points has NaN or infinite values"),
    "flat": (lambda s: replace(s, boxes=s.boxes * 0), "Batch.boxes has a length, width or height that must be"),
    "class -5": (lambda s: replace(s, labels=s.labels - 5), "Batch.labels has -5"),
    "singular": (lambda s: replace(s, base_aug=s.base_aug * 0), "Batch.undo_base_aug has NaN or infinite values"),
    "without boxes": (lambda s: replace(s, boxes=None, labels=None), "collate got samples with and without boxes"),
    "another base": (lambda s: replace(s, base=Base.EGO_AT_CAMERAS), "collate got samples in the bases"),
    "four columns": (lambda s: replace(s, points=s.points[:, :4]), "Batch.points has shape [1, 5, 4]"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_impossible_values_and_samples_that_do_not_fit_together_are_damage_too(name):
    change, what = SPOILT[name]
    load = spoilt(change, 1)
    with pytest.raises(ValueError) as error:
        read(load)
    assert str(error.value).startswith(f"key frame t1: {what}")
    items = read(load, on_damaged="skip")
    assert tokens(items) == ["t0", "t2", *(f"t{i}" for i in range(2, 10))]
    assert items[0].counts["bad/samples"] == 1 and items[0].problems[0].startswith(f"key frame t1: {what}")


def test_a_missing_file_is_a_sentence_too(tmp_path):
    def load(index: int, generator: np.random.Generator) -> Sample:
        return np.fromfile(tmp_path / "a.bin")

    with pytest.raises(ValueError) as error:
        read(load)
    assert str(error.value) == f"{tmp_path}/a.bin could not be read: No such file or directory"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_is_not_taken_for_damage(workers):
    def load(index: int, generator: np.random.Generator) -> Sample:
        raise KeyError("typo")

    with pytest.raises(KeyError, match="typo"):
        read(load, workers=workers, on_damaged="skip")


# ----------------------------------------------------------------------------------------------------- processes


def workers_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [int(child) for child in found]


def wait_until_gone(pids: list[int]) -> None:
    """However long a busy machine takes: nothing but their end ends the reading of `where`'s epochs."""
    while any(is_running(pid) for pid in pids):
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return state not in ("",) and not state.startswith("Z")


def where(index: int, generator: np.random.Generator) -> Sample:
    """A sample whose token is the process that read it."""
    return Sample(**{**vars(sample(index, generator)), "token": str(os.getpid())})


def test_closing_in_the_middle_of_an_epoch_ends_the_workers():
    config = loader.Config(2, workers=2)
    stream = loader.batches(where, np.arange(1000), config, seed=3, epoch=1, capacities=CAPACITIES)
    pids = [int(pid) for pid in {*next(stream).tokens, *next(stream).tokens}]
    assert len(pids) == 2 and os.getpid() not in pids and all(map(is_running, pids))
    stream.close()
    wait_until_gone(pids)


def test_workers_leave_stopping_to_the_training_process_and_use_one_thread():
    def load(index: int, generator: np.random.Generator) -> Sample:
        from threadpoolctl import threadpool_info

        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C reaches the whole process group
        if index == 0:
            os.kill(os.getpid(), signal.SIGTERM)  # as `timeout` does
        assert torch.get_num_threads() == 1 and all(pool["num_threads"] == 1 for pool in threadpool_info())
        return sample(index, generator)

    assert tokens(read(load, workers=2)) == [f"t{i}" for i in range(10)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_killed_worker_is_one_sentence(number):
    def load(index: int, generator: np.random.Generator) -> Sample:
        if index == 5:
            os.kill(os.getpid(), number)
        return sample(index, generator)

    expected = read(workers=1)
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(ChildProcessError) as error:
        read(load, workers=1)
    message = str(error.value)
    assert message.startswith("A process that reads samples ended (") and "\n" not in message
    assert message.endswith("; if memory is short, lower the loader's workers, prefetch or batch_size.")
    assert signal.getsignal(signal.SIGCHLD) is before
    assert same(read(workers=1), expected)  # and the next epoch is well


def test_a_worker_killed_during_a_step_is_the_same_sentence():
    config = loader.Config(2, workers=1)
    stream = loader.batches(where, np.arange(1000), config, seed=3, epoch=1, capacities=CAPACITIES)
    with pytest.raises(ChildProcessError, match="A process that reads samples ended"):
        for item in stream:
            os.kill(int(item.tokens[0]), signal.SIGKILL)
            time.sleep(600)  # the step, in which torch's signal handler raises
    stream.close()


ENDLESS = """
import sys, time
import numpy as np
sys.path.insert(0, sys.argv[1])
from test_loader import CAPACITIES, where
from bevfn.data import loader
stream = loader.batches(where, np.arange(10**6), loader.Config(2, workers=2), seed=0, epoch=0, capacities=CAPACITIES)
print(*{*next(stream).tokens, *next(stream).tokens}, flush=True)
time.sleep(600)
"""


def test_workers_of_a_killed_training_process_end_at_once():
    command = [sys.executable, "-c", ENDLESS, os.path.dirname(__file__)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2 and all(map(is_running, pids))
        process.kill()
        process.wait()
        wait_until_gone(pids)


UNCAUGHT = ENDLESS.replace("time.sleep(600)", "raise RuntimeError('of a collective')")


def test_an_uncaught_error_while_workers_read_ends_the_process_and_them():
    """At exit multiprocessing sends one SIGTERM, which workers ignore, and joins them."""
    command = [sys.executable, "-c", UNCAUGHT, os.path.dirname(__file__)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        try:
            _, error = process.communicate(timeout=300)  # it was for ever
        finally:
            process.kill()
        assert process.returncode == 1 and "of a collective" in error
        assert len(pids) == 2
        wait_until_gone(pids)


def test_batches_take_the_pipe_where_shared_memory_is_too_small(monkeypatch):
    expected = read(workers=2)
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
    made = read(workers=2)
    assert same(made, expected) and not any(item.batch.points.is_shared() for item in made)
    assert all(item.batch.points.is_shared() for item in expected)


TINY = """
set -e
mount -t tmpfs -o size=4m tmpfs /dev/shm
exec "$0" -c "
import sys; sys.path.insert(0, '$1')
import numpy as np, test_loader as t
from bevfn.data.batch import Capacities
items = t.read(workers=2, order=np.arange(40), capacities=Capacities(points=50_000, boxes=4))
assert t.tokens(items) == [f't{i}' for i in range(40)]
print('read', sum(item.batch.points.is_shared() for item in items), len(items))
"
"""


def test_a_container_with_a_tiny_dev_shm_reads_all(tmp_path):
    command = ["unshare", "--mount", "sh", "-c", TINY, sys.executable, os.path.dirname(__file__)]
    if subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True
    ).returncode:
        pytest.skip("mounting is not permitted here")
    result = subprocess.run(command, capture_output=True, text=True)  # 2 MB batches, 4 MB of memory
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("read ")
