"""BEVNeXt's two necks: against torch's own layers."""

import torch
import torch.nn.functional as F

from bevfn import tree
from bevfn.necks import fpn, fpn_lss


def test_the_pyramids_finest_level_equals_torchs_layers():
    config = fpn.Config(channels_in=(4, 6, 8), channels=5)
    params = fpn.init(config, torch.Generator().manual_seed(0))
    assert all((layer["bias"] == 0).all() for layer in (*params["laterals"], params["out"]))
    bound = (6 / ((5 + 8) * 1)) ** 0.5
    assert 0.5 * bound < float(params["laterals"][2]["weight"].abs().max()) <= bound
    params = tree.map(lambda leaf: leaf + 0.1, params)
    features = [torch.randn(2, c, 8 // 2**i, 12 // 2**i) for i, c in enumerate(config.channels_in)]
    top = None
    for layer, feature in zip(reversed(params["laterals"]), reversed(features)):
        side = F.conv2d(feature, layer["weight"], layer["bias"])
        top = side if top is None else side + F.interpolate(top, feature.shape[-2:], mode="nearest")
    expected = F.conv2d(top, params["out"]["weight"], params["out"]["bias"], padding=1)
    torch.testing.assert_close(fpn.apply(params, features), expected, atol=1e-5, rtol=1e-4)


def test_the_bev_neck_equals_torchs_layers():
    config = fpn_lss.Config(channels_in=(4, 6), channels=8, channels_out=5)
    params, state = fpn_lss.init(config, torch.Generator().manual_seed(0))
    fine, coarse = torch.randn(2, 4, 8, 12), torch.randn(2, 6, 2, 3)
    y, new = fpn_lss.apply(params, state, fine, coarse, config=config, train=True)

    def layer(part, x):
        x = F.conv2d(x, part["conv"]["weight"], padding=1)
        return F.batch_norm(x, None, None, training=True).relu()

    def up(x, factor):
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=True)

    x = layer(params["merge"][1], layer(params["merge"][0], torch.cat([fine, up(coarse, 4)], 1)))
    x = layer(params["up"], up(x, 2))
    expected = F.conv2d(x, params["out"]["weight"], params["out"]["bias"])
    assert y.shape == (2, 5, 16, 24)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    assert tree.diff(new, state) == [] and not torch.equal(new["up"]["norm"]["mean"], state["up"]["norm"]["mean"])
