"""Depth net, depth supervision and the frustum over the BEV grid."""

import math
from dataclasses import replace

import pytest
import small_cameras
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bevfn.views import camera_grid, depth_aggregation, depth_net

GRID = camera_grid.Config(
    image_size=(32, 96), depth_m=(2.0, 34.0, 4.0), x_m=(-16.0, 16.0, 1.0), y_m=(-12.0, 12.0, 1.5), z_m=(-5.0, 3.0, 8.0)
)
NET = depth_net.Config(channels_in=12, channels=8, context=5, depth_bins=8, blocks=1, dilations=(1, 2), weight_groups=2)


def scalar_label(block, low, high, step):
    """The bin of one feature pixel by the published rule, in Python."""
    hits = [d for d in block if d != 0]
    if not hits:
        return -1
    place = (min(hits) - (low - step)) / step
    return int(place) - 1 if 0 <= place < round((high - low) / step) + 1 else -1


@given(st.lists(st.sampled_from([0.0, 0.5, 1.49, 1.5, 2.0, 2.5, 7.75, 57.99, 58.0, 70.0]), min_size=16, max_size=16))
@settings(max_examples=50)
def test_labels_are_the_nearest_points_bin(depths):
    depth = torch.tensor(depths).view(1, 4, 4)
    labels = depth_net.depth_labels(depth, (2.0, 58.0, 0.5), 2)
    for r in range(2):
        for c in range(2):
            block = depth[0, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten().tolist()
            assert int(labels[0, r, c]) == scalar_label(block, 2.0, 58.0, 0.5)


def test_depth_loss_is_torchs_cross_entropy_over_labelled_pixels_with_its_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(2, 8, 3, 4, generator=generator)  # saturated: probabilities of 0 and 1 are among them
    labels = torch.randint(-1, 8, (2, 3, 4), generator=generator)

    def published(logits):
        p = logits.softmax(1).permute(0, 2, 3, 1).reshape(-1, 8)
        known = labels.flatten() >= 0
        target = F.one_hot(labels.flatten()[known], 8).float()
        return 3.0 * F.binary_cross_entropy(p[known], target, reduction="sum") / known.sum()

    ours, theirs = (
        torch.func.grad_and_value(f)(logits) for f in (lambda x: depth_net.depth_loss(x.softmax(1), labels), published)
    )
    torch.testing.assert_close(ours[1], theirs[1])
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=1e-5)


def test_no_label_means_no_loss_and_nan_does_not_abort():
    logits = torch.zeros(1, 8, 2, 2)
    assert float(depth_net.depth_loss(logits.softmax(1), torch.full((1, 2, 2), -1))) == 0
    assert math.isnan(
        float(depth_net.depth_loss(logits.softmax(1) * torch.nan, torch.zeros(1, 2, 2, dtype=torch.int64)))
    )


def test_camera_vectors_are_the_key_frames():
    batch = small_cameras.make()
    vectors = depth_net.camera_vectors(batch)
    assert vectors.shape == (4, depth_net.CAMERA_NUMBERS)
    K, pose = batch.intrinsics[0, 0, 1], batch.base_from_camera[0, 0, 1]
    assert vectors[1, :4].tolist() == [K[0, 0], K[1, 1], K[0, 2], K[1, 2]]
    assert vectors[1, 4:10].tolist() == [0.5, 0.0, 0.0, 0.0, 0.5, -2.0]
    assert vectors[1, 15:].tolist() == pose[:3].flatten().tolist()


def test_outputs_and_that_the_camera_gates_them():
    params, state = depth_net.init(NET, torch.Generator().manual_seed(0))
    x = torch.randn(4, 12, 2, 6, generator=torch.Generator().manual_seed(1))
    cameras = depth_net.camera_vectors(small_cameras.make())
    out, new = depth_net.apply(params, state, x, cameras, config=NET, train=True)
    assert out["logits"].shape == (4, 8, 2, 6) and out["context"].shape == (4, 5, 2, 6)
    assert set(new) == set(state)
    other, _ = depth_net.apply(params, state, x, cameras + torch.randn(4, 27), config=NET, train=True)
    assert not torch.equal(out["logits"], other["logits"]) and torch.equal(out["reduce"], other["reduce"])


def test_dropout_needs_a_key():
    params, state = depth_net.init(NET, torch.Generator().manual_seed(0))
    x, cameras = torch.randn(4, 12, 2, 6), depth_net.camera_vectors(small_cameras.make())
    with_key, _ = depth_net.apply(params, state, x, cameras, config=NET, train=True, key=torch.tensor(5))
    without, _ = depth_net.apply(params, state, x, cameras, config=NET, train=True)
    kept = with_key["aspp"] != 0
    torch.testing.assert_close(with_key["aspp"][kept], 2 * without["aspp"][kept])
    assert 0.3 < float((without["aspp"] != 0).float().mean() - kept.float().mean()) / float(
        (without["aspp"] != 0).float().mean()
    ) < 0.7  # fmt: skip


# ------------------------------------------------------------------------------------------------ frustum and grid


def test_cells_are_those_of_projected_points():
    """A cell's frustum point, taken back through the camera, is the pixel and depth that it came from."""
    batch = small_cameras.make(base_aug=small_cameras.yaw(0.3) @ torch.diag(torch.tensor([1.0, -1.0, 1.0, 1.0])))
    for t in range(2):
        x, y, z = camera_grid.frustum_points(batch, t, GRID)
        points = torch.stack([x, y, z, torch.ones_like(x)], -1)  # B N D H W 4
        back = torch.linalg.inv(batch.base_aug[:, None] @ batch.base_from_camera[:, t])[:, :, None, None, None]
        camera = (back @ points[..., None])[..., 0]
        pixel = (batch.intrinsics[:, t][:, :, None, None, None] @ camera[..., None])[..., 0]
        torch.testing.assert_close(
            pixel[..., 2], torch.arange(2.0, 34.0, 4.0)[:, None, None].expand_as(x), atol=1e-3, rtol=0
        )
        pixel = torch.cat([pixel[..., :2] / pixel[..., 2:3], pixel[..., 2:]], -1)
        shown = (batch.image_aug[:, t][:, :, None, None, None] @ pixel[..., None])[..., 0]
        torch.testing.assert_close(shown[0, 0, 0, :, :, 0], torch.linspace(0, 95, 6).expand(2, 6), atol=1e-2, rtol=0)
        torch.testing.assert_close(
            shown[0, 0, 0, :, :, 1], torch.linspace(0, 31, 2)[:, None].expand(2, 6), atol=1e-2, rtol=0
        )


def test_pool_puts_rows_at_y_and_columns_at_x():
    batch = small_cameras.make()
    cell = camera_grid.cells(batch, 0, GRID)  # B N D H W
    x, y, _ = camera_grid.frustum_points(batch, 0, GRID)
    depth = torch.rand(4, 8, 2, 6)
    context = torch.randn(4, 3, 2, 6)
    bev = camera_grid.pool(depth, context, cell, GRID)
    assert bev.shape == (2, 3, 16, 32)
    expected = torch.zeros_like(bev)
    for b, n, d, h, w in (cell >= 0).nonzero().tolist():
        row, column = int((y[b, n, d, h, w] + 12.0) / 1.5), int(x[b, n, d, h, w] + 16.0)
        expected[b, :, row, column] += depth[2 * b + n, d, h, w] * context[2 * b + n, :, h, w]
    torch.testing.assert_close(bev, expected, atol=1e-5, rtol=1e-5)
    volume = depth[:, None] * context[:, :, None]  # M C D H W
    torch.testing.assert_close(camera_grid.pool_volume(volume, cell, GRID), expected, atol=1e-5, rtol=1e-5)


def test_rows_are_x_where_the_grid_says_so_and_floor_leaves_out_what_lies_below():
    batch = small_cameras.make()
    y_first = camera_grid.cells(batch, 0, GRID)
    x_first = camera_grid.cells(batch, 0, replace(GRID, rows="x"))
    (b, row, column), inside = ((y_first // 512, y_first % 512 // 32, y_first % 32), y_first >= 0)
    assert replace(GRID, rows="x").cells == (32, 16) == GRID.cells[::-1]
    assert torch.equal(x_first, torch.where(inside, (b * 32 + column) * 16 + row, -1).to(torch.int32))
    high = replace(GRID, z_m=(1.0, 9.0, 8.0))  # some points lie below it, by less than a cell
    truncated, floored = (
        camera_grid.cells(batch, 0, replace(high, truncate_toward_zero=rule)) for rule in (True, False)
    )
    point = camera_grid.frustum_points(batch, 0, high)
    below = torch.stack(torch.broadcast_tensors(*(p < low for p, low in zip(point, (-16.0, -12.0, 1.0))))).any(0)
    assert bool((below & (truncated >= 0)).any()) and torch.equal(floored, torch.where(below, -1, truncated))


def test_depth_aggregation_moves_mass_along_rows_only():
    params, state = depth_aggregation.init(3, torch.Generator().manual_seed(0))
    depth, context = torch.rand(2, 4, 3, 5), torch.randn(2, 3, 3, 5)
    one, _ = depth_aggregation.apply(params, state, depth, context, train=False)
    assert one.shape == (2, 3, 4, 3, 5)
    context[0, :, 1] += 1.0  # image row 1
    two, _ = depth_aggregation.apply(params, state, depth, context, train=False)
    changed = (one != two).any(4).any(2).any(1)  # M H
    assert changed.tolist() == [[False, True, False], [False, False, False]]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_size", (30, 96), "multiples of the feature's stride"),
        ("x_m", (0.0, 10.0, 0.3), "whole number of steps"),
        ("z_m", (-5.0, 3.0, 4.0), "must hold one cell"),
        ("depth_m", (3.0, 2.0, 0.5), "low < high"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        camera_grid.Config(**{**vars(GRID), field: value})


def test_second_derivatives_of_the_depth_loss_are_those_of_finite_differences():
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(1, 3, 1, 2, generator=g), torch.tensor([[[0, 2]]])
    slope = torch.func.grad(lambda x: depth_net.depth_loss(x.softmax(1), labels))
    steps = torch.eye(6).view(6, *logits.shape) * 1e-2
    columns = [(slope(logits + step) - slope(logits - step)) / 2e-2 for step in steps]
    expected = torch.stack(columns, -1).view(*logits.shape, *logits.shape)
    for hessian in (torch.func.hessian(lambda x: depth_net.depth_loss(x.softmax(1), labels)), torch.func.jacrev(slope)):
        torch.testing.assert_close(hessian(logits), expected, rtol=1e-2, atol=1e-2)
    saturated = torch.func.hessian(lambda x: depth_net.depth_loss(x.softmax(1), labels))(logits * 1000)
    assert torch.isfinite(saturated).all()
