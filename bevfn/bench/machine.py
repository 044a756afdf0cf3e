"""What this machine can do at best, the yardsticks of every benchmark; and how time and memory are measured."""

import ctypes
import gc
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bevfn import host

SCRATCH = 1 << 28  # bytes written before what is timed on a GPU, several times its cache
HELD = 100_000_000  # cycles, 50 ms or more, for which a GPU waits while the host queues what is timed


def best_seconds(run: Callable[[], object], *, repeats: int = 5, warm_up: int = 1) -> float:
    """Least wall-clock seconds of `run`, after `warm_up` calls; waits for CUDA where there is one."""
    seconds = []
    for i in range(warm_up + repeats):
        _synchronize()
        started = time.perf_counter()
        run()
        _synchronize()
        if i >= warm_up:
            seconds.append(time.perf_counter() - started)
    return min(seconds)


def seconds_on(device: str, *runs: Callable[[], object], repeats: int = 9) -> list[float]:
    """Least seconds of each of `runs`: `best_seconds` on a CPU, on a GPU by its own clock, where they take turns.

    A GPU's clock starts once the host has queued a call's kernels, so that their launches do not count, and with a cache that
    holds nothing of the operands. A call that waits for the GPU in between is timed with its waiting.
    """
    if not device.startswith("cuda"):
        return [best_seconds(run, repeats=repeats) for run in runs]
    scratch = torch.empty(SCRATCH, dtype=torch.uint8, device=device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = [float("inf")] * len(runs)
    for repeat in range(-2, repeats):  # the first rounds compile and choose among kernels
        for i, run in enumerate(runs):
            scratch.zero_()
            torch.cuda._sleep(HELD)
            begin.record()
            run()
            end.record()
            end.synchronize()
            if repeat >= 0:
                best[i] = min(best[i], 1e-3 * begin.elapsed_time(end))
    return best


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tried(part: Callable[[], dict]) -> dict:
    """Its figures, or {"failed": why}, with the traceback on standard error."""
    try:
        return part()
    except Exception as error:  # of a kernel, its compiler or a peer: the others' figures are not thrown away for it
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def extra_mib(run: Callable[[], object]) -> float | None:
    """MiB that a call of `run` needs at its worst moment beyond what was there before it, its result included.

    The kernel's high-water mark of resident memory, which also sees what is not a tensor; Linux only, None elsewhere.
    A first call warms up: what libraries keep from it, such as packing buffers, does not count.
    """
    reset, trim = Path("/proc/self/clear_refs"), getattr(ctypes.CDLL(None), "malloc_trim", None)
    if not reset.exists() or trim is None:
        return None
    run()
    gc.collect()
    trim(0)  # freed memory that malloc keeps would hide what the call takes
    before = _status_kib("VmRSS")
    reset.write_text("5")
    kept = run()
    peak = _status_kib("VmHWM")
    del kept
    return (peak - before) / 1024


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def in_process(target: Callable, *arguments: Any) -> Any:
    """target(*arguments) in a fresh process, whose memory is its own.

    Raises RuntimeError if the process dies; it has said why, unless it was killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, target, arguments))
    with host.ctrl_c_later():
        process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        why = "failed, as it says above" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        why += ", as the system does when it is out of memory" if code == -signal.SIGKILL else ""
        raise RuntimeError(f"the benchmark process of {target.__name__}{arguments} {why}") from None
    except KeyboardInterrupt:
        process.kill()
        raise
    finally:
        process.join()


def _send(sender: Any, target: Callable, arguments: tuple) -> None:
    host.start_worker()
    sender.send(target(*arguments))


def gemm_gflops(*, size: int = 2048, dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """GFLOP/s of a square matrix product: what "peak" means in every figure here."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = best_seconds(lambda: a @ b, repeats=9)
    return 2 * size**3 / seconds / 1e9


def copy_gbps(*, megabytes: int = 512, device: str = "cpu") -> float:
    """GB/s of a copy between two buffers beyond any cache, read + written bytes."""
    source = torch.zeros(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    (seconds,) = seconds_on(device, lambda: target.copy_(source))
    return 2 * source.numel() * 4 / seconds / 1e9
