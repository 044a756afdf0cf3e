"""Host lowering of `voxelize`: `cpu.cpp`, equal to the reference bit for bit."""

import ctypes

import torch
from torch import Tensor

from bevfn.kernels import indices, native
from bevfn.kernels.voxelize.reference import Extent


def voxelize(
    points: Tensor, valid: Tensor, lower: Extent, size: Extent, grid: list[int], max_points: int, max_voxels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `bevfn.kernels.voxelize.voxelize`, in the order of the operator's schema."""
    B, P, C = points.shape
    indices.check("voxelize", "points of a sample", P, smaller="cloud")
    points, valid = points.contiguous(), valid.contiguous()
    features = torch.empty(B, max_voxels, C)
    coords = torch.empty(B, max_voxels, 3, dtype=torch.int32)
    count = torch.empty(B, max_voxels, dtype=torch.int32)
    found = torch.empty(B, dtype=torch.int32)
    axes = [(ctypes.c_float * 3)(*values) for values in (lower, size)]
    outputs = (features, coords, count, found)
    native.call("voxelize", "voxelize", points, valid, B, P, C, *axes, grid, max_points, max_voxels, *outputs)
    return outputs
