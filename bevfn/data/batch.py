"""What a step reads: the padded Batch of fixed shapes, and how samples of any length become one.

Letters: B batch, N cameras, H W image rows and columns, P points, G padded boxes. Transforms are `target_from_source`.
"lidar" is the frame of the (augmented) points and boxes: x right, y forward, z up on nuScenes, metres.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bevfn import geometry
from bevfn.data import layout


@dataclass(frozen=True)
class Capacities:
    """Fixed sizes of the padded batch. What does not fit is dropped from the end and counted, never silently."""

    points: int = 40_000
    """Points per sample (P). A nuScenes key frame has about 34,700; ten sweeps have about 300,000."""
    boxes: int = 64
    """Annotated boxes per sample (G). A key frame has about 35 in range, crowded ones over 100."""


@dataclass(frozen=True)
class Sample:
    """One frame as a reader makes it: numpy arrays of their own length, and where they come from.

    Arrays have the meaning of the Batch's fields of the same name, without the leading B and without padding.
    """

    points: np.ndarray  # P 5 float32
    boxes: np.ndarray  # G 9 float32
    labels: np.ndarray  # G int64
    lidar_aug: np.ndarray  # 4 4 float32
    images: np.ndarray | None = None  # N H W 3 uint8
    image_from_lidar: np.ndarray | None = None  # N 4 4 float32
    lidar_from_camera: np.ndarray | None = None  # N 4 4 float32
    intrinsics: np.ndarray | None = None  # N 4 4 float32
    image_aug: np.ndarray | None = None  # N 4 4 float32
    token: str = ""
    """The data set's name of this key frame."""
    timestamp: float = 0.0
    """Of the key frame's lidar, s since 1970."""
    image_paths: tuple[Path, ...] = ()
    """Original images, N files in camera order (also where `images` is None)."""
    camera_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    """What `labels` index."""
    counts: dict[str, int] = field(default_factory=dict)
    """Things worth a warning: `bad/points` NaN points dropped, `empty/points` and `empty/boxes` 1 if none in range."""


@dataclass(frozen=True)
class Batch:
    """A pytree of tensors; the camera fields are None for LiDAR-only models.

    The inverses are computed on the host by `collate`: a graph for the NPU has no matrix inversion, and their rounding
    (see `geometry.invert`) must not depend on the machine, since 1e-7 moves frustum points between BEV cells.
    """

    points: Tensor
    """[B,P,5] float32: x, y, z [m, lidar], intensity 0..255, time lag [s] (key frame time - sweep time)."""
    points_valid: Tensor
    """[B,P] bool; points that are not valid are zero."""
    boxes: Tensor
    """[B,G,9] float32: x, y, z of the BOTTOM centre, dx (length, along yaw), dy, dz [m], yaw [rad], vx, vy [m/s]."""
    labels: Tensor
    """[B,G] int64 class index, 0 in padding."""
    boxes_valid: Tensor
    """[B,G] bool."""
    lidar_aug: Tensor
    """[B,4,4] float32: augmented lidar from original lidar."""
    undo_lidar_aug: Tensor
    """[B,3,3] float32: inverse of lidar_aug[:3,:3]."""
    images: Tensor | None = None
    """[B,N,H,W,3] uint8 RGB, resized and cropped."""
    image_from_lidar: Tensor | None = None
    """[B,N,4,4] float32: pixels (times depth) of the ORIGINAL image from the original lidar frame."""
    lidar_from_camera: Tensor | None = None
    """[B,N,4,4] float32."""
    intrinsics: Tensor | None = None
    """[B,N,4,4] float32: original pixels from camera."""
    image_aug: Tensor | None = None
    """[B,N,4,4] float32: pixels of `images` from pixels of the original image."""
    undo_image_aug: Tensor | None = None
    """[B,N,3,3] float32: inverse of image_aug[:3,:3]."""
    lidar_from_pixel: Tensor | None = None
    """[B,N,3,3] float32: lidar_from_camera[:3,:3] @ inverse(intrinsics[:3,:3])."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {name: v if v is None else v.to(device) for name, v in layout.fields(self).items()}
        return Batch(**moved)

    def validate(self) -> None:
        """Checks shapes, dtypes, padding and values on the host (not for graphs: it looks at the data).

        Raises ValueError naming the first field that is wrong.
        """
        missing = [name for name in _CAMERA_FIELDS if getattr(self, name) is None]
        if missing and len(missing) < len(_CAMERA_FIELDS):
            raise ValueError(f"Batch has camera fields but {', '.join(missing)} is None; give all of them or none.")
        layout.check(self, _LAYOUT)
        values = {name: value for name, value in layout.fields(self).items() if value is not None}
        for name, valid in (("points", self.points_valid), ("boxes", self.boxes_valid), ("labels", self.boxes_valid)):
            if bool((values[name][~valid] != 0).any()):
                raise ValueError(f"Batch.{name} is not zero where it is not valid; pad with zeros.")
        if bool((self.labels < 0).any()):
            raise ValueError(f"Batch.labels has {int(self.labels.min())}; a class index is 0 or more.")
        if bool((self.boxes[self.boxes_valid][:, 3:6] <= 0).any()):
            raise ValueError("Batch.boxes has a box with length, width or height <= 0 m; drop it when reading.")
        for inverse, matrix in (("undo_lidar_aug", "lidar_aug"), ("undo_image_aug", "image_aug")):
            if matrix in values:
                product = values[inverse].double() @ values[matrix][..., :3, :3].double()
                if not torch.allclose(product, torch.eye(3).to(product), atol=1e-4):
                    raise ValueError(f"Batch.{inverse} is not the inverse of {matrix}[:3,:3]; build it with collate.")


pytree.register_dataclass(Batch)

_LAYOUT: dict[str, tuple[str, torch.dtype]] = {
    "points": ("B P 5", torch.float32),
    "points_valid": ("B P", torch.bool),
    "boxes": ("B G 9", torch.float32),
    "labels": ("B G", torch.int64),
    "boxes_valid": ("B G", torch.bool),
    "lidar_aug": ("B 4 4", torch.float32),
    "undo_lidar_aug": ("B 3 3", torch.float32),
    "images": ("B N H W 3", torch.uint8),
    "image_from_lidar": ("B N 4 4", torch.float32),
    "lidar_from_camera": ("B N 4 4", torch.float32),
    "intrinsics": ("B N 4 4", torch.float32),
    "image_aug": ("B N 4 4", torch.float32),
    "undo_image_aug": ("B N 3 3", torch.float32),
    "lidar_from_pixel": ("B N 3 3", torch.float32),
}
_CAMERA_FIELDS = [name for name, (letters, _) in _LAYOUT.items() if " N " in letters]
_SAMPLE_CAMERA_FIELDS = ["images", "image_from_lidar", "lidar_from_camera", "intrinsics", "image_aug"]


def collate(samples: list[Sample], *, capacities: Capacities) -> tuple[Batch, dict[str, int]]:
    """Pads samples to one Batch, and counts what did not fit.

    Returns (batch on the CPU, counts): `overflow/points`, `overflow/boxes` dropped (the last ones of a sample), and
    the sums of the samples' own counts (`bad/points`, `empty/points`, `empty/boxes`).

    Raises ValueError if there is no sample, or if samples differ in cameras or image size.
    """
    if not samples:
        raise ValueError("collate got no samples; a batch needs at least one.")
    points = [pad(s.points, capacities.points) for s in samples]
    boxes = [pad(s.boxes, capacities.boxes) for s in samples]
    labels = [pad(s.labels, capacities.boxes) for s in samples]
    lidar_aug = stack("lidar_aug", [s.lidar_aug for s in samples])  # B 4 4
    cameras: dict[str, Tensor] = {}  # none if the samples hold calibration only
    with_images = [s for s in samples if s.images is not None]
    if with_images:
        if len(with_images) < len(samples):
            raise ValueError("collate got samples with and without images; read all with cameras or all without.")
        cameras = {name: stack(name, [getattr(s, name) for s in samples]) for name in _SAMPLE_CAMERA_FIELDS}
        cameras["undo_image_aug"] = geometry.invert(cameras["image_aug"][..., :3, :3])
        cameras["lidar_from_pixel"] = geometry.unprojection(cameras["lidar_from_camera"], cameras["intrinsics"])
    batch = Batch(
        points=torch.stack([value for value, _ in points]),
        points_valid=torch.stack([valid for _, valid in points]),
        boxes=torch.stack([value for value, _ in boxes]),
        labels=torch.stack([value for value, _ in labels]),
        boxes_valid=torch.stack([valid for _, valid in boxes]),
        lidar_aug=lidar_aug,
        undo_lidar_aug=geometry.invert(lidar_aug[:, :3, :3]),
        **cameras,
    )
    counts = {
        "overflow/points": sum(max(0, len(s.points) - capacities.points) for s in samples),
        "overflow/boxes": sum(max(0, len(s.boxes) - capacities.boxes) for s in samples),
    }
    for sample in samples:
        for name, count in sample.counts.items():
            counts[name] = counts.get(name, 0) + count
    return batch, counts


def pad(array: np.ndarray, capacity: int) -> tuple[Tensor, Tensor]:
    """The first `capacity` rows, zeros behind them, and which rows are real."""
    value = np.zeros((capacity, *array.shape[1:]), dtype=array.dtype)
    kept = min(len(array), capacity)
    value[:kept] = array[:kept]
    return torch.from_numpy(value), torch.arange(capacity) < kept


def stack(name: str, arrays: list[np.ndarray]) -> Tensor:
    """The arrays [...] as one tensor [B ...]; raises ValueError, with `name`, if their shapes differ."""
    shapes = sorted({a.shape for a in arrays})
    if len(shapes) > 1:
        raise ValueError(f"collate got samples whose {name} differ in shape, {shapes}; one batch needs one shape.")
    return torch.from_numpy(np.stack(arrays))
