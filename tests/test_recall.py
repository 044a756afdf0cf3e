"""Recall by centre distance: nuScenes' greedy matching, and what the table says."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bevfn.evaluation.recall import recall

NAMES = ("car", "truck", "pedestrian")


def boxes(*centres) -> np.ndarray:
    made = np.ones((len(centres), 9), dtype=np.float32)
    made[:, :2] = np.array(centres, dtype=np.float32).reshape(-1, 2)
    return made


def count(predicted, scores, labels, annotated, annotated_labels, **rule):
    labels, annotated_labels = np.array(labels, dtype=int), np.array(annotated_labels, dtype=int)
    return recall(
        boxes(*predicted), np.array(scores, dtype=float), labels, boxes(*annotated), annotated_labels,
        class_names=NAMES, **rule,
    )  # fmt: skip


def test_perfect_predictions_find_everything():
    result = count([(0, 0), (5, 5)], [0.9, 0.8], [0, 2], [(0, 0), (5, 5)], [0, 2])
    assert [row.name for row in result.rows] == ["car", "pedestrian"]
    assert all(row.recall == row.precision == 1.0 and row.centre_error_m == 0.0 for row in result.rows)
    assert result.total.found == 2


def test_a_box_is_found_once():
    result = count([(0, 0), (0.1, 0)], [0.9, 0.8], [0, 0], [(0, 0)], [0])
    assert (result.total.found, result.total.predicted, result.total.precision) == (1, 2, 0.5)


def test_the_surer_prediction_chooses_first_and_takes_the_nearest():
    # The sure one takes the box at 1.0; the other one then finds the box at 0 m only because it is within 2 m.
    result = count([(0.9, 0), (0.8, 0)], [0.5, 0.9], [0, 0], [(0, 0), (1, 0)], [0, 0])
    assert result.total.found == 2
    np.testing.assert_allclose(result.total.centre_error_m, (0.2 + 0.9) / 2, rtol=1e-5)


def test_greedy_like_nuscenes_even_where_another_assignment_finds_more():
    result = count([(0, 0), (-1.9, 0)], [0.9, 0.5], [0, 0], [(-0.05, 0), (1.8, 0)], [0, 0])
    assert result.total.found == 1


def test_classes_do_not_mix_and_distance_is_strict():
    assert count([(0, 0)], [0.9], [1], [(0, 0)], [0]).total.found == 0
    assert count([(2, 0)], [0.9], [0], [(0, 0)], [0]).total.found == 0
    assert count([(2, 0)], [0.9], [0], [(0, 0)], [0], distance_m=2.1).total.found == 1


def test_height_does_not_count():
    high = boxes((0, 0))
    high[:, 2] = 50.0
    result = recall(high, np.ones(1), np.zeros(1, int), boxes((0, 0)), np.zeros(1, int), class_names=NAMES)
    assert result.total.found == 1


def test_score_threshold_hides_predictions_and_nan_scores():
    result = count(
        [(0, 0), (9, 0), (20, 0)], [0.3, 0.1, np.nan], [0, 0, 0], [(0, 0), (9, 0)], [0, 0], score_threshold=0.2
    )
    assert (result.total.predicted, result.total.found) == (1, 1)


def test_nothing_to_divide_is_a_dash_and_no_warning():
    empty = count([], [], [], [], [])
    assert empty.rows == () and np.isnan(empty.total.recall)
    text = count([], [], [], [(0, 0)], [1]).table()
    assert "truck" in text and "0.00" in text and " - " in text and "car" not in text.split("found:")[0]


def test_table_states_the_rule_and_lines_up():
    lines = count([(0, 0)], [0.9], [0], [(0, 0)], [0]).table().splitlines()
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-1] == "found: same class, centre closer than 2 m from above, score >= 0.1"


def test_tensors_are_welcome():
    made = torch.from_numpy(boxes((0, 0)))
    label = torch.zeros(1, dtype=torch.int64)
    assert recall(made, torch.ones(1), label, made, label, class_names=NAMES).total.found == 1


@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(0, 12))
def test_found_never_exceeds_either_side_and_order_does_not_matter(seed, num_predicted, num_annotated):
    rng = np.random.default_rng(seed)
    predicted, annotated = (
        boxes(*rng.uniform(-5, 5, (num_predicted, 2))),
        boxes(*rng.uniform(-5, 5, (num_annotated, 2))),
    )
    scores, labels = rng.uniform(0, 1, num_predicted), rng.integers(0, 3, num_predicted)
    annotated_labels = rng.integers(0, 3, num_annotated)
    first = recall(predicted, scores, labels, annotated, annotated_labels, class_names=NAMES)
    for row in first.rows:
        assert row.found <= min(row.annotated, row.predicted)
    p, g = rng.permutation(num_predicted), rng.permutation(num_annotated)
    again = recall(predicted[p], scores[p], labels[p], annotated[g], annotated_labels[g], class_names=NAMES)
    assert again.table() == first.table()


def test_lengths_and_labels_are_checked():
    with pytest.raises(ValueError, match=r"recall got 1 boxes, 2 scores, 1 labels .* one score and label for each box"):
        count([(0, 0)], [0.9, 0.8], [0], [], [])
    with pytest.raises(ValueError, match=r"annotated_labels with 3, but there are 3 class names"):
        count([], [], [], [(0, 0)], [3])
    with pytest.raises(ValueError, match=r"labels with -1"):
        count([(0, 0)], [0.9], [-1], [], [])
