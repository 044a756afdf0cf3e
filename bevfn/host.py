"""What a process can ask of its host."""

import contextlib
import ctypes
import multiprocessing
import os
import threading
from collections.abc import Iterator

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


def end_with_parent() -> None:
    """In a worker process: it ends at once when its parent was killed, instead of holding memory and locks for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
