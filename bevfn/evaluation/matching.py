"""Which prediction takes which annotated box: greedy, in order of precedence, as all driving data sets score detections."""

import numpy as np


def assign(cost: np.ndarray, limit: float) -> np.ndarray:
    """Which annotated box each prediction takes, [P] int64, -1 for none.

    cost [P,G]: what a pair costs, predictions in order of precedence; inf where it may not be. Each prediction in turn
    takes the cheapest box that is still free, the first of equals, if it costs less than limit. So the first n rows of
    the answer do not depend on the rest. Values of which more is better come with their sign changed, and so does limit.

    Source: nuscenes-devkit, eval/detection/algo.py, the matching of `accumulate`.
    """
    taken = np.full(len(cost), -1, dtype=np.int64)
    free = np.where(cost < limit, cost, np.inf)
    # One after another, as the devkit does: an optimal assignment would let a weak prediction displace a sure one.
    for i in np.flatnonzero((free < np.inf).any(axis=1)):
        nearest = int(np.argmin(free[i]))
        if free[i, nearest] < np.inf:
            taken[i] = nearest
            free[:, nearest] = np.inf  # a box is found once
    return taken
