"""The published augmentations: what is drawn, and what it does to points and boxes.

A global augmentation is one matrix, `augmented_from_original` of the base frame: a rotation about z, a uniform scale, a
translation and mirrors. Points and boxes both move by that matrix, so they cannot disagree, and it is what the batch
records as `base_aug`. An image augmentation is a set of arguments of `image.transform`, which returns its matrix.

Source: mmdetection3d GlobalRotScaleTrans, BEVFusionGlobalRotScaleTrans, BEVFusionRandomFlip3D, ImageAug3D
(fact sheet bevfusion_lidar_cam, part B).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bevfn.boxes import limit_yaw
from bevfn.data import image


@dataclass(frozen=True)
class Images:
    """Ranges of the image augmentation, drawn for every camera on its own. Defaults: mmdetection3d's."""

    resize: tuple[float, float] = (0.38, 0.55)
    """Factor, uniform. The crop keeps the bottom rows; its left edge is uniform where the image is wider."""
    flip: bool = True
    """Mirror left-right with probability 1/2."""
    rotate_deg: tuple[float, float] = (-5.4, 5.4)
    """Uniform, counter-clockwise about the crop's centre."""
    turned: image.Filter = "nearest"
    """What pixels of a turned image are made of: the nearest one's (mmdetection3d), or bicubic (AWML)."""


@dataclass(frozen=True)
class Global:
    """Ranges of the global augmentation of points and boxes. Defaults: as published with images (mmdetection3d)."""

    rotation: float = 0.78539816
    """rad; uniform in +- this."""
    scale: tuple[float, float] = (0.9, 1.1)
    """Uniform."""
    translation: float | tuple[float, float, float] = 0.5
    """m; standard deviation in x, y and z, or of each."""
    scale_translation: bool = True
    """Translate before scaling (order rotate, translate, scale: LiDAR-camera), or after it (LiDAR-only)."""
    flip_x: float = 0.5
    """Probability of x -> -x ("vertical" upstream)."""
    flip_y: float = 0.5
    """Probability of y -> -y ("horizontal" upstream)."""


def draw_image(
    config: Images, source_size: tuple[int, int], size: tuple[int, int], generator: np.random.Generator
) -> dict[str, Any]:
    """Arguments of `image.transform` for one camera: resize, crop, flip, rotate_deg. Sizes are (H, W).

    Where the resized image is narrower than the crop, the rest on the right is black.
    """
    resize = generator.uniform(*config.resize)
    height, width = (int(side * resize) for side in source_size)
    left = int(generator.uniform(0, max(0, width - size[1])))
    flip = bool(config.flip and generator.random() < 0.5)
    rotate_deg = generator.uniform(*config.rotate_deg)
    return {"resize": resize, "crop": (left, height - size[0]), "flip": flip, "rotate_deg": rotate_deg}


def draw_matrix(config: Global, generator: np.random.Generator) -> np.ndarray:
    """augmented_from_original of the base frame, [4,4] float32: flips @ (rotation, scale, translation)."""
    angle = generator.uniform(-config.rotation, config.rotation)
    scale = generator.uniform(*config.scale)
    shift = generator.normal(0.0, config.translation, 3)
    flips = generator.random(2) < (config.flip_x, config.flip_y)
    mirror = np.where([*flips, False], -1.0, 1.0)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    matrix = np.eye(4)
    matrix[:3, :3] = mirror[:, None] * (scale * turn)
    matrix[:3, 3] = mirror * (scale * shift if config.scale_translation else shift)
    return matrix.astype(np.float32)


def move_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points [P,3+] float32 moved by a matrix [4,4]; further columns stay."""
    moved = points.copy()
    moved[:, :3] = points[:, :3] @ matrix[:3, :3].T.astype(np.float32) + matrix[:3, 3].astype(np.float32)
    return moved


def move_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Boxes [G,9] (bottom centre, dims, yaw, velocity) float32 moved by a matrix of `draw_matrix`; yaw in [-pi, pi).

    The matrix turns the heading and the velocity as it turns any horizontal arrow: a y flip makes yaw -yaw, an x flip
    pi - yaw, and the velocity is scaled with the box.
    """
    linear, shift = matrix[:3, :3].astype(np.float64), matrix[:3, 3].astype(np.float64)
    heading = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], axis=1) @ linear[:2, :2].T  # G 2
    yaw = torch.from_numpy(np.arctan2(heading[:, 1], heading[:, 0]).astype(np.float32))
    moved = np.empty_like(boxes)
    moved[:, :3] = boxes[:, :3] @ linear.T + shift
    moved[:, 3:6] = boxes[:, 3:6] * abs(linear[2, 2])  # the scale; z is never mirrored or tilted
    moved[:, 6] = limit_yaw(yaw).numpy()
    moved[:, 7:9] = boxes[:, 7:9] @ linear[:2, :2].T
    return moved
