"""AWML's rules for T4 annotations, against what AWML itself made of them (../shared/goldens/recipe_bevnext_awml)."""

import json
from pathlib import Path

import numpy as np
import pytest

from bevfn.data import t4_classes
from bevfn.data.t4_classes import CLASSES, MAPPING, Objects, Rules

GOLDEN = Path(__file__).parents[1].parent / "shared/goldens/recipe_bevnext_awml"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared (goldens of AWML's recipe) is not here")
RULES = Rules()


def objects(rows: list[dict]) -> Objects:
    """Of annotations as the golden files have them."""
    boxes = [[*r["position"], *np.array(r["size_wlh"])[[1, 0, 2]], r["yaw"]] for r in rows]
    points = np.array([r["num_lidar_pts"] for r in rows])
    return Objects(
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 7),
        velocities=np.array([r["velocity"] for r in rows], dtype=np.float64).reshape(-1, 2),
        points=points,
        categories=tuple(r["category"] for r in rows),
        attributes=tuple(tuple(r["attributes"]) for r in rows),
        valid=t4_classes.lidar_valid(points),
    )


@golden
def test_every_category_with_every_attribute():
    told = json.loads((GOLDEN / "awml_classes.json").read_text())
    assert tuple(told["class_names"]) == CLASSES
    for category, row in told["category_table"].items():
        assert RULES.name(category) == row["mapped_to"] and (category in MAPPING) == row["in_mapping"], category
        assert RULES.label(category) == row["label"], category
        dropped = [a for a in told["attributes_tried"] if RULES.label(category, (a,)) != row["label"]]
        assert sorted(dropped) == sorted(row["dropped_by_attributes"]), category
        assert RULES.label(category, told["attributes_tried"]) == -1 or not dropped  # also among others
    assert set(MAPPING) <= set(told["category_table"])
    fast = t4_classes.clipped(np.array([[40.0, 40.0], [3.0, 4.0], [np.nan, np.nan], [0.0, 0.0]]))
    np.testing.assert_allclose(fast[0], told["velocity_clip_input_40_40"], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(fast[1:], [[3, 4], [np.nan, np.nan], [0, 0]])


@golden
def test_every_merge():
    for name, case in json.loads((GOLDEN / "awml_merge.json").read_text()).items():
        made = t4_classes.merge(objects(case["input"]), RULES)
        want = case["output"]
        assert len(made) == len(want), name
        np.testing.assert_allclose(made.boxes, [w["bbox_3d"] for w in want], rtol=0, atol=1e-9, err_msg=name)
        velocities = np.array([w["velocity"] for w in want], dtype=np.float64)
        np.testing.assert_allclose(made.velocities, velocities, rtol=0, atol=1e-9, err_msg=name)
        np.testing.assert_array_equal(t4_classes.labels(made, RULES), [w["label"] for w in want], name)
        np.testing.assert_array_equal(made.points, [w["num_lidar_pts"] for w in want], name)
        np.testing.assert_array_equal(made.valid, [w["bbox_3d_isvalid"] for w in want], name)
        assert made.categories == tuple(w["gt_nusc_name"] for w in want), name
        assert [set(a) for a in made.attributes] == [set(w["gt_attrs_as_a_set"]) for w in want], name


def test_a_merge_does_not_depend_on_where_the_world_is_turned():
    """The rule is about boxes, so a turned and shifted world has turned and shifted boxes."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = [
            {
                "category": category,
                "attributes": [],
                "position": [*rng.uniform(-8, 8, 2), 1.5],
                "size_wlh": rng.uniform([2, 4, 2], [3, 12, 4]),
                "yaw": rng.uniform(-3, 3),
                "velocity": [0, 0],
                "num_lidar_pts": 1,
            }
            for category in ("truck", "trailer", "truck", "car")
        ]
        found = objects(rows)
        angle, shift = rng.uniform(-3, 3), rng.uniform(-20, 20, 2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        moved = found.boxes.copy()
        moved[:, :2] = moved[:, :2] @ turn.T + shift
        moved[:, 6] += angle
        here, there = (t4_classes.merge(o, RULES) for o in (found, Objects(**{**vars(found), "boxes": moved})))
        assert here.sources == there.sources
        want = here.boxes.copy()
        want[:, :2] = want[:, :2] @ turn.T + shift
        want[:, 6] += angle
        np.testing.assert_allclose(there.boxes, want, atol=1e-9)


def test_objects_know_where_they_come_from_and_nothing_may_be_there():
    none = objects([])
    assert len(t4_classes.merge(none, RULES)) == 0 and len(t4_classes.labels(none, RULES)) == 0
    row = {"attributes": [], "size_wlh": [2, 6, 3], "yaw": 0, "velocity": [0, 0], "num_lidar_pts": 1}
    places = {"car": 40, "trailer": -7, "truck": 0}
    rows = [row | {"category": name, "position": [x, 0, 1]} for name, x in places.items()]
    made = t4_classes.merge(objects(rows), RULES)
    assert made.sources == (2, 0) and made.categories == ("truck", "car")


def test_rules_of_ones_own():
    own = Rules(classes=("cone",), mapping={"movable_object.trafficcone": "cone"}, merged=(), dropped=frozenset())
    assert own.label("movable_object.trafficcone") == 0 and own.label("car") == -1
