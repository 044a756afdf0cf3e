"""AP and recall of parts of the annotated boxes: by distance, by size, by visibility, by LiDAR points.

AP at 2 m, as the devkit's curve and mean. What a detection outside of a part found is neither right nor wrong there, as COCO has it
for areas; a false alarm counts in the part that its own distance or size is of. It has no visibility and no points of its own, so by
these there is recall alone.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bevfn.evaluation.average_precision import Ranked, average_precision, curve
from bevfn.evaluation.outcomes import Outcomes

ALL = ""
"""what every class together is called in a breakdown: no class can have this name"""
LENGTHS = (0.0, 1.0, 2.5, 6.0, 10.0, math.inf)
POINTS = (1, 6, 21, 101, math.inf)


@dataclass(frozen=True)
class Slice:
    """A part of the annotated boxes."""

    name: str
    annotated: np.ndarray
    """[G] bool."""
    detected: np.ndarray | None
    """[n] bool: where false alarms count; None: nobody can tell."""


def every(outcomes: Outcomes) -> dict[str, list[Slice]]:
    """The parts by what they are told by; a visibility that no box has is none."""
    a, d = outcomes.annotated, outcomes.detected
    far, length = (np.linalg.norm(side.place, axis=1) for side in (a, d)), (a.length, d.length)
    most = float(np.linalg.norm(a.place, axis=1).max(initial=10.0))
    step = 10.0 if most <= 60 else 20.0
    edges = tuple(step * i for i in range(math.ceil(most / step) + 1))
    levels = sorted({level for level in a.visibility.tolist() if level}, key=_number)
    return {
        "distance [m]": list(_between(edges, *far)),
        "length [m]": list(_between(LENGTHS, *length)),
        "visibility": [Slice(level, a.visibility == level, None) for level in levels],
        "LiDAR points": list(_between(POINTS, a.points, None)),
    }


def counted(outcomes: Outcomes, part: Slice, threshold: float, label: int | None = None) -> dict[str, float | None]:
    """ "annotated", "found" and "recall" from a score on, and "AP" over all scores, of a class, or of all: their mean AP.

    None where nothing is annotated, or AP cannot be told.
    """
    mine = part.annotated if label is None else part.annotated & (outcomes.annotated.label == label)
    boxes, found = int(mine.sum()), int((mine & outcomes.found(threshold)).sum())
    labels = sorted(set(outcomes.annotated.label[mine].tolist()))
    aps = [ap for one in labels if (ap := precision_of(outcomes, part, one)) is not None]
    return {
        "annotated": boxes,
        "found": found,
        "recall": found / boxes if boxes else None,
        "AP": float(np.mean(aps)) if aps else None,
    }


def precision_of(outcomes: Outcomes, part: Slice, label: int) -> float | None:
    """AP at 2 m of a class in a part; None where nothing is annotated, or false alarms are of no part."""
    boxes = int((part.annotated & (outcomes.annotated.label == label)).sum())
    if not boxes or part.detected is None:
        return None
    d = outcomes.detected
    right = d.takes >= 0
    inside = part.detected.copy()
    inside[right] = part.annotated[d.takes[right]]
    mine = np.flatnonzero(inside & (d.label == label))
    ranked = Ranked(d.score[mine], right[mine].astype(np.float64), right[mine])
    precision, recall, _ = curve(ranked, boxes)
    return average_precision(precision, recall, envelope=False)


def _between(edges: tuple[float, ...], annotated: np.ndarray, detected: np.ndarray | None) -> Iterator[Slice]:
    """From each edge to below the next."""
    for low, high in itertools.pairwise(edges):
        inside = [None if v is None else (v >= low) & (v < high) for v in (annotated, detected)]
        last = high - 1 if edges is POINTS else high  # of counts, the last that is in it
        assert inside[0] is not None
        yield Slice(f"{low:g}+" if math.isinf(high) else f"{low:g}-{last:g}", inside[0], inside[1])


def _number(level: str) -> tuple[float, str]:
    """ "v0-40" before "v40-60"; levels without numbers by their letters."""
    first = re.search(r"\d+", level)
    return (float(first[0]) if first else math.inf, level)
