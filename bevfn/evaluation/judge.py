"""What detections are worth, in the form that their data allows, and the files about it.

A split of a nuScenes root gets the devkit's scores and a report; a frame without tables gets recall and a picture.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bevfn import view
from bevfn.data import pipeline
from bevfn.data.index import Index
from bevfn.evaluation import page, recall, results, score, tables
from bevfn.evaluation.results import Detections, Meta

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
    reading: pipeline.Config,
    out: Path,
    *,
    run_dir: Path | None = None,
    title: str = "Evaluation",
    config: Mapping[str, Any] | None = None,
    others: Mapping[str, score.Scores] | None = None,
) -> Judgement:
    """Scores detections of every key frame of `index` (by token), and writes the folder `out`.

    reading: how the frames were read for them. run_dir: the training run, whose curves the report shows. config: plain
    data for the report. others: earlier scores to show beside these.
    """
    if not (index.root / index.version / "sample.json").is_file():
        return _recall(index, found, reading, out)
    meta = Meta(use_camera=reading.cameras, use_lidar=True)
    document = results.format(found, index, class_names=reading.class_names, meta=meta)
    results.write(out / RESULTS, document)
    scores = score.score(index, document)
    page.write(out, scores, title=title, index=index, found=document, run_dir=run_dir, config=config, others=others)
    return Judgement(scores.nds, scores.headline, tables.summary(scores, title))


def _recall(index: Index, found: Mapping[str, Detections], reading: pipeline.Config, out: Path) -> Judgement:
    """Recall over frames without nuScenes tables, and pictures of them."""
    numbers: dict[str, float] = {}
    texts = []
    for frame in index:
        sample, mine = pipeline.load(frame, index.root, reading), found[frame.token]
        counted = recall.recall(
            mine.boxes, mine.scores, mine.labels, sample.boxes, sample.labels, class_names=reading.class_names,
            score_threshold=SCORE_THRESHOLD,
        )  # fmt: skip
        picture = out / f"{frame.token}.png"
        view.draw(sample, mine.boxes, mine.scores, mine.labels, picture, score_threshold=SCORE_THRESHOLD)
        texts.append(f"{counted.table()}\n{picture}")
        numbers |= {"recall": counted.total.recall, "precision": counted.total.precision}
        numbers |= {f"recall/{row.name}": row.recall for row in counted.rows}
    numbers = {name: value for name, value in numbers.items() if np.isfinite(value)}
    return Judgement(numbers.get("recall", 0.0), numbers, "\n\n".join(texts))
