"""What a step reads: the padded Batch of fixed shapes, and how samples of any length become one.

Letters: B batch, T frames (0 the key frame, then earlier ones, newest first), N cameras, H W image rows and columns,
P points, G padded boxes. Transforms are `target_from_source`.

"base" is the frame in which points, boxes, the BEV grid and the frustums of all frames lie, in metres; `Base` says which.
Every camera's pose contains the motion since its exposure, so that nothing is warped later. "Augmented" is the base frame
behind the 3D augmentation.

Sources: mmdetection3d projects/BEVFusion; BEVDepth (Li et al. 2022, arXiv 2206.10092); golden cases, "Inputs".
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from bevfn import geometry, tree
from bevfn.data import possible
from bevfn.names import printable

FRONT = "CAM_FRONT"


class Base(enum.Enum):
    """Which frame a batch's base is. It is part of a batch's structure, no tensor: another base is another graph."""

    LIDAR = "lidar"
    """The LiDAR's at the key frame's scan: x right, y forward, z up on nuScenes."""
    EGO_AT_CAMERAS = "ego at the cameras' exposures"
    """The vehicle's (x forward, y left, z up) at the key frame's camera exposures, which are within 50 ms: a camera's
    pose, of any frame, is relative to the vehicle at that camera's own exposure of the key frame; boxes and detections
    are relative to the mean of these vehicle poses over the cameras."""
    EGO_AT_FRONT = "ego at the front camera's exposure"
    """The vehicle's at the key frame's exposure of CAM_FRONT, for the cameras of all frames, boxes and detections."""

    @property
    def needs_ego_poses(self) -> bool:
        """Whether it is told from the sensors' own poses only together with the vehicle's."""
        return self is not Base.LIDAR

    def clocks(self, channels: tuple[str, ...]) -> tuple[str, ...]:
        """The cameras at whose exposures of the key frame the vehicle's poses count for what these cameras see."""
        return (FRONT,) if self is Base.EGO_AT_FRONT else channels


Field = TypeVar("Field", np.ndarray, Tensor)


@dataclass(frozen=True)
class Capacities:
    """Fixed sizes of the padded batch. What does not fit is dropped from the end and counted, never silently."""

    points: int = 40_000
    """Points per sample (P). A nuScenes key frame has about 34,700; ten sweeps have about 300,000."""
    boxes: int = 64
    """Annotated boxes per sample (G). A key frame has about 35 in range, crowded ones over 100."""

    def changed(self, points: int | None = None, boxes: int | None = None) -> Capacities:
        """With these sizes where they are given."""
        return Capacities(self.points if points is None else points, self.boxes if boxes is None else boxes)


@dataclass(frozen=True, repr=False)
class Sample:
    """One key frame, and the T - 1 before it, as it is read: numpy arrays of their own length.

    Arrays have the meaning of the Batch's fields of the same name, without the leading B and without padding; a group
    that is not read is None.
    """

    base: Base
    base_aug: np.ndarray  # 4 4 float32
    points: np.ndarray | None = None  # P 5 float32
    boxes: np.ndarray | None = None  # G 9 float32
    labels: np.ndarray | None = None  # G int64
    images: np.ndarray | None = None  # T N H W 3 uint8
    intrinsics: np.ndarray | None = None  # T N 4 4 float32
    image_aug: np.ndarray | None = None  # T N 4 4 float32
    base_from_camera: np.ndarray | None = None  # T N 4 4 float32
    image_from_base: np.ndarray | None = None  # T N 4 4 float32
    depth: np.ndarray | None = None  # N H W float32
    token: str = ""
    """The data set's name of this key frame."""
    image_paths: tuple[Path, ...] = ()
    """Original images of the key frame, N files in camera order (also where `images` is None)."""
    camera_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    """What `labels` index."""
    counts: dict[str, int] = field(default_factory=dict)
    """Things worth a warning: `bad/points` NaN points dropped; `bad/intensities` 1 if they are of 0..1; `empty/points` and
    `empty/boxes` 1 if there is none;
    `empty/depth` cameras whose depth map has no point; `missing/frames` earlier key frames in whose place the current
    one stands."""

    def __repr__(self) -> str:
        rows = [f"{len(rows):,} {name}" for name in ("points", "boxes") if (rows := getattr(self, name)) is not None]
        name = printable(self.token) or "without a name"
        return _said(f"Sample {name}", self, rows, None if self.images is None else self.images.shape)


@tree.register(static=("base",))
@dataclass(frozen=True, repr=False)
class Batch:
    """A pytree of tensors. A group (points, boxes, cameras, depth) that a model does not read is None as a whole.

    The inverses are computed on the host by `make`: a graph for the NPU has no matrix inversion, and their rounding
    (see `geometry.invert`) must not depend on the machine, since 1e-7 moves frustum points between BEV cells.
    """

    base: Base
    """What "base" means in the other fields."""
    base_aug: Tensor
    """[B,4,4] float32: augmented base from base."""
    undo_base_aug: Tensor
    """[B,3,3] float32: inverse of base_aug[:3,:3]."""
    points: Tensor | None = None
    """[B,P,5] float32: x, y, z [m, augmented base], intensity 0..255, time lag [s] (key frame time - sweep time)."""
    points_valid: Tensor | None = None
    """[B,P] bool; points that are not valid are zero."""
    boxes: Tensor | None = None
    """[B,G,9] float32: x, y, z of the BOTTOM centre, dx (length, along yaw), dy, dz [m], yaw [rad], vx, vy [m/s];
    augmented base."""
    labels: Tensor | None = None
    """[B,G] int64 class index, 0 in padding."""
    boxes_valid: Tensor | None = None
    """[B,G] bool."""
    images: Tensor | None = None
    """[B,T,N,H,W,3] uint8 RGB, resized and cropped."""
    intrinsics: Tensor | None = None
    """[B,T,N,4,4] float32: original pixels (times depth) from camera."""
    image_aug: Tensor | None = None
    """[B,T,N,4,4] float32: pixels of `images` from pixels of the original image; depth passes through."""
    base_from_camera: Tensor | None = None
    """[B,T,N,4,4] float32: the KEY frame's base from the camera of frame t, not augmented."""
    image_from_base: Tensor | None = None
    """[B,T,N,4,4] float32: original pixels (times depth) of frame t from the KEY frame's base, not augmented."""
    undo_image_aug: Tensor | None = None
    """[B,T,N,3,3] float32: inverse of image_aug[:3,:3]."""
    base_from_pixel: Tensor | None = None
    """[B,T,N,3,3] float32: base_from_camera[:3,:3] @ inverse(intrinsics[:3,:3])."""
    depth: Tensor | None = None
    """[B,N,H,W] float32: LiDAR depth along the optical axis in the key frame's images [m], 0 where no point falls."""
    tables: Any = None
    """A model's own pytree: what it computes of the other fields alone, where the loader's workers have done it
    (`training.tasks.Task.tables`). None: the model does it in its graph."""

    def __repr__(self) -> str:
        """Counts and sizes, no numbers; of a batch that is traced or mapped, whose numbers are nowhere, without counts."""
        rows = []
        for name, valid in (("points", self.points_valid), ("boxes", self.boxes_valid)):
            if valid is not None:
                rows.append(f"{_counted(valid)}{valid.shape[-1]:,} {name}")
        what = f"Batch of {len(self.base_aug)}" if self.base_aug.dim() == 3 else "Batch, one sample of it"  # under vmap
        return _said(what, self, rows, None if self.images is None else tuple(self.images.shape[-5:]))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return tree.to(self, device)

    def _impossible(self) -> Iterator[tuple[str, str, np.ndarray, object]]:
        """(field, what is in it, which of it cannot be, what must be)."""
        rows = (
            {} if self.points is None else {"points": self.points.cpu().numpy().reshape(-1, 5)}
        )  # padding is possible
        if self.boxes is not None and self.boxes_valid is not None:
            rows["boxes"] = self.boxes[self.boxes_valid].cpu().numpy()  # G 9
        for name, what, columns, kind in (
            ("points", "positions", slice(0, 3), possible.POSITION),
            ("points", "intensities", slice(3, 4), possible.INTENSITY),
            ("points", "time lags", slice(4, 5), possible.LAGS),
            ("boxes", "positions", slice(0, 3), possible.POSITION),
            ("boxes", "a length, width or height", slice(3, 6), possible.SIZE),
            ("boxes", "angles", slice(6, 7), possible.YAW),
            ("boxes", "velocities", slice(7, 9), possible.VELOCITY),
        ):
            if name in rows and len(rows[name]):
                ends = np.array([(column.min(), column.max()) for column in rows[name].T[columns]])  # a NaN is both
                yield name, what, kind.impossible(ends), kind
        if self.intrinsics is not None and self.base_from_camera is not None:
            lenses, poses = (
                m.cpu().numpy()[..., :3, :3].astype(float) for m in (self.intrinsics, self.base_from_camera)
            )
            yield "intrinsics", "a matrix", possible.no_intrinsics(lenses), "focal lengths and a centre in pixels"
            yield "base_from_camera", "a matrix", possible.no_rotation(poses), "a rotation, not mirrored"
        if self.depth is not None:
            ends = np.array([float(self.depth.min()), float(self.depth.max())])
            yield "depth", "values", possible.DEPTH.impossible(ends), possible.DEPTH

    def validate(self) -> None:
        """Checks shapes, dtypes, padding and values on the host (not for graphs: it looks at the data).

        Raises ValueError naming the first field that is wrong.
        """
        _check_groups(self)
        values = {name: value for name, value in tree.flatten(self).items() if name in _LAYOUT}
        _check_layouts(values)
        for name, valid in (("points", self.points_valid), ("boxes", self.boxes_valid), ("labels", self.boxes_valid)):
            if valid is not None and not bool(valid.all()) and bool((values[name][~valid] != 0).any()):
                raise ValueError(f"Batch.{name} is not zero where it is not valid; pad with zeros.")
        if self.boxes is not None and self.labels is not None and bool((self.labels < 0).any()):
            raise ValueError(f"Batch.labels has {int(self.labels.min())}; a class index is 0 or more.")
        for name, what, bad, must in self._impossible():
            if bool(torch.as_tensor(bad).any()):
                raise ValueError(f"Batch.{name} has {what} that must be {must}; repair or drop it when reading.")
        for inverse, matrix in (("undo_base_aug", "base_aug"), ("undo_image_aug", "image_aug")):
            if matrix in values:
                product = values[inverse].double() @ values[matrix][..., :3, :3].double()
                if not torch.allclose(product, torch.eye(3).to(product), atol=1e-4):
                    raise ValueError(f"Batch.{inverse} is not the inverse of {matrix}[:3,:3]; build it with make.")


def _said(what: str, of: Sample | Batch, rows: list[str], images: tuple[int, ...] | None) -> str:
    """`Batch of 2 (lidar): 34,019 + 33,870 of 40,000 points, ..., images of 1 frame x 6 cameras x 256 x 704`."""
    if images is not None:
        T, N, H, W = images[:4]
        rows = [*rows, f"images of {T} frame{'s' if T > 1 else ''} x {N} cameras x {H} x {W}"]
    rows = [*rows, "depth maps"] if of.depth is not None else rows
    return f"{what} ({of.base.value}): {', '.join(rows) or 'nothing read'}"


def _counted(valid: Tensor) -> str:
    """ "34,019 + 33,870 of " for the rows [B n] that are real, or "" where their values are not to be had."""
    if type(valid) is not Tensor:  # a fake one
        return ""
    try:
        return " + ".join(f"{count:,}" for count in valid.sum(-1).tolist()) + " of "
    except RuntimeError:  # on the meta device, or under vmap
        return ""


def needed(field: Field | None, name: str) -> Field:
    """A field of a batch or sample that somebody cannot do without; raises ValueError where it is None."""
    if field is None:
        raise ValueError(f"the batch has no {name}, which are needed here; let the reading ask for them.")
    return field


def annotated_boxes(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [B G 9], labels [B G], which rows are a box [B G] bool; raises ValueError where the batch has none."""
    return (
        needed(batch.boxes, "boxes"),
        needed(batch.labels, "labels"),
        needed(batch.boxes_valid, "boxes_valid"),
    )


_LAYOUT: dict[str, tuple[str, torch.dtype]] = {
    "base_aug": ("B 4 4", torch.float32),
    "undo_base_aug": ("B 3 3", torch.float32),
    "points": ("B P 5", torch.float32),
    "points_valid": ("B P", torch.bool),
    "boxes": ("B G 9", torch.float32),
    "labels": ("B G", torch.int64),
    "boxes_valid": ("B G", torch.bool),
    "images": ("B T N H W 3", torch.uint8),
    "intrinsics": ("B T N 4 4", torch.float32),
    "image_aug": ("B T N 4 4", torch.float32),
    "base_from_camera": ("B T N 4 4", torch.float32),
    "image_from_base": ("B T N 4 4", torch.float32),
    "undo_image_aug": ("B T N 3 3", torch.float32),
    "base_from_pixel": ("B T N 3 3", torch.float32),
    "depth": ("B N H W", torch.float32),
}
CAMERA_FIELDS = tuple(name for name, (letters, _) in _LAYOUT.items() if " T N " in letters)
"""Fields that every camera of every frame has."""
_GROUPS = {
    "point": ("points", "points_valid"),
    "box": ("boxes", "labels", "boxes_valid"),
    "camera": CAMERA_FIELDS,
}


def check_base(batch: Batch, accepted: Base, model: str) -> None:
    """Raises ValueError where a model that means one base frame gets a batch in another; free in a graph."""
    if batch.base != accepted:
        raise ValueError(
            f"{model} takes batches in the base frame {accepted.value!r}, not {batch.base.value!r}; read with that Reading.base"
        )


def make(*, base: Base, base_aug: Tensor, **given: Tensor) -> Batch:
    """A Batch of its fields but for the inverses, which are computed here; on the host."""
    if "images" in given:
        given["undo_image_aug"] = geometry.invert(given["image_aug"][..., :3, :3])
        given["base_from_pixel"] = geometry.unprojection(given["base_from_camera"], given["intrinsics"])
    return Batch(base, base_aug, geometry.invert(base_aug[:, :3, :3]), **given)


def collate(samples: list[Sample], *, capacities: Capacities) -> tuple[Batch, dict[str, int]]:
    """Pads samples to one Batch, and counts what did not fit.

    Returns (batch on the CPU, counts): `overflow/points`, `overflow/boxes` dropped (the last ones of a sample), and
    the sums of the samples' own counts.

    Raises ValueError if there is no sample, or if samples differ in what they hold, base, frames, cameras or image size.
    """
    if not samples:
        raise ValueError("collate got no samples; a batch needs at least one.")
    if len(bases := {sample.base for sample in samples}) > 1:
        raise ValueError(
            f"collate got samples in the bases {', '.join(sorted(b.value for b in bases))}; read all in one."
        )
    padded = {"points": capacities.points, "boxes": capacities.boxes, "labels": capacities.boxes}
    made: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for name in _LAYOUT:
        arrays = _given(name, samples)
        if not arrays:
            continue
        if name not in padded:
            made[name] = _stack(name, arrays)
            continue
        rows = [_pad(array, padded[name]) for array in arrays]
        made[name] = torch.stack([value for value, _ in rows])
        if name != "labels":  # which are boxes'
            made[f"{name}_valid"] = torch.stack([valid for _, valid in rows])
            counts[f"overflow/{name}"] = sum(max(0, len(array) - padded[name]) for array in arrays)
    for sample in samples:
        for name, count in sample.counts.items():
            counts[name] = counts.get(name, 0) + count
    return make(base=samples[0].base, **made), counts


def checked(sample: Sample, like: Sample | None = None) -> Sample:
    """The sample. Raises ValueError, naming its key frame, where it has a value that cannot be (`Batch.validate`), or holds
    something else than `like`, which shall be in the same batch."""
    try:
        room = Capacities(*(0 if rows is None else len(rows) for rows in (sample.points, sample.boxes)))
        collate([sample], capacities=room)[0].validate()
        if like is not None and _form(like) != _form(sample):
            collate([like, sample], capacities=room)  # which says what differs
    except ValueError as error:
        raise ValueError(f"key frame {printable(sample.token)}: {error}") from error
    return sample


def _form(sample: Sample) -> list:
    """What samples of one batch have in common: base, and shapes without what is padded."""
    arrays = {name: getattr(sample, name, None) for name in _LAYOUT}
    padded = ("points", "boxes", "labels")
    return [sample.base, *(a if a is None else a.shape[name in padded :] for name, a in arrays.items())]


def _given(name: str, samples: list[Sample]) -> list[np.ndarray]:
    """That field of all samples; none if none has it."""
    arrays = [array for sample in samples if (array := getattr(sample, name, None)) is not None]
    if arrays and len(arrays) < len(samples):
        raise ValueError(f"collate got samples with and without {name}; read all with them or all without.")
    return arrays


def _pad(array: np.ndarray, capacity: int) -> tuple[Tensor, Tensor]:
    """The first `capacity` rows, zeros behind them, and which rows are real."""
    value = np.zeros((capacity, *array.shape[1:]), dtype=array.dtype)
    kept = min(len(array), capacity)
    value[:kept] = array[:kept]
    return torch.from_numpy(value), torch.arange(capacity) < kept


def _stack(name: str, arrays: list[np.ndarray]) -> Tensor:
    """The arrays [...] as one tensor [B ...]; raises ValueError, with `name`, if their shapes differ."""
    shapes = sorted({a.shape for a in arrays})
    if len(shapes) > 1:
        raise ValueError(f"collate got samples whose {name} differ in shape, {shapes}; one batch needs one shape.")
    return torch.from_numpy(np.stack(arrays))


def _check_groups(batch: Batch) -> None:
    for group, names in _GROUPS.items():
        missing = [name for name in names if getattr(batch, name) is None]
        if missing and len(missing) < len(names):
            raise ValueError(f"Batch has {group} fields but {', '.join(missing)} is None; give all of them or none.")


def _check_layouts(values: dict[str, Tensor]) -> None:
    """Every tensor has the layout of its name and no NaN or infinity.

    A letter must mean the same size in every field, a digit exactly that size.
    """
    sizes: dict[str, int] = {}
    for name, value in values.items():
        letters, dtype = _LAYOUT[name]
        wanted = letters.split()
        fits = value.dim() == len(wanted) and all(
            size == (int(letter) if letter.isdigit() else sizes.setdefault(letter, size))
            for letter, size in zip(wanted, value.shape)
        )
        if not fits:
            known = ", ".join(f"{letter} {size}" for letter, size in sizes.items() if letter in wanted)
            raise ValueError(f"Batch.{name} has shape {list(value.shape)} but must be [{letters}] (here {known}).")
        if value.dtype != dtype:
            raise ValueError(f"Batch.{name} is {value.dtype} but must be {dtype}; convert it when reading.")
    for name, value in values.items():
        if value.is_floating_point() and not np.isfinite(value.cpu().numpy()).all():
            raise ValueError(f"Batch.{name} has NaN or infinite values; drop or replace them when reading.")
