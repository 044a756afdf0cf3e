"""A file in its runtime against the eager detector: every boundary, and the boxes as they lie in space.

A row's place among the queries, and which of two equal scores is among the highest, is rounding: boxes are compared as sets.
Where another query was chosen, the head's boundaries behind that choice hold other rows and are told, not judged. Nothing else is
excused: shapes, voxels, sites and what did not fit must be the same, whatever the precision. A frustum point on the edge of two
cells may be in the other one; of what is summed by cell the limit is then as wide as so many points can make it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import onnxruntime
import torch
from scipy.optimize import linear_sum_assignment

from bevfn.evaluation import tables
from bevfn.precision import Precision

Arrays = Mapping[str, np.ndarray]
QUERIES, HEAD = "head.query_", "head."
"""what the highest scores choose, and where what follows from it is"""
EXACT = ("voxels.", "lidar.")
"""whose integers are the same in every runtime: a comparison of float32, a division and what follows from them"""
NONE: Mapping = MappingProxyType({})
UNITS = {"score": "", "size": "", "yaw_rad": " rad", "velocity_mps": " m/s"}
"""of what a detection has beside its place and class"""


@dataclass(frozen=True)
class Limits:
    """What a file may differ by from the eager detector of its precision."""

    boundary: float
    """relative L2 of a boundary of floats"""
    choices: float
    """share of the queries' cells and classes that may differ, whatever their order: rounding decides between equals"""
    cells: float
    """share of frustum points that may be in another cell, each in its place"""
    near_m: float
    """how near a detection's centre must be to the float32 detector's of its class"""
    alike: Mapping[str, float]
    """and what else of it may differ by, by the names of `UNITS`"""
    found: float
    """share of detections that must have one"""


LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(
        boundary=1e-4,
        choices=0.02,
        cells=0.02,
        near_m=0.05,
        alike={"score": 0.001, "size": 0.01, "yaw_rad": 0.01, "velocity_mps": 0.01},
        found=0.98,  # as many as may be chosen otherwise
    ),
    # 199 of 200 within 0.3 m of float32's on the real frame; products are rounded in another order than eagerly. The rest is as
    # wide as halves are coarse: an eleventh bit of a logit, of a size's logarithm and of a sine that is small against its cosine.
    "fp16": Limits(
        boundary=3e-2,
        choices=1.0,
        cells=0.02,  # geometry stays float32
        near_m=0.3,
        alike={"score": 0.05, "size": 0.1, "yaw_rad": 0.2, "velocity_mps": 0.3},
        found=0.95,
    ),
}


@dataclass(frozen=True)
class Boxes:
    """Detections of two runs, paired class by class so that the sum of distances is least; only valid ones count."""

    detections: int
    reference: int
    found: int
    """of the reference's, how many have a partner within `near_m` that is alike"""
    near: int
    """how many have one that may not be"""
    near_m: float
    median_m: float
    """of all partners' centre distances, as the next; 0 without any"""
    largest_m: float
    differences: dict[str, float]
    """largest, of the near partners, by the names of `UNITS`"""
    beyond: dict[str, int]
    """how many of the near partners differ by more than the limit that there is"""
    not_finite: int
    """detections that have a value which is no number"""

    @property
    def share(self) -> float:
        """Found, of all that either has."""
        return self.found / max(self.detections, self.reference, 1) if self.detections or self.reference else 1.0


@dataclass(frozen=True)
class Verdict:
    """What was compared."""

    boundaries: dict[str, float]
    """relative L2 of floats, share that differs of integers, in the order in which they are computed"""
    counts: dict[str, int]
    """of the key frame: "points" and what did not fit a capacity and was dropped, "overflow/*" """
    boxes: Boxes
    """against the detector in float32"""
    failed: str
    """the first thing beyond its limit, one sentence; empty if there is none"""

    def to_json(self) -> dict:
        return asdict(self)

    def text(self) -> str:
        """A table for people."""
        lines = [f"{'boundary':<44} {'error':>10}"]
        lines += [f"{name:<44} {error:>10.1e}" for name, error in self.boundaries.items()]
        b, d = self.boxes, self.boxes.differences
        lines += [
            f"detections: {b.detections}, of float32 {b.reference}; {b.near} pairs within {b.near_m:g} m, {b.found} of them alike; "
            f"centres apart {b.median_m:.2g} m (median), {b.largest_m:.2g} m (most); of the near ones at most: "
            + ", ".join(f"{_named(name)} {d[name]:.1e}{unit}" for name, unit in UNITS.items())
        ]
        return "\n".join([*lines, *tables.counted(self.counts)])


def run(path: Path, inputs: Arrays, boundaries: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Outputs of the file in onnxruntime on this process' threads; values inside by name, too."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if boundaries:
        model = onnx.load(path)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in boundaries)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    else:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return dict(zip((value.name for value in session.get_outputs()), session.run(None, dict(inputs))))


def compare(
    ours: Arrays,
    eager: Arrays,
    reference: Arrays,
    outputs: Sequence[str],
    precision: Precision,
    counts: Mapping[str, int] = NONE,
) -> Verdict:
    """Outputs and boundaries of a file with the eager ones of its precision, and its detections with float32's.

    outputs: names of what is detected and counted; what else `ours` has are boundaries. counts: of the key frame, before the file.
    """
    limits = LIMITS[precision]
    errors = {name: error(value, eager[name]) for name, value in ours.items() if name not in outputs}
    overflow = {name: int(value) for name, value in eager.items() if name.startswith("overflow/")}
    boxes = paired(ours, reference, limits.near_m, limits.alike)
    failed = _boundaries(ours, eager, errors, limits) or _overflow(ours, overflow) or beyond(boxes, limits)
    return Verdict(errors, {**counts, **overflow}, boxes, failed)


def _boundaries(ours: Arrays, eager: Arrays, errors: Mapping[str, float], limits: Limits) -> str:
    """The first boundary that is beyond its limit, one sentence; errors: of all of them, in the order in which they are computed."""
    chosen_otherwise, widest = False, limits.boundary
    for name, value in errors.items():
        theirs = eager[name]
        if ours[name].shape != theirs.shape:
            return f"{name} has the shape {ours[name].shape}, not {theirs.shape}"
        judged, limit = value, widest
        if theirs.dtype.kind == "f":
            if chosen_otherwise and name.startswith(HEAD):
                continue
        elif name.startswith(QUERIES):
            judged, limit, chosen_otherwise = _chosen(ours[name], theirs), limits.choices, chosen_otherwise or value > 0
        else:
            limit = 0.0 if name.startswith(EXACT) else limits.cells
            widest = max(widest, 2 * value**0.5)  # equal summands, a share s of which is in another cell: sqrt(2 s)
        if not judged <= limit:  # NaN is beyond every limit
            return f"{name} differs by {judged:.1e}, more than {limit:g}"
    return ""


def _overflow(ours: Arrays, overflow: Mapping[str, int]) -> str:
    """The first count of a file that is another than `overflow`, one sentence."""
    for name, count in overflow.items():
        if name in ours and int(ours[name]) != count:
            return f"{name} is {int(ours[name])}, not {count}"
    return ""


def beyond(boxes: Boxes, limits: Limits) -> str:
    """What of detections is beyond their limits, one sentence; empty if nothing is."""
    most = max(boxes.detections, boxes.reference)
    if boxes.not_finite:
        return f"{boxes.not_finite} of {boxes.detections} detections have values that are not finite"
    if boxes.share >= limits.found:
        return ""
    if boxes.near < limits.found * most:
        return (
            f"{boxes.near} of {most} detections are within {boxes.near_m:g} m of the eager float32 detector's, fewer than "
            f"{limits.found:.0%}"
        )
    name = max(boxes.beyond, key=lambda name: boxes.beyond[name])
    return (
        f"{boxes.beyond[name]} of {most} detections differ from the eager float32 detector's in {_named(name)} by more than "
        f"{limits.alike[name]:g}{UNITS[name]}, at most by {boxes.differences[name]:.2g}{UNITS[name]}"
    )


def _named(difference: str) -> str:
    """Without its unit."""
    return difference.partition("_")[0]


def _chosen(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of `theirs` that is not among ours, each as often."""
    (a, ours_times), (b, theirs_times) = (np.unique(values, return_counts=True) for values in (ours, theirs))
    _, i, j = np.intersect1d(a, b, return_indices=True)
    missing = theirs.size - int(np.minimum(ours_times[i], theirs_times[j]).sum())
    return missing / max(theirs.size, 1)


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative L2 of floats, share that differs of integers; NaN and infinity must be in the same places."""
    if ours.shape != theirs.shape:
        return float("inf")
    if theirs.dtype.kind != "f":
        return float((ours != theirs).mean()) if theirs.size else 0.0
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("nan")
    a, b = a[finite], b[finite]
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))


def paired(ours: Arrays, reference: Arrays, near_m: float, alike: Mapping[str, float] = NONE) -> Boxes:
    """The valid detections of two runs ("boxes" [1 Q 9], "scores", "labels", "valid" [1 Q]); alike: limits, as of `Limits`."""
    (boxes, scores, labels), (others, other_scores, other_labels) = (
        [run[part][run["valid"]] for part in ("boxes", "scores", "labels")] for run in (ours, reference)
    )
    distance = np.linalg.norm(boxes[:, None, :3] - others[None, :, :3], axis=-1)
    distance = np.where(labels[:, None] == other_labels[None], np.nan_to_num(distance, nan=1e6), 1e6)
    rows, columns = linear_sum_assignment(distance)
    partners = distance[rows, columns] < 1e6
    rows, columns = rows[partners], columns[partners]
    apart = distance[rows, columns]
    near = apart <= near_m
    differences = {
        name: value[near]
        for name, value in _differences(boxes[rows], others[columns], scores[rows] - other_scores[columns])
    }
    within = {name: differences[name] <= limit for name, limit in alike.items()}  # NaN never is
    return Boxes(
        detections=len(boxes),
        reference=len(others),
        found=int(np.logical_and.reduce([near[near], *within.values()]).sum()),
        near=int(near.sum()),
        near_m=near_m,
        median_m=float(np.median(apart)) if len(apart) else 0.0,
        largest_m=float(apart.max()) if len(apart) else 0.0,
        differences={name: float(value.max()) if len(value) else 0.0 for name, value in differences.items()},
        beyond={name: int((~value).sum()) for name, value in within.items()},
        not_finite=int((~(np.isfinite(boxes).all(-1) & np.isfinite(scores))).sum()),
    )


def _differences(ours: np.ndarray, theirs: np.ndarray, scores: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """By the names of `UNITS`, of partners [n 9] and their scores' differences [n]: of a size the share by which its worst side
    differs (of those below 0.1 m, of that), of a yaw the angle between, of a velocity the distance."""
    apart = ours - theirs
    yaw = apart[:, 6]
    yield "score", np.abs(scores)
    yield "size", (np.abs(apart[:, 3:6]) / np.maximum(theirs[:, 3:6], 0.1)).max(-1)
    yield "yaw_rad", np.abs(np.arctan2(np.sin(yaw), np.cos(yaw)))
    yield "velocity_mps", np.linalg.norm(apart[:, 7:], axis=-1)
