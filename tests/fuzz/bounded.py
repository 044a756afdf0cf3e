"""A command in a process of its own, forked from this one, with bounds on time and memory."""

import contextlib
import os
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bevfn import exits

SECONDS = 20.0  # of wall time: a hundred times what any of these commands takes
MEMORY = 2**30  # bytes of address space above this process' own
TRACEBACK = 97  # exit code, which no command of bevfn has


@dataclass(frozen=True)
class Outcome:
    """How the process ended."""

    code: int
    """its exit code, minus the signal that killed it"""
    out: str
    """standard output and error"""
    seconds: float

    @property
    def refused(self) -> bool:
        """One sentence, on one line, and exit code 2; a command may have reported before it."""
        last = self.out.rstrip("\n").rpartition("\n")[2]
        return self.code == exits.REFUSED and last.startswith("bevfn: ") and self.out.count("bevfn: ") == 1


def run(command: Callable[[], object], *, seconds: float = SECONDS, memory: int = MEMORY) -> Outcome:
    """Calls `command` as bevfn's command line does; what it returns is the exit code if it is a number."""
    with tempfile.TemporaryFile() as file:
        began = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            _child(command, file.fileno(), memory)
        code = _wait(pid, began + seconds)
        file.seek(0)
        return Outcome(code, file.read().decode(errors="backslashreplace"), time.perf_counter() - began)


def _child(command: Callable[[], object], output: int, memory: int) -> None:
    code = TRACEBACK
    try:
        torch.set_num_threads(1)  # the pool of OpenMP threads did not survive the fork: waiting for it is for ever
        warnings.resetwarnings()  # pytest makes errors of them, a user gets a line
        os.dup2(output, 1)
        os.dup2(output, 2)
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with (
            os.fdopen(os.dup(output), "w", buffering=1) as out,
            contextlib.redirect_stdout(out),  # pytest has replaced both
            contextlib.redirect_stderr(out),
            exits.one_sentence(),
        ):
            result = command()
        code = result if isinstance(result, int) else 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        os.write(2, traceback.format_exc()[-2000:].encode(errors="backslashreplace"))
    finally:
        os._exit(code)


def _wait(pid: int, deadline: float) -> int:
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.perf_counter() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -signal.SIGKILL
        time.sleep(0.002)
