"""The sparse encoder against a dense encoder on a small grid, and its static shapes."""

import torch
import torch.nn.functional as F

from bevfn import tree
from bevfn.backbones import sparse_encoder

CONFIG = sparse_encoder.Config(
    channels_in=3, channels=(4, 6, 8, 8), channels_out=8, blocks=1, capacities=(600, 500, 300, 200)
)
GRID = (16, 16, 41)


def voxels(seed, count, capacity, B=1):
    generator = torch.Generator().manual_seed(seed)
    coords = torch.full((B, capacity, 3), -1, dtype=torch.int32)
    for b in range(B):
        cells = torch.randperm(GRID[0] * GRID[1] * 40, generator=generator)[:count]
        x, y, z = cells // (GRID[1] * 40), cells // 40 % GRID[1], cells % 40
        coords[b, :count] = torch.stack([x, y, z], 1).int()
    features = torch.randn(B, capacity, 3, generator=generator)
    valid = (torch.arange(capacity) < count).expand(B, -1)
    return features * valid[..., None], coords, valid


def dense_encoder(params, features, coords, valid):
    """The same mathematics with conv3d over the whole grid and explicit masks, evaluation mode."""
    x = torch.zeros(1, 3, *GRID)
    mask = torch.zeros(1, 1, *GRID)
    at = coords[0][valid[0]].long()
    x[0, :, at[:, 0], at[:, 1], at[:, 2]] = features[0][valid[0]].T
    mask[0, 0, at[:, 0], at[:, 1], at[:, 2]] = 1

    def weight(layer):
        return layer["weight"].permute(4, 3, 0, 1, 2)

    def norm(layer, x):
        scale = (layer["weight"] / (1 + CONFIG.norm_eps) ** 0.5).view(1, -1, 1, 1, 1)
        return x * scale + layer["bias"].view(1, -1, 1, 1, 1)

    def subm(layer, n, x):
        return norm(n, F.conv3d(x, weight(layer), padding=1)) * mask

    x = F.relu(subm(params["conv_input"]["conv"], params["conv_input"]["norm"], x))
    for level, stage in enumerate(params["stages"]):
        for block in stage["blocks"]:
            y = F.relu(subm(block["conv1"], block["norm1"], x))
            x = F.relu(subm(block["conv2"], block["norm2"], y) + x)
        if "down" in stage:
            padding = CONFIG.paddings[level]
            mask = (F.conv3d(mask, torch.ones(1, 1, 3, 3, 3), stride=2, padding=padding) > 0).float()
            down = F.conv3d(x, weight(stage["down"]["conv"]), stride=2, padding=padding)
            x = F.relu(norm(stage["down"]["norm"], down)) * mask
    mask = (F.conv3d(mask, torch.ones(1, 1, 1, 1, 3), stride=(1, 1, 2)) > 0).float()
    out = F.conv3d(x, weight(params["conv_out"]["conv"]), stride=(1, 1, 2))
    x = F.relu(norm(params["conv_out"]["norm"], out)) * mask  # 1 C X Y Z
    return x.permute(0, 1, 4, 2, 3).flatten(1, 2)  # 1 C*Z X Y


def test_sparse_encoder_equals_a_dense_one():
    params, state = sparse_encoder.init(CONFIG, torch.Generator().manual_seed(0))
    inputs = voxels(1, 60, 100)
    outputs, _ = sparse_encoder.apply(params, state, *inputs, config=CONFIG, grid=GRID, train=False)
    expected = dense_encoder(params, *inputs)
    assert outputs["bev"].shape == expected.shape
    torch.testing.assert_close(outputs["bev"], expected, atol=1e-5, rtol=1e-4)
    assert all(int(v) == 0 for v in outputs["overflow"].values())


def test_padding_does_not_change_the_result_or_the_statistics():
    params, state = sparse_encoder.init(CONFIG, torch.Generator().manual_seed(0))
    tight, loose = voxels(2, 50, 50), voxels(2, 50, 50)
    loose = tuple(F.pad(t, (0, 0, 0, 40) if t.dim() == 3 else (0, 40)) for t in loose)
    a, state_a = sparse_encoder.apply(params, state, *tight, config=CONFIG, grid=GRID, train=True)
    b, state_b = sparse_encoder.apply(params, state, *loose, config=CONFIG, grid=GRID, train=True)
    torch.testing.assert_close(a["bev"], b["bev"])
    torch.testing.assert_close(tree.flatten(state_a), tree.flatten(state_b))


def test_samples_of_a_batch_do_not_see_each_other_in_evaluation():
    params, state = sparse_encoder.init(CONFIG, torch.Generator().manual_seed(0))
    features, coords, valid = voxels(3, 40, 60, B=2)
    both, _ = sparse_encoder.apply(params, state, features, coords, valid, config=CONFIG, grid=GRID, train=False)
    for b in range(2):
        alone, _ = sparse_encoder.apply(
            params,
            state,
            features[b : b + 1],
            coords[b : b + 1],
            valid[b : b + 1],
            config=CONFIG,
            grid=GRID,
            train=False,
        )
        torch.testing.assert_close(both["bev"][b : b + 1], alone["bev"], atol=1e-6, rtol=1e-5)


def test_overflow_of_a_level_is_counted_and_the_rest_still_encoded():
    small = sparse_encoder.Config(
        channels_in=3, channels=(4, 6, 8, 8), channels_out=8, blocks=1, capacities=(20, 500, 300, 200)
    )
    params, state = sparse_encoder.init(small, torch.Generator().manual_seed(0))
    outputs, _ = sparse_encoder.apply(params, state, *voxels(1, 60, 100), config=small, grid=GRID, train=False)
    assert int(outputs["overflow"]["voxels_l1"]) > 0
    assert torch.isfinite(outputs["bev"]).all()


def test_no_voxels_at_all_give_an_empty_map_and_finite_statistics():
    params, state = sparse_encoder.init(CONFIG, torch.Generator().manual_seed(0))
    outputs, new = sparse_encoder.apply(params, state, *voxels(1, 0, 30), config=CONFIG, grid=GRID, train=True)
    assert (outputs["bev"] == 0).all()
    assert all(torch.isfinite(leaf).all() for leaf in tree.leaves(new))


def test_a_config_with_too_few_capacities_is_refused():
    try:
        sparse_encoder.Config(capacities=(1, 2))
    except ValueError as error:
        assert "4 capacities" in str(error)
    else:
        raise AssertionError("accepted")
