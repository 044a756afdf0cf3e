"""Too little memory is one sentence: what was wanted, what is there, what would fit."""

import errno
import os
import re

import numpy as np
import pytest
import torch

from bevfn import exits, memory
from bevfn.kernels.voxel_pool import intervals

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.20 GiB of which 10.06 GiB is free. "
    "Including non-PyTorch memory, this process has 69.07 GiB memory in use. Of the allocated memory 68.00 GiB is allocated"
)
NPU = (
    "NPU out of memory. Tried to allocate 512.00 MiB (NPU 0; 60.97 GiB total capacity; 59.10 GiB already allocated; "
    "59.10 GiB current active; 260.00 MiB free; 60.00 GiB reserved in total by PyTorch)"
)


@pytest.mark.parametrize(
    "error, said",
    [
        (torch.OutOfMemoryError(CUDA), "20 GiB more are wanted, 10.1 of 79.2 GiB are free"),
        (RuntimeError(NPU), "0.5 GiB more are wanted, 0.254 of 61 GiB are free"),
    ],
)
def test_a_devices_own_numbers_are_told(error, said):
    assert memory.missing(error) == f"there is not enough memory for this: {said}"


def allocate_with_torch():
    torch.empty(1 << 55, dtype=torch.uint8)


def allocate_with_numpy():
    np.empty(1 << 55, dtype=np.uint8)


@pytest.mark.parametrize("allocate", [allocate_with_torch, allocate_with_numpy])
def test_memory_of_the_host_that_is_not_there(capsys, allocate):
    """32 PiB, of which no system gives even the addresses."""
    with pytest.raises(SystemExit) as end, exits.one_sentence():
        allocate()
    told = capsys.readouterr().err
    assert end.value.code == exits.REFUSED
    assert re.fullmatch(
        r"bevfn: there is not enough memory for this: 33,554,432 GiB more are wanted(, [\d.]+ of [\d.]+ GiB are free)?\n",
        told,
    )


def test_what_says_no_size_is_known_too():
    for error in (
        MemoryError("std::bad_alloc"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
        torch._inductor.exc.InductorError(MemoryError(), None),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("unable to mmap 512 bytes from file </tmp/x>: Cannot allocate memory (12)"),
    ):
        assert str(memory.missing(error)).startswith("there is not enough memory for this")


@pytest.mark.parametrize("threads", [1, 2])
def test_a_kernels_own_allocation(capsys, threads):
    """Counters of 2^52 cells, which no thread gets, be it the caller's or a worker's."""
    cells = torch.zeros(2, 1, 1, 1, 8, dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(SystemExit) as end, exits.one_sentence():
            intervals.made(cells, 1 << 52)
    finally:
        torch.set_num_threads(before)
    assert end.value.code == exits.REFUSED
    assert capsys.readouterr().err.startswith("bevfn: there is not enough memory for this")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
        OSError("a.so: failed to map segment from shared object"),  # of a folder mounted noexec
    ],
)
def test_another_error_stays_what_it_is(error):
    assert memory.missing(error) is None
    with pytest.raises(type(error)) as raised, memory.advised("buy some"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "setting, said",
    [
        ((4, 2, False), "--batch-size 2 --accumulate 4 and --checkpoint-activations (activations of 2 instead of 4 samples at once)"),
        ((3, 1, True), "--batch-size 1 --accumulate 3 (activations of 1 instead of 3 samples at once)"),
        ((1, 8, False), "what needs less: --checkpoint-activations"),
        ((1, 8, True), "use a device with more memory"),
    ],
)  # fmt: skip
def test_a_train_step_names_the_flags_that_need_less(capsys, setting, said):
    with pytest.raises(SystemExit), exits.one_sentence(), memory.advised(memory.smaller(*setting)):
        raise torch.OutOfMemoryError(CUDA)
    told = capsys.readouterr().err
    assert told.startswith(
        "bevfn: there is not enough memory for this: 20 GiB more are wanted, 10.1 of 79.2 GiB are free; "
    )
    assert told.endswith(f"{said}\n") and told.count("\n") == 1
