"""boxes: corner order, yaw limits, and rotated overlap against an independent polygon clipper (shapely)."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from shapely.geometry import Polygon

from bevfn import boxes

GOLDEN = Path(__file__).parents[1].parent / "shared" / "goldens" / "bevfusion_lidar"


def box(x=0.0, y=0.0, z=0.0, dx=4.0, dy=2.0, dz=1.5, yaw=0.0, dtype=torch.float32):
    return torch.tensor([[x, y, z, dx, dy, dz, yaw]], dtype=dtype)


def random_boxes(count, *, seed, spread=2.0, smallest=0.1, largest=8.0, center=(40.0, -30.0)):
    generator = torch.Generator().manual_seed(seed)
    position = torch.randn(count, 3, generator=generator) * torch.tensor([spread, spread, 0.5])
    size = torch.rand(count, 3, generator=generator) * (largest - smallest) + smallest
    yaw = (torch.rand(count, 1, generator=generator) - 0.5) * 20
    return torch.cat([position + torch.tensor([*center, 0.0]), size, yaw], dim=1)


def clipped_areas(a, b):
    """Overlap areas by shapely, float64 [Q G]; on a grid, since GEOS may find nothing where edges all but coincide."""
    first, second = ([Polygon(p.tolist()) for p in boxes.bev_corners(x.double())] for x in (a, b))
    return torch.tensor([[p.intersection(q, grid_size=1e-12).area for q in second] for p in first], dtype=torch.float64)


def smaller_area(a, b):
    return torch.minimum((a[:, 3] * a[:, 4])[:, None], (b[:, 3] * b[:, 4])[None])


def test_corners_run_counter_clockwise_from_front_left_bottom_before_top():
    expected = [[2, 1], [-2, 1], [-2, -1], [2, -1]]
    torch.testing.assert_close(boxes.bev_corners(box())[0], torch.tensor(expected).float())
    solid = boxes.corners(box(x=10.0, z=-1.0, yaw=math.pi / 2))[0]
    turned = torch.tensor([[9.0, 2.0], [9.0, -2.0], [11.0, -2.0], [11.0, 2.0]])  # front (dx) now points to +y
    torch.testing.assert_close(solid[:, :2], turned.repeat(2, 1))
    torch.testing.assert_close(solid[:, 2], torch.tensor([-1.0] * 4 + [0.5] * 4))


def test_corners_take_any_leading_axes_and_more_columns():
    many = torch.rand(2, 3, 5, 9)
    assert boxes.bev_corners(many).shape == (2, 3, 5, 4, 2)
    torch.testing.assert_close(boxes.corners(many)[1, 2, 4], boxes.corners(many[1, 2, 4, :7]))


@given(st.floats(-50, 50, width=32))
def test_limited_yaw_is_the_same_direction_inside_the_half_open_circle(yaw):
    limited = boxes.limit_yaw(torch.tensor(yaw))
    assert -math.pi - 1e-6 <= limited < math.pi
    assert math.cos(limited.item() - yaw) > 1 - 1e-9


def test_limited_yaw_excludes_pi_and_keeps_what_is_inside():
    pi = torch.tensor(math.pi)
    assert boxes.limit_yaw(torch.stack([pi, 3 * pi, -pi])).lt(0).all()
    inside = torch.linspace(-3.14, 3.14, 100)
    assert torch.equal(boxes.limit_yaw(inside), inside)


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.0, 0.5, 2.0, 6.0]), like=st.booleans())
def test_overlap_equals_polygon_clipping(seed, spread, like):
    limits = {"smallest": 1.0, "largest": 5.0} if like else {}
    a, b = (random_boxes(12, seed=seed + i, spread=spread, **limits) for i in range(2))
    expected = clipped_areas(a, b)
    torch.testing.assert_close(boxes.rotated_overlap_bev(a.double(), b.double()), expected, rtol=1e-11, atol=1e-11)
    error = (boxes.rotated_overlap_bev(a, b) - expected).abs() / smaller_area(a, b)
    # The clip window is off by the rounding of the centre distance, which weighs more the smaller the box.
    assert error.max() < (3e-6 if like else 3e-5)


@settings(max_examples=60)
@given(
    first=st.tuples(*[st.integers(-3, 3)] * 2, *[st.integers(1, 4)] * 2, st.integers(-4, 4)),
    second=st.tuples(*[st.integers(-3, 3)] * 2, *[st.integers(1, 4)] * 2, st.integers(-4, 4)),
)
def test_overlap_is_right_when_edges_and_corners_coincide(first, second):
    a, b = (box(x=v[0] / 2, y=v[1] / 2, dx=v[2], dy=v[3], yaw=v[4] * math.pi / 4) for v in (first, second))
    expected = clipped_areas(a, b)
    assert (boxes.rotated_overlap_bev(a, b) - expected).abs().max() < 5e-6
    assert (boxes.rotated_overlap_bev(a.double(), b.double()) - expected).abs().max() < 1e-8


@settings(max_examples=60)
@given(st.floats(-3.0, 3.0, width=32), st.sampled_from([1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12, 1e-38]))
def test_overlap_of_nearly_coincident_boxes_is_nearly_the_area(yaw, nudge):
    a = box(x=20.0, y=-7.0, dx=4.5, dy=1.9, yaw=yaw)
    b = a + nudge * torch.tensor([1.0, -1.0, 0, 1.0, 0, 0, 1.0])
    overlap = boxes.rotated_overlap_bev(a, b).item()
    assert abs(overlap - 4.5 * 1.9) < 4e-5 + 10 * nudge


def test_overlap_is_symmetric_and_unchanged_by_moving_both():
    a, b = random_boxes(40, seed=1, center=(0, 0)), random_boxes(50, seed=2, center=(0, 0))
    overlap = boxes.rotated_overlap_bev(a, b)
    torch.testing.assert_close(boxes.rotated_overlap_bev(b, a).T, overlap, rtol=1e-5, atol=1e-5)
    angle = 0.7
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    moved = [torch.cat([x[:, :2] @ turn.T + 5, x[:, 2:6], x[:, 6:] + angle], dim=1) for x in (a, b)]
    torch.testing.assert_close(boxes.rotated_overlap_bev(*moved), overlap, rtol=1e-5, atol=3e-5)


@settings(max_examples=40)
@given(
    center=st.tuples(*[st.sampled_from([0.0, 0.5, -3.0, 51.3, 1e3])] * 2),
    gap=st.tuples(*[st.sampled_from([0.0, 1e-4, 0.25, 1.0, 2.0, 40.0])] * 2),
    size=st.tuples(*[st.sampled_from([0.01, 0.4, 1.0, 2.0, 12.0])] * 4),
    yaw=st.tuples(*[st.one_of(st.floats(-4, 4, width=32), st.integers(-2, 2).map(lambda k: k * math.pi / 2))] * 2),
)
def test_iou_from_above_equals_polygon_clipping(center, gap, size, yaw):
    """Also of rectangles that coincide, touch, contain one another, are turned by 90 degrees, tiny, or far away."""
    a = box(x=center[0], y=center[1], dx=size[0], dy=size[1], yaw=yaw[0])
    b = box(x=center[0] + gap[0], y=center[1] + gap[1], dx=size[2], dy=size[3], yaw=yaw[1])
    shared = clipped_areas(a, b).item()
    expected = shared / (size[0] * size[1] + size[2] * size[3] - shared)
    # rounding of the distance weighs more the smaller a box
    assert boxes.iou_bev(a, b).item() == pytest.approx(expected, abs=1e-4 if min(size) < 0.1 else 1e-5)
    assert boxes.iou_bev(b, a).item() == pytest.approx(boxes.iou_bev(a, b).item(), abs=1e-5)


@pytest.mark.parametrize("yaw", [0.0, 0.3, math.pi / 2, -2.0])
def test_identical_boxes_have_iou_one(yaw):
    a = box(x=51.3, y=-48.7, z=-1.1, dx=4.63, dy=1.97, dz=1.74, yaw=yaw)
    assert boxes.iou_3d(a, a).item() == boxes.iou_bev(a, a).item() == 1.0
    turned = a + torch.tensor([0, 0, 0, 0, 0, 0, 2 * math.pi])
    assert boxes.iou_3d(a, turned).item() == pytest.approx(1.0, abs=2e-6)


@pytest.mark.parametrize("step", [{"x": 4.0}, {"y": 2.0}, {"x": 4.0, "y": 2.0}, {"z": 1.5}, {"z": -1.5}])
def test_touching_boxes_have_iou_zero(step):
    assert boxes.iou_3d(box(), box(**step)).item() == 0.0
    turned = {"x": math.cos(0.4) * step.get("x", 0) - math.sin(0.4) * step.get("y", 0), "z": step.get("z", 0.0)}
    turned["y"] = math.sin(0.4) * step.get("x", 0) + math.cos(0.4) * step.get("y", 0)
    assert boxes.iou_3d(box(yaw=0.4), box(**turned, yaw=0.4)).item() < 1e-6


def test_a_box_inside_another_counts_whole():
    inner, outer = box(x=3.0, z=1.0, dx=1.0, dy=0.5, dz=0.25, yaw=0.8), box(dx=10.0, dy=6.0, dz=4.0, yaw=0.1)
    assert boxes.rotated_overlap_bev(inner, outer).item() == pytest.approx(0.5, rel=1e-6)
    assert boxes.rotated_overlap_bev(outer, inner).item() == pytest.approx(0.5, rel=1e-6)
    assert boxes.iou_3d(outer, inner).item() == pytest.approx(0.125 / 240, rel=2e-6)


def test_height_counts_from_the_bottom_centre():
    assert boxes.iou_3d(box(dz=2.0), box(z=1.0, dz=2.0)).item() == pytest.approx(1 / 3)
    assert boxes.iou_3d(box(dz=4.0), box(z=1.0, dz=1.0)).item() == pytest.approx(1 / 4)


def test_degenerate_huge_and_undefined_boxes_never_give_nan():
    values = [0.0, -1.0, 1e-30, 1e-3, 3e4, 1e30, 3e38, math.inf, -math.inf, math.nan]
    strange = torch.tensor([[x, 1.0, 0.0, size, 2.0, 1.0, yaw] for x in values for size in values for yaw in values])
    ordinary = torch.cat([random_boxes(5, seed=0, center=(0, 0)), box()])
    for a, b in ((strange, ordinary), (ordinary, strange), (strange, strange.flip(0))):
        for result in (boxes.rotated_overlap_bev(a, b), boxes.iou_3d(a, b), boxes.iou_bev(a, b)):
            assert result.isfinite().all() and (result >= 0).all()
        assert boxes.iou_3d(a, b).max() <= 1 and boxes.iou_bev(a, b).max() <= 1
    for flat in ({"dx": 0.0}, {"dy": 0.0}, {"dz": 0.0}, {"dx": -3.0}):
        assert boxes.iou_3d(box(**flat), box()).item() == boxes.iou_3d(box(**flat), box(**flat)).item() == 0.0
    assert boxes.iou_3d(box(dx=1e9, dy=1e9, dz=1e9), box(dx=1e9, dy=1e9, dz=1e9)).item() == pytest.approx(1.0)


def test_half_precision_boxes_are_compared_in_float32():
    a = random_boxes(6, seed=3, center=(0, 0)).half()
    assert boxes.iou_3d(a, a).dtype == torch.float32
    torch.testing.assert_close(boxes.iou_3d(a, a), boxes.iou_3d(a.float(), a.float()))


def test_gradient_is_finite_where_boxes_coincide_or_vanish():
    a = torch.cat([box(), box(dx=0.0), random_boxes(4, seed=4, center=(0, 0))])
    grad = torch.func.grad(lambda x: boxes.iou_3d(x, a).sum())(a)
    assert grad.isfinite().all()


def test_compiled_whole_it_equals_eager_with_batch_axes():
    a = random_boxes(24, seed=5).view(2, 12, 7)
    b = torch.cat([random_boxes(18, seed=6), torch.zeros(18, 2)], dim=1).view(2, 9, 9)
    iou = torch.compile(boxes.iou_3d, fullgraph=True, backend="aot_eager")(a, b)
    assert iou.shape == (2, 12, 9)
    assert torch.equal(iou, boxes.iou_3d(a, b))
    torch.testing.assert_close(iou[1], boxes.iou_3d(a[1], b[1]))


def test_iou_reproduces_the_matching_cost_and_matched_ious_of_mmdetection3d():
    if not GOLDEN.exists():
        pytest.skip(f"golden case {GOLDEN} is not there")
    given_, expected = load_file(GOLDEN / "inputs.safetensors"), load_file(GOLDEN / "outputs.safetensors")
    center, height, log_size, rotation = (given_[f"unit/{name}"][0] for name in ("center", "height", "dim", "rot"))
    size = log_size.exp()
    yaw = torch.atan2(rotation[:1], rotation[1:])
    predicted = torch.cat([center * 0.6 - 54, height - size[2:] / 2, size, yaw]).T  # 200 7
    truth, labels = given_["gt_boxes"], given_["gt_labels"].long()
    iou = boxes.iou_3d(predicted, truth)  # 200 52

    p = given_["unit/heatmap"][0].sigmoid().T[:, labels]
    negative, positive = -(1 - p + 1e-12).log() * 0.75 * p**2, -(p + 1e-12).log() * 0.25 * (1 - p) ** 2
    distance = (predicted[:, None, :2] - truth[None, :, :2]).abs().sum(-1) / 108
    cost = 0.15 * (positive - negative) + 0.25 * distance - 0.25 * iou
    assert (cost - expected["unit/cost"]).abs().max() < 5e-7  # measured 7.5e-8
    match = expected["unit/match"].long()
    assert iou[match[:, 0], match[:, 1]].mean().item() == pytest.approx(0.367156, abs=2e-6)
