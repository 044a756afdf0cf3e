"""What scores mean: how many detections of a score are right, and how far that share is from the score."""

from dataclasses import dataclass

import numpy as np

from bevfn.evaluation.outcomes import Outcomes

BINS = 20


@dataclass(frozen=True)
class Calibration:
    """Of the detections of a class, or of all, in BINS equal bins of score from 0 to 1."""

    hits: np.ndarray
    """[BINS] int64: detections that found a box."""
    alarms: np.ndarray
    """[BINS] int64: those that found none."""
    score: np.ndarray
    """[BINS] float64: mean score; NaN of an empty bin."""

    @property
    def share(self) -> np.ndarray:
        """[BINS] float64: of detections that found a box; NaN of an empty bin."""
        total = self.hits + self.alarms
        return np.divide(self.hits, total, out=np.full(BINS, np.nan), where=total > 0)

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al. 2017, arXiv 1706.04599): |share - mean score|, weighted by the bins' detections;
        NaN without any."""
        total = self.hits + self.alarms
        if not total.sum():
            return float("nan")
        apart = np.abs(np.nan_to_num(self.share) - np.nan_to_num(self.score))
        return float((total * apart).sum() / total.sum())


def measure(outcomes: Outcomes, label: int | None = None) -> Calibration:
    """Of a class; None: of all."""
    d = outcomes.detected
    mine = np.ones(len(d.score), dtype=bool) if label is None else d.label == label
    score, right = d.score[mine], d.takes[mine] >= 0
    place = np.minimum((score * BINS).astype(np.int64), BINS - 1)  # a score of 1 is in the last
    hits, total = (np.bincount(place[chosen], minlength=BINS) for chosen in (right, slice(None)))
    sums = np.bincount(place, weights=score, minlength=BINS)
    mean = np.divide(sums, total, out=np.full(BINS, np.nan), where=total > 0)
    return Calibration(hits, total - hits, mean)
