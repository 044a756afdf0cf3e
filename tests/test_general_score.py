"""NDS over any class names: AWML's golden numbers, and the devkit's own on nuScenes."""

import numpy as np
import pytest
import small_world
import t4_cases
from small_world import annotations, index

from bevfn.data.reading import CLASS_NAMES, Reading
from bevfn.evaluation import general_score, results, score, t4_report
from bevfn.evaluation.results import RANGES, Detections
from bevfn.evaluation.t4_matching import Boxes, Frame

KEY = "nuscenes_1.1.9_t4metric"
RUNS = [
    pytest.param(path, run, id=f"{path.stem}-{run}")
    for path in t4_cases.CASES
    for run in t4_cases.read(path)["expected"].get(KEY, {})
]


@pytest.mark.skipif(not RUNS, reason=t4_cases.ABSENT)
@pytest.mark.parametrize("path, run", RUNS or [pytest.param(None, "", id="none")])
def test_every_number_of_a_golden_case(path, run):
    case = t4_cases.read(path)
    frames, reach = t4_cases.frames(case), 120.0
    if run.startswith("filter_as_pe"):  # what perception_eval keeps of 0-121 m
        least = dict(zip(case["config"]["labels"], case["config"]["min_point_numbers"]))
        frames, reach = [Frame(kept(one.annotated, least), kept(one.detected, least)) for one in frames], 121.0
    made = general_score.score(frames, dict.fromkeys(case["config"]["labels"], reach))
    expected = case["expected"][KEY][run]
    assert made.nds == pytest.approx(expected["nd_score"], abs=1e-6)
    assert made.mean_ap == pytest.approx(expected["mean_ap"], abs=1e-6)
    for ours, theirs in score.ERRORS.items():
        assert made.errors[ours] == pytest.approx(expected["tp_errors"][theirs], abs=1e-6)
    for one in made.classes:
        assert one.annotated == expected["num_gt"][one.name]
        assert one.ap == pytest.approx(expected["mean_dist_aps"][one.name], abs=1e-6)
        for distance, value in zip(score.DISTANCES, one.ap_at):
            assert value == pytest.approx(expected["label_aps"][one.name][str(distance)], abs=1e-6)
        for ours, theirs in score.ERRORS.items():
            assert one.errors[ours] == pytest.approx(expected["label_tp_errors"][one.name][theirs], abs=1e-6)


def kept(side: Boxes, least: dict[str, int]) -> Boxes:
    far = np.hypot(side.boxes[:, 0], side.boxes[:, 1])
    good = (far > 0) & (far < 121)
    if side.num_points is not None:
        good &= side.num_points >= np.array([least.get(name, 0) for name in side.labels])
    rows = np.flatnonzero(good)
    scores = None if side.scores is None else side.scores[rows]
    return Boxes(side.boxes[rows], tuple(side.labels[i] for i in rows), scores)


def shaken(found: Detections) -> Detections:
    rng = np.random.default_rng(len(found.boxes))
    away = np.array([1.0, 1.0, 0.2, 0.1, 0.1, 0.1, 0.4, 1.0, 1.0])
    return Detections(found.boxes + rng.normal(0, 0.5, found.boxes.shape) * away, found.scores, found.labels)


def test_nuscenes_scores_the_same_without_its_tables_but_for_attributes():
    found = {frame.token: shaken(annotations(frame)) for frame in index()}
    frames = t4_report.frames(index(), found, Reading())
    ours = general_score.score(frames, RANGES, version="v1.0-trainval", split="val")
    document = results.format(found, index(), class_names=CLASS_NAMES, meta=small_world.META)
    theirs = score.score(index(), document, tables=small_world.tables())
    assert (ours.frames, ours.version, ours.split) == (3, "v1.0-trainval", "val")
    assert 0.1 < ours.mean_ap == pytest.approx(theirs.mean_ap, abs=1e-9)
    for name in ("ATE", "ASE", "AOE", "AVE"):  # the devkit turns boxes with the tilt of the road
        assert ours.errors[name] == pytest.approx(theirs.errors[name], abs=1e-3)
    assert ours.errors["AAE"] == 1.0
    by_name = {one.name: one for one in ours.classes}
    assert all(by_name[one.name].annotated == one.annotated for one in theirs.classes)
    assert "own classes and ranges: car 50 m, truck 50 m" in ours.rule


def test_what_cannot_be_counted():
    nothing = Boxes(np.zeros((0, 9)), ())
    with pytest.raises(ValueError, match="have no scores"):
        general_score.score([Frame(nothing, nothing)], {"tram": 50.0})
    silent = general_score.score([Frame(nothing, Boxes(np.zeros((0, 9)), (), np.zeros(0)))], {"tram": 50.0})
    assert silent.headline == {"NDS": 0.0, "mAP": 0.0, "mATE": 1.0, "mASE": 1.0, "mAOE": 1.0, "mAVE": 1.0, "mAAE": 1.0}


def test_of_a_frame_the_500_surest_detections_count():
    boxes = np.tile([10.0, 0.0, 0.0, 4.0, 2.0, 1.5, 0.0, 0.0, 0.0], (501, 1))
    boxes[:500, 0] = 40.0
    scores = np.linspace(0.9, 0.5, 501)
    annotated = Boxes(boxes[500:], ("tram",))
    one = Frame(annotated, Boxes(boxes, ("tram",) * 501, scores))
    assert (
        general_score.score([one], {"tram": 50.0}).classes[0].errors["ATE"] == 1.0
    )  # the last one, which fits, is cut
