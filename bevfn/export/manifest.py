"""What lies beside an exported file: all that its reader must know of it, as JSON.

A reader needs no bevfn: inputs and outputs with shapes, dtypes, units and how they are made, sizes that must not be exceeded,
how scans and images become its inputs, the classes that labels index, what the file was made of and how far it is from the
eager detector.
"""

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import bevfn
from bevfn.data import sweeps
from bevfn.data.batch import Base
from bevfn.data.reading import Reading
from bevfn.detector import Detector
from bevfn.export.verify import Verdict
from bevfn.training import checkpoint

FORMAT = 1
NAME = "manifest.json"
MEANINGS = {
    "points": "x, y, z [m, base frame], intensity 0..255, time lag [s] (key frame time - sweep time); rows that are not valid "
    "are zero. Of several sweeps all points, moved to the key frame",
    "points_valid": "which rows are a point",
    "voxel_features": "mean of the first points of a voxel, columns as those of points; 0 in empty slots",
    "voxel_coords": "cell (x, y, z); -1 in empty slots",
    "voxel_count": "points that are averaged; 0 in empty slots",
    "voxels_found": "occupied cells before the capacity",
    "images": "RGB, 0..255, resized and cropped; frames (the key frame first, then earlier ones), cameras, rows, columns",
    "intrinsics": "pixels of the original image (times depth) from the camera's frame",
    "image_aug": "pixels of `images` from pixels of the original image; depth passes through",
    "base_from_camera": "the key frame's base frame from the camera of a frame",
    "image_from_base": "intrinsics @ inverse(base_from_camera): pixels of the original image (times depth)",
    "undo_image_aug": "inverse(image_aug[:3, :3])",
    "base_from_pixel": "base_from_camera[:3, :3] @ inverse(intrinsics[:3, :3])",
    "voxels": "first points of a voxel in their order, then zeros: x, y, z [m, base frame], intensity 0..255 (with "
    "use_intensity), time lag [s]",
    "coors": "cell (z, y, x) of a voxel",
    "num_points_per_voxel": "points of a voxel that are not zeros",
    "imgs": "RGB, 0..255, resized and cropped; cameras, 3, rows, columns; of the other file",
    "image_feats": "of the other file, of as many images",
    "lidar2image": "pixels of the original image (times depth) from the base frame",
    "img_aug_matrix": "pixels of `imgs` from pixels of the original image; depth passes through",
    "geom_feats": "cells x, y, z and batch of the frustum points in the grid, in the order of `ranks`",
    "kept": "which of the frustum points (cameras, depths, rows, columns) are in the grid",
    "ranks": "x * rows + y of `geom_feats`, ascending",
    "indices": "place of each among those kept",
    "bbox_pred": "x, y of the centre [cells of out_size_factor voxels from the range's corner], z of the GRAVITY centre [m], "
    "logarithm of length, width, height [m], sine and cosine of the yaw [from x to y], vx, vy [m/s]; base frame",
    "score": "0..1, not sorted",
    "label_pred": "which of `classes`",
    "boxes": "x, y, z of the BOTTOM centre [m], length, width, height [m], yaw [rad, from x to y], vx, vy [m/s]; base frame",
    "scores": "0..1, not sorted",
    "labels": "which of `classes`",
    "valid": "which rows are detections; the others are to be left out",
}
OVERFLOW = "what did not fit a capacity and was dropped; 0 unless a capacity is too small"
POINTS = (
    "All points of the key frame's scan come first, with time lag 0, then those of `sweeps` scans before it (fewer where there are "
    "fewer): the newest, or with sweep_choice random any of the `sweep_pool` newest. Of an earlier scan points with |x| and |y| "
    "below `close_m` in its own frame, the vehicle's, are left out; the others are moved into the key frame's by turn (3 x 3) and "
    "shift (3): turn @ p + shift, or with published_sweeps turn @ p + transpose(turn) @ shift, as the published weights were "
    "trained. Where there is no earlier scan and pad_empty_sweeps is true, the key frame's own, without the points below "
    "`close_m`, is repeated `sweeps` times, with time lag 0. Last, points that are not strictly inside range_m (lower x, y, z, upper "
    "x, y, z) are left out."
)
CAMERAS = (
    "Of an image of h x w pixels and an image_size of H x W: cover = max(H / h, W / w); r = cover where `resize` is null, else "
    "resize * cover / covering, or `resize` where covering is null. The image is resized to int(h * r) x int(w * r) pixels "
    "(bicubic, antialiased, as Pillow's), and rows from int(h * r) - H on and columns from int(max(0, int(w * r) - W) / 2) on are "
    "cut out, H x W of them; what lies outside is black. With covering null and cameras of several sizes h and w are the largest "
    "ones in both. image_aug has r twice on its diagonal, and minus that column and row as its shift. `frames` are the key frame, "
    "then those before it, as far apart as in the data of the training (nuScenes: 0.5 s); the key frame again where there is none."
)
FRAMES = {
    Base.LIDAR: "the LiDAR's at its scan (x right, y forward, z up on nuScenes)",
    Base.EGO_AT_CAMERAS: "the vehicle's (x forward, y left, z up) at the cameras' exposures",
    Base.EGO_AT_FRONT: "the vehicle's (x forward, y left, z up) at the front camera's exposure",
}


def make(
    detector: Detector,
    file: Path,
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    *,
    facts: Mapping[str, Any],
    runtime: str,
    packages: Sequence[str],
    verdict: Verdict,
    data: str,
) -> dict[str, Any]:
    """The manifest of a file.

    Args:
        facts: what a reader of this kind of file must know besides.
        runtime: in which it was verified.
        packages: whose versions made it.
        data: what it was verified on, at the values inside that `verdict` names.
    """
    config = detector.config
    return {
        "format": FORMAT,
        "file": {"name": file.name, "bytes": file.stat().st_size, "sha256": checksum(file), **facts},
        "model": config.model,
        "scale": config.scale,
        "precision": config.precision,
        "checkpoint": _origin(detector.checkpoint),
        "averages": detector.averaged,
        "versions": {
            "bevfn": bevfn.__version__,
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "base_frame": FRAMES[detector.reading.base],
        "classes": list(detector.classes),
        "cameras": [] if detector.reading.cameras is None else list(detector.reading.cameras.channels),
        "reading": reading(detector.reading),
        "inputs": [_described(name, value) for name, value in inputs.items()],
        "outputs": [_described(name, value) for name, value in outputs.items()],
        "capacities": capacities(detector),
        "verified": {"on": data, "runtime": runtime, **verdict.to_json()},
    }


def _origin(place: Path) -> dict[str, str]:
    """The checkpoint without this machine's folders: of a run's step the run's name too."""
    weights = place / checkpoint.TENSORS if place.is_dir() else place
    name = "/".join(place.resolve().parts[-3:]) if place.is_dir() else place.name
    return {"name": name, "file": weights.name, "sha256": checksum(weights)}


def reading(how: Reading) -> dict[str, Any]:
    """What becomes of scans and images before they are inputs; null where the model reads none."""
    points, cameras = how.points, how.cameras
    said: dict[str, Any] = {"points": None, "cameras": None}
    if points is not None:
        said["points"] = {
            **{"sweeps": points.sweeps, "sweep_choice": points.sweep_choice},
            **({"sweep_pool": points.oldest} if points.sweep_choice == "random" else {}),
            **{"pad_empty_sweeps": points.pad_empty_sweeps, "published_sweeps": points.published_sweeps},
            **{"close_m": sweeps.CLOSE_M, "range_m": None if how.range is None else list(how.range), "rule": POINTS},
        }
    if cameras is not None:
        said["cameras"] = {
            **{"frames": cameras.frames, "image_size": list(cameras.image_size)},
            **{"resize": cameras.resize, "covering": cameras.covering, "rule": CAMERAS},
        }
    return said


def _described(name: str, value: np.ndarray) -> dict[str, Any]:
    meaning = OVERFLOW if name.startswith("overflow/") else MEANINGS[name]
    return {"name": name, "shape": list(value.shape), "dtype": str(value.dtype), "meaning": meaning}


def capacities(detector: Detector) -> dict[str, Any]:
    """Fixed sizes of the file; voxels with the grid that they are cells of."""
    network = detector.task.network
    found: dict[str, Any] = {}
    if detector.reading.points is not None:
        found["points"] = detector.reading.capacities.points
    if getattr(network, "lidar", None) is not None:
        grid = network.voxels
        found |= {"voxels": grid.max_voxels[1], "sites": list(network.lidar.encoder.capacities)}
        found["voxel_grid"] = {**asdict(grid), "max_voxels": grid.max_voxels[1], "cells": list(grid.grid)}
    return found


def checksum(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
