"""What a report breaks scores down by, against cases made by hand, and against the devkit where it counts the same."""

import dataclasses
import json
import math

import numpy as np
import pytest
import small_world
from small_world import document, index

from bevfn.evaluation import breakdown, calibration, confusion, frame_quality, interactive, outcomes, score, slices
from bevfn.evaluation.outcomes import Annotated, Detected, Outcomes
from bevfn.evaluation.results import RANGES, Detections
from bevfn.files import to_json

CAR, TRUCK = 0, 1


def case(annotated: list[tuple], detected: list[tuple]) -> Outcomes:
    """annotated: (frame, label, x, length, points, visibility); detected: (frame, label, x, length, score, row that it takes)."""
    a, d = zip(*annotated), zip(*detected)
    frame, label, x, length, points, visibility = (np.array(column) for column in a)
    found = np.full(len(frame), -1.0)
    for *_, sure, row in detected:
        if row >= 0:
            found[row] = sure
    theirs = Annotated(frame, label, np.column_stack([x, 0 * x]), length, points, visibility, found)
    frame, label, x, length, sure, takes = (np.array(column) for column in d)
    errors = np.where((takes >= 0)[:, None], [[0.25, 0.125, 0.5, np.nan]], np.nan)
    return Outcomes(
        ("car", "truck"),
        ("a", "a", "b"),
        theirs,
        Detected(frame, label, np.column_stack([x, 0 * x]), length, sure, takes, errors),
    )


MADE = case(
    [
        (0, CAR, 5.0, 4.0, 50, "v80-100"),
        (0, CAR, 15.0, 4.0, 3, "v0-40"),
        (0, TRUCK, 25.0, 8.0, 30, "v80-100"),
        (2, CAR, 5.0, 4.0, -1, ""),
    ],
    [
        (0, CAR, 5.2, 4.0, 0.9, 0),
        (0, CAR, 25.5, 5.0, 0.8, -1),  # where the truck is
        (0, CAR, 8.0, 4.0, 0.7, -1),  # where nothing is
        (0, CAR, 15.1, 4.0, 0.2, 1),  # right, but below the threshold
        (2, TRUCK, 5.5, 4.0, 0.6, -1),  # where a car is
    ],
)


def test_recall_and_ap_by_distance_by_hand():
    near, middle, far = slices.every(MADE)["distance [m]"]
    assert (near.name, middle.name, far.name) == ("0-10", "10-20", "20-30")
    found = slices.counted(MADE, near, 0.5)
    assert (found["annotated"], found["found"], found["recall"]) == (2, 1, 0.5)
    # Of cars up to 10 m: the first is found at precision 1, the false alarm at 8 m follows; recall ends at 0.5.
    ap = found["AP"]
    precision, recall = np.array([1.0, 0.5]), np.array([0.5, 0.5])
    grid = np.interp(np.linspace(0, 1, 101), recall, precision, right=0)[11:]
    assert ap == pytest.approx(np.mean(np.maximum(grid - 0.1, 0)) / 0.9)
    # What found a box elsewhere is no false alarm here; recall counts from the threshold on, AP does not look at it.
    assert slices.counted(MADE, middle, 0.5)["recall"] == 0.0 and slices.counted(MADE, middle, 0.5)["AP"] > 0.9
    assert slices.counted(MADE, far, 0.5) == {"annotated": 1, "found": 0, "recall": 0.0, "AP": 0.0}


def test_what_false_alarms_have_not_gives_recall_alone():
    parts = slices.every(MADE)
    assert [part.name for part in parts["visibility"]] == ["v0-40", "v80-100"]
    low, high = (slices.counted(MADE, part, 0.5) for part in parts["visibility"])
    assert (low["recall"], high["recall"], low["AP"], high["AP"]) == (0.0, 0.5, None, None)
    assert [part.name for part in parts["LiDAR points"]] == ["1-5", "6-20", "21-100", "101+"]
    assert [int(part.annotated.sum()) for part in parts["LiDAR points"]] == [1, 0, 2, 0]  # one is unknown
    assert slices.counted(MADE, parts["LiDAR points"][1], 0.5)["recall"] is None
    assert [int(part.annotated.sum()) for part in parts["length [m]"]] == [0, 0, 3, 1, 0]


def test_confusion_by_hand():
    counts = confusion.matrix(MADE, 0.5)
    #                        car truck missed
    assert counts.tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert confusion.matrix(MADE, 0.1).tolist() == [[2, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert confusion.matrix(MADE, 0.95).tolist() == [[0, 0, 3], [0, 0, 1], [0, 0, 0]]


def test_a_confused_box_is_taken_once_by_the_surer():
    made = case(
        [(1, CAR, 5.0, 4.0, 9, "")],
        [(1, TRUCK, 5.5, 4.0, 0.9, -1), (1, TRUCK, 5.0, 4.0, 0.8, -1), (2, TRUCK, 5.0, 4.0, 0.9, -1)],
    )
    assert confusion.matrix(made, 0.0).tolist() == [[0, 1, 0], [0, 0, 0], [0, 2, 0]]


def test_calibration_by_hand():
    found = calibration.measure(MADE)
    bins = np.flatnonzero(found.hits + found.alarms)
    assert bins.tolist() == [4, 12, 14, 16, 18]  # 0.2 0.6 0.7 0.8 0.9
    assert found.hits[bins].tolist() == [1, 0, 0, 0, 1] and found.alarms[bins].tolist() == [0, 1, 1, 1, 0]
    assert found.error == pytest.approx((0.8 + 0.6 + 0.7 + 0.8 + 0.1) / 5)
    trucks = calibration.measure(MADE, TRUCK)
    assert trucks.alarms.sum() == 1 and trucks.hits.sum() == 0 and trucks.error == pytest.approx(0.6)
    one = dataclasses.replace(MADE, detected=dataclasses.replace(MADE.detected, score=np.ones(5)))
    assert calibration.measure(one).hits[-1] == 2  # a score of 1 is in the last bin


def test_errors_and_scenes_by_hand():
    told = breakdown.errors(MADE, 0.0)
    assert told["centre [m]"]["median"] == 0.25 and sum(told["centre [m]"]["counts"]) == 2
    assert told["centre [m]"]["counts"][2] == 2 and told["velocity [m/s]"]["median"] is None
    rows = breakdown.scenes(MADE, 0.5)
    assert [row["scene"] for row in rows] == ["b", "a"]  # the worst first
    assert rows[1] | {"AP": 0} == {
        "scene": "a", "frames": 2, "annotated": 3, "found": 1, "false_alarms": 2, "recall": 1 / 3, "precision": 1 / 3,
        "F1": 1 / 3, "AP": 0,
    }  # fmt: skip


def test_errors_of_pairs_by_hand():
    box = np.array([[1.0, 2.0, 0.0, 4.0, 2.0, 2.0, 3.0, 1.0, 0.0]])
    other = np.array([[4.0, 6.0, 9.0, 4.0, 2.0, 1.0, -3.0, 1.0, np.nan]])
    centre, size, yaw, velocity = outcomes.pair_errors(box, other)[0]
    assert (centre, size) == (5.0, 0.5) and yaw == pytest.approx(2 * math.pi - 6) and math.isnan(velocity)


def shaken(found: Detections) -> Detections:
    """Misses, double and false alarms, wrong classes; scores all different."""
    random = np.random.default_rng(len(found.boxes))
    boxes = np.concatenate([found.boxes[::2], found.boxes, found.boxes[:8]])
    boxes[:, :2] += random.normal(0, 0.7, (len(boxes), 2))
    labels = np.concatenate([found.labels[::2], found.labels, np.roll(found.labels[:8], 3)])
    return Detections(boxes, random.permutation(len(boxes)) / len(boxes), labels)


@pytest.fixture(scope="module")
def world() -> tuple[Outcomes, score.Scores]:
    made = document(shaken)
    found = outcomes.of(index(), made, frame_quality.match_all(index(), made), RANGES)
    return found, score.score(index(), made, tables=small_world.tables())


def test_the_ap_of_everything_is_the_devkits_at_2_m(world):
    found, scores = world
    whole = slices.Slice("", np.ones(len(found.annotated.label), bool), np.ones(len(found.detected.label), bool))
    for one in scores.classes:
        label = found.classes.index(one.name)
        assert (found.annotated.label == label).sum() == one.annotated
        if one.annotated:
            assert slices.precision_of(found, whole, label) == pytest.approx(one.ap_at[2], abs=2e-3), one.name


def test_parts_add_up_and_the_whole_is_strict_json(world):
    found, _ = world
    told = breakdown.of(found, 0.3)
    for what in ("distance [m]", "length [m]", "visibility"):
        assert sum(part["annotated"] for part in told["slices"][what][slices.ALL]) == len(found.annotated.label), what
    counts = np.array(told["confusion"])
    assert counts[:-1].sum() == len(found.annotated.label)  # each annotated box in one cell
    assert counts[:, :-1].sum() == found.sure(0.3).sum()  # and each detection
    assert np.trace(counts) == sum(row["found"] for row in told["scenes"]) == found.found(0.3).sum()
    every = told["calibration"][slices.ALL]
    assert sum(every["hits"]) + sum(every["false_alarms"]) == len(found.detected.score)
    assert sum(told["errors"][slices.ALL]["centre [m]"]["counts"]) == found.found(0.3).sum()
    assert json.loads(to_json(told)) == told and b"nan" not in to_json(told)


def test_a_class_called_all_is_one_class_of_the_report():
    """The choice of every class together is another than it, in the data and on the page."""
    told = breakdown.of(dataclasses.replace(MADE, classes=("all", "truck")), 0.5)
    of = told["slices"]["length [m]"]
    counts = [sum(one["annotated"] for one in of[name]) for name in (slices.ALL, "all", "truck")]
    assert counts == [4, 3, 1]
    alarms = [sum(told["calibration"][name]["false_alarms"]) for name in (slices.ALL, "all", "truck")]
    assert alarms == [3, 2, 1]
    options = interactive._options([slices.ALL, *told["classes"]])
    assert options.count("<option") == 3 and options.startswith('<option value="">all classes</option>')
    assert '<option value="all">all</option>' in options
