"""Every box of an evaluation that counts, of all key frames in one table: what was annotated and what found it, what was detected
and what it found. Everything that a report breaks down (slices, confusion, calibration, errors, scenes) is counted in it.

Matched as `frame_quality.compare` does, within a class at 2 m, surer detections first: so what a detection found does not depend on
the score from which detections are shown.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bevfn.data.index import Frame, Index
from bevfn.evaluation import results
from bevfn.evaluation.box_values import wrap
from bevfn.evaluation.frame_quality import Matched, offsets

ERRORS = ("centre [m]", "size [1 - IoU]", "yaw [rad]", "velocity [m/s]")


@dataclass(frozen=True)
class Annotated:
    """G annotated boxes."""

    frame: np.ndarray
    """[G] int64: place of the key frame in the index."""
    label: np.ndarray
    """[G] int64 into Outcomes.classes."""
    place: np.ndarray
    """[G,2] float64: x and y from the ego vehicle in the world's directions [m]."""
    length: np.ndarray
    """[G] float64: the longer side from above [m]."""
    points: np.ndarray
    """[G] int64: LiDAR points in it; -1 where unknown."""
    visibility: np.ndarray
    """[G] text: the data set's level, "" where unknown."""
    score: np.ndarray
    """[G] float64: of the detection that found it; -1 where none did."""


@dataclass(frozen=True)
class Detected:
    """n detections, each key frame's in falling order of score."""

    frame: np.ndarray
    label: np.ndarray
    place: np.ndarray
    length: np.ndarray
    score: np.ndarray
    """[n] float64."""
    takes: np.ndarray
    """[n] int64: the row of Annotated that it found, -1 for a false alarm."""
    errors: np.ndarray
    """[n,4] float64 in the order of ERRORS; NaN of a false alarm, and where the velocity is unknown."""


@dataclass(frozen=True)
class Outcomes:
    """Both sides."""

    classes: tuple[str, ...]
    scenes: tuple[str, ...]
    """By key frame."""
    annotated: Annotated
    detected: Detected

    def found(self, threshold: float) -> np.ndarray:
        """[G] bool: which annotated boxes a detection with such a score or a higher one found."""
        return self.annotated.score >= max(threshold, 0.0)

    def sure(self, threshold: float) -> np.ndarray:
        """[n] bool: the detections from a score on."""
        return self.detected.score >= threshold


def of(
    index: Index, document: Mapping[str, Any], matched: Mapping[str, Matched], ranges: Mapping[str, float]
) -> Outcomes:
    """The outcomes of a results document; matched: `frame_quality.match_all` of the same. ranges: the classes."""
    classes = tuple(ranges)
    scenes, theirs, ours, rows = [], list[Annotated](), list[Detected](), 0
    for n, frame in enumerate(index):
        m = matched[frame.token]
        scenes.append(frame.scene)
        theirs.append(_annotated(n, frame, m, classes))
        ours.append(_detected(n, frame, m, document["results"].get(frame.token, []), rows, classes))
        rows += len(m.annotated)
    return Outcomes(classes, tuple(scenes), _joined(Annotated, theirs), _joined(Detected, ours))


def _joined(kind: Any, parts: list) -> Any:
    """The parts' columns, one after the other."""
    names = list(kind.__dataclass_fields__)
    return kind(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _annotated(n: int, frame: Frame, m: Matched, classes: tuple[str, ...]) -> Annotated:
    score = np.full(len(m.annotated), -1.0)
    score[m.takes[m.takes >= 0]] = m.scores[m.takes >= 0]
    return Annotated(
        frame=np.full(len(m.annotated), n),
        label=np.array([classes.index(frame.names[i]) for i in m.annotated], dtype=np.int64),
        place=offsets(frame, frame.boxes[m.annotated]),
        length=frame.boxes[m.annotated, 3:5].max(axis=1, initial=0.0),
        points=frame.num_lidar_points[m.annotated],
        visibility=np.array([frame.visibility[i] for i in m.annotated], dtype=np.str_),
        score=score,
    )


def _detected(n: int, frame: Frame, m: Matched, entries: list[dict], first: int, classes: tuple[str, ...]) -> Detected:
    counted = [entries[i] for i in m.order]
    sizes = np.array([entry["size"] for entry in counted], dtype=np.float64).reshape(-1, 3)
    places = np.array([entry["translation"][:2] for entry in counted], dtype=np.float64).reshape(-1, 2)
    right = np.flatnonzero(m.takes >= 0)
    errors = np.full((len(counted), len(ERRORS)), np.nan)
    boxes = results.to_lidar([counted[i] for i in right], frame, classes).boxes  # only of these: most are false alarms
    boxes[:, 2] += boxes[:, 5] / 2
    errors[right] = pair_errors(boxes, frame.boxes[m.annotated[m.takes[right]]])
    return Detected(
        frame=np.full(len(counted), n),
        label=np.array([classes.index(entry["detection_name"]) for entry in counted], dtype=np.int64),
        place=places - frame.global_from_ego[:2, 3],
        length=sizes[:, :2].max(axis=1, initial=0.0),
        score=m.scores,
        takes=np.where(m.takes >= 0, m.takes + first, -1),
        errors=errors,
    )


def pair_errors(boxes: np.ndarray, annotated: np.ndarray) -> np.ndarray:
    """[n,4] in the order of ERRORS: how far detections [n,9] are from the annotations [n,9] that they found, in one frame.

    Centre distance in x and y; 1 - IoU of the boxes as if they had one place and heading, as the devkit's ASE; least angle between
    the headings, of 2 pi; length of the difference of velocities.
    """
    shared = np.minimum(boxes[:, 3:6], annotated[:, 3:6]).prod(axis=1)
    union = boxes[:, 3:6].prod(axis=1) + annotated[:, 3:6].prod(axis=1) - shared
    return np.column_stack(
        [
            np.linalg.norm(boxes[:, :2] - annotated[:, :2], axis=1),
            1 - shared / union,
            np.abs(wrap(boxes[:, 6] - annotated[:, 6])),
            np.linalg.norm(boxes[:, 7:9] - annotated[:, 7:9], axis=1),
        ]
    )
