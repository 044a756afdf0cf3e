"""The depth's random field: against the formula written out pixel by pixel, and its gradients."""

from dataclasses import replace

import pytest
import torch

from bevfn.views import crf

CONFIG = crf.Config(iterations=3, colour_deviation=20.0)


@pytest.fixture
def field():
    """(logits [2 5 3 4], colours [2 3 3 4]) of which some neighbours look alike and some do not."""
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(2, 5, 3, 4, generator=generator), 60 * torch.rand(2, 3, 3, 4, generator=generator)


def written_out(logits, colour, strength, config):
    """Mean field in double precision, neighbour by neighbour."""
    logits, colour = logits.double(), colour.double()
    D, H, W = logits.shape[1:]
    bins = torch.arange(D, dtype=torch.float64)
    penalty = (bins[:, None] - bins).abs()
    q = logits.softmax(1)
    for _ in range(config.iterations):
        message = torch.zeros_like(q)
        for i, j in ((i, j) for i in range(H) for j in range(W)):
            for k, n in (
                (k, n) for k in range(max(i - 1, 0), min(i + 2, H)) for n in range(max(j - 1, 0), min(j + 2, W))
            ):
                squares = (colour[:, :, i, j] - colour[:, :, k, n]).square().sum(1, keepdim=True)
                message[:, :, i, j] += torch.exp(-squares / (2 * config.colour_deviation**2)) * q[:, :, k, n]
        q = (logits - strength * torch.einsum("ab,mbhw->mahw", penalty, message)).softmax(1)
    return q


def run(logits, colour, strength, config):
    return crf.apply({"strength": strength}, logits, crf.likeness(colour, config), config=config)


def test_mean_field_is_the_formula_written_out(field):
    logits, colour = field
    found = run(logits, colour, torch.tensor([0.3]), CONFIG)
    torch.testing.assert_close(found["depth"].double(), written_out(logits, colour, 0.3, CONFIG), atol=1e-6, rtol=1e-5)
    once = written_out(logits, colour, 0.3, replace(CONFIG, iterations=1))
    torch.testing.assert_close(found["first"].double(), once, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["start"], logits.softmax(1))


def test_gradients_flow_through_every_step_into_logits_and_strength(field):
    logits, colour = (x[:1, :, :2, :2].double() for x in field)
    probe = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)

    def ours(logits, strength):
        return (run(logits.float(), colour.float(), strength.float(), CONFIG)["depth"] * probe).sum()

    def exact(logits, strength):
        return (written_out(logits, colour, strength, CONFIG) * probe).sum()

    # written_out fills in place, which torch.func differentiates too
    point = logits, torch.tensor([0.3], dtype=torch.float64)
    found, wanted = (torch.func.grad(f, argnums=(0, 1))(*point) for f in (ours, exact))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_published_likeness_is_equality_of_patches():
    """Means of 64 bytes differ by a 64th at least, which is 16 deviations."""
    images = torch.zeros(1, 1, 16, 24, 3, dtype=torch.uint8)
    images[..., 16:, :] = 10
    images[0, 0, 0, 0, 0] = 1
    colour = crf.colours(images, 8)
    assert colour.shape == (1, 3, 2, 3) and float(colour[0, 0, 0, 0]) == 1 / 64
    k = crf.likeness(colour, crf.Config())
    assert set(k.unique().tolist()) == {0.0, 1.0}
    assert k[0, :, 1, 1].tolist() == [0, 1, 0, 1, 1, 0, 1, 1, 1]  # its own grey and, beyond the map, black
    assert k[0, :, 0, 2].tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 0]


def test_later_images_use_the_first_ones_colours(field):
    logits, colour = field
    both = run(torch.cat([logits, logits.flip(0)]), colour, torch.tensor([0.3]), CONFIG)["depth"]
    turned = run(logits.flip(0), colour, torch.tensor([0.3]), CONFIG)["depth"]
    torch.testing.assert_close(both[2:], turned)


def test_no_strength_leaves_the_softmax_and_much_prefers_the_middle(field):
    logits, colour = field
    torch.testing.assert_close(run(logits, colour, torch.zeros(1), CONFIG)["depth"], logits.softmax(1))
    flat = run(torch.zeros_like(logits), colour, torch.tensor([0.5]), CONFIG)["depth"]
    assert (flat[:, 2] > flat[:, 0]).all()
