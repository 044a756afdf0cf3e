"""Res2Fusion: against torch's own layers written out, and the order in which frames enter."""

import pytest
import torch
import torch.nn.functional as F

from bevfn import tree
from bevfn.backbones import res2_fusion

CONFIG = res2_fusion.Config(frames=6, context=16, group_width=4, blocks=(2, 1))


@pytest.fixture
def weights():
    """Parameters and statistics that differ from channel to channel."""
    params, state = res2_fusion.init(CONFIG, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)

    def moved(leaf):
        return leaf + 0.3 * torch.rand(leaf.shape, generator=generator)

    return params, tree.map(moved, state)


def layer(params, state, x, *, relu=True, **how):
    x = F.conv2d(x, params["conv"]["weight"], padding=params["conv"]["weight"].shape[-1] // 2, **how)
    norm, seen = params["norm"], state["norm"]
    x = F.batch_norm(x, seen["mean"], seen["var"], norm["weight"], norm["bias"])
    return x.relu() if relu else x


def block(params, state, x, stride):
    a, b, c, d = layer(params["reduce"], state["reduce"], x).chunk(4, 1)
    each = [lambda part, i=i: layer(params["scales"][i], state["scales"][i], part, stride=stride) for i in range(3)]
    if stride == 2:
        parts = [each[0](a), each[1](b), each[2](c), F.avg_pool2d(d, 3, 2, 1)]
        x = layer(params["shortcut"], state["shortcut"], F.avg_pool2d(x, 2, 2), relu=False)
    else:
        first = each[0](a)
        second = each[1](b + first)
        parts = [first, second, each[2](c + second), d]
    return (layer(params["expand"], state["expand"], torch.cat(parts, 1), relu=False) + x).relu()


def test_equals_torchs_layers_written_out(weights):
    params, state = weights
    x = torch.randn(2, 6 * 16, 16, 12, generator=torch.Generator().manual_seed(2))
    maps, new = res2_fusion.apply(params, state, x, config=CONFIG, train=False)
    fusion, seen = params["fusion"], state["fusion"]
    newest, middle, oldest = layer(fusion["reduce"], seen["reduce"], x, groups=3).chunk(3, 1)
    first = layer(fusion["scales"][0], seen["scales"][0], oldest)
    second = layer(fusion["scales"][1], seen["scales"][1], first + middle)
    fused = layer(fusion["expand"], seen["expand"], torch.cat([first, second, newest], 1))
    torch.testing.assert_close(maps[0], fused, atol=1e-5, rtol=1e-4)
    for s, blocks in enumerate(params["stages"]):
        y = maps[s]
        for i, weights_of in enumerate(blocks):
            y = block(weights_of, state["stages"][s][i], y, 2 if i == 0 else 1)
        torch.testing.assert_close(maps[s + 1], y, atol=1e-5, rtol=1e-4)
    assert [m.shape[1:] for m in maps] == [(16, 16, 12), (32, 8, 6), (64, 4, 3)]
    assert tree.diff(new, state) == []


def test_every_frame_counts_and_only_older_ones_meet_a_frames_3x3(weights):
    params, state = weights
    x = torch.randn(1, 6 * 16, 8, 8, generator=torch.Generator().manual_seed(2))

    def reduced(x):
        return res2_fusion.apply(params, state, x, config=CONFIG, train=False)[0][0]

    for t in range(6):
        changed = x.clone()
        changed[:, 16 * t, 4, 4] += 10.0
        moved = (reduced(changed) - reduced(x)).abs().sum(1)[0] > 1e-6
        reach = {0: 1, 1: 1, 2: 3, 3: 3, 4: 5, 5: 5}[
            t
        ]  # pixels across: no 3x3 for the newest group, two for the oldest
        assert moved[4, 4] and int(moved.any(0).sum()) <= reach, t


def test_gradients_reach_every_parameter():
    params, state = res2_fusion.init(CONFIG, torch.Generator().manual_seed(0))
    x = torch.randn(2, 6 * 16, 8, 8, generator=torch.Generator().manual_seed(2))

    def total(params):
        maps, new = res2_fusion.apply(params, state, x, config=CONFIG, train=True)
        return sum(m.square().sum() for m in maps), new

    gradient, new = torch.func.grad(total, has_aux=True)(params)
    assert all(float(g.abs().sum()) > 0 for g in tree.leaves(gradient))
    assert all(not torch.equal(a, b) for a, b in zip(tree.leaves(new), tree.leaves(state)))


def test_frames_that_make_no_groups_are_refused():
    with pytest.raises(ValueError, match="3 groups must be at least 2 and divide the 4 frames"):
        res2_fusion.Config(frames=4)
    with pytest.raises(ValueError, match="width_divisor 8 must divide"):
        res2_fusion.Config(context=6)
