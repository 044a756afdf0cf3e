"""Distances between boxes of two ways of computing a model: what is told of boxes that are known to be apart."""

import numpy as np
import pytest

from bevfn.evaluation import apart
from bevfn.evaluation.results import Detections


def frame(boxes: int = 20, seed: int = 0) -> Detections:
    """Boxes that are 5 m apart, of two classes, half of them below the least score."""
    rng = np.random.default_rng(seed)
    made = rng.normal(0, 1, (boxes, 9)).astype(np.float32)
    made[:, 0] = 5.0 * np.arange(boxes)
    return Detections(made, np.linspace(0.9, 0.01, boxes), np.arange(boxes) % 2)


def moved(detections: Detections, column: int, by: float) -> Detections:
    boxes = detections.boxes.copy()
    boxes[:, column] += by
    return Detections(boxes, detections.scores, detections.labels)


COLUMNS = {"centre [m]": 2, "size [m]": 4, "yaw [rad]": 6, "velocity [m/s]": 8}


@pytest.mark.parametrize("name", COLUMNS)
def test_boxes_that_moved_are_apart_by_that_much(name):
    sure = frame()
    counted = int((sure.scores >= apart.LEAST).sum())
    for by, ok in ((0.5 * apart.STATED[name], True), (1.5 * apart.STATED[name], False)):
        order = np.random.default_rng(1).permutation(len(sure.scores))
        other = moved(sure, COLUMNS[name], by)
        other = Detections(other.boxes[order], other.scores[order], other.labels[order])
        found = apart.measure({"a": sure}, {"a": other})
        assert (found.boxes, found.matched, found.ok) == (counted, counted, ok)
        assert found.distances[name] == pytest.approx(by, abs=1e-5)
        assert all(found.distances[other_name].max() < 1e-6 for other_name in apart.STATED if other_name != name)
        assert found.numbers()[name]["p99"] == pytest.approx(by, abs=1e-5)
        assert f"{name:<15} median" in found.text("fp32", "fp16")


def test_a_turn_is_told_over_the_end_of_the_circle_and_scores_by_their_difference():
    sure = frame(1)
    boxes = sure.boxes.copy()
    sure.boxes[:, 6], boxes[:, 6] = np.pi - 0.01, -np.pi + 0.02
    found = apart.measure({"a": sure}, {"a": Detections(boxes, sure.scores - 0.5, sure.labels)})
    assert found.distances["yaw [rad]"] == pytest.approx(0.03, abs=1e-5) and found.distances["score"] == pytest.approx(
        0.5
    )


def test_a_box_that_is_lost_is_within_nothing():
    sure = frame()
    fewer = Detections(sure.boxes[1:], sure.scores[1:], sure.labels[1:])
    other_class = Detections(sure.boxes, sure.scores, 1 - sure.labels)
    for other, lost in ((fewer, 1), (other_class, int((sure.scores >= apart.LEAST).sum()))):
        found = apart.measure({"a": sure}, {"a": other})
        assert found.matched == found.boxes - lost and not found.ok
        assert found.within("score") == pytest.approx(found.matched / found.boxes)


def test_without_a_box_nothing_is_proved():
    nothing = Detections(np.zeros((0, 9)), np.zeros(0), np.zeros(0, np.int64))
    found = apart.measure({"a": nothing}, {"a": frame()})
    assert not found.ok and found.numbers()["boxes"] == 0 and "0 of 0 boxes" in found.text("fp32", "fp16")
