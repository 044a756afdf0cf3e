"""All that a report says beyond the means, as plain data: for its page, and for metrics.json under "breakdown"."""

import math
from typing import Any

import numpy as np

from bevfn.evaluation import calibration, confusion, slices
from bevfn.evaluation.outcomes import ERRORS, Outcomes
from bevfn.evaluation.slices import ALL, Slice

EDGES = {  # of the histograms of errors; what is larger is in the last bin
    "centre [m]": np.linspace(0, 2, 21),
    "size [1 - IoU]": np.linspace(0, 1, 21),
    "yaw [rad]": np.linspace(0, math.pi, 25),
    "velocity [m/s]": np.linspace(0, 5, 26),
}


def of(outcomes: Outcomes, threshold: float) -> dict[str, Any]:
    """Plain data, None where a number would mean nothing. threshold: the score from which recall, confusion, errors and scenes count
    detections."""
    labels = {ALL: None} | {name: i for i, name in enumerate(outcomes.classes)}
    parts = slices.every(outcomes)
    return {
        "threshold": threshold,
        "classes": list(outcomes.classes),
        "slices": {
            what: {
                name: [{"part": one.name} | slices.counted(outcomes, one, threshold, label) for one in some]
                for name, label in labels.items()
            }
            for what, some in parts.items()
        },
        "confusion": confusion.matrix(outcomes, threshold).tolist(),
        "calibration": {name: _calibrated(calibration.measure(outcomes, label)) for name, label in labels.items()},
        "errors": {name: errors(outcomes, threshold, label) for name, label in labels.items()},
        "scenes": scenes(outcomes, threshold),
    }


def _calibrated(one: calibration.Calibration) -> dict[str, Any]:
    return {
        "hits": one.hits.tolist(),
        "false_alarms": one.alarms.tolist(),
        "score": _finite(one.score),
        "share": _finite(one.share),
        "error": _finite(np.array([one.error]))[0],
    }


def errors(outcomes: Outcomes, threshold: float, label: int | None = None) -> dict[str, dict[str, Any]]:
    """Of each of ERRORS the "edges" of bins, "counts" of the detections that found a box, their "median" and 90th percentile "p90";
    of a class, or of all."""
    d = outcomes.detected
    mine = outcomes.sure(threshold) & (d.takes >= 0) & ((d.label == label) | (label is None))
    told = {}
    for name, values in zip(ERRORS, d.errors[mine].T):
        known, edges = values[np.isfinite(values)], EDGES[name]
        median, p90 = np.quantile(known, [0.5, 0.9]).tolist() if len(known) else (None, None)
        counts = np.histogram(np.minimum(known, edges[-1]), edges)[0].tolist()
        told[name] = {"edges": edges.round(4).tolist(), "counts": counts, "median": median, "p90": p90}
    return told


def scenes(outcomes: Outcomes, threshold: float) -> list[dict[str, Any]]:
    """A row of each scene, the worst first: "scene", "frames", "annotated", "found", "false_alarms", "recall", "precision", "F1", and
    "AP" at 2 m, the mean over its classes."""
    a, d = outcomes.annotated, outcomes.detected
    names = np.array(outcomes.scenes, dtype=np.str_)
    found, sure, rows = outcomes.found(threshold), outcomes.sure(threshold), []
    for name in dict.fromkeys(outcomes.scenes):
        part = Slice(name, names[a.frame] == name, names[d.frame] == name)
        counted = slices.counted(outcomes, part, threshold)
        boxes, right = int(part.annotated.sum()), int((part.annotated & found).sum())
        assert part.detected is not None
        shown = int((part.detected & sure).sum())
        rows.append(
            {"scene": name, "frames": int((names == name).sum()), "annotated": boxes, "found": right}
            | {"false_alarms": shown - right, "recall": counted["recall"]}
            | {"precision": right / shown if shown else None}
            | {"F1": 2 * right / (boxes + shown) if boxes else None, "AP": counted["AP"]}
        )
    return sorted(rows, key=lambda row: math.inf if row["F1"] is None else row["F1"])


def _finite(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
