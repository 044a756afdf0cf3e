"""What lies beside an exported file: all that its reader must know of it, as JSON.

A reader needs no bevfn: inputs and outputs with shapes, dtypes, units and how they are made, sizes that must not be exceeded,
the classes that labels index, what the file was made of and how far it is from the eager detector.
"""

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import bevfn
from bevfn.data.batch import Base
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
        "versions": {
            "bevfn": bevfn.__version__,
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "base_frame": FRAMES[detector.reading.base],
        "classes": list(detector.classes),
        "cameras": [] if detector.reading.cameras is None else list(detector.reading.cameras.channels),
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
