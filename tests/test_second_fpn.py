"""SECONDFPN: raising, lowering and keeping a stage's resolution, and the published start of its weights."""

import pytest
import torch
import torch.nn.functional as F

from bevfn.necks import second_fpn

CONFIG = second_fpn.Config(channels_in=(3, 4, 5, 6), channels=(2, 2, 2, 2), strides=(0.25, 0.5, 1, 2))


def test_every_stage_comes_to_one_resolution_by_the_layer_of_its_stride():
    params, state = second_fpn.init(CONFIG, torch.Generator().manual_seed(0))
    maps = [torch.randn(1, c, 16 // 2**i, 32 // 2**i) for i, c in enumerate(CONFIG.channels_in)]
    y, _ = second_fpn.apply(params, state, maps, config=CONFIG, train=False)
    assert y.shape == (1, 8, 4, 8)
    weights = [block["conv"]["weight"] for block in params["blocks"]]
    raw = [
        F.conv2d(maps[0], weights[0], stride=4), F.conv2d(maps[1], weights[1], stride=2), F.conv2d(maps[2], weights[2]),
        F.conv_transpose2d(maps[3], weights[3], stride=2),
    ]  # fmt: skip
    # statistics at their start: mean 0, variance 1, eps 1e-3
    torch.testing.assert_close(y, torch.cat(raw, 1).relu() / 1.001**0.5)


def test_a_transposed_convolution_of_size_1_is_the_1x1_with_its_weight_transposed():
    weight, x = torch.randn(5, 2, 1, 1), torch.randn(1, 5, 3, 4)
    torch.testing.assert_close(F.conv_transpose2d(x, weight), F.conv2d(x, weight.transpose(0, 1)))


def test_published_start_counts_the_inputs_of_transposed_convolutions():
    wide = second_fpn.Config(channels_in=(64, 64), channels=(512, 512), strides=(1, 2), kaiming_normal=True)
    params, _ = second_fpn.init(wide, torch.Generator().manual_seed(0))
    one, two = (block["conv"]["weight"] for block in params["blocks"])
    assert one.shape == (512, 64, 1, 1) and float(one.std()) == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert two.shape == (64, 512, 2, 2) and float(two.std()) == pytest.approx((2 / 256) ** 0.5, rel=0.05)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must name the same stages"):
        second_fpn.Config(channels_in=(3,), channels=(2, 2))
    with pytest.raises(ValueError, match="whole numbers"):
        second_fpn.Config(strides=(1, 1.5))
