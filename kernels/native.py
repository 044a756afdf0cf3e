"""Compiles an op's `cpu.cpp` with the host's C++ compiler on first use and loads it with ctypes.

The sources are plain C++17 with `extern "C"` entry points over raw pointers: no torch headers, so a build takes
seconds and one binary serves every torch version. Inductor needs the same compiler on a CPU anyway. Binaries are
cached under `$BEVFN_CACHE` (default `~/.cache/bevfn`), keyed by source, flags, compiler and processor.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevfn.kernels.cache import cache_dir

SHARED = sorted(Path(__file__).parent.glob("*.h"))  # what the sources include
THIS_CPU = (
    "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
)  # Apple's clang: the first only
FLAGS = ("-O3", THIS_CPU, "-std=c++17", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-Wall")
# -ffp-contract=off: voxel and cell indices must round exactly as the published code does. Kernels whose inner loop is
# a dot product call __builtin_fma (or vector intrinsics) where a fused multiply-add is wanted.

OUT_OF_MEMORY = -(2**63)  # what a kernel returns then, see parallel.h


def compiler() -> str:
    """Path of the C++ compiler; raises FileNotFoundError, one sentence, if there is none."""
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name) or shutil.which("clang++")
    if path is None:
        raise FileNotFoundError(
            f"bevfn's CPU kernels need a C++17 compiler and {name!r} is not on PATH: install g++ (Debian: "
            "`apt-get install g++`) or set CXX; inductor needs one too."
        )
    return path


@functools.cache
def load(source: Path) -> ctypes.CDLL:
    """The shared library of `source`, compiled once per machine.

    A library is loaded only if this user (or root) wrote it in a folder that nobody else may write, and it is what the
    compiler wrote, by the digest beside it; else it is built again, in a folder of this process where the cache cannot
    be trusted.

    Raises:
        OSError: there is no compiler, or it refuses the source (its message is quoted).
    """
    cxx = compiler()
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    key = "\0".join(
        [*(file.read_text() for file in (source, *SHARED)), *FLAGS, version, platform.machine(), _cpu_flags()]
    )
    name = f"{source.parent.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    folder = cache_dir()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if why := untrusted(folder):
        warnings.warn(
            f"bevfn's kernels are built again for this process, since {why}: set BEVFN_CACHE to a folder of your own.",
            stacklevel=2,
        )
        folder = private_folder()
    target = folder / name
    if not _is_whole(target):
        _build(cxx, source, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        if "failed to map segment" not in str(error):
            raise
        raise OSError(f"{error}: set BEVFN_CACHE to a folder that is not mounted noexec, as this one may be.") from None


def untrusted(path: Path) -> str | None:
    """Why code in this file or folder may be somebody else's; None if only this user and root can have put it there."""
    user, path = os.getuid(), path.resolve()
    for place in (path, *path.parents):
        about = place.stat()
        if about.st_uid not in (user, 0):
            return f"{place} belongs to user {about.st_uid}"
        own_group = about.st_gid == user == os.getgid()  # the group of one that many systems give every user
        open_to_others = about.st_mode & (stat.S_IWOTH if own_group else stat.S_IWOTH | stat.S_IWGRP)
        sticky = about.st_mode & stat.S_ISVTX and place != path  # as /tmp: nobody replaces what is ours in it
        if open_to_others and not sticky:
            return f"users other than {user} may write {place}"
    return None


@functools.cache
def private_folder() -> Path:
    """A folder that only this user may read or write and that goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="bevfn-compiled-"))  # mode 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_whole(library: Path) -> bool:
    """Whether the file is ours alone and what its digest says: mapping a half-written one ends in SIGBUS."""
    try:
        expected = _digest_file(library).read_text()
        return (
            all(untrusted(p) is None for p in (library, _digest_file(library)))
            and hashlib.sha256(library.read_bytes()).hexdigest() == expected
        )
    except (OSError, UnicodeDecodeError):
        return False


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _build(cxx: str, source: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # same file system, so the renames are atomic
        built, digest = Path(folder) / "kernel.so", Path(folder) / "digest"
        _run([cxx, *FLAGS, str(source), "-o", str(built)], f"build {source}")
        digest.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
        for file in (built, digest):
            file.chmod(0o755 if file is built else 0o644)  # whatever the umask says
        os.replace(built, target)
        os.replace(digest, _digest_file(target))


def archive(sources: Sequence[Path], target: Path, include: Sequence[str] = ()) -> None:
    """Compiles C++ files into a static library whose functions nothing but what it is linked into sees.

    Raises:
        OSError: there is no compiler, or it or `ar` refuses (the message is quoted).
    """
    flags = [
        *(flag for flag in FLAGS if flag != "-shared"),
        "-fvisibility=hidden",
        *(f"-I{place}" for place in include),
    ]
    cxx = compiler()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [str(Path(folder) / f"{i}.o") for i in range(len(sources))]
        for source, made in zip(sources, objects):
            _run([cxx, *flags, "-c", str(source), "-o", made], f"build {source}")
        _run(["ar", "rcs", str(target), *objects], f"make {target}")


def _run(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise OSError(f"{command[0]} is not on PATH and cannot {what}") from None
    if done.returncode != 0:
        raise OSError(f"{command[0]} cannot {what}: {done.stderr.strip()[-2000:]}")


def _cpu_flags() -> str:
    """What THIS_CPU means here: a cache shared between machines must not mix instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def call(op: str, name: str, *values: Tensor | int | Sequence[int] | ctypes.Array | None) -> int:
    """Runs a C function of `kernels/<op>/cpu.cpp`, whose last argument is torch's number of threads.

    Args:
        op: the folder.
        name: the function.
        values: tensors go as their address, numbers as int64, sequences as arrays of int64, None as a null pointer.

    Returns:
        The function's int64.

    Raises:
        OSError: the source cannot be built, see `load`.
        ValueError: a tensor is not contiguous or not on the CPU.
        MemoryError: the function found too little of it.
    """
    function = getattr(load(Path(__file__).parent / op / "cpu.cpp"), name)
    function.restype = ctypes.c_int64  # ctypes would cut it to an int
    result = function(*map(_argument, (*values, torch.get_num_threads())))
    if result == OUT_OF_MEMORY:
        raise MemoryError(f"out of memory in the CPU kernel {name}")
    return result


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
