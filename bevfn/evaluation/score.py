"""nuScenes detection scores by the devkit's own DetectionEval, configuration detection_cvpr_2019.

The devkit's own functions load, filter and count. Only which key frames count is not asked of it, since it knows nuScenes'
splits alone: they are the index' own, whatever its split and version are called.
"""

import contextlib
import io
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bevfn import files
from bevfn.data.index import Index
from bevfn.evaluation import results as nuscenes_results
from bevfn.names import printable, sentence

METRICS = "metrics.json"  # of an evaluation's folder, written last: it is what tells a whole one
RULE = "detection_cvpr_2019"  # the devkit's configuration
DISTANCES = (0.5, 1.0, 2.0, 4.0)  # m, at which AP is averaged; true positives are measured at 2 m
# our name of an error: the devkit's
ERRORS = {"ATE": "trans_err", "ASE": "scale_err", "AOE": "orient_err", "AVE": "vel_err", "AAE": "attr_err"}
UNITS = {"ATE": "m", "ASE": "1 - IoU", "AOE": "rad", "AVE": "m/s", "AAE": "1 - accuracy"}


@dataclass(frozen=True)
class ClassScore:
    """One class."""

    name: str
    annotated: int
    """Boxes that count: in range, with at least one LiDAR or radar point, and no bicycle in a rack."""
    ap: float
    """Mean over DISTANCES, 0..1; 0 if nothing is annotated."""
    ap_at: tuple[float, ...]
    """AP at each of DISTANCES."""
    errors: dict[str, float]
    """By name of ERRORS: of true positives at 2 m, mean over recalls from 0.1 up; 1 if that recall is not reached, NaN
    where the class has no such error (cones: AOE, AVE, AAE; barriers: AVE, AAE)."""
    precision: tuple[tuple[float, ...], ...]
    """At each of DISTANCES, for recall 0, 0.01, ... 1."""


@dataclass(frozen=True)
class Scores:
    """What DetectionEval says about one results file."""

    nds: float
    """nuScenes detection score: (5 mAP + sum over ERRORS of max(0, 1 - mean error)) / 10."""
    mean_ap: float
    errors: dict[str, float]
    """By name of ERRORS (without its m): mean over the classes that have it."""
    classes: tuple[ClassScore, ...]
    frames: int
    """Key frames evaluated."""
    version: str
    split: str
    rule: str = RULE
    """By which classes, ranges and conventions."""

    @property
    def headline(self) -> dict[str, float]:
        """NDS, mAP, mATE, mASE, mAOE, mAVE, mAAE."""
        return {"NDS": self.nds, "mAP": self.mean_ap, **{f"m{name}": value for name, value in self.errors.items()}}


def tables(index: Index) -> Any:
    """The devkit's NuScenes object of the index' root (40 s for v1.0-trainval, so load it once). Raises ValueError."""
    from nuscenes import NuScenes  # imports matplotlib.pyplot and OpenCV; only evaluation needs it

    try:
        return NuScenes(version=index.version, dataroot=str(index.root), verbose=False)
    except (AssertionError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{index.root}: the devkit cannot load version {index.version} ({error}).") from error


def score(
    index: Index, results: Mapping[str, Any] | Path, *, tables: Any = None, split: str = "", out: Path | None = None
) -> Scores:
    """Scores of a results document or file (`results.format`, `results.write`).

    index: the key frames to evaluate: a split, or some frames of one (`dataclasses.replace(index, frames=...)`);
    detections of other key frames are an error. tables: the loaded `tables(index)`, loaded here if None. split: its name
    where the index has none (info files). out: a JSON file to write.

    Raises ValueError, one sentence, if the results do not belong to the index or cannot be scored.
    """
    if isinstance(results, Path):
        results = nuscenes_results.read(results)
    else:
        nuscenes_results.check(results, "the results")
    split = split or index.split
    if not index.annotated:
        raise ValueError(
            f"{index.root}: the {len(index)} key frames of split {split!r} have no annotations of the ten classes, so "
            "nothing can be scored; evaluate on val, or submit the results file of test."
        )
    for have, want, what in (
        (results["results"], index.positions, "the results have no key frame"),
        (index.positions, results["results"], f"split {split!r} has no key frame"),
    ):
        for token in want:
            if token not in have:
                raise ValueError(
                    f"{what} {printable(token)}; evaluate the split that the detections are of, all of it."
                )
    scores = _evaluate(index, results, split, tables if tables is not None else _load(index))
    if out is not None:
        write(out, scores)
    return scores


_load = tables  # the argument of `score` hides the name


def _evaluate(index: Index, results: Mapping[str, Any], split: str, tables: Any) -> Scores:
    return summed(_judge(index, results, tables), len(index), index.version, split)


def summed(judge: Any, frames: int, version: str, split: str, rule: str = RULE) -> Scores:
    """What a DetectionEval that has its boxes says about them."""
    metrics, curves = judge.evaluate()
    annotated = Counter(box.detection_name for box in judge.gt_boxes.all)
    classes = tuple(
        ClassScore(
            name=name,
            annotated=annotated[name],
            ap=float(metrics.mean_dist_aps[name]),
            ap_at=tuple(float(metrics.get_label_ap(name, distance)) for distance in DISTANCES),
            errors={ours: float(metrics.get_label_tp(name, theirs)) for ours, theirs in ERRORS.items()},
            precision=tuple(tuple(curves[name, distance].precision.round(5).tolist()) for distance in DISTANCES),
        )
        for name in judge.cfg.class_names
    )
    errors = {ours: metrics.tp_errors[theirs] for ours, theirs in ERRORS.items()}
    return Scores(metrics.nd_score, metrics.mean_ap, errors, classes, frames, version, split, rule)


def _judge(index: Index, results: Mapping[str, Any], tables: Any) -> Any:
    """A DetectionEval of the index' key frames, as its __init__ makes it of a split."""
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.common.loaders import add_center_dist, filter_eval_boxes, load_gt_of_sample_tokens
    from nuscenes.eval.detection.config import config_factory
    from nuscenes.eval.detection.data_classes import DetectionBox
    from nuscenes.eval.detection.evaluate import DetectionEval

    def counting(boxes: EvalBoxes) -> EvalBoxes:
        boxes = add_center_dist(tables, boxes)
        # without any box it cannot tell detections from tracks
        return filter_eval_boxes(tables, boxes, judge.cfg.class_range) if boxes.all else boxes

    judge = DetectionEval.__new__(DetectionEval)
    judge.nusc, judge.verbose, judge.cfg = tables, False, config_factory("detection_cvpr_2019")
    tokens = list(index.positions)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the devkit's progress bars have no switch
            judge.gt_boxes = counting(load_gt_of_sample_tokens(tables, tokens, DetectionBox))
        found = EvalBoxes.deserialize({token: results["results"][token] for token in tokens}, DetectionBox)
        judge.pred_boxes = counting(found)
    except Exception as error:  # as which the devkit raises what it refuses
        raise ValueError(
            f"{index.root}: the devkit cannot score these key frames of {index.version} ({type(error).__name__}: "
            f"{sentence(error)}); check that version and index belong together."
        ) from error
    judge.sample_tokens = tokens
    return judge


def to_json(scores: Scores) -> dict:
    """Plain data; NaN becomes None."""
    return {
        **scores.headline,
        "version": scores.version,
        "split": scores.split,
        "frames": scores.frames,
        "rule": scores.rule,
        "classes": {
            c.name: {
                "annotated": c.annotated,
                "AP": c.ap,
                **{f"AP@{distance:g}": ap for distance, ap in zip(DISTANCES, c.ap_at)},
                **{name: None if math.isnan(value) else value for name, value in c.errors.items()},
                "precision": c.precision,
            }
            for c in scores.classes
        },
    }


def write(
    path: Path, scores: Scores, counts: Mapping[str, float] | None = None, more: Mapping[str, Any] | None = None
) -> None:
    """Writes the JSON, all or nothing; counts: what was counted on the way to the scores (`detect`); more: plain data
    under names of its own."""
    document = to_json(scores) | {"counts": dict(counts or {})} | dict(more or {})
    files.write_atomically(Path(path), files.to_json(document))


def read(path: Path) -> Scores:
    """What `write` wrote. Raises ValueError, one sentence, for a missing, truncated or other file."""
    try:
        data = files.read_json(Path(path).read_bytes())
        classes = tuple(
            ClassScore(
                name=name,
                annotated=int(c["annotated"]),
                ap=float(c["AP"]),
                ap_at=tuple(float(c[f"AP@{distance:g}"]) for distance in DISTANCES),
                errors={error: math.nan if c[error] is None else float(c[error]) for error in ERRORS},
                precision=tuple(tuple(map(float, row)) for row in c["precision"]),
            )
            for name, c in data["classes"].items()
        )
        errors = {name: float(data[f"m{name}"]) for name in ERRORS}
        return Scores(
            float(data["NDS"]),
            float(data["mAP"]),
            errors,
            classes,
            int(data["frames"]),
            data["version"],
            data["split"],
            str(data.get("rule", RULE)),  # files of an older bevfn have none
        )
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; `bevfn eval` writes it.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of scores ({type(error).__name__}: {error}); evaluate again.") from error
