"""What detections are worth, in the form that their data allows, and the files about it.

A split of a nuScenes root gets the devkit's scores and a report; a frame without tables gets recall and a picture.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bevfn import draw
from bevfn.data import annotations, scene
from bevfn.data.index import Frame, Index
from bevfn.data.reading import Reading
from bevfn.evaluation import page, recall, results, score, tables
from bevfn.evaluation.results import Detections, Meta
from bevfn.files import to_json, write_atomically
from bevfn.names import file_name

RESULTS = "results_nusc.json"
SCORE_THRESHOLD = 0.1  # of recall and pictures of a frame


@dataclass(frozen=True)
class Judgement:
    """One evaluation."""

    value: float
    """What checkpoints are compared by: NDS, or recall."""
    numbers: dict[str, float]
    text: str
    """For the terminal."""


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
) -> Judgement:
    """Scores detections of every key frame of `index` (by token), and writes the folder `out`.

    reading: how the frames were read for them. run_dir: the training run, whose curves the report shows. config:
    plain data for the report. others: earlier scores to show beside these. counts: of what did not fit, was broken or
    missing on the way (`detect`).

    Raises ValueError where they cannot be scored or shown: it says where the detections are, and the folder is no evaluation
    then, nor the one that it was before.
    """
    if index.judge == "recall":
        return _recall(index, found, reading, out, counts or {})
    document = submission(index, found, reading)
    forget(out)
    results.write(out / RESULTS, document)
    try:
        scores = score.score(index, document)
        shown: dict[str, Any] = {
            "title": title,
            "index": index,
            "found": document,
            "run_dir": run_dir,
            "config": config,
        }
        page.write(out, scores, **shown, others=others, counts=counts)
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}; the detections are in {out / RESULTS}, without scores") from error
    return Judgement(scores.nds, scores.headline, tables.summary(scores, title, counts))


def forget(out: Path) -> None:
    """Takes from a folder what makes it an evaluation, before other files are written there: they are not of these scores."""
    (out / score.METRICS).unlink(missing_ok=True)


def submission(index: Index, found: Mapping[str, Detections], reading: Reading) -> dict:
    """The nuScenes results document of detections of every key frame."""
    meta = Meta(use_camera=reading.cameras is not None, use_lidar=reading.points is not None)

    def lidar_from_boxes(frame: Frame) -> np.ndarray:
        return annotations.lidar_from_base(frame, reading.base, reading.channels)

    return results.format(found, index, class_names=reading.class_names, meta=meta, lidar_from_boxes=lidar_from_boxes)


def _recall(
    index: Index, found: Mapping[str, Detections], reading: Reading, out: Path, counts: Mapping[str, float]
) -> Judgement:
    """Recall over frames without nuScenes tables, and pictures of them."""
    numbers: dict[str, float] = {}
    texts = []
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
        numbers |= {"recall": counted.total.recall, "precision": counted.total.precision}
        numbers |= {f"recall/{row.name}": row.recall for row in counted.rows}
    numbers = {name: value for name, value in numbers.items() if np.isfinite(value)}
    write_atomically(out / score.METRICS, to_json(numbers | {"counts": dict(counts)}, indent=1))
    return Judgement(numbers.get("recall", 0.0), numbers, "\n\n".join([*texts, *tables.counted(counts)]))
