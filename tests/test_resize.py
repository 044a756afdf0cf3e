"""Resized maps are F.interpolate's, in value, gradient and memory format."""

import pytest
import torch
import torch.nn.functional as F

from bevfn.layers import resize

SIZES = [((8, 22), (16, 44)), ((4, 5), (9, 7)), ((1, 3), (4, 3)), ((16, 16), (64, 64))]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("size", "target"), SIZES)
def test_bilinear_is_interpolation(size, target, align_corners):
    x = torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x, target, mode="bilinear", align_corners=align_corners)
    found = resize.bilinear(x, target, align_corners=align_corners)
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("align_corners", [False, True])
def test_bilinear_has_the_gradient_of_interpolation(align_corners):
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, 3, 8, 12, dtype=torch.float64)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return resize.bilinear(x, (8, 12), align_corners=align_corners)

    theirs = F.interpolate(x, (8, 12), mode="bilinear", align_corners=align_corners)
    wanted = torch.autograd.grad((probe * theirs).sum(), x)[0]
    # the weights are float32's, also of doubles
    assert torch.allclose(torch.autograd.grad((probe * ours(x)).sum(), x)[0], wanted, atol=1e-6)
    assert torch.autograd.gradcheck(ours, x)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_nearest_is_interpolation(factor):
    x = torch.randn(2, 3, 4, 6, requires_grad=True)
    expected = F.interpolate(x, scale_factor=factor, mode="nearest")
    found = resize.nearest(x, factor)
    assert torch.equal(found, expected)
    assert factor == 1 or found.is_contiguous(memory_format=torch.channels_last)
    probe = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad((probe * y).sum(), x)[0] for y in (found, expected)))
