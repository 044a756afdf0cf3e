"""A file in its runtime against the eager detector: every boundary, and the boxes as they lie in space.

A row's place among the queries, and which of two equal scores is among the highest, is rounding: boxes are compared as sets.
Behind a choice that fell otherwise (an integer that differs, such as a query's cell) a boundary holds other rows and is told,
not judged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from scipy.optimize import linear_sum_assignment

from bevfn.precision import Precision

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Limits:
    """What a file may differ by from the eager detector of its precision."""

    boundary: float
    """relative L2 of a boundary of floats"""
    choices: float
    """share of a boundary of integers that may differ, whatever their order: rounding decides between equals"""
    near_m: float
    """how near a detection's centre must be to the float32 detector's of its class"""
    found: float
    """share of detections that must have one"""


LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(boundary=1e-4, choices=0.02, near_m=0.05, found=0.99),
    # 199 of 200 within 0.3 m of float32's on the real frame; products are rounded in another order than eagerly.
    "fp16": Limits(boundary=3e-2, choices=1.0, near_m=0.3, found=0.95),
}


@dataclass(frozen=True)
class Boxes:
    """Detections of two runs, paired class by class so that the sum of distances is least; only valid ones count."""

    detections: int
    reference: int
    found: int
    """of the reference's, how many have a partner within `near_m`"""
    near_m: float
    median_m: float
    """of the partners' centre distances, as the next two; 0 without any"""
    largest_m: float
    score: float
    """largest difference"""

    @property
    def share(self) -> float:
        """Found, of all that either has."""
        return self.found / max(self.detections, self.reference, 1) if self.detections or self.reference else 1.0


@dataclass(frozen=True)
class Verdict:
    """What was compared."""

    boundaries: dict[str, float]
    """relative L2 of floats, share that differs of integers, in the order in which they are computed"""
    outputs: dict[str, float]
    """the same of counts that the file gives: "overflow/*" """
    boxes: Boxes
    """against the detector in float32"""
    failed: str
    """the first thing beyond its limit, one sentence; empty if there is none"""

    def to_json(self) -> dict:
        return asdict(self)

    def text(self) -> str:
        """A table for people."""
        lines = [f"{'boundary':<44} {'error':>10}"]
        lines += [f"{name:<44} {error:>10.1e}" for name, error in {**self.boundaries, **self.outputs}.items()]
        b = self.boxes
        lines += [
            f"detections: {b.detections}, of float32 {b.reference}; {b.found} pairs within {b.near_m:g} m, centres apart "
            f"{b.median_m:.2g} m (median), {b.largest_m:.2g} m (most), scores {b.score:.1e}"
        ]
        return "\n".join(lines)


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


def compare(ours: Arrays, eager: Arrays, reference: Arrays, outputs: Sequence[str], precision: Precision) -> Verdict:
    """Outputs and boundaries of a file with the eager ones of its precision, and its detections with float32's.

    outputs: names of what is detected and counted; what else `ours` has are boundaries.
    """
    limits = LIMITS[precision]
    errors = {name: error(value, eager[name]) for name, value in ours.items() if name not in outputs}
    counted = {name: error(ours[name], eager[name]) for name in outputs if name.startswith("overflow/")}
    boxes = paired(ours, reference, limits.near_m)
    chosen = {name: _chosen(ours[name], eager[name]) for name in errors if eager[name].dtype.kind != "f"}
    return Verdict(errors, counted, boxes, _failed(errors, chosen, counted, boxes, limits))


def _failed(
    errors: dict[str, float], chosen: dict[str, float], counted: dict[str, float], boxes: Boxes, limits: Limits
) -> str:
    """chosen: of boundaries of integers, the share that differs in any order."""
    chosen_otherwise = False
    for name, value in errors.items():
        judged, limit = (chosen[name], limits.choices) if name in chosen else (value, limits.boundary)
        if not judged <= limit and not (name not in chosen and chosen_otherwise):  # NaN is beyond every limit
            return f"{name} differs by {judged:.1e}, more than {limit:g}"
        chosen_otherwise |= name in chosen and value > 0
    for name, value in counted.items():
        if value > 0 and limits.choices < 1:
            return f"{name} differs"
    if boxes.share < limits.found:
        return (
            f"{boxes.found} of {max(boxes.detections, boxes.reference)} detections are within {boxes.near_m:g} m of the "
            f"eager float32 detector's, fewer than {limits.found:.0%}"
        )
    return ""


def _chosen(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of `theirs` that is not among ours, each as often."""
    (a, ours_times), (b, theirs_times) = (np.unique(values, return_counts=True) for values in (ours, theirs))
    _, i, j = np.intersect1d(a, b, return_indices=True)
    return 1.0 - float(np.minimum(ours_times[i], theirs_times[j]).sum()) / max(theirs.size, 1)


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


def paired(ours: Arrays, reference: Arrays, near_m: float) -> Boxes:
    """The valid detections of two runs ("boxes" [1 Q 9], "scores", "labels", "valid" [1 Q])."""
    (boxes, scores, labels), (others, other_scores, other_labels) = (
        [run[part][run["valid"]] for part in ("boxes", "scores", "labels")] for run in (ours, reference)
    )
    distance = np.linalg.norm(boxes[:, None, :3] - others[None, :, :3], axis=-1)
    distance = np.where(labels[:, None] == other_labels[None], np.nan_to_num(distance, nan=1e6), 1e6)
    rows, columns = linear_sum_assignment(distance)
    near = distance[rows, columns] < 1e6
    rows, columns = rows[near], columns[near]
    apart = distance[rows, columns]
    return Boxes(
        detections=len(boxes),
        reference=len(others),
        found=int((apart <= near_m).sum()),
        near_m=near_m,
        median_m=float(np.median(apart)) if len(apart) else 0.0,
        largest_m=float(apart.max()) if len(apart) else 0.0,
        score=float(np.abs(scores[rows] - other_scores[columns]).max()) if len(apart) else 0.0,
    )
