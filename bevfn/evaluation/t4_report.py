"""The T4 metric of an index: its frames as the metric takes them, and what tables, report and metrics.json show of it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bevfn.data import annotations
from bevfn.data.index import Frame as KeyFrame
from bevfn.data.index import Index
from bevfn.data.reading import Reading
from bevfn.evaluation import results
from bevfn.evaluation.results import Detections
from bevfn.evaluation.t4_config import AWML_V2, Config, Mode
from bevfn.evaluation.t4_matching import Boxes, Frame
from bevfn.evaluation.t4_metric import At, Evaluation, Score, band_name, evaluate
from bevfn.evaluation.tables import Extra, Rows, number

NDS_RANGE = 120.0  # m, of every class: that of AWML's first T4Metric
NAMES: dict[Mode, str] = {
    "center_distance_bev": "BEV centre distance",
    "center_distance": "centre distance",
    "plane_distance": "plane distance",
    "iou_2d": "BEV IoU",
    "iou_3d": "3D IoU",
}
SHOWN_AT = 2.0  # m, where the table says which score is best


@dataclass(frozen=True)
class Evaluated:
    """Of one data set."""

    config: Config
    evaluation: Evaluation
    signed: float
    """mAPH of the headline with true headings."""

    @property
    def headline(self) -> Score:
        """Of the first mode over the widest band, as AWML's."""
        widest = max(self.config.bands, key=lambda band: band[1] - band[0])
        return self.evaluation[band_name(widest)][next(iter(self.config.matching))]


def config(class_names: tuple[str, ...], reach: tuple[float, ...] = ()) -> Config:
    """AWML's settings for these classes; reach: m of each, beyond which boxes do not count. Unknown velocities stay, as AWML's data sets fill them with 0 before its metric
    would drop them; and thresholds are for all classes, however many there are."""
    return replace(
        AWML_V2, labels=class_names, drop_nan=False, row_per_label=False, reach=dict(zip(class_names, reach))
    )


def of(frames: list[Frame], settings: Config) -> Evaluated:
    """The evaluation, and the mAPH that headings without their sign hide."""
    mode, widest = next(iter(settings.matching)), max(settings.bands, key=lambda band: band[1] - band[0])
    true = replace(settings, unsigned_yaw=False, matching={mode: settings.matching[mode]}, bands=(widest,))
    return Evaluated(settings, evaluate(frames, settings), evaluate(frames, true)[band_name(widest)][mode].mean_aph)


def frames(index: Index, found: Mapping[str, Detections], reading: Reading) -> Iterator[Frame]:
    """Every key frame: valid annotations of the reading's classes, and detections by token, in the ego frame."""
    for frame in index:
        lidar_from_boxes = annotations.lidar_from_base(frame, reading.base, reading.channels)
        yield Frame(
            _annotated(frame, reading.class_names), _detected(frame, found[frame.token], lidar_from_boxes, reading)
        )


def _annotated(frame: KeyFrame, class_names: tuple[str, ...]) -> Boxes:
    kept = [i for i, name in enumerate(frame.names) if name in class_names and frame.valid[i]]
    boxes = frame.boxes[kept]
    boxes[:, 2] -= boxes[:, 5] / 2  # to the bottom, as detections have it
    in_ego = results.moved(Detections(boxes, np.zeros(len(kept)), np.zeros(len(kept))), frame.ego_from_lidar).boxes
    labels = tuple(frame.names[i] for i in kept)
    return Boxes(_centred(in_ego), labels, num_points=frame.num_lidar_points[kept])


def _detected(frame: KeyFrame, found: Detections, lidar_from_boxes: np.ndarray, reading: Reading) -> Boxes:
    in_ego = results.moved(found, frame.ego_from_lidar @ lidar_from_boxes).boxes
    labels = tuple(reading.class_names[label] for label in found.labels)
    return Boxes(_centred(in_ego), labels, scores=np.asarray(found.scores, np.float64))


def _centred(boxes: np.ndarray) -> np.ndarray:
    """Bottom to gravity centre."""
    return boxes + [0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0] * boxes[:, 5:6]


def extra(evaluated: Evaluated) -> Extra:
    """What tables and report show."""
    score, bands = evaluated.headline, evaluated.evaluation
    headline = {"mAP": score.mean_ap, "mAPH": score.mean_aph, "mAPH signed": evaluated.signed}
    modes = list(evaluated.config.matching)
    ranges: Rows = [["range [m]", *(f"{what}, {NAMES[mode]}" for mode in modes for what in ("mAP", "mAPH"))]]
    for band, by_mode in bands.items():
        values = [value for mode in modes for value in (by_mode[mode].mean_ap, by_mode[mode].mean_aph)]
        ranges.append([band, *map(number, values)])
    shown = {f"T4 {name}": value for name, value in headline.items()}
    note = (
        f"T4 metric: perception_eval 9d8c977 as AWML calls it, by {NAMES[modes[0]]} over the widest range; mAPH "
        "carries AWML's heading without sign, mAPH signed does not (docs/t4_metrics.md)."
    )
    found = {"T4 metric by class": classes(score), "T4 metric by range": ranges}
    return Extra(shown, found, note, {**finite(headline), "bands": to_json(bands)})


def classes(score: Score) -> Rows:
    """One row a class: AP, APH, AP at each threshold, and the score at which F1 is best."""
    thresholds = [one.threshold for one in score.labels[0].at]
    at = SHOWN_AT if SHOWN_AT in thresholds else thresholds[-1]
    rows = [["class", "boxes", "AP", "APH", *(f"AP@{t:g}" for t in thresholds), f"best F1@{at:g}", "at score"]]
    for label in score.labels:
        best = next(one.best for one in label.at if one.threshold == at)
        values = [label.ap, label.aph, *(one.ap for one in label.at), best.f1, best.score]
        rows.append([label.name, f"{label.num_gt:,}", *map(number, values)])
    total = f"{sum(label.num_gt for label in score.labels):,}"
    return [*rows, ["mean", total, number(score.mean_ap), number(score.mean_aph), *["-"] * (len(thresholds) + 2)]]


def to_json(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Plain data by band of range, then matching, as the tests' scores of autoware's own metric are; NaN becomes None."""
    return {band: {mode: _score(score) for mode, score in modes.items()} for band, modes in evaluation.items()}


def _score(score: Score) -> dict[str, Any]:
    labels = {
        label.name: {"num_gt": label.num_gt, **finite({"AP": label.ap, "APH": label.aph})}
        | {"thresholds": [_at(one) for one in label.at]}
        for label in score.labels
    }
    return {**finite({"mAP": score.mean_ap, "mAPH": score.mean_aph}), "labels": labels}


def _at(one: At) -> dict[str, Any]:
    best = one.best
    numbers = {"AP": one.ap, "APH": one.aph, "heading_weighted_tp": one.heading_weighted_tp, "max_f1": best.f1}
    where = {"precision": best.precision, "recall": best.recall, "score": best.score}
    numbers |= {f"{name}_at_max_f1": value for name, value in where.items()}
    return {"threshold": one.threshold, "num_pred": one.num_pred, "num_tp": one.num_tp, **finite(numbers)}


def finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """NaN becomes None."""
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}
