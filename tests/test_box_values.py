"""Distances and overlaps of upright boxes: areas known by hand, symmetry, and what a turn or a height changes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bevfn.evaluation import box_values
from bevfn.evaluation.matching import assign


def box(x: float = 0, y: float = 0, z: float = 0, l: float = 4, w: float = 2, h: float = 1.5, yaw: float = 0):
    return np.array([[x, y, z, l, w, h, yaw]], dtype=np.float64)


@st.composite
def some(draw) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 5))
    place, size = rng.uniform(-4, 4, (count, 3)), rng.uniform(0.5, 5, (count, 3))
    return np.concatenate([place, size, rng.uniform(-4, 4, (count, 1))], axis=1)


def test_footprints_overlap_as_geometry_says():
    square = box(l=1, w=1)
    assert box_values.overlap(square, box(l=1, w=1, yaw=math.pi / 4)) == pytest.approx(2 * (math.sqrt(2) - 1))
    assert box_values.overlap(box(), box(x=3, y=1)) == pytest.approx(1.0)
    assert box_values.overlap(box(), box(x=4)) == 0.0 and box_values.overlap(box(), box(x=90)) == 0.0
    assert box_values.overlap(box(), box(yaw=math.pi / 2)) == pytest.approx(4.0)
    assert box_values.iou_bev(box(), box(x=2)) == pytest.approx(1 / 3)
    assert box_values.iou_3d(box(), box(z=0.75)) == pytest.approx(1 / 3)
    assert box_values.iou_3d(box(), box(z=1.5)) == 0.0


def test_boxes_without_area_share_nothing():
    assert box_values.iou_bev(box(l=0), box(l=0)) == 0.0 and box_values.iou_3d(box(h=0), box(h=0)) == 0.0


@given(some(), some())
@settings(max_examples=50)
def test_overlaps_are_symmetric_between_0_and_1_and_a_box_is_like_itself(first, second):
    for value in (box_values.iou_bev, box_values.iou_3d):
        ours = value(first, second)
        np.testing.assert_allclose(ours, value(second, first).T, atol=1e-9)
        assert (ours >= 0).all() and (ours <= 1).all()
        np.testing.assert_allclose(np.diag(value(first, first)), 1.0, atol=1e-9)
    turned = first.copy()
    turned[:, 6] += math.pi  # a footprint has no front
    np.testing.assert_allclose(box_values.iou_bev(turned, second), box_values.iou_bev(first, second), atol=1e-9)


@given(some(), some())
@settings(max_examples=50)
def test_distances_are_those_of_their_points(first, second):
    np.testing.assert_allclose(
        box_values.centre_distance(first, second) ** 2,
        box_values.centre_distance_bev(first, second) ** 2 + (first[:, None, 2] - second[:, 2]) ** 2,
    )
    for pairing in ("aligned", "indexed"):
        np.testing.assert_allclose(np.diag(box_values.plane_distance(first, first, pairing)), 0.0, atol=1e-9)
        shifted = first + np.array([0.3, -0.4, 9, 0, 0, 0, 0])
        np.testing.assert_allclose(np.diag(box_values.plane_distance(shifted, first, pairing)), 0.5, atol=1e-9)


def test_plane_distance_looks_at_the_corners_nearest_to_the_vehicle():
    near = box(x=10)
    assert box_values.plane_distance(box(x=10.5, l=5), near) == pytest.approx(0.0)  # longer, but to the back
    assert box_values.plane_distance(box(x=9.5, l=5), near) == pytest.approx(1.0)
    assert box_values.plane_distance(box(x=10, yaw=math.pi), near, "indexed") == pytest.approx(0.0)
    quarter = box(x=10, l=2, w=2, yaw=1.5), box(x=10, l=2, w=2)
    assert box_values.plane_distance(*quarter, "aligned") < 0.2 < 1.9 < box_values.plane_distance(*quarter, "indexed")


def test_corners_start_front_left_and_go_counter_clockwise():
    np.testing.assert_allclose(box_values.corners(box(x=1))[0], [[3, 1], [-1, 1], [-1, -1], [3, -1]])
    np.testing.assert_allclose(box_values.corners(box(yaw=math.pi / 2))[0, 0], [-1, 2], atol=1e-12)


def test_nothing_has_no_values():
    none = np.zeros((0, 7))
    for value in (box_values.centre_distance, box_values.plane_distance, box_values.iou_bev, box_values.iou_3d):
        assert value(none, box()).shape == (0, 1) and value(box(), none).shape == (1, 0)


def test_what_costs_the_limit_or_nothing_known_is_no_match():
    cost = np.array([[1.0, np.nan], [0.5, 0.2], [0.1, 0.6]])
    assert assign(cost, 1.0).tolist() == [-1, 1, 0]
    assert assign(cost, 0.15).tolist() == [-1, -1, 0]
    assert assign(np.zeros((2, 0)), 1.0).tolist() == [-1, -1] and assign(np.zeros((0, 2)), 1.0).tolist() == []
    assert assign(np.array([[0.3, 0.3]]), 1.0).tolist() == [0]  # the first of equals
