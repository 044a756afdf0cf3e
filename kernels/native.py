"""Compiles an op's `cpu.cpp` with the host's C++ compiler on first use and loads it with ctypes.

The sources are plain C++17 with `extern "C"` entry points over raw pointers: no torch headers, so a build takes
seconds and one binary serves every torch version. Inductor needs the same compiler on a CPU anyway. Binaries are
cached under `$BEVFN_CACHE` (default `~/.cache/bevfn`), keyed by source, flags, compiler and processor.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevfn.kernels.cache import cache_dir

SHARED = Path(__file__).with_name("parallel.h")  # what the sources include
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-Wall")
# -ffp-contract=off: voxel and cell indices must round exactly as the published code does. Kernels whose inner loop is
# a dot product call __builtin_fma (or vector intrinsics) where a fused multiply-add is wanted.


def _compiler() -> str:
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name) or shutil.which("clang++")
    if path is None:
        raise RuntimeError(
            f"bevfn's CPU kernels need a C++17 compiler and {name!r} is not on PATH: install g++ (Debian: "
            "`apt-get install g++`) or set CXX; inductor needs one too."
        )
    return path


@functools.cache
def load(source: Path) -> ctypes.CDLL:
    """The shared library of `source`, compiled once per machine.

    Raises:
        RuntimeError: there is no compiler, or it refuses the source (its message is quoted).
    """
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    key = "\0".join([source.read_text(), SHARED.read_text(), *FLAGS, version, platform.machine(), _cpu_flags()])
    target = cache_dir() / f"{source.parent.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # same file system, so the rename is atomic
            built = Path(folder) / "kernel.so"
            done = subprocess.run([compiler, *FLAGS, str(source), "-o", str(built)], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{compiler} cannot build {source}: {done.stderr.strip()[-2000:]}")
            os.replace(built, target)
    return ctypes.CDLL(str(target))


def _cpu_flags() -> str:
    """What -march=native means here: a cache shared between machines must not mix instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def call(op: str, name: str, *values: Tensor | int | Sequence[int] | ctypes.c_void_p | ctypes.Array | None) -> int:
    """Runs a C function of `kernels/<op>/cpu.cpp`, whose last argument is torch's number of threads.

    Args:
        op: the folder.
        name: the function.
        values: tensors go as their address, numbers as int64, sequences as arrays of int64, None as a null pointer.

    Returns:
        The function's int64; without meaning where it returns nothing.

    Raises:
        RuntimeError: the source cannot be built, see `load`.
        ValueError: a tensor is not contiguous or not on the CPU.
    """
    function = getattr(load(Path(__file__).parent / op / "cpu.cpp"), name)
    function.restype = ctypes.c_int64  # ctypes would cut it to an int
    return function(*map(_argument, (*values, torch.get_num_threads())))


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return pointer(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return (ctypes.c_int64 * len(value))(*value) if isinstance(value, list | tuple) else value


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Address of a contiguous CPU tensor's first element."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(
            f"kernel operand must be a contiguous CPU tensor, got {tensor.device}, strides {tensor.stride()}"
        )
    return ctypes.c_void_p(tensor.data_ptr())
