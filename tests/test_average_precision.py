"""Average precision: nuScenes' own without the envelope, and the rules for edges that perception_eval adds."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bevfn.evaluation.average_precision import Ranked, average_precision, best_f1, curve


def ranked(found: list[int], scores: list[float] | None = None, weights: list[float] | None = None) -> Ranked:
    hits = np.array(found, dtype=bool)
    falling = np.linspace(0.9, 0.1, len(hits)) if scores is None else np.array(scores, dtype=float)
    return Ranked(falling, np.array(weights, dtype=float) if weights else hits.astype(float), hits)


def ap(found: list[int], annotated: int, envelope: bool = True) -> float:
    precision, recall, _ = curve(ranked(found), annotated)
    return average_precision(precision, recall, envelope=envelope)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=60), st.integers(0, 20))
@settings(max_examples=60)
def test_without_envelope_it_is_the_devkits(found, missed):
    from nuscenes.eval.detection.algo import calc_ap
    from nuscenes.eval.detection.data_classes import DetectionMetricData

    hits, annotated = np.cumsum(found), sum(found) + missed
    if not annotated or not hits[-1]:
        return  # the devkit does not come so far
    made = DetectionMetricData.no_predictions()
    precision, recall = hits / np.arange(1, len(found) + 1), hits / annotated
    made.precision = np.interp(np.linspace(0, 1, 101), recall, precision, right=0)
    ours = ap(found, annotated, envelope=False)
    assert ours == pytest.approx(calc_ap(made, 0.1, 0.1), abs=1e-12)
    assert ours <= ap(found, annotated) + 1e-12 <= 1 + 2e-12


def test_edges():
    assert ap([], 3) == 0.0 and ap([0, 0], 3) == 0.0 and ap([1], 0) == 0.0
    assert ap([1, 1, 1], 3) == pytest.approx(1.0)
    assert ap([1], 10) == 0.0  # recall 0.1 does not count
    assert ap([1] * 7 + [0], 10) == pytest.approx(59 / 90)  # 7/10 lies below the grid's 0.7000000000000001


def test_of_equal_scores_the_last_listed_comes_first_however_many_there_are():
    for count in (3, 40):
        precision, recall, scores = curve(ranked([1] + [0] * (count - 1), scores=[0.5] * count), 1)
        assert precision.tolist() == [0.0] * (count - 1) + [1 / count] and recall[-1] == 1.0
        assert scores.tolist() == [0.5] * count


def test_a_weighted_hit_lowers_both_but_is_no_false_alarm():
    precision, recall, _ = curve(ranked([1, 0, 1], weights=[0.5, 0.0, 0.0]), 2)
    assert precision.tolist() == [1.0, pytest.approx(1 / 3), pytest.approx(1 / 3)]
    assert recall.tolist() == [0.25, 0.25, 0.25]
    assert curve(ranked([1], weights=[0.0]), 1)[0].tolist() == [0.0]  # 0 / 0


def test_the_first_highest_f1_says_its_score():
    best = best_f1(*curve(ranked([1, 0, 1, 0]), 2))
    assert (best.f1, best.precision, best.recall) == pytest.approx((0.8, 2 / 3, 1.0))
    assert best.score == pytest.approx(0.9 - 1.6 / 3)
    assert all(math.isnan(value) for value in vars(best_f1(*curve(ranked([0, 0]), 2))).values())
    assert math.isnan(best_f1(*curve(ranked([]), 2)).f1)
