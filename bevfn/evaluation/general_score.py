"""nuScenes' detection score of data that is not nuScenes: the devkit's own matching, means and NDS over any classes.

The devkit's config and boxes refuse names other than nuScenes' ten, but what it counts with (`DetectionEval.evaluate`)
does not look at them, save that it asks cones and barriers by name for fewer errors. So both are made without their
checks. Without attributes in the data the attribute error is 1, and NDS at most 0.9, as in AWML's first T4Metric.

Sources: nuscenes-devkit eval/detection/evaluate.py; AWML 7a6ec07, T4DetectionConfig and T4Box, for what to replace.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bevfn.evaluation.results import MAX_BOXES
from bevfn.evaluation.score import Scores, summed
from bevfn.evaluation.t4_matching import Boxes, Frame


def score(frames: Iterable[Frame], ranges: Mapping[str, float], *, version: str = "", split: str = "") -> Scores:
    """NDS, mAP and errors of detections in frames.

    ranges: the classes, in the order of the report, and the distance in x and y [m] below which boxes of each count,
    of both sides. Of a frame's detections the 500 with the highest scores count. Annotations without points are the
    caller's to leave out; velocities may be NaN. version, split: of the data, for the report.

    Raises ValueError for detections without scores.
    """
    from nuscenes.eval.common.data_classes import EvalBoxes  # imports OpenCV and more; only evaluation needs it
    from nuscenes.eval.detection.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval

    judge = DetectionEval.__new__(DetectionEval)
    judge.verbose, judge.cfg = False, copy.copy(config_factory("detection_cvpr_2019"))
    judge.cfg.class_range, judge.cfg.class_names = dict(ranges), tuple(ranges)
    judge.gt_boxes, judge.pred_boxes = EvalBoxes(), EvalBoxes()
    count = 0
    for count, frame in enumerate(frames, start=1):
        if frame.detected.scores is None:
            raise ValueError("the detections have no scores; give Frame.detected.scores")
        judge.gt_boxes.add_boxes(str(count), _boxes(str(count), frame.annotated, ranges))
        judge.pred_boxes.add_boxes(str(count), _boxes(str(count), frame.detected, ranges))
    reaches = " m, ".join(f"{name} {reach:g}" for name, reach in ranges.items())
    if len(set(ranges.values())) == 1:
        reaches = f"all {next(iter(ranges.values())):g}"
    return summed(judge, count, version, split, f"detection_cvpr_2019 with own classes and ranges: {reaches} m")


def _boxes(token: str, given: Boxes, ranges: Mapping[str, float]) -> list[Any]:
    """Those in range, as the devkit has them."""
    boxes, places = np.asarray(given.boxes, np.float64), np.arange(len(given.boxes))
    if given.scores is not None:
        places = np.sort(np.argsort(-np.asarray(given.scores), kind="stable")[:MAX_BOXES])
    far = np.hypot(boxes[:, 0], boxes[:, 1])
    return [
        _box(token, boxes[i], given.labels[i], -1.0 if given.scores is None else float(given.scores[i]))
        for i in places
        if given.labels[i] in ranges and far[i] < ranges[given.labels[i]]
    ]


def _box(token: str, box: np.ndarray, name: str, score: float) -> Any:
    """box [9] as in `Boxes`. A DetectionBox whose name is not held against nuScenes' ten."""
    from nuscenes.eval.detection.data_classes import DetectionBox

    x, y, z, length, width, height, yaw, *velocity = box.tolist()
    made = DetectionBox(
        sample_token=token,
        translation=(x, y, z),
        size=(width, length, height),
        rotation=(float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))),
        velocity=tuple(velocity),
        ego_translation=(x, y, z),
        detection_score=score,
    )
    made.detection_name = name
    return made
