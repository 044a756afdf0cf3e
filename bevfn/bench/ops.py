"""The ops of `bevfn bench ops`: sparse and deformable convolution, voxel pooling and deformable attention against peers
and the machine; on a GPU also those that make indices.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bevfn.bench import attention, deform, encoder, indexing, machine, pool, sparse
from bevfn.kernels.cuda import unusable

DTYPES = ("float16", "float32")  # on a GPU


def measure(frame: Path | None = None, device: str = "cpu") -> dict:
    """Figures of every op, and the machine's limits of the same run; sparse convolution on a CPU with one thread.

    frame: folder of a key frame, of whose points and cameras the sizes are; None: what stands for one in each file.
    """
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            return {"kernels": unusable(torch.device(device)) or _triton(), **_on_gpu(frame, device)}
    return {
        "gemm_gflops": machine.gemm_gflops(),
        "copy_gbps": machine.copy_gbps(),
        "frame": None if frame is None else str(frame),
        "sparse": sparse.measure(frame),
        "voxel_pool": pool.measure(frame),
        "deform_conv": deform.measure(),
        "deform_attn": attention.measure(frame),
    }


def _on_gpu(frame: Path | None, device: str) -> dict:
    """In this process; an op that fails is told beside the others' figures."""
    gemm = {name: machine.gemm_gflops(size=8192, dtype=getattr(torch, name), device=device) for name in DTYPES}
    copy = machine.copy_gbps(device=device)
    points, source = sparse.scan(frame)
    cell = pool.frustum_cells() if frame is None else pool.cells_of(frame)
    parts: dict[str, Callable[[], dict]] = {
        "sparse": lambda: {"scan": source, **encoder.measure(device, points, gemm)},
        "voxel_pool": lambda: _of_dtypes(lambda dtype: pool.measure_on(device, copy, cell, dtype=dtype)),
        "deform_conv": lambda: _of_dtypes(
            lambda dtype: deform.measure(device=device, dtype=dtype, gemm_gflops=gemm[str(dtype).split(".")[1]])
        ),
        "deform_attn": lambda: _of_dtypes(lambda dtype: attention.measure(frame, device=device, dtype=dtype)),
        "indexing": lambda: {"scan": source, **indexing.measure(device, points)},
    }
    limits = {"gemm_gflops": gemm, "copy_gbps": copy, "frame": None if frame is None else str(frame)}
    return {**limits, **{name: machine.tried(part) for name, part in parts.items()}}


def _triton() -> str:
    import triton

    return f"triton {triton.__version__}"


def _of_dtypes(part: Callable[[torch.dtype], dict]) -> dict:
    return {name: machine.tried(partial(part, getattr(torch, name))) for name in DTYPES}
