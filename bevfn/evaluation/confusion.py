"""Which classes are taken for which: a matrix of annotated classes over detected ones, with what was missed and what is nothing."""

import numpy as np

from bevfn.evaluation.frame_quality import DISTANCE
from bevfn.evaluation.outcomes import Outcomes
from bevfn.evaluation.recall import match


def matrix(outcomes: Outcomes, threshold: float) -> np.ndarray:
    """[C+1,C+1] int64: row: annotated class, the last: nothing was there; column: detected class, the last: missed.

    The diagonal has the boxes that are found, as everywhere: within their class at 2 m, by detections with such a score or a higher
    one. A detection that found none then takes the nearest box within 2 m that is still free, of another class, surer ones first.
    """
    a, d, count = outcomes.annotated, outcomes.detected, len(outcomes.classes)
    found, sure = outcomes.found(threshold), outcomes.sure(threshold)
    counts = np.zeros((count + 1, count + 1), dtype=np.int64)
    np.add.at(counts, (a.label[found], a.label[found]), 1)
    missed, alarms = np.flatnonzero(~found), np.flatnonzero(sure & (d.takes < 0))
    taken = np.full(len(alarms), -1)
    of_frame = _starts(a.frame[missed], len(outcomes.scenes)), _starts(d.frame[alarms], len(outcomes.scenes))
    for n in range(len(outcomes.scenes)):
        theirs, ours = (slice(starts[n], starts[n + 1]) for starts in of_frame)
        of_them = match(d.place[alarms[ours]], a.place[missed[theirs]], DISTANCE)
        taken[ours] = np.where(of_them >= 0, of_them + theirs.start, -1)
    right = taken >= 0
    np.add.at(counts, (a.label[missed[taken[right]]], d.label[alarms[right]]), 1)
    np.add.at(counts, (np.full((~right).sum(), count), d.label[alarms[~right]]), 1)
    left = np.delete(missed, taken[right])
    np.add.at(counts, (a.label[left], np.full(len(left), count)), 1)
    return counts


def _starts(frames: np.ndarray, count: int) -> np.ndarray:
    """Of rows in order of their frame: where each frame's begin, and the end."""
    return np.searchsorted(frames, np.arange(count + 1))
