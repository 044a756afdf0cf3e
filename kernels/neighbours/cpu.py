"""Host lowering of the neighbour tables: `cpu.cpp`, equal to the reference entry for entry."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from bevfn.kernels import native

SOURCE = Path(__file__).with_name("cpu.cpp")


def submanifold(coords: Tensor, valid: Tensor, kernel: list[int], grid: list[int], batch: int | None = None) -> Tensor:
    """As `bevfn.kernels.neighbours.submanifold`, in the order of the operator's schema."""
    coords, valid = coords.contiguous(), valid.contiguous()
    V = coords.shape[0]
    table = torch.empty(kernel[0] * kernel[1] * kernel[2], V, dtype=torch.int32)
    wrong = _library().submanifold(
        native.pointer(coords), native.pointer(valid), ctypes.c_int64(V), _triple(kernel), _triple(grid),
        native.pointer(table), torch.get_num_threads(),
    )  # fmt: skip
    if batch is not None and wrong < 0:
        beyond = valid & (coords[:, 0] >= batch)
        wrong = int(beyond.to(torch.int8).argmax()) if bool(beyond.any()) else wrong
    _check(wrong, coords, grid, batch)
    return table


def strided(
    coords: Tensor,
    valid: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    grid: list[int],
    capacity: int,
    batch: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `bevfn.kernels.neighbours.strided`, in the order of the operator's schema."""
    coords, valid = coords.contiguous(), valid.contiguous()
    V, K = coords.shape[0], kernel[0] * kernel[1] * kernel[2]
    out_coords = torch.empty(capacity, 4, dtype=torch.int32)
    out_valid = torch.empty(capacity, dtype=torch.bool)
    table = torch.empty(K, capacity, dtype=torch.int32)
    inverse = torch.empty(K, V, dtype=torch.int32)
    found = torch.empty((), dtype=torch.int32)
    out_grid = [(g + 2 * p - k) // s + 1 for g, k, s, p in zip(grid, kernel, stride, padding)]
    wrong = _library().strided(
        native.pointer(coords), native.pointer(valid), ctypes.c_int64(V),
        *map(_triple, (kernel, stride, padding, grid, out_grid)), ctypes.c_int64(capacity), ctypes.c_int64(batch),
        *map(native.pointer, (out_coords, out_valid, table, inverse, found)), torch.get_num_threads(),
    )  # fmt: skip
    _check(wrong, coords, grid, batch)
    return out_coords, out_valid, table, inverse, found


def _library() -> ctypes.CDLL:
    library = native.load(SOURCE)
    library.submanifold.restype = library.strided.restype = ctypes.c_int64
    return library


def _triple(numbers: list[int]) -> ctypes.Array:
    return (ctypes.c_int64 * 3)(*numbers)


def _check(wrong: int, coords: Tensor, grid: list[int], batch: int | None) -> None:
    if wrong >= 0:
        limit = "" if batch is None else f" or the batch of {batch}"
        raise RuntimeError(
            f"neighbours: valid row {wrong} has (b, x, y, z) = {tuple(coords[wrong].tolist())}, "
            f"outside grid {tuple(grid)}{limit}; mark padded rows invalid or check the voxel range."
        )
