"""Detections as a nuScenes results file: boxes in the global frame, with attributes, at most 500 a key frame.

A model's boxes have the bottom centre and lie in the key frame's lidar frame, or one that the caller names; an entry of
the file has the gravity centre, size (width, length, height) and a quaternion (w, x, y, z) in the global frame. What the
model does not say, an object's attribute, follows from its class and speed.

Sources: the task's rules, nuscenes-devkit eval/detection/README.md; attributes and range, mmdetection3d
evaluation/metrics/nuscenes_metric.py (the same rule in BEVDepth).
"""

import io
import math
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import scipy  # whose rooms are imported when they are entered

from bevfn.data.index import Frame, Index
from bevfn.files import read_json, to_json, write_atomically
from bevfn.names import printable

# m from the ego vehicle in x and y: the devkit's detection_cvpr_2019 scores nothing beyond
RANGES = {
    **dict.fromkeys(("car", "truck", "bus", "trailer", "construction_vehicle"), 50.0),
    **dict.fromkeys(("pedestrian", "motorcycle", "bicycle"), 40.0),
    **dict.fromkeys(("traffic_cone", "barrier"), 30.0),
}
MAX_BOXES = 500
MOVING = 0.2  # m/s in the global x-y plane; above it an object moves
# class: (attribute of what moves, attribute of what stands); "" for classes that have none
ATTRIBUTES = {
    **dict.fromkeys(("car", "truck", "trailer", "construction_vehicle"), ("vehicle.moving", "vehicle.parked")),
    "bus": ("vehicle.moving", "vehicle.stopped"),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
    **dict.fromkeys(("motorcycle", "bicycle"), ("cycle.with_rider", "cycle.without_rider")),
    **dict.fromkeys(("barrier", "traffic_cone"), ("", "")),
}
_NUMBERS = {"translation": 3, "size": 3, "rotation": 4, "velocity": 2}
KNOWN_ATTRIBUTES = {"pedestrian.sitting_lying_down", *(a for pair in ATTRIBUTES.values() for a in pair)}
KNOWN_ATTRIBUTES |= {"vehicle.stopped", ""}


@dataclass(frozen=True)
class Detections:
    """What a model found in one key frame: n boxes, numpy arrays."""

    boxes: np.ndarray
    """n 9 float: x y z of the BOTTOM centre, dx (length, along yaw) dy dz, yaw, vx, vy [m, rad, m/s]."""
    scores: np.ndarray
    """n float, 0..1."""
    labels: np.ndarray
    """n int, into the model's class names."""


@dataclass(frozen=True)
class Meta:
    """What a submission declares that it used; the leaderboard's tracks depend on it."""

    use_camera: bool = False
    use_lidar: bool = False
    use_radar: bool = False
    use_map: bool = False
    use_external: bool = False
    """Data beyond nuScenes, such as a detector's pretraining; ImageNet does not count."""


def collect(found: Iterable[tuple[str, Detections]]) -> dict[str, Detections]:
    """Detections by sample token. Of a token that comes again (padding of the last batch) the first one counts."""
    collected: dict[str, Detections] = {}
    for token, detections in found:
        collected.setdefault(token, detections)
    return collected


def format(
    found: Mapping[str, Detections],
    index: Index,
    *,
    class_names: tuple[str, ...],
    meta: Meta,
    lidar_from_boxes: Callable[[Frame], np.ndarray] = lambda frame: np.eye(4),
    ranges: Mapping[str, float] | None = RANGES,
    bottom: bool = False,
) -> dict:
    """The results file's document {"meta", "results": {token: [entry]}} of all key frames of `index`.

    lidar_from_boxes: [4,4] for a key frame whose detections do not lie in its lidar frame. ranges, bottom: as of `entries`.

    Raises ValueError if a key frame has no detections entry (an empty one is fine), if a token is not of the index, or
    for a box that is not finite or has no size or class.
    """
    for token in index.positions:
        if token not in found:
            missing = sum(token not in found for token in index.positions)
            raise ValueError(
                f"no detections for key frame {printable(token)} and {missing - 1} others of {len(index)} in split "
                f"{index.split!r}; run the model on every key frame."
            )
    results = {}
    for token, detections in found.items():
        frame = index[index.position(token)]
        frames = {
            "ego_from_boxes": frame.ego_from_lidar @ lidar_from_boxes(frame),
            "global_from_ego": frame.global_from_ego,
        }
        results[token] = entries(token, detections, class_names=class_names, ranges=ranges, bottom=bottom, **frames)
    return {"meta": asdict(meta), "results": results}


def entries(
    token: str,
    found: Detections,
    *,
    class_names: tuple[str, ...],
    ego_from_boxes: np.ndarray,
    global_from_ego: np.ndarray,
    ranges: Mapping[str, float] | None = RANGES,
    bottom: bool = False,
) -> list[dict]:
    """One key frame's entries in falling order of score; both matrices [4,4].

    Boxes beyond their class's range around the ego vehicle are left out (`ranges` None: all stay), then all but the 500
    with the highest scores. Velocities turn with the boxes, and attributes go by their global speed; classes of data that
    is not nuScenes, which `ranges` then names, have none. bottom: entries have the bottom centre, as BEVNeXt writes them,
    though a results file should have the gravity centre; scores look at x and y.

    Raises ValueError for detections that do not fit together, or are not finite.
    """
    boxes, scores, labels = np.asarray(found.boxes, np.float64), np.asarray(found.scores), np.asarray(found.labels)
    _check_detections(token, boxes, scores, labels, class_names, RANGES if ranges is None else ranges)
    centres = boxes[:, :3] + [0.0, 0.0, 0.0 if bottom else 0.5] * boxes[:, 5:6]  # n 3, gravity
    in_ego = _move(ego_from_boxes, centres)
    order = np.argsort(-scores, kind="stable")
    if ranges is not None:
        reach = np.array([ranges[name] for name in class_names])[labels]  # n
        order = order[np.linalg.norm(in_ego[order, :2], axis=1) <= reach[order]]
    order = order[:MAX_BOXES]
    if not len(order):
        return []
    boxes, labels = boxes[order], labels[order]
    global_from_boxes = np.asarray(global_from_ego) @ ego_from_boxes
    translation = _move(np.asarray(global_from_ego), in_ego[order])
    turns = scipy.spatial.transform.Rotation
    turn = turns.from_matrix(global_from_boxes[:3, :3]) * turns.from_rotvec(boxes[:, 6:7] * [0.0, 0.0, 1.0])
    rotation = turn.as_quat()[:, [3, 0, 1, 2]]  # n 4: w x y z
    velocity = boxes[:, 7:9] @ global_from_boxes[:2, :2].T  # the boxes' vz is 0
    moves = np.linalg.norm(velocity, axis=1) > MOVING
    attributes = ATTRIBUTES if ranges is None or ranges is RANGES else {}
    columns = zip(
        translation.tolist(),
        boxes[:, [4, 3, 5]].tolist(),
        rotation.tolist(),
        velocity.tolist(),
        [class_names[label] for label in labels],
        scores[order].tolist(),
        moves,
    )
    return [
        {
            "sample_token": token,
            "translation": centre,
            "size": size,
            "rotation": quaternion,
            "velocity": speed,
            "detection_name": name,
            "detection_score": score,
            "attribute_name": attributes.get(name, ("", ""))[0 if moving else 1],
        }
        for centre, size, quaternion, speed, name, score, moving in columns
    ]


def to_lidar(entries: list[dict], frame: Frame, class_names: tuple[str, ...]) -> Detections:
    """The inverse of `entries`: one key frame's boxes back in its lidar frame, for pictures."""
    if not entries:
        return Detections(np.zeros((0, 9)), np.zeros(0), np.zeros(0, dtype=np.int64))
    column = {name: np.array([entry[name] for entry in entries], dtype=np.float64) for name in _NUMBERS}
    matrix = frame.global_from_lidar
    boxes = np.empty((len(entries), 9))
    boxes[:, :3] = _move(np.linalg.inv(matrix), column["translation"])
    boxes[:, 3:6] = column["size"][:, [1, 0, 2]]
    boxes[:, 2] -= 0.5 * boxes[:, 5]
    turns = scipy.spatial.transform.Rotation
    turn = turns.from_matrix(matrix[:3, :3]).inv() * turns.from_quat(column["rotation"][:, [1, 2, 3, 0]])
    ahead = turn.apply([1.0, 0.0, 0.0])  # n 3
    boxes[:, 6] = np.arctan2(ahead[:, 1], ahead[:, 0])
    boxes[:, 7:9] = np.linalg.solve(matrix[:2, :2], column["velocity"].T).T
    scores = np.array([entry["detection_score"] for entry in entries], dtype=np.float64)
    labels = np.array([class_names.index(entry["detection_name"]) for entry in entries], dtype=np.int64)
    return Detections(boxes, scores, labels)


def moved(found: Detections, target_from_boxes: np.ndarray) -> Detections:
    """The detections in another frame, [4,4] from theirs, whose z axis is nearly theirs: boxes stay upright."""
    boxes, turn = np.array(found.boxes, dtype=np.float64), target_from_boxes[:3, :3]
    cos, sin = np.cos(boxes[:, 6]), np.sin(boxes[:, 6])
    lift = [0.0, 0.0, 0.5] * boxes[:, 5:6]  # bottom to gravity centre
    boxes[:, :3] = _move(target_from_boxes, boxes[:, :3] + lift) - lift
    boxes[:, 6] = np.arctan2(turn[1, 0] * cos + turn[1, 1] * sin, turn[0, 0] * cos + turn[0, 1] * sin)
    boxes[:, 7:9] = boxes[:, 7:9] @ turn[:2, :2].T
    return Detections(boxes, found.scores, found.labels)


def write(path: Path, results: Mapping[str, Any], classes: Collection[str] = tuple(RANGES)) -> None:
    """Checks the document and writes it, all or nothing, as JSON; as a zip of it if `path` ends in .zip (to submit).
    classes: those that it may name."""
    path = Path(path)
    check(results, str(path), classes)
    text = to_json(results)
    if path.suffix == ".zip":
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(zipfile.ZipInfo("results_nusc.json"), text, zipfile.ZIP_DEFLATED)
        text = packed.getvalue()
    write_atomically(path, text)


def read(path: Path, classes: Collection[str] | None = tuple(RANGES)) -> dict:
    """A results file's document; classes: as of `check`. Raises ValueError, one sentence, if it is missing, truncated or no such file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a nuScenes results file (JSON).")
    try:
        results = read_json(path.read_bytes(), finite=False)  # `check` names the box
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"{path} is not valid JSON ({error}); it is truncated or another file.") from error
    check(results, str(path), classes)
    return results


def check(results: Any, where: str, classes: Collection[str] | None = tuple(RANGES)) -> None:
    """Raises ValueError, one sentence, for the first thing in which `results` breaks nuScenes' rules. classes: those that it may
    name; None: any."""
    if not isinstance(results, Mapping) or not all(isinstance(results.get(k), Mapping) for k in ("meta", "results")):
        raise ValueError(
            f"{where} is no nuScenes results file: it must be an object with objects `meta` and `results`."
        )
    for name in (field.name for field in fields(Meta)):
        if not isinstance(results["meta"].get(name), bool):
            raise ValueError(f"{where}: meta.{name} is {results['meta'].get(name)!r}; it must be true or false.")
    for token, listed in results["results"].items():
        if not isinstance(listed, list) or len(listed) > MAX_BOXES:
            what = f"{len(listed)} boxes" if isinstance(listed, list) else type(listed).__name__
            raise ValueError(
                f"{where}: results.{printable(token)} has {what}; it must be a list of at most {MAX_BOXES} boxes."
            )
        for i, entry in enumerate(listed):
            wrong = _first_wrong(token, entry, classes)
            if wrong:
                raise ValueError(f"{where}: results.{printable(token)}[{i}].{wrong}.")


def _first_wrong(token: str, entry: Any, classes: Collection[str] | None) -> str:
    """What the devkit or the server would refuse in one entry, "" if nothing."""
    if not isinstance(entry, Mapping):
        return f"is a {type(entry).__name__}; it must be an object"
    for name, count in _NUMBERS.items():
        values = entry.get(name)
        if not (isinstance(values, list) and len(values) == count and all(map(_is_number, values))):
            return f"{name} is {values!r}; it must be {count} finite numbers"
    if min(entry["size"]) <= 0:
        return f"size is {entry['size']}; width, length and height must be above 0 m"
    if entry.get("sample_token") != token:
        return f"sample_token is {entry.get('sample_token')!r}; it must be the token it is listed under"
    if classes is None and not isinstance(entry.get("detection_name"), str):
        return f"detection_name is {entry.get('detection_name')!r}; it must be a class's name"
    if classes is not None and entry.get("detection_name") not in classes:
        return f"detection_name is {entry.get('detection_name')!r}; it must be one of {', '.join(classes)}"
    if entry.get("attribute_name") not in KNOWN_ATTRIBUTES:
        return f"attribute_name is {entry.get('attribute_name')!r}; it must be a nuScenes attribute or empty"
    score = entry.get("detection_score")
    return "" if _is_number(score) and 0 <= score <= 1 else f"detection_score is {score!r}; it must be from 0 to 1"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_detections(
    token: str,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    class_names: tuple[str, ...],
    known: Collection[str],
) -> None:
    if boxes.shape != (len(scores), 9) or labels.shape != scores.shape:
        raise ValueError(
            f"key frame {printable(token)}: boxes {list(boxes.shape)}, scores {list(scores.shape)} and labels "
            f"{list(labels.shape)} do not fit together; give boxes [n,9] and one score and label for each."
        )
    if unknown := set(class_names) - set(known):
        raise ValueError(f"class {sorted(unknown)[0]!r} is no nuScenes detection class; use {', '.join(known)}.")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise ValueError(
            f"key frame {printable(token)}: a label is not in 0..{len(class_names) - 1}, the class names given."
        )
    bad = ~np.isfinite(boxes).all(axis=1) | ~np.isfinite(scores) | (boxes[:, 3:6] <= 0).any(axis=1)
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(
            f"key frame {printable(token)}: detection {i} has box {boxes[i].round(3).tolist()} and score {scores[i]}, which is "
            "not finite or has no size; check the checkpoint's parameters for NaN."
        )


def _move(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """points [n,3] through [4,4]."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]
