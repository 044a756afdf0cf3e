"""What detections are worth, in the form that their data allows, and the files about it.

A split of a nuScenes root gets the devkit's scores and a report; T4 data get the T4 metric, and the devkit's scores over
their own classes; a frame without tables gets recall and a picture.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bevfn import draw
from bevfn.data import annotations, scene
from bevfn.data.index import Frame, Index
from bevfn.data.reading import Reading
from bevfn.evaluation import general_score, page, recall, results, score, t4_report, tables
from bevfn.evaluation.results import Detections, Meta
from bevfn.files import to_json, write_atomically
from bevfn.names import file_name

RESULTS, RESULTS_T4 = "results_nusc.json", "results_t4.json"
SCORE_THRESHOLD = 0.1  # of recall and pictures of a frame


@dataclass(frozen=True)
class Judgement:
    """One evaluation."""

    value: float
    """What checkpoints are compared by: NDS, the T4 metric's mAP, or recall."""
    numbers: dict[str, float]
    text: str
    """For the terminal."""
    by_class: dict[str, float] = field(default_factory=dict)
    """AP by "AP/<class>" of the classes that are annotated."""
    picture: Path | None = None
    """A PNG of the worst key frame, if it was drawn."""


def judge(
    index: Index,
    found: Mapping[str, Detections],
    reading: Reading,
    out: Path,
    *,
    run_dir: Path | None = None,
    title: str = "Evaluation",
    config: Mapping[str, Any] | None = None,
    others: Mapping[str, score.Scores] | None = None,
    counts: Mapping[str, float] | None = None,
    bottom: bool = False,
) -> Judgement:
    """Scores detections of every key frame of `index` (by token), and writes the folder `out`.

    reading: how the frames were read for them. run_dir: the training run, whose curves the report shows. config:
    plain data for the report. others: earlier scores to show beside these. counts: of what did not fit, was broken or
    missing on the way (`detect`). bottom: of the results file, see `results.entries`.

    Raises ValueError where they cannot be scored or shown: it says where the detections are, and the folder is no evaluation
    then, nor the one that it was before.
    """
    if index.judge == "recall":
        return _recall(index, found, reading, out, counts or {})
    t4 = index.judge == "t4"
    ranges = dict.fromkeys(reading.class_names, np.inf) if t4 else results.RANGES
    document = submission(index, found, reading, ranges)
    written = submission(index, found, reading, ranges, bottom=True) if bottom else document
    forget(out)
    file = out / (RESULTS_T4 if t4 else RESULTS)
    results.write(file, written, reading.class_names)
    try:
        scored = _t4(index, found, reading) if t4 else _Scored(score.score(index, written))
        shown: dict[str, Any] = {
            "title": title,
            "index": index,
            "found": document,
            "run_dir": run_dir,
            "config": config,
        }
        shown |= {"others": others, "counts": counts, "ranges": scored.ranges, "extra": scored.extra}
        page.write(out, scored.scores, **shown)
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}; the detections are in {file}, without scores") from error
    text = tables.summary(scored.scores, title, counts, scored.extra)
    told = {f"AP/{c.name}": c.ap for c in scored.scores.classes if c.annotated}, _there(out / page.WORST)
    if scored.extra is None:
        return Judgement(scored.scores.nds, scored.scores.headline, text, *told)
    numbers = {name: value for name, value in scored.extra.headline.items() if np.isfinite(value)}
    return Judgement(numbers.get("T4 mAP", 0.0), numbers | scored.scores.headline, text, *told)


def _there(path: Path) -> Path | None:
    return path if path.is_file() else None


def measure(
    rows: Mapping[str, Mapping[str, np.ndarray]],
    scores_of: Callable[[Mapping[str, np.ndarray]], dict[str, float]],
    out: Path,
    *,
    title: str,
    counts: Mapping[str, float],
) -> Judgement:
    """Scores what a model that detects nothing predicts of key frames (`detect.collect`), and writes the folder `out`:
    metrics.json and summary.md.

    scores_of: {name: [frames ...]} -> scores by name, more being better for the first, which checkpoints are compared by (0 if
    it is not finite).
    """
    forget(out)
    measured = scores_of({name: np.stack([row[name] for row in rows.values()]) for name in next(iter(rows.values()))})
    numbers = {name: value for name, value in measured.items() if np.isfinite(value)}
    text = tables.measured(measured, title, len(rows), counts)
    write_atomically(out / "summary.md", text.encode())
    write_atomically(out / score.METRICS, to_json(numbers | {"counts": dict(counts)}, indent=1))
    return Judgement(numbers.get(next(iter(measured)), 0.0), numbers, text)


def forget(out: Path) -> None:
    """Takes from a folder what makes it an evaluation, before other files are written there: they are not of these scores."""
    (out / score.METRICS).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Scored:
    """What goes into the report."""

    scores: score.Scores
    ranges: Mapping[str, float] = field(default_factory=lambda: results.RANGES)
    extra: tables.Extra | None = None


def _t4(index: Index, found: Mapping[str, Detections], reading: Reading) -> _Scored:
    """The T4 metric, and beside it NDS over the same classes."""
    frames = list(t4_report.frames(index, found, reading))
    settings = t4_report.config(reading.class_names, reading.class_reach)
    extra = t4_report.extra(t4_report.of(frames, settings))
    ranges = {name: min(t4_report.NDS_RANGE, settings.reach.get(name, np.inf)) for name in reading.class_names}
    scores = general_score.score(frames, ranges, version=index.version, split=index.split)
    return _Scored(scores, ranges, extra)


def submission(
    index: Index,
    found: Mapping[str, Detections],
    reading: Reading,
    ranges: Mapping[str, float] | None = results.RANGES,
    *,
    bottom: bool = False,
) -> dict:
    """The nuScenes results document of detections of every key frame; ranges, bottom: as of `results.entries`."""
    meta = Meta(use_camera=reading.cameras is not None, use_lidar=reading.points is not None)

    def lidar_from_boxes(frame: Frame) -> np.ndarray:
        return annotations.lidar_from_base(frame, reading.base, reading.channels)

    return results.format(
        found,
        index,
        class_names=reading.class_names,
        meta=meta,
        lidar_from_boxes=lidar_from_boxes,
        ranges=ranges,
        bottom=bottom,
    )


def _recall(
    index: Index, found: Mapping[str, Detections], reading: Reading, out: Path, counts: Mapping[str, float]
) -> Judgement:
    """Recall over frames without nuScenes tables, and pictures of them."""
    numbers: dict[str, float] = {}
    texts, pictures = [], dict[Path, float]()
    forget(out)
    for place, frame in enumerate(index):
        sample, mine = scene.load(index, place, reading, np.random.default_rng(0)), found[frame.token]
        assert sample.boxes is not None and sample.labels is not None
        counted = recall.recall(
            *(mine.boxes, mine.scores, mine.labels),
            *(sample.boxes, sample.labels),
            class_names=reading.class_names,
            score_threshold=SCORE_THRESHOLD,
        )
        picture = out / f"{file_name(frame.token)}.png"  # a token may be anything, a path too
        shown = results.moved(mine, annotations.lidar_from_base(frame, reading.base, reading.channels))
        picked = draw.sample(frame, index.root, reading.class_names)
        draw.draw(picked, shown.boxes, shown.scores, shown.labels, picture, score_threshold=SCORE_THRESHOLD)
        texts.append(f"{counted.table()}\n{picture}")
        pictures[picture] = counted.total.recall
        numbers |= {"recall": counted.total.recall, "precision": counted.total.precision}
        numbers |= {f"recall/{row.name}": row.recall for row in counted.rows}
    numbers = {name: value for name, value in numbers.items() if np.isfinite(value)}
    write_atomically(out / score.METRICS, to_json(numbers | {"counts": dict(counts)}, indent=1))
    text = "\n\n".join([*texts, *tables.counted(counts)])
    worst = min(pictures, key=lambda path: pictures[path], default=None)
    return Judgement(numbers.get("recall", 0.0), numbers, text, picture=worst)
