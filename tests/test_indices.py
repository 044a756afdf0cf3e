"""Operands of more than 2^31 - 1 rows, pixels or points are named by the host's kernels, before anything is copied or written."""

import pytest
import torch
from torch import Tensor

from bevfn.kernels import deform_attn, deform_conv, indices, neighbours, voxelize

HUGE = 1 << 31


def thin(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of that shape, in the memory of one element."""
    return torch.zeros((), dtype=dtype).expand(shape)


def deformed(height: int) -> tuple:
    return thin(1, 1, height, 1 << 16), thin(1, 2, height, 1 << 16), None, thin(1, 1, 1, 1), 1, 0, 1


def attended(height: int) -> tuple:
    width = (1 << 16) - 2
    return thin(1, height * width, 1, 1), thin(1, 1, 1, 1, 1, 2), thin(1, 1, 1, 1, 1), None, [height, width]


def sites(rows: int, capacity: int) -> tuple:
    place = thin(rows, 4, dtype=torch.int32), thin(rows, dtype=torch.bool)
    return *place, [3, 3, 3], [2, 2, 2], [1, 1, 1], [4, 4, 4], capacity, 1


CASES = {
    "deform_conv": (deform_conv.cpu.forward, deformed(1 << 15), "pixels of an image", "image"),
    "deform_conv_backward": (deform_conv.cpu.backward, (thin(1), *deformed(1 << 15)), "pixels", "image"),
    "deform_attn": (deform_attn.cpu.forward, attended((1 << 15) - 2), "pixels of an image's levels", "image"),
    "deform_attn_backward": (deform_attn.cpu.backward, (thin(1), *attended((1 << 15) - 2)), "pixels", "image"),
    "submanifold_neighbours": (neighbours.cpu.submanifold, (*sites(HUGE, 1)[:3], [4, 4, 4]), "rows", "batch"),
    "strided_neighbours": (neighbours.cpu.strided, sites(1 << 28, 1), "candidates for outputs", "batch"),
    "strided_neighbours, its outputs": (neighbours.cpu.strided, sites(1, HUGE), "output rows", "batch"),
    "voxelize": (
        voxelize.cpu.voxelize,
        (thin(1, HUGE, 4), thin(1, HUGE, dtype=torch.bool), [0.0] * 3, [1.0] * 3, [4, 4, 4], 1, 1),
        "points of a sample",
        "cloud",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_more_than_an_index_holds_is_named(name):
    lowering, operands, what, smaller = CASES[name]
    with pytest.raises(ValueError, match=rf"^\w+: \d+ {what}.* more than the {HUGE - 1} .* smaller {smaller}\.$"):
        lowering(*operands)


def test_the_largest_number_is_allowed():
    indices.check("voxelize", "points", HUGE - 1)
