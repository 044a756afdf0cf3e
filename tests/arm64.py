"""The CPU kernels as an arm64 machine computes them: built by a cross-compiler, each call a process that qemu emulates.

As a plugin it does so for whole test files (an aarch64 torch is not needed: the kernels see raw memory only):
    apt-get install g++-aarch64-linux-gnu qemu-user
    PYTHONPATH=tests python -m pytest -p arm64 tests/test_voxel_pool.py
"""

import ctypes
import functools
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevfn.kernels import native

COMPILER, EMULATOR, LIBRARIES = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"
CPU = "-mcpu=tsv110"  # Kunpeng 920, the host of Ascend servers: ARMv8.2 with half precision, as every Apple laptop has too


def missing() -> str:
    """Why nothing can be emulated here; empty if it can."""
    absent = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    return f"no {' and no '.join(absent)}: apt-get install g++-aarch64-linux-gnu qemu-user" if absent else ""


@functools.cache
def built(source: Path, *flags: str) -> Path:
    """The source compiled, once per process."""
    target = Path(_folder()) / f"{source.parent.name}-{source.stem}"
    subprocess.run([COMPILER, *flags, str(source), "-o", str(target)], check=True, capture_output=True)
    return target


@functools.cache
def _folder() -> str:
    return tempfile.mkdtemp(prefix="bevfn-arm64-")


def pytest_configure() -> None:
    if missing():
        raise SystemExit(missing())
    native.call = call


def pytest_unconfigure() -> None:
    shutil.rmtree(_folder(), ignore_errors=True)


def call(op: str, name: str, *values: Any) -> int:
    """As `native.call`."""
    flags = [CPU if flag == native.THIS_CPU else flag for flag in native.FLAGS]
    library = built(Path(native.__file__).parent / op / "cpu.cpp", *flags)
    caller = built(Path(__file__).with_name("call_arm64.cpp"), "-O1", "-std=c++17", "-ldl")
    operands = [_memory(value) for value in (*values, torch.get_num_threads())]
    sent = b"".join(
        struct.pack("<qq", -1, x) if isinstance(x, int) else struct.pack("<q", len(x)) + bytes(x) for x in operands
    )
    command = [EMULATOR, "-L", LIBRARIES, str(caller), str(library), name]
    done = subprocess.run(command, input=struct.pack("<q", len(operands)) + sent, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    (result,), at = struct.unpack_from("<q", done.stdout), 8
    for memory in operands:
        if not isinstance(memory, int):
            memory[:] = done.stdout[at : at + len(memory)]
            at += len(memory)
    assert at == len(done.stdout)
    return result


def _memory(value: Any) -> int | memoryview:
    """A number (null is 0), or the bytes of what the C function gets the address of."""
    if value is None or isinstance(value, int):
        return value or 0
    if isinstance(value, Tensor):
        size = value.numel() * value.element_size()
        address = native.pointer(value).value or 0
        return memoryview((ctypes.c_char * size).from_address(address)).cast("B") if size else memoryview(bytearray())
    return memoryview(value if isinstance(value, ctypes.Array) else (ctypes.c_int64 * len(value))(*value)).cast("B")
