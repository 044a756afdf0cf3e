"""mAP and mAPH of T4 data: equal to perception_eval's and AWML's golden numbers, and what the definition promises."""

import math
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import t4_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from bevfn.evaluation import t4_config, t4_report
from bevfn.evaluation.t4_config import AWML_V2, MODES, PE_1_3_6, PE_9D8C977, VERSIONS, Config
from bevfn.evaluation.t4_matching import Boxes, Frame
from bevfn.evaluation.t4_metric import Score, evaluate

RUNS = [
    pytest.param(path, version, id=f"{path.stem}-{version}")
    for path in t4_cases.CASES
    for version in t4_cases.read(path)["expected"]
    if version in VERSIONS
]
golden = pytest.mark.skipif(not RUNS, reason=t4_cases.ABSENT)


def same(ours: float | None, theirs: float | None, where: str) -> None:
    assert (ours is None) == (theirs is None), (where, ours, theirs)
    assert ours is None or abs(ours - theirs) <= 1e-6, (where, ours, theirs)


@golden
@pytest.mark.parametrize("path, version", RUNS or [pytest.param(None, "", id="none")])
def test_every_number_of_a_golden_case(path, version):
    case = t4_cases.read(path)
    made = evaluate(t4_cases.frames(case), t4_cases.config(case, version))
    for band, expected in case["expected"][version].items():
        if version.startswith("awml"):
            ours = awml_keys(made[band], case["num_frames"])
            assert set(expected) == set(ours)
            for name, value in expected.items():
                same(ours[name], value, f"{band} {name}")
        else:
            ours = t4_report.to_json(made)[band]
            for mode, score in expected.items():
                compare(ours[mode], score, f"{band} {mode}")


def compare(ours: dict, theirs: dict, where: str) -> None:
    """Numbers by name, thresholds by their value."""
    assert set(ours) == set(theirs), where
    for name, value in theirs.items():
        if name == "labels":
            for label, numbers in value.items():
                compare(ours[name][label], numbers, f"{where} {label}")
        elif name == "thresholds":
            expected = sorted(value, key=lambda one: one["threshold"])
            assert len(expected) == len(ours[name])
            for a, b in zip(ours[name], expected):
                compare(a, b, f"{where} at {b['threshold']}")
        else:
            same(ours[name], value, f"{where} {name}")


def awml_keys(modes: dict[str, Score], num_frames: int) -> dict[str, float | None]:
    """T4MetricV2's own names."""
    named: dict[str, float] = {"metadata/test_total_num_frames": num_frames}
    for mode, score in modes.items():
        named |= {f"T4MetricV2/mAP_{mode}": score.mean_ap, f"T4MetricV2/mAPH_{mode}": score.mean_aph}
        for label in score.labels:
            for one in label.at:
                best = one.best
                values = {"AP": one.ap, "max-f1score": best.f1, "optimal-confidence": best.score}
                values |= {"optimal-recall": best.recall, "optimal-precision": best.precision}
                for name, value in values.items():
                    named[f"T4MetricV2_label/{label.name}_{name}_{mode}_{one.threshold}"] = value
            named[f"metadata_label/test_{label.name}_num_predictions"] = label.at[0].num_pred
            named[f"metadata_label/test_{label.name}_num_ground_truths"] = label.num_gt
        named["metadata/test_total_num_ground_truths"] = sum(label.num_gt for label in score.labels)
        named["metadata/test_total_num_predictions"] = sum(label.at[0].num_pred for label in score.labels)
    return t4_report.finite(named)


ALL = replace(
    PE_9D8C977,
    labels=("car", "bus"),
    matching={mode: (0.3, 0.5, 0.9) if mode.startswith("iou") else (0.5, 1.0, 4.0) for mode in MODES},
    bands=((0.0, 40.0), (0.0, 121.0)),
)


@st.composite
def worlds(draw, most: int = 6) -> list[Frame]:
    """Frames of generic boxes, detections of some of them and others; no two scores are equal."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    made = []
    for _ in range(draw(st.integers(1, 3))):
        theirs, others = boxes(rng, draw(st.integers(0, most))), boxes(rng, draw(st.integers(0, most)))
        seen = theirs + rng.normal(0, draw(st.sampled_from([0.1, 1.0, 3.0])), theirs.shape) * AWAY
        ours = np.concatenate([seen[rng.random(len(seen)) < 0.8], others])
        labels = tuple(rng.choice(["car", "bus"], len(theirs))), tuple(rng.choice(["car", "bus"], len(ours)))
        made.append(Frame(Boxes(theirs, labels[0]), Boxes(ours, labels[1], rng.random(len(ours)))))
    return made


AWAY = np.array([1, 1, 0.2, 0.05, 0.05, 0.05, 0.5, 1, 1])


def boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    place, size = rng.uniform([-40, -40, -2], [40, 40, 2], (count, 3)), rng.uniform(1, 6, (count, 3))
    return np.concatenate([place, size, rng.uniform(-3.1, 3.1, (count, 1)), rng.normal(0, 5, (count, 2))], axis=1)


def flat(frames: list[Frame], config: Config = ALL) -> np.ndarray:
    """Every AP and APH."""
    scores = [score for modes in evaluate(frames, config).values() for score in modes.values()]
    at = [one for score in scores for label in score.labels for one in label.at]
    means = [value for score in scores for value in (score.mean_ap, score.mean_aph)]
    return np.array([*means, *(value for one in at for value in (one.ap, one.aph))])


@given(worlds(), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_order_does_not_matter_where_no_scores_are_equal(frames, seed):
    rng = np.random.default_rng(seed)

    def mixed(side: Boxes) -> Boxes:
        order = rng.permutation(len(side.boxes))
        scores = None if side.scores is None else side.scores[order]
        return Boxes(side.boxes[order], tuple(side.labels[i] for i in order), scores)

    others = [Frame(mixed(frame.annotated), mixed(frame.detected)) for frame in frames]
    np.testing.assert_allclose(flat([others[i] for i in rng.permutation(len(others))]), flat(frames), atol=1e-12)


@given(worlds())
@settings(max_examples=30)
def test_detections_that_are_the_annotations_score_1_in_every_mode(frames):
    rng = np.random.default_rng(0)
    perfect = [
        Frame(one.annotated, Boxes(one.annotated.boxes, one.annotated.labels, rng.random(len(one.annotated.boxes))))
        for one in frames
    ]
    values = flat(perfect)
    np.testing.assert_allclose(values[~np.isnan(values)], 1.0, atol=1e-12)
    inside = [np.hypot(*frame.annotated.boxes[:, :2].T) < 121 for frame in frames]
    assert np.isnan(values).all() == (not np.concatenate(inside).any())


@given(worlds(), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_a_false_alarm_less_never_costs_and_a_heading_never_pays(frames, seed):
    rng = np.random.default_rng(seed)
    config = replace(ALL, matching={"center_distance_bev": (2.0,)}, bands=((0.0, 121.0),))
    values = flat(frames, config).reshape(-1, 2)
    assert (np.nan_to_num(values[:, 1]) <= np.nan_to_num(values[:, 0]) + 1e-12).all()
    far = boxes(rng, 1) + np.array([200.0, 0, 0, 0, 0, 0, 0, 0, 0])  # of no annotation, but in range
    first = frames[0].detected
    alarm = Boxes(np.concatenate([first.boxes, far]), (*first.labels, "car"), np.append(first.scores, rng.random()))
    more = [Frame(frames[0].annotated, alarm), *frames[1:]]
    config = replace(config, bands=((0.0, 300.0),))
    before, after = flat(frames, config), flat(more, config)
    known = ~np.isnan(before)  # of a class without either, an alarm makes 0 of nothing
    assert (after[known][2:] <= before[known][2:] + 1e-12).all()


@given(worlds(), st.floats(-3, 3))
@settings(max_examples=20)
def test_a_turn_of_everything_changes_nothing_where_headings_keep_their_sign(frames, angle):
    cos, sin = math.cos(angle), math.sin(angle)

    def turned(side: Boxes) -> Boxes:
        moved = side.boxes.copy()
        moved[:, :2] = side.boxes[:, :2] @ np.array([[cos, sin], [-sin, cos]])
        moved[:, 6] += angle
        return Boxes(moved, side.labels, side.scores)

    others = [Frame(turned(frame.annotated), turned(frame.detected)) for frame in frames]
    config = replace(ALL, unsigned_yaw=False)
    np.testing.assert_allclose(flat(others, config), flat(frames, config), atol=1e-9)


# ------------------------------------------------------------------------------------- rules that no golden case shows


def box(x: float, y: float = 0.0, yaw: float = 0.0) -> list[float]:
    return [x, y, 0.0, 4.5, 1.8, 1.6, yaw, 0.0, 0.0]


def frame(annotated: list[tuple[str, list]], detected: list[tuple[str, list, float]]) -> Frame:
    theirs = Boxes(np.array([b for _, b in annotated]).reshape(-1, 9), tuple(name for name, _ in annotated))
    ours = np.array([b for _, b, _ in detected]).reshape(-1, 9)
    return Frame(theirs, Boxes(ours, tuple(name for name, *_ in detected), np.array([s for *_, s in detected])))


def score(one: Frame, config: Config) -> Score:
    (modes,) = evaluate([one], config).values()
    (found,) = modes.values()
    return found


def aps(found: Score) -> dict[str, float]:
    return {label.name: round(label.ap, 9) for label in found.labels}


BEV = replace(PE_1_3_6, labels=("car", "truck"), matching={"center_distance_bev": (1.0,)}, bands=((0.0, 100.0),))


def test_a_label_blind_pair_is_a_false_alarm_of_the_annotation():
    one = frame([("truck", box(10))], [("car", box(10), 0.9), ("truck", box(10.5), 0.8)])
    plain, blind = (score(one, replace(BEV, class_agnostic_false_positives=on)) for on in (False, True))
    assert [label.at[0].num_pred for label in plain.labels] == [1, 1]
    assert [label.at[0].num_pred for label in blind.labels] == [1, 1]  # the truck is taken by its own detection
    one = frame([("truck", box(10))], [("car", box(10), 0.9)])
    blind = score(one, replace(BEV, class_agnostic_false_positives=True))
    assert [label.at[0].num_pred for label in blind.labels] == [0, 1]
    assert math.isnan(blind.labels[0].ap) and blind.labels[1].ap == 0.0


def test_policies_pair_what_they_say():
    names = ("car", "truck", "pedestrian", "unknown", "hazard")
    theirs = [("truck", box(10)), ("pedestrian", box(30))]
    ours = [("car", box(10), 0.9), ("hazard", box(30), 0.8)]
    found = {
        (policy, version): [
            label.at[0].num_tp
            for label in score(frame(theirs, ours), replace(config, labels=names, policy=policy)).labels[1:3]
        ]
        for policy in ("DEFAULT", "ALLOW_ANY", "ALLOW_UNKNOWN", "ALLOW_SAME_GROUP")
        for version, config in (("new", BEV), ("old", replace(BEV, hazard_is_unknown=False)))
    }
    assert found["DEFAULT", "new"] == [0, 0] and found["ALLOW_ANY", "old"] == [1, 1]
    assert found["ALLOW_UNKNOWN", "new"] == [0, 1] and found["ALLOW_UNKNOWN", "old"] == [0, 0]
    assert found["ALLOW_SAME_GROUP", "new"] == [1, 1] and found["ALLOW_SAME_GROUP", "old"] == [1, 0]


def test_rows_give_every_label_its_own_thresholds():
    one = frame([("car", box(10)), ("truck", box(30))], [("car", box(10.7), 0.9), ("truck", box(30.7), 0.8)])
    rows = replace(BEV, matching={"center_distance_bev": ((0.5, 1.0), (1.0, 2.0))})
    assert rows.thresholds("center_distance_bev") == ((0.5, 1.0), (1.0, 2.0))
    found = score(one, rows)
    assert [[at.num_tp for at in label.at] for label in found.labels] == [[0, 1], [1, 1]]
    flat_row = replace(BEV, matching={"center_distance_bev": (0.5, 1.0)})
    assert aps(score(one, flat_row)) == {"car": 0.0, "truck": 1.0}
    assert aps(score(one, replace(flat_row, row_per_label=False))) == {"car": 0.5, "truck": 0.5}


def test_without_labels_a_false_alarm_counts_at_thresholds_of_other_labels_too():
    one = frame([("car", box(10)), ("truck", box(30))], [("car", box(10), 0.9), ("car", box(60), 0.8)])
    rows = replace(BEV, matching={"center_distance_bev": ((0.5, 2.0),)}, policy="ALLOW_ANY")
    (car, _) = score(one, rows).labels
    assert [(at.threshold, at.num_pred) for at in car.at] == [(0.5, 2), (2.0, 2)]
    (car, _) = score(one, replace(rows, policy="DEFAULT")).labels
    assert [at.threshold for at in car.at] == [0.5]


def test_a_label_without_annotations_counts_as_the_switch_says():
    one = frame([("car", box(10))], [("car", box(10), 0.9), ("truck", box(30), 0.8)])
    without = frame([("car", box(10))], [("car", box(10), 0.9)])
    means = {
        absent: [round(score(made, replace(BEV, absent=absent)).mean_ap, 9) for made in (one, without)]
        for absent in ("zero_if_detected", "skipped", "zero")
    }
    assert means == {"zero_if_detected": [0.5, 1.0], "skipped": [1.0, 1.0], "zero": [0.5, 0.5]}


def test_a_label_reaches_no_farther_than_its_region_of_interest():
    one = frame([("car", box(10)), ("car", box(60)), ("truck", box(60, 9))], [("truck", box(60, 9), 0.9)])
    near = score(one, replace(BEV, reach={"car": 50.0}))
    assert [label.num_gt for label in near.labels] == [1, 1] and near.labels[1].ap > 0.99
    assert [label.num_gt for label in score(one, BEV).labels] == [2, 1]


def test_published_map_with_heading_does_not_see_a_mirrored_heading():
    one = frame([("car", box(10, 0, 0.8))], [("car", box(10, 0, -0.8), 0.9)])
    assert score(one, BEV).mean_aph > 0.99
    assert score(one, replace(BEV, unsigned_yaw=False)).labels[0].at[0].heading_weighted_tp == round(
        1 - 1.6 / math.pi, 10
    )


def test_settings_of_awml_are_the_defaults_and_versions_differ_from_them_by_name():
    assert VERSIONS["awml_t4metric_v2"] == AWML_V2 == Config()
    assert AWML_V2.labels == t4_config.LABELS and AWML_V2.bands[-1] == (0.0, 121.0)


def test_the_page_about_the_metric_names_every_switch_with_its_default():
    page = (Path(__file__).parents[1] / "docs" / "t4_metrics.md").read_text()
    for switch in fields(Config):
        written = re.search(rf"^\| `{switch.name}` \| ([^|]*) \|", page, flags=re.MULTILINE)
        assert written, f"docs/t4_metrics.md has no row of {switch.name}"
        value = getattr(AWML_V2, switch.name)
        if isinstance(value, bool | str):
            assert written[1] == f"`{value}`", switch.name


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"labels": ()}, "must be different names"),
        ({"labels": ("car", "car")}, "must be different names"),
        ({"min_points": (1,)}, "must have one number for each of car, truck"),
        ({"policy": "ALLOW_UNKNOWN"}, "needs 'unknown' among the labels"),
        ({"reach": {"tram": 5.0}}, "reach names 'tram'"),
        ({"bands": ((5.0, 5.0),)}, "band 5-5 must go from"),
        ({"matching": {"iou_4d": (0.5,)}}, "mode 'iou_4d' is none of center_distance_bev"),
        ({"matching": {"iou_2d": ((0.5, 0.5, 0.5),)}}, "rows of one for each of 2 labels"),
        ({"matching": {"iou_2d": (math.nan,)}}, "must be numbers"),
        ({"matching": {"iou_2d": ()}}, "must be numbers"),
    ],
)
def test_a_config_that_cannot_be_says_why(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(BEV, **change)


def test_boxes_that_do_not_fit_together_and_detections_without_scores_are_refused():
    with pytest.raises(ValueError, match="do not fit together"):
        Boxes(np.zeros((2, 9)), ("car",))
    with pytest.raises(ValueError, match="do not fit together"):
        Boxes(np.zeros((1, 9)), ("car",), scores=np.zeros(3))
    nothing = Boxes(np.zeros((0, 9)), ())
    with pytest.raises(ValueError, match="have no scores"):
        evaluate([Frame(nothing, nothing)])
    made = evaluate([Frame(nothing, Boxes(np.zeros((0, 9)), (), np.zeros(0)))])
    assert all(math.isnan(score.mean_ap) for modes in made.values() for score in modes.values())
    assert len(evaluate([])) == 4
