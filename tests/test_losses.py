"""Losses against their formulas and torch's."""

import torch
import torch.nn.functional as F

from bevfn import losses


def test_gaussian_focal_is_zero_for_a_perfect_heatmap_and_finite_at_the_extremes():
    target = torch.zeros(1, 2, 5, 5)
    target[0, 1, 2, 2] = 1
    perfect = torch.where(target == 1, 50.0, -50.0)
    assert losses.gaussian_focal(perfect, target) < 1e-3
    assert torch.isfinite(losses.gaussian_focal(-perfect, target))


def test_gaussian_focal_without_a_centre_divides_by_one():
    logits = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    p = torch.sigmoid(logits)
    expected = -((1 - p).log() * p**2).sum()
    torch.testing.assert_close(losses.gaussian_focal(logits, torch.zeros_like(logits)), expected, rtol=1e-5, atol=0)


def test_sigmoid_focal_with_gamma_zero_is_binary_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 10, generator=generator) * 10
    target = (torch.rand(20, 10, generator=generator) > 0.5).float()
    ours = losses.sigmoid_focal(logits, target, torch.tensor(4.0), gamma=0.0, alpha=0.5)
    theirs = 0.5 * F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / 4
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_losses_pass_gradcheck():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    target = (torch.rand(3, 4, generator=generator) > 0.5).double()
    one = torch.tensor(1.0, dtype=torch.float64)
    # float32 inside: finite differences need a wide step and a loose tolerance
    assert torch.autograd.gradcheck(
        lambda x: losses.sigmoid_focal(x, target, one).double(), logits, eps=1e-2, atol=1e-2, rtol=1e-2
    )
    assert torch.autograd.gradcheck(
        lambda x: losses.weighted_l1(x, target, torch.ones(()), one).double(), logits, eps=1e-2, atol=1e-2, rtol=1e-2
    )
