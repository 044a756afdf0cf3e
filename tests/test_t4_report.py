"""T4 data are judged by the T4 metric: the same boxes in the ego frame, and all of it in table, report and metrics.json."""

import dataclasses
import json
import os

import numpy as np
import pytest
from small_world import annotations, index, nothing

from bevfn.data import annotations as ground_truth
from bevfn.data import source
from bevfn.data.batch import Base
from bevfn.data.reading import CLASS_NAMES, Cameras, Reading
from bevfn.evaluation import results, score, slices, t4_report
from bevfn.evaluation.judge import judge
from bevfn.evaluation.results import KNOWN_ATTRIBUTES
from bevfn.evaluation.t4_metric import band_name

T4 = dataclasses.replace(index(), metric="t4")
LIDAR = Reading()


def perfect() -> dict[str, results.Detections]:
    return {frame.token: annotations(frame) for frame in index()}


def test_annotations_and_perfect_detections_are_the_same_boxes_in_the_ego_frame():
    for key_frame, frame in zip(index(), t4_report.frames(T4, perfect(), LIDAR)):
        np.testing.assert_allclose(frame.annotated.boxes[:, :7], frame.detected.boxes[:, :7], atol=1e-9)
        assert frame.annotated.labels == frame.detected.labels and len(frame.annotated.labels)
        in_ego = (
            key_frame.boxes[key_frame.valid, :3] @ key_frame.ego_from_lidar[:3, :3].T + key_frame.ego_from_lidar[:3, 3]
        )
        known = np.array([bool(name) for name in key_frame.names])[key_frame.valid]
        np.testing.assert_allclose(frame.annotated.boxes[:, :3], in_ego[known], atol=1e-9)


def test_detections_of_a_camera_model_come_from_its_own_frame():
    """Boxes of `Base.EGO_AT_CAMERAS` lie where the cameras' mean vehicle was."""
    cameras = Reading(base=Base.EGO_AT_CAMERAS, cameras=Cameras())
    found = {}
    for frame in index():
        boxes, labels = ground_truth.boxes(frame, cameras.base, cameras.channels, CLASS_NAMES)
        found[frame.token] = results.Detections(boxes, np.linspace(0.9, 0.5, len(boxes)), labels)
    evaluated = t4_report.of(list(t4_report.frames(T4, found, cameras)), t4_report.config(CLASS_NAMES))
    assert evaluated.headline.mean_ap == pytest.approx(1.0)
    assert evaluated.signed > 0.98  # headings 1e-4 rad off do not reach recall 1, which is one point of 90


def test_a_perfect_detector_has_1_and_a_silent_one_0():
    evaluated = t4_report.of(list(t4_report.frames(T4, perfect(), LIDAR)), t4_report.config(CLASS_NAMES))
    assert (evaluated.headline.mean_ap, evaluated.headline.mean_aph, evaluated.signed) == pytest.approx((1.0, 1.0, 1.0))
    silent = {frame.token: nothing() for frame in index()}
    evaluated = t4_report.of(list(t4_report.frames(T4, silent, LIDAR)), t4_report.config(CLASS_NAMES))
    assert evaluated.headline.mean_ap == evaluated.signed == 0.0


def test_thresholds_are_for_all_classes_even_of_as_many():
    settings = t4_report.config(("car", "truck", "bus", "tram"))
    assert settings.thresholds("center_distance_bev") == ((0.5, 1.0, 2.0, 4.0),) * 4
    assert [band_name(band) for band in settings.bands] == ["0-50", "50-90", "90-121", "0-121"]


def test_judging_t4_data_writes_both_metrics(tmp_path):
    judged = judge(T4, perfect(), LIDAR, tmp_path, title="T4", counts={"overflow/points": 3.0, "points": 5.0})
    assert judged.value == pytest.approx(1.0) == judged.numbers["T4 mAP"] and judged.numbers["NDS"] > 0.3
    assert {"results_t4.json", "metrics.json", "summary.md", "report.html", "worst.png"} <= set(os.listdir(tmp_path))
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert set(stored["t4"]["bands"]) == {"0-50", "50-90", "90-121", "0-121"}
    assert stored["t4"]["bands"]["0-121"]["center_distance_bev"]["mAP"] == judged.value == stored["t4"]["mAP"]
    assert stored["t4"]["bands"]["90-121"]["plane_distance"]["mAP"] is None and stored["NDS"] == judged.numbers["NDS"]
    assert score.read(tmp_path / "metrics.json").rule.startswith("detection_cvpr_2019 with own classes")
    assert sum(part["found"] for part in stored["breakdown"]["slices"]["visibility"][slices.ALL]) > 0
    for text in (judged.text, (tmp_path / "summary.md").read_text(), (tmp_path / "report.html").read_text()):
        for word in (
            "T4 mAPH signed",
            "T4 metric by class",
            "T4 metric by range",
            "mAPH, plane distance",
            "overflow/points",
        ):
            assert word in text
    document = json.loads((tmp_path / "results_t4.json").read_text())
    listed = [entry for entries in document["results"].values() for entry in entries]
    assert listed and {entry["attribute_name"] for entry in listed} == {""}


def test_classes_of_ones_own_are_judged(tmp_path):
    named = {"car": "automobile", "pedestrian": "walker"}

    def renamed(frame):
        return dataclasses.replace(frame, names=tuple(named.get(name, "") for name in frame.names))

    names = tuple(named.values())
    own = dataclasses.replace(T4, frames=tuple(map(renamed, index())), class_names=names)
    found = {}
    for frame in own:
        rows = [i for i, name in enumerate(frame.names) if name and frame.valid[i]]
        boxes = np.nan_to_num(frame.boxes[rows], nan=0.0)
        boxes[:, 2] -= 0.5 * boxes[:, 5]
        labels = np.array([names.index(frame.names[i]) for i in rows], dtype=np.int64)
        found[frame.token] = results.Detections(boxes, np.linspace(0.9, 0.5, len(rows)), labels)
    judged = judge(own, found, Reading(class_names=names), tmp_path)
    assert judged.value == pytest.approx(1.0) and judged.numbers["mAP"] == pytest.approx(1.0)
    assert "| automobile" in judged.text and "walker" in (tmp_path / "report.html").read_text()


def test_t4_data_without_annotations_say_so():
    def blank(frame):
        return dataclasses.replace(frame, names=("",) * len(frame.names))

    empty = dataclasses.replace(T4, frames=tuple(map(blank, index())), class_names=("tram",))
    with pytest.raises(ValueError, match="has no annotations of the classes tram, so nothing can be scored there"):
        source.check_scored(empty, KNOWN_ATTRIBUTES)
    source.check_scored(T4, ())  # attributes do not count


def test_the_table_by_class_is_complete():
    evaluated = t4_report.of(list(t4_report.frames(T4, perfect(), LIDAR)), t4_report.config(CLASS_NAMES))
    head, *rows, mean = t4_report.classes(evaluated.headline)
    assert head[:4] == ["class", "boxes", "AP", "APH"] and head[-2:] == ["best F1@2", "at score"]
    assert [row[0] for row in rows] == list(CLASS_NAMES) and mean[0] == "mean"
    assert {len(row) for row in (head, *rows, mean)} == {len(head)}
    assert sum(int(row[1]) for row in rows) == int(mean[1])
