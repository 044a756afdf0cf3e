"""Augmentations keep points, boxes, velocities and images consistent."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import small_frames
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from bevfn import boxes as shapes
from bevfn.data import augment, points

SHARED = Path(__file__).parents[1].parent / "shared"
SEED = st.integers(0, 2**32 - 1)
STILL = {"rotation": 0.0, "scale": (1.0, 1.0), "translation": 0.0, "flip_x": 0.0, "flip_y": 0.0}


def some_boxes(rng: np.random.Generator, count: int = 6) -> np.ndarray:
    lower, upper = [-50, -50, -3, 0.3, 0.3, 0.3, -4, -9, -9], [50, 50, 1, 12, 3, 4, 4, 9, 9]
    return rng.uniform(lower, upper, (count, 9)).astype(np.float32)


def drawn(seed: int, config: augment.Global | None = None) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return some_boxes(rng), augment.draw_matrix(config or augment.Global(), rng)


@given(SEED)
def test_corners_move_with_the_box(seed):
    boxes, matrix = drawn(seed)
    corners = shapes.corners(torch.from_numpy(boxes.astype(np.float64))).numpy()  # G 8 3
    expected = corners @ matrix[:3, :3].T.astype(np.float64) + matrix[:3, 3]
    found = shapes.corners(torch.from_numpy(augment.move_boxes(boxes, matrix).astype(np.float64))).numpy()
    distance = np.linalg.norm(expected[:, :, None] - found[:, None], axis=-1)  # G 8 8, mirrors change the order
    assert distance.min(axis=2).max() < 1e-4 and distance.min(axis=1).max() < 1e-4
    turned = augment.move_boxes(boxes, matrix)[:, 6]
    assert (turned >= -np.float32(np.pi)).all() and (turned < np.pi).all()


@given(SEED)
def test_a_point_inside_a_box_stays_inside(seed):
    boxes, matrix = drawn(seed)
    rng = np.random.default_rng(seed)
    moved = augment.move_boxes(boxes, matrix)
    for before, after in zip(boxes, moved):
        along, across, up = (rng.uniform([-0.49, -0.49, 0.01], [0.49, 0.49, 0.99], (50, 3)) * before[3:6]).T
        cos, sin = np.cos(before[6]), np.sin(before[6])
        inside = np.stack([cos * along - sin * across, sin * along + cos * across, up], axis=1) + before[:3]
        cloud = np.column_stack([inside, np.zeros((50, 2))]).astype(np.float32)
        assert len(points.in_box(cloud[:, :3].T.copy(), before)) == 50
        assert len(points.in_box(augment.move_points(cloud, matrix)[:, :3].T.copy(), after)) == 50


@given(SEED, st.floats(-2.0, 2.0))
def test_velocity_moves_the_augmented_box_as_it_moves_the_original(seed, dt):
    boxes, matrix = drawn(seed)
    later = boxes.copy()
    later[:, :2] += dt * boxes[:, 7:9]
    now = augment.move_boxes(boxes, matrix)
    now[:, :2] += dt * now[:, 7:9]
    np.testing.assert_allclose(now[:, :7], augment.move_boxes(later, matrix)[:, :7], atol=1e-4)


@pytest.mark.parametrize("flips, yaw", [((0.0, 1.0), -0.3), ((1.0, 0.0), math.pi - 0.3), ((1.0, 1.0), 0.3 - math.pi)])
def test_flips_follow_the_stated_yaw_rules(flips, yaw):
    flip_x, flip_y = flips
    config = augment.Global(**{**STILL, "flip_x": flip_x, "flip_y": flip_y})
    matrix = augment.draw_matrix(config, np.random.default_rng(0))
    np.testing.assert_array_equal(matrix, np.diag([1 - 2 * flip_x, 1 - 2 * flip_y, 1, 1]))
    box = np.array([[3.0, 4.0, -1.0, 4.0, 2.0, 1.5, 0.3, 5.0, 1.0]], dtype=np.float32)
    moved = augment.move_boxes(box, matrix)[0]
    sign_x, sign_y = matrix[0, 0], matrix[1, 1]
    expected = [3 * sign_x, 4 * sign_y, -1, 4, 2, 1.5, yaw, 5 * sign_x, sign_y]
    np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_the_two_recipes_differ_in_whether_the_translation_is_scaled():
    ranges = {**STILL, "scale": (1.1, 1.1), "translation": 0.5}
    first = augment.draw_matrix(augment.Global(**ranges, scale_translation=True), np.random.default_rng(0))
    second = augment.draw_matrix(augment.Global(**ranges, scale_translation=False), np.random.default_rng(0))
    np.testing.assert_allclose(first[:3, 3], 1.1 * second[:3, 3], rtol=1e-6)
    np.testing.assert_array_equal(first[:3, :3], second[:3, :3])


def test_draws_fill_the_published_ranges():
    rng = np.random.default_rng(0)
    matrices = np.stack([augment.draw_matrix(augment.Global(), rng) for _ in range(4000)])
    scale = matrices[:, 2, 2]
    assert 0.9 <= scale.min() < 0.901 and 1.099 < scale.max() <= 1.1 + 1e-6
    mirrored = np.linalg.det(matrices[:, :2, :2]) < 0
    assert abs(mirrored.mean() - 0.5) < 0.03  # exactly one of two flips
    flipped_x = matrices[:, 0, 0] < 0  # |rotation| < 45 degrees, so cos > 0
    assert abs(flipped_x.mean() - 0.5) < 0.03
    shift = matrices[:, :3, 3] / scale[:, None]
    np.testing.assert_allclose(shift.std(axis=0), 0.5, atol=0.03)
    angle = np.arctan2(np.abs(matrices[:, 1, 0]), np.abs(matrices[:, 0, 0]))
    assert 0.78 < angle.max() <= 0.78539817


@given(SEED)
@settings(max_examples=200)
def test_image_draws_lie_in_the_published_ranges_and_keep_the_bottom(seed):
    move = augment.draw_image(augment.Images(), (900, 1600), (256, 704), np.random.default_rng(seed))
    left, top = move["crop"]
    assert 0.38 <= move["resize"] < 0.55 and abs(move["rotate_deg"]) <= 5.4
    assert top == int(900 * move["resize"]) - 256
    assert 0 <= left <= max(0, int(1600 * move["resize"]) - 704)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared (real frame and goldens) is not here")
def test_points_move_and_are_filtered_as_the_golden_training_augmentation():
    golden = load_file(SHARED / "goldens/bevfusion_lidar_cam/inputs.safetensors")
    everything = (-1e3, -1e3, -1e3, 1e3, 1e3, 1e3)
    reading = dataclasses.replace(small_frames.SMALL, cameras=None, range=everything)
    cloud = small_frames.load(SHARED / "nuscenes_frame", reading).points
    moved = augment.move_points(cloud, golden["aug/lidar_aug_matrix"])
    kept = moved[points.in_range(moved, small_frames.RANGE)]
    assert kept.shape == golden["aug/points"].shape
    np.testing.assert_allclose(kept, golden["aug/points"], atol=2e-5)
