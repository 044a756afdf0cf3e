"""Host lowering of `voxelize`: `cpu.cpp`, equal to the reference bit for bit."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from bevfn.kernels import native

SOURCE = Path(__file__).with_name("cpu.cpp")


def voxelize(
    points: Tensor,
    valid: Tensor,
    lower: list[float],
    size: list[float],
    grid: list[int],
    max_points: int,
    max_voxels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `bevfn.kernels.voxelize.voxelize`, in the order of the operator's schema."""
    B, P, C = points.shape
    points, valid = points.contiguous(), valid.contiguous()
    features = torch.empty(B, max_voxels, C)
    coords = torch.empty(B, max_voxels, 3, dtype=torch.int32)
    count = torch.empty(B, max_voxels, dtype=torch.int32)
    found = torch.empty(B, dtype=torch.int32)
    native.load(SOURCE).voxelize(
        native.pointer(points), native.pointer(valid), *(ctypes.c_int64(n) for n in (B, P, C)),
        (ctypes.c_float * 3)(*lower), (ctypes.c_float * 3)(*size), (ctypes.c_int64 * 3)(*grid),
        ctypes.c_int64(max_points), ctypes.c_int64(max_voxels),
        *map(native.pointer, (features, coords, count, found)), torch.get_num_threads(),
    )  # fmt: skip
    return features, coords, count, found
