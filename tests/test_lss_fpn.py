"""GeneralizedLSSFPN: the top-down path against torch's own layers."""

import pytest
import torch
import torch.nn.functional as F

from bevfn.necks import lss_fpn

CONFIG = lss_fpn.Config(channels_in=(6, 8, 10), channels_out=4)


@pytest.mark.parametrize("train", [False, True])
def test_levels_absorb_the_finished_coarser_level(train):
    params, state = lss_fpn.init(CONFIG, torch.Generator().manual_seed(0))
    features = [torch.randn(3, c, s, 2 * s) for c, s in zip(CONFIG.channels_in, (8, 4, 2))]

    def layer(name: str, level: int, x: torch.Tensor) -> torch.Tensor:
        p, padding = params[name][level], 1 if name == "outputs" else 0
        x = F.conv2d(x, p["conv"]["weight"], padding=padding)
        statistics = (torch.zeros(4), torch.ones(4))
        return F.batch_norm(x, *statistics, p["norm"]["weight"], p["norm"]["bias"], training=train).relu()

    expected = [None, None]
    above = features[2]
    for level in (1, 0):
        up = F.interpolate(above, features[level].shape[-2:], mode="bilinear", align_corners=False)
        above = expected[level] = layer("outputs", level, layer("laterals", level, torch.cat([features[level], up], 1)))
    outputs, new = lss_fpn.apply(params, state, features, train=train)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs, expected, strict=True))
    moved = not torch.equal(new["laterals"][0]["norm"]["mean"], state["laterals"][0]["norm"]["mean"])
    assert moved == train
    assert torch.equal(state["laterals"][0]["norm"]["mean"], torch.zeros(4))  # the caller's state is not touched


def test_gradients_reach_every_parameter_and_agree_with_a_finite_difference():
    params, state = lss_fpn.init(CONFIG, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, c, s, s, generator=generator) for c, s in zip(CONFIG.channels_in, (8, 4, 2))]

    def loss(weight: torch.Tensor) -> torch.Tensor:
        changed = {**params, "laterals": [params["laterals"][0], {**params["laterals"][1], "conv": {"weight": weight}}]}
        return lss_fpn.apply(changed, state, features, train=False)[0][0].square().sum()

    weight = params["laterals"][1]["conv"]["weight"]
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    slope = (torch.func.grad(loss)(weight) * direction).sum()
    step = 1e-3  # float32 and ReLU kinks: 1 % is what a difference can show
    difference = (loss(weight + step * direction) - loss(weight - step * direction)) / (2 * step)
    assert abs(slope - difference) < 0.01 * abs(slope)


def test_a_single_level_is_refused():
    with pytest.raises(ValueError, match=r"channels_in \(256,\) must name at least two levels"):
        lss_fpn.Config(channels_in=(256,))
