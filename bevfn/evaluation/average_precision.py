"""Average precision of one class at one threshold, from what its detections found: the curve, its mean, the best F1.

Sources: nuscenes-devkit eval/detection/algo.py (`calc_ap`: 101 recalls, none up to 0.1, precision above 0.1) and
tier4/autoware_perception_evaluation evaluation/metrics/detection/ap.py, by its definition.
"""

import math
from dataclasses import dataclass

import numpy as np

RECALLS = np.linspace(0.0, 1.0, 101)
MIN_RECALL, MIN_PRECISION = 0.1, 0.1


@dataclass(frozen=True)
class Ranked:
    """The n detections of one class in the order of an evaluator's result list (`curve` sorts them)."""

    scores: np.ndarray
    """[n] float64."""
    weights: np.ndarray
    """[n] float64: what a detection that found a box counts, 1 or less; 0 for a false alarm."""
    found: np.ndarray
    """[n] bool."""


@dataclass(frozen=True)
class Best:
    """Where F1 is highest; NaN throughout where there is no F1."""

    f1: float
    precision: float
    recall: float
    score: float


def curve(ranked: Ranked, annotated: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(precision [n], recall [n], scores [n]) in falling order of score; of equal scores the last listed comes first.

    Found boxes count by their weight in both numerators; false alarms count 1. 0 / 0 is 0. annotated: boxes there are.
    """
    # That of perception_eval, ascending and reversed. Beyond 16 entries numpy's default sort leaves equal scores in no
    # stated order; here it stays stable.
    order = np.argsort(ranked.scores, kind="stable")[::-1]
    hits = np.cumsum(ranked.weights[order])
    total = hits + np.cumsum(~ranked.found[order])
    precision = np.divide(hits, total, out=np.zeros(len(order)), where=total > 0)
    recall = hits / annotated if annotated else np.zeros(len(order))
    return precision, recall, ranked.scores[order]


def average_precision(precision: np.ndarray, recall: np.ndarray, *, envelope: bool = True) -> float:
    """Mean over the 90 recalls above 0.1 of what precision has above 0.1, 0..1 (up to rounding); 0 of an empty curve.

    precision, recall [n]: of `curve`. envelope: precision becomes the highest that is reached at that recall or a higher
    one; nuScenes leaves it as it is. Between points precision is linear; at one recall the last counts; beyond: 0.
    """
    if not len(precision):
        return 0.0
    if envelope:
        precision = np.maximum.accumulate(precision[::-1])[::-1]
    sampled = np.interp(RECALLS, recall, precision, right=0)[round(100 * MIN_RECALL) + 1 :]
    return float(np.mean(np.maximum(sampled - MIN_PRECISION, 0.0))) / (1.0 - MIN_PRECISION)


def best_f1(precision: np.ndarray, recall: np.ndarray, scores: np.ndarray) -> Best:
    """The first highest 2 p r / (p + r) of the curve, [n] each."""
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.full(len(total), -1.0), where=total > 0)
    if not len(f1) or f1.max() < 0:
        return Best(math.nan, math.nan, math.nan, math.nan)
    i = int(np.argmax(f1))
    return Best(float(f1[i]), float(precision[i]), float(recall[i]), float(scores[i]))
