"""What a process can ask of its host, and how it has others work for it."""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TypeVar

Result = TypeVar("Result")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep freed memory instead of giving it back to the kernel; False where there is no glibc.

    A train step frees and takes gigabytes in large blocks; by default each block is new pages, and the kernel clears
    them: a third of an eager LiDAR-only step's CPU time here. Peak memory grows by fragmentation.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # macOS, musl, Windows
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def start_worker() -> None:
    """In a worker process: Ctrl-C, which a terminal sends to every process of a command, is left to its parent, and where that was
    killed it ends at once, instead of holding memory and locks for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def ctrl_c_later() -> Iterator[None]:
    """Inside, Ctrl-C waits, and does not reach processes that are started: one that still imports would print a traceback."""
    multiprocessing.resource_tracker.ensure_running()  # which starts with the first process, and ends the waiting
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unordered(function: Callable[..., Result], jobs: Iterable[tuple], workers: int) -> Iterator[Result]:
    """function(*job) of every job as they are done, in `workers` processes (up to 1: in this one).

    `jobs` is read as they are handed out: those of a whole data set need not wait in memory. An exception here or in a job,
    Ctrl-C included, ends the processes in the middle of their jobs.
    """
    if workers <= 1:
        for job in jobs:
            yield function(*job)
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ctrl_c_later():
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker)
    others = multiprocessing.active_children()
    pending: set[Future] = set()
    try:
        for job in jobs:
            with ctrl_c_later():
                pending.add(pool.submit(function, *job))
            if len(pending) >= 2 * workers:
                yield from _finished(pending)
        while pending:
            yield from _finished(pending)
    except BaseException:
        with ctrl_c_later():
            for process in multiprocessing.active_children():
                if process not in others:
                    process.kill()
            # Which waits for its thread: a second Ctrl-C ends at once and would leave its semaphores.
            pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def _finished(pending: set[Future]) -> list:
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    pending -= done
    return [future.result() for future in done]


@contextlib.contextmanager
def bounded_memory(more: int) -> Iterator[None]:
    """Inside, what would take this process more than `more` bytes beyond what it has is a MemoryError (on Linux).

    For readers of files that declare sizes which they may not have. The whole process is bound, so for seconds only.
    """
    try:
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bounds = [bound for bound in (used + more, soft, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
