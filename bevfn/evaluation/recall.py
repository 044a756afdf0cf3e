"""How many annotated boxes a set of predictions finds, matched by distance as on nuScenes.

A quick look for a demo or a training log: one score threshold, no averaging. It is not the nuScenes mAP.
"""

from dataclasses import dataclass

import numpy as np

from bevfn.evaluation.matching import assign


@dataclass(frozen=True)
class ClassRecall:
    """Counts of one class at one score threshold."""

    name: str
    annotated: int
    predicted: int
    """Predictions at or above the score threshold."""
    found: int
    """Annotated boxes with a prediction of their class matched to them."""
    centre_error_m: float
    """Mean distance of matched centres in x and y; NaN if none matched."""

    @property
    def recall(self) -> float:
        """found / annotated; NaN without annotations."""
        return self.found / self.annotated if self.annotated else float("nan")

    @property
    def precision(self) -> float:
        """found / predicted; NaN without predictions."""
        return self.found / self.predicted if self.predicted else float("nan")


@dataclass(frozen=True)
class Recall:
    """One row per class that is annotated or predicted, in label order, and the rule they were counted by."""

    rows: tuple[ClassRecall, ...]
    distance_m: float
    score_threshold: float

    @property
    def total(self) -> ClassRecall:
        """All classes together (matching stays within a class)."""
        found = sum(row.found for row in self.rows)
        error = sum(row.centre_error_m * row.found for row in self.rows if row.found)
        return ClassRecall(
            name="all",
            annotated=sum(row.annotated for row in self.rows),
            predicted=sum(row.predicted for row in self.rows),
            found=found,
            centre_error_m=error / found if found else float("nan"),
        )

    def table(self) -> str:
        """The rows and their total as text, with the rule in the last line; `-` where nothing can be divided."""
        names = [row.name for row in self.rows]
        width = max(map(len, [*names, "class"]))
        lines = [f"{'class':<{width}}  annotated  predicted  found  recall  precision  centre error"]
        for row in (*self.rows, self.total):
            ratios = f"{_number(row.recall):>6}  {_number(row.precision):>9}  {_number(row.centre_error_m, ' m'):>12}"
            lines.append(f"{row.name:<{width}}  {row.annotated:>9}  {row.predicted:>9}  {row.found:>5}  {ratios}")
        lines.insert(-1, "-" * len(lines[0]))
        rule = (
            f"found: same class, centre closer than {self.distance_m:g} m from above, score >= {self.score_threshold:g}"
        )
        return "\n".join([*lines, rule])


def recall(
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    annotated_boxes: np.ndarray,
    annotated_labels: np.ndarray,
    *,
    class_names: tuple[str, ...],
    distance_m: float = 2.0,
    score_threshold: float = 0.1,
) -> Recall:
    """Per-class recall of one frame.

    boxes [Q,>=2] and annotated_boxes [G,>=2]: x, y first, metres, one frame; scores [Q]; labels [Q] and [G] index
    class_names. Numpy or CPU tensors, without padding. Within a class, predictions in order of falling score each take
    the nearest annotated box that is still free, if its centre is closer than distance_m in x and y.

    Raises ValueError if lengths differ or a label has no name.
    Source: nuscenes-devkit, eval/detection/algo.py, the matching of `accumulate`.
    """
    boxes, scores, labels = np.asarray(boxes), np.asarray(scores), np.asarray(labels)
    annotated_boxes, annotated_labels = np.asarray(annotated_boxes), np.asarray(annotated_labels)
    if not (len(boxes) == len(scores) == len(labels) and len(annotated_boxes) == len(annotated_labels)):
        raise ValueError(
            f"recall got {len(boxes)} boxes, {len(scores)} scores, {len(labels)} labels and {len(annotated_boxes)} "
            f"annotated boxes, {len(annotated_labels)} labels; give one score and label for each box."
        )
    for name, values in (("labels", labels), ("annotated_labels", annotated_labels)):
        if len(values) and not 0 <= values.min() <= values.max() < len(class_names):
            wrong = values.min() if values.min() < 0 else values.max()
            raise ValueError(f"recall got {name} with {wrong}, but there are {len(class_names)} class names.")
    rows = []
    keep = scores >= score_threshold
    for label, name in enumerate(class_names):
        mine = np.flatnonzero(keep & (labels == label))
        mine = mine[np.argsort(-scores[mine], kind="stable")]  # stable: equal scores keep the order they came in
        theirs = annotated_boxes[annotated_labels == label]
        if len(mine) or len(theirs):
            taken = match(boxes[mine, :2], theirs[:, :2], distance_m)
            errors = np.linalg.norm(boxes[mine, :2][taken >= 0] - theirs[taken[taken >= 0], :2], axis=-1)
            error = float(np.mean(errors)) if len(errors) else float("nan")
            rows.append(ClassRecall(name, len(theirs), len(mine), len(errors), error))
    return Recall(tuple(rows), distance_m, score_threshold)


def match(predicted: np.ndarray, annotated: np.ndarray, distance_m: float) -> np.ndarray:
    """Which annotated centre each prediction takes, [Q] int64, -1 for none.

    predicted [Q,2] x, y in order of precedence, annotated [G,2]. Each prediction in turn takes the nearest centre that is
    still free, if it is closer than distance_m. So the first n rows do not depend on the rest.
    """
    return assign(np.linalg.norm(predicted[:, None] - annotated[None], axis=-1), distance_m)


def _number(value: float, unit: str = "") -> str:
    return "-" if np.isnan(value) else f"{value:.2f}{unit}"
