"""Frames of the T4 metric, and the pairs that their boxes make at one threshold: the evaluators' result lists.

Sources, by their definition: tier4/autoware_perception_evaluation at 9d8c977 and 96b7182, evaluation/matching and
evaluation/result/object_result_matching.py; AWML 7a6ec07, T4MetricV2.
"""

from dataclasses import dataclass

import numpy as np

from bevfn.evaluation import box_values
from bevfn.evaluation.average_precision import Ranked
from bevfn.evaluation.matching import assign
from bevfn.evaluation.t4_config import GROUPS, HAZARD, UNKNOWN, Config, Mode


@dataclass(frozen=True)
class Boxes:
    """n boxes of a frame in the ego frame (x forward, y left, z up; base_link)."""

    boxes: np.ndarray
    """[n,9] float: x y z of the GRAVITY centre, length along yaw, width, height, yaw, vx, vy [m, rad, m/s]."""
    labels: tuple[str, ...]
    """n names."""
    scores: np.ndarray | None = None
    """[n] float, of detections."""
    num_points: np.ndarray | None = None
    """[n] int, of annotations; None: enough."""

    def __post_init__(self) -> None:
        for what in (self.labels, self.scores, self.num_points):
            if self.boxes.shape != (len(self.labels), 9) or (what is not None and len(what) != len(self.boxes)):
                raise ValueError(
                    f"boxes {list(self.boxes.shape)}, {len(self.labels)} labels and {0 if what is None else len(what)} "
                    "scores or point counts do not fit together; give boxes [n,9] and one of each for every box"
                )


@dataclass(frozen=True)
class Frame:
    """One frame's two sides; the order within a side decides between equals."""

    annotated: Boxes
    detected: Boxes


@dataclass(frozen=True)
class Side:
    """Boxes that can count, without what only `_values` needs."""

    places: np.ndarray
    """[n,2] float64: x, y."""
    labels: np.ndarray
    """[n] int64 into config.labels; len(config.labels): unknown, which is none of them."""
    scores: np.ndarray
    """[n] float64; of annotations 0."""
    heading: np.ndarray
    """[n] rad."""


@dataclass(frozen=True)
class Prepared:
    """A frame; detections in falling order of score, equals in the order they came in."""

    annotated: Side
    detected: Side
    near: dict[Mode, tuple[np.ndarray, np.ndarray]]
    """Of each mode the k pairs that a threshold lets through: flat places [k] in [P,G], and values [k] of which less is
    better. All pairs of all frames would not fit in memory."""

    def values(self, mode: Mode) -> np.ndarray:
        """[P,G]; inf where no threshold lets the pair through."""
        dense = np.full((len(self.detected.labels), len(self.annotated.labels)), np.inf)
        flat, values = self.near[mode]
        dense.flat[flat] = values
        return dense


def prepare(frame: Frame, config: Config) -> Prepared:
    """What matching needs of a frame."""
    if frame.detected.scores is None:
        raise ValueError("the detections have no scores; give Frame.detected.scores")
    (theirs, annotated), (ours, detected) = _side(frame.annotated, config), _side(frame.detected, config)
    near: dict[Mode, tuple[np.ndarray, np.ndarray]] = {}
    for mode in config.matching:
        values, limits = _values(mode, ours, theirs, config), config.thresholds(mode)
        loosest = max(limit_of(mode, threshold) for row in limits for threshold in row)
        flat = np.flatnonzero(values < loosest)
        near[mode] = flat, values.flat[flat]
    return Prepared(annotated, detected, near)


def _side(given: Boxes, config: Config) -> tuple[np.ndarray, Side]:
    """(boxes [n,9] as the evaluator has them, the rest) without what counts in no band: other labels, few points, low
    scores, NaN; in falling order of score."""
    boxes = np.asarray(given.boxes, np.float64)
    scores = np.zeros(len(boxes)) if given.scores is None else np.asarray(given.scores, np.float64)
    if config.single_precision:
        boxes, scores = (values.astype(np.float32).astype(np.float64) for values in (boxes, scores))
    numbers = {name: i for i, name in enumerate(config.labels)}
    if given.scores is not None:
        numbers.setdefault(UNKNOWN, len(config.labels))  # passes as a detection even where it is no target
    labels = np.array([numbers.get(name, -1) for name in given.labels], dtype=np.int64)
    kept = labels >= 0
    if config.drop_nan:
        kept &= ~np.isnan(boxes).any(axis=1) & ~np.isnan(scores)
    if given.num_points is not None and config.min_points:
        kept &= np.asarray(given.num_points) >= np.array([*config.min_points, 0])[labels]
    if given.scores is not None and config.confidence is not None:
        kept &= scores > np.where(labels == len(config.labels), 0.0, config.confidence)
    reach = np.array([*(config.reach.get(name, np.inf) for name in config.labels), np.inf])
    kept &= np.hypot(boxes[:, 0], boxes[:, 1]) < reach[labels]
    order = np.flatnonzero(kept)[np.argsort(-scores[kept], kind="stable")]
    boxes = boxes[order]
    if config.handed_over == "bottom_lwh":
        boxes = boxes[:, [0, 1, 2, 4, 3, 5, 6, 7, 8]]
        boxes[:, 2] -= boxes[:, 5] / 2
    return boxes, Side(boxes[:, :2].copy(), labels[order], scores[order], _heading(boxes[:, 6], config.unsigned_yaw))


def _heading(yaw: np.ndarray, unsigned: bool) -> np.ndarray:
    """[-pi, pi]; unsigned: twice the angle of a quaternion whose vector part has lost its sign."""
    if unsigned:
        yaw = 2 * np.arctan2(np.abs(np.sin(yaw / 2)), np.cos(yaw / 2))
    return box_values.wrap(yaw)


def _values(mode: Mode, detected: np.ndarray, annotated: np.ndarray, config: Config) -> np.ndarray:
    """[P,G] of which less is better."""
    match mode:
        case "center_distance_bev":
            return box_values.centre_distance_bev(detected, annotated)
        case "center_distance":
            return box_values.centre_distance(detected, annotated)
        case "plane_distance":
            return box_values.plane_distance(detected, annotated, config.pairing)
        case "iou_2d":
            return -box_values.iou_bev(detected, annotated)
        case "iou_3d":
            return -box_values.iou_3d(detected, annotated)


@dataclass(frozen=True)
class Listed:
    """Entries of the result lists of all labels at one threshold, in order."""

    labels: np.ndarray
    """[n] int64, as of `Side`."""
    ranked: Ranked

    def of(self, label: int) -> Ranked:
        mine = self.labels == label
        return Ranked(self.ranked.scores[mine], self.ranked.weights[mine], self.ranked.found[mine])


def in_band(places: np.ndarray, config: Config, band: tuple[float, float]) -> np.ndarray:
    """[n] bool."""
    if config.max_xy is not None:
        return (np.abs(places) < config.max_xy).all(axis=1)
    distance, (low, high) = np.hypot(places[:, 0], places[:, 1]), band
    return ((distance >= low) if config.inclusive_lower_range else (distance > low)) & (distance < high)


@dataclass(frozen=True)
class Rule:
    """What makes a pair."""

    mode: Mode
    limit: float
    owners: np.ndarray
    """[labels + 1] bool: which labels have this threshold."""
    config: Config


def entries(frame: Prepared, inside: tuple[np.ndarray, np.ndarray], rule: Rule) -> Listed:
    """One frame's entries at one threshold: pairs, label-blind pairs, then what is left.

    inside: annotations [G] and detections [P] in the band, bool.
    """
    ours, theirs, config, owners = frame.detected, frame.annotated, rule.config, rule.owners
    (there, here), values = inside, frame.values(rule.mode)
    free = there & owners[theirs.labels]  # G
    allowed = _allowed(config)[ours.labels][:, theirs.labels] & here[:, None] & free
    taken = assign(np.where(allowed, values, np.inf), rule.limit)
    blind = np.full_like(taken, -1)
    if config.class_agnostic_false_positives and config.policy == "DEFAULT":
        left = (taken < 0) & here & owners[ours.labels]
        free = free & ~np.isin(np.arange(len(free)), taken)
        blind = assign(np.where(left[:, None] & free, values, np.inf), rule.limit)
    alone = (taken < 0) & (blind < 0) & here
    if config.policy in ("DEFAULT", "ALLOW_SAME_GROUP"):
        alone &= owners[ours.labels]
    found, confused, missed = np.flatnonzero(taken >= 0), np.flatnonzero(blind >= 0), np.flatnonzero(alone)
    labels = np.concatenate([theirs.labels[taken[found]], theirs.labels[blind[confused]], ours.labels[missed]])
    weights = np.zeros(len(labels))
    weights[: len(found)] = _likeness(ours.heading[found], theirs.heading[taken[found]])
    scores = ours.scores[np.concatenate([found, confused, missed])]
    return Listed(labels, Ranked(scores, weights, np.arange(len(labels)) < len(found)))


def _allowed(config: Config) -> np.ndarray:
    """[labels + 1, labels] bool: which detection may be a pair with which annotation."""
    names, blank = (*config.labels, UNKNOWN), np.eye(len(config.labels) + 1, len(config.labels), dtype=bool)
    wild = {UNKNOWN, HAZARD} if config.hazard_is_unknown else {UNKNOWN}
    match config.policy:
        case "DEFAULT":
            return blank
        case "ALLOW_ANY":
            return np.ones_like(blank)
    grouped = GROUPS if config.policy == "ALLOW_SAME_GROUP" else ()
    rows = [[a in wild or any({a, b} <= group for group in grouped) for b in config.labels] for a in names]
    return blank | np.array(rows)


def _likeness(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """What a pair counts for APH: 1 at the same heading, 0 at the opposite one."""
    apart = np.abs(first - second)
    apart = np.where(apart > np.pi, 2 * np.pi - apart, apart)
    return np.round(np.clip(1 - apart / np.pi, 0.0, 1.0), 10)


def concatenate(frames: list[Listed]) -> Listed:
    """All frames' entries, one frame after another."""
    ranked = [listed.ranked for listed in frames]
    together = Ranked(
        joined([one.scores for one in ranked], np.float64),
        joined([one.weights for one in ranked], np.float64),
        joined([one.found for one in ranked], np.bool_),
    )
    return Listed(joined([listed.labels for listed in frames], np.int64), together)


def limit_of(mode: Mode, threshold: float) -> float:
    """Below which a value of `_values` is a match."""
    return -threshold if mode.startswith("iou") else threshold


def joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    """One after another; of no parts, an empty array of that type."""
    return np.concatenate([np.zeros(0, dtype), *parts])
