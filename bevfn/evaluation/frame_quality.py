"""Which key frames went best and worst: found boxes, missed boxes and false alarms, counted frame by frame.

A frame's quality is F1 = 2 found / (annotated + predicted), matched at 2 m as the devkit does, at the one score threshold
that makes the F1 of all frames together the highest. A picture needs such a threshold; the devkit's AP does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bevfn.data.index import Frame, Index
from bevfn.evaluation.recall import match
from bevfn.evaluation.results import RANGES

DISTANCE = 2.0  # m


@dataclass(frozen=True)
class Counted:
    """One key frame at the ranking's threshold."""

    token: str
    annotated: int
    predicted: int
    found: int

    @property
    def f1(self) -> float:
        """2 found / (annotated + predicted), 0..1."""
        return 2 * self.found / max(1, self.annotated + self.predicted)


@dataclass(frozen=True)
class Ranking:
    """The key frames with annotations, best first."""

    frames: tuple[Counted, ...]
    score_threshold: float
    """The lowest score that counts as a prediction."""

    def ends(self, count: int) -> tuple[tuple[Counted, ...], tuple[Counted, ...]]:
        """(the best, the worst): up to `count` each, no frame in both, the worst one last."""
        best = self.frames[: min(count, -(-len(self.frames) // 2))]
        return best, self.frames[max(len(best), len(self.frames) - count) :]


@dataclass(frozen=True)
class Matched:
    """One key frame's annotations that count (G) and predictions in falling order of score (n)."""

    annotated: np.ndarray
    """[G] int64: rows of the Frame's boxes."""
    order: np.ndarray
    """[n] int64: places in the frame's list of results."""
    scores: np.ndarray
    """[n]."""
    takes: np.ndarray
    """[n] int64: which of `annotated` a prediction found, -1 for a false alarm."""


def match_all(index: Index, results: Mapping[str, Any], ranges: Mapping[str, float] = RANGES) -> dict[str, Matched]:
    """`compare` of every frame of `index` and its detections in a results document, by token."""
    return {frame.token: compare(frame, results["results"].get(frame.token, []), ranges) for frame in index}


def rank(index: Index, results: Mapping[str, Any], ranges: Mapping[str, float] = RANGES) -> Ranking:
    """Ranks the frames of `index` by their detections in a results document; ties in the index' order. ranges: as of
    `compare`."""
    return ranked(match_all(index, results, ranges))


def ranked(matched: Mapping[str, Matched]) -> Ranking:
    """`rank` of what has been matched, by token."""
    matched = {token: m for token, m in matched.items() if len(m.annotated)}
    threshold = _best_threshold(list(matched.values()))
    counted = []
    for token, m in matched.items():
        sure = m.scores >= threshold
        counted.append(Counted(token, len(m.annotated), int(sure.sum()), int((m.takes[sure] >= 0).sum())))
    return Ranking(tuple(sorted(counted, key=lambda c: -c.f1)), threshold)


def compare(frame: Frame, entries: list[dict], ranges: Mapping[str, float] = RANGES) -> Matched:
    """Matches one key frame's results entries with its annotations in range, within each class.

    ranges: the classes that count, and the distance [m] from the ego vehicle below which they do.
    """
    names = np.array(frame.names, dtype=object)
    centres = offsets(frame, frame.boxes)  # G 2
    annotated = np.flatnonzero(frame.valid & _in_range(centres, names, ranges))
    named = np.array([entry["detection_name"] for entry in entries], dtype=object)
    placed = np.array([entry["translation"][:2] for entry in entries], dtype=np.float64).reshape(-1, 2)  # n 2
    placed -= frame.global_from_ego[:2, 3]
    scores = np.array([entry["detection_score"] for entry in entries], dtype=np.float64)
    order = np.argsort(-scores, kind="stable")
    order = order[_in_range(placed, named, ranges)[order]]
    takes = np.full(len(order), -1, dtype=np.int64)
    for name in set(named[order]):
        mine = np.flatnonzero(named[order] == name)
        theirs = np.flatnonzero(names[annotated] == name)
        taken = match(placed[order[mine]], centres[annotated[theirs]], DISTANCE)
        takes[mine[taken >= 0]] = theirs[taken[taken >= 0]]
    return Matched(annotated, order, scores[order], takes)


def offsets(frame: Frame, boxes: np.ndarray) -> np.ndarray:
    """[G,2]: where boxes [G,>=3] of the frame's lidar frame are from the ego vehicle, x and y in the world's directions [m]."""
    centres = boxes[:, :3] @ frame.global_from_lidar[:3, :3].T + frame.global_from_lidar[:3, 3]
    return centres[:, :2] - frame.global_from_ego[:2, 3]


def _in_range(offset: np.ndarray, names: np.ndarray, ranges: Mapping[str, float]) -> np.ndarray:
    """offset [n,2] from the ego vehicle, names [n] -> [n] bool; nothing else than the classes of `ranges` is in range."""
    reach = np.array([ranges.get(name, 0.0) for name in names])
    return np.linalg.norm(offset, axis=1) < reach


def _best_threshold(matched: list[Matched]) -> float:
    """The score at which all frames together have the highest F1; the highest score if nothing is ever found."""
    scores = np.concatenate([m.scores for m in matched] or [np.zeros(0)])
    if not len(scores):
        return 0.0
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(np.concatenate([m.takes >= 0 for m in matched])[order])
    f1 = 2 * found / (sum(len(m.annotated) for m in matched) + np.arange(1, len(scores) + 1))
    # all predictions of one score come together, so only the last one of a score is a threshold
    last = np.append(np.diff(scores[order]) != 0, True)
    return float(scores[order][last][np.argmax(f1[last])])
