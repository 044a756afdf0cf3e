"""How far the boxes of one way of computing a model are from those of another: of fp16 from fp32, say.

Of every key frame each box of the reference, the surest first, takes the nearest box of its class that is still free and less than
NEAR away (`matching.assign`); of these pairs the distances are told. Boxes of a score below LEAST are left out of the reference,
since thousands of them mean nothing; a box takes any.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bevfn.evaluation.matching import assign
from bevfn.evaluation.results import Detections

LEAST = 0.1
"""score of a box of the reference that counts"""
NEAR = 1.0
"""m between the centres of one box and another that may be the same"""
STATED = {"centre [m]": 0.05, "size [m]": 0.05, "yaw [rad]": 0.05, "velocity [m/s]": 0.1, "score": 0.02}
"""what at least SHARE of the reference's boxes are apart at most"""
SHARE = 0.99


@dataclass(frozen=True)
class Apart:
    """Of all key frames: reference boxes that count, those that found theirs, and distances of the pairs by name, [matched]."""

    boxes: int
    matched: int
    distances: Mapping[str, np.ndarray]

    def within(self, name: str) -> float:
        """Share of the reference's boxes that found theirs within the stated distance; NaN where there are none."""
        return float((self.distances[name] <= STATED[name]).sum() / self.boxes) if self.boxes else float("nan")

    @property
    def ok(self) -> bool:
        """Whether all stated distances hold; without a box nothing does."""
        return all(self.within(name) >= SHARE for name in STATED)

    def numbers(self) -> dict[str, Any]:
        """For a JSON file: counts, and per distance its median, 99th percentile, largest and the share within what is stated."""
        told: dict[str, Any] = {"boxes": self.boxes, "matched": self.matched, "least_score": LEAST, "ok": self.ok}
        for name, found in self.distances.items():
            spread = np.quantile(found, [0.5, 0.99, 1.0]).tolist() if len(found) else [None] * 3
            told[name] = dict(zip(("median", "p99", "largest"), spread))
            told[name] |= {"stated": STATED[name], "share_within": self.within(name)}
        return told

    def text(self, one: str, other: str) -> str:
        """For a terminal; one, other: names of the reference and of what is compared."""
        lines = [
            f"{other} against {one}: {self.matched:,} of {self.boxes:,} boxes of score {LEAST} or more are found within {NEAR:g} m"
        ]
        for name, found in self.distances.items():
            middle, most, worst = np.quantile(found, [0.5, 0.99, 1.0]) if len(found) else [float("nan")] * 3
            verdict = "ok" if self.within(name) >= SHARE else "FAIL"
            lines.append(
                f"  {name:<15} median {middle:.1e}, 99 % {most:.1e}, largest {worst:.1e}; "
                f"{self.within(name):.1%} within {STATED[name]:g}: {verdict}"
            )
        return "\n".join(lines)


def measure(reference: Mapping[str, Detections], other: Mapping[str, Detections]) -> Apart:
    """Distances of `other` from the reference, both by token; boxes as `results.Detections`."""
    boxes, rows = 0, [np.zeros((0, len(STATED)))]
    for token, sure in reference.items():
        counted = np.flatnonzero(sure.scores >= LEAST)
        counted = counted[np.argsort(-sure.scores[counted], kind="stable")]
        boxes += len(counted)
        rows.append(_pairs(sure, counted, other[token]))
    distances = dict(zip(STATED, np.concatenate(rows).T))
    return Apart(boxes, sum(map(len, rows)), distances)


def _pairs(sure: Detections, counted: np.ndarray, other: Detections) -> np.ndarray:
    """[pairs, distances in the order of STATED] of a key frame; counted: of the reference's boxes, in order of precedence."""
    ours, theirs = sure.boxes[counted].astype(np.float64), other.boxes.astype(np.float64)
    cost = np.linalg.norm(ours[:, None, :3] - theirs[None, :, :3], axis=-1)
    cost[sure.labels[counted][:, None] != other.labels[None]] = np.inf
    taken = assign(cost, NEAR)
    found = np.flatnonzero(taken >= 0)
    a, b, scores = ours[found], theirs[taken[found]], (sure.scores[counted[found]], other.scores[taken[found]])
    turn = np.abs((a[:, 6] - b[:, 6] + np.pi) % (2 * np.pi) - np.pi)
    return np.column_stack(
        [
            cost[found, taken[found]],
            np.abs(a[:, 3:6] - b[:, 3:6]).max(1, initial=0.0),
            turn,
            np.linalg.norm(a[:, 7:9] - b[:, 7:9], axis=-1),
            np.abs(scores[0] - scores[1]),
        ]
    )
