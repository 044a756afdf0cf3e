"""Runs beside each other: what their configs say otherwise, their losses over the steps, their last scores by class."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from bevfn.evaluation import page, plots, score, tables
from bevfn.files import read_json, write_atomically
from bevfn.metrics import METRICS_FILE, read_metrics

ABSENT = "(none)"


@dataclass(frozen=True)
class One:
    """A run as it is compared."""

    name: str
    config: Mapping[str, str]
    """flag: what it was set to"""
    records: Sequence[Mapping[str, float]]
    """`read_metrics`"""
    scores: score.Scores | None
    """of its last evaluation"""


def read(folder: Path, name: str, config: Mapping[str, str]) -> One:
    """A run's folder, whose config has been read. Raises ValueError for damaged files in it."""
    records = read_metrics(folder) if (folder / METRICS_FILE).is_file() else []
    own = (path for path in folder.glob("evaluations/step_*") if re.fullmatch(r"step_\d+", path.name))
    evaluated = sorted(path / score.METRICS for path in own if (path / score.METRICS).is_file())
    detects = bool(evaluated) and "classes" in read_json(evaluated[-1].read_bytes())  # which a pretraining does not
    return One(name, config, records, score.read(evaluated[-1]) if detects else None)


def differences(runs: Sequence[One]) -> list[tuple[str, ...]]:
    """Rows (flag, its value in each run) of the flags that are not the same in all."""
    flags = dict.fromkeys(flag for run in runs for flag in run.config)
    rows = [(flag, *(run.config.get(flag, ABSENT) for run in runs)) for flag in flags]
    return [row for row in rows if len(set(row[1:])) > 1]


def scored(runs: Sequence[One]) -> dict[str, score.Scores]:
    """The scores of the runs that have some."""
    return {run.name: run.scores for run in runs if run.scores is not None}


def losses(runs: Sequence[One], theme: plots.Theme = plots.LIGHT) -> bytes:
    """The total losses of the runs over their steps, a PNG."""
    curves = {}
    for run in runs:
        pairs = [(r["step"], r["loss/total"]) for r in run.records if math.isfinite(r.get("loss/total", math.nan))]
        if pairs:
            steps, values = np.array(pairs, dtype=np.float64).T
            curves[run.name] = steps, values
    return plots.curves(curves, "loss", theme)


def write(out: Path, runs: Sequence[One]) -> str:
    """Writes compare.html, losses.png and classes.png (of runs that were scored on the same key frames) into `out`; returns what
    to print."""
    rows = differences(runs)
    text = [
        "the configs say the same" if not rows else "configs:",
        *(f"  {row[0]}: {' | '.join(row[1:])}" for row in rows),
    ]
    pictures = {"losses": (losses(runs), losses(runs, plots.DARK))}
    scores, why = scored(runs), ""
    if len(scores) > 1:
        try:
            text += ["", tables.compare(scores)]
            pictures["classes"] = (plots.comparison(scores), plots.comparison(scores, plots.DARK))
        except ValueError as error:
            why = str(error)
    else:
        why = f"{len(scores)} of {len(runs)} runs have been evaluated, so no scores are compared"
    for name, (light, _) in pictures.items():
        write_atomically(out / f"{name}.png", light)
    write_atomically(out / "compare.html", _page(runs, rows, pictures, why).encode())
    return "\n".join([*text, *([why] if why else [])])


def _page(
    runs: Sequence[One], rows: list[tuple[str, ...]], pictures: Mapping[str, tuple[bytes, bytes]], why: str
) -> str:
    title = escape(" and ".join(run.name for run in runs))
    table = page.table([["", *(run.name for run in runs)], *map(list, rows)]) if rows else "<p>They say the same.</p>"
    body = f'<section class="config"><h2>Configs</h2>{table}</section>'
    for name, both in pictures.items():
        body += f"<section><h2>{name.capitalize()}</h2>{page.themed(name, both)}</section>"
    if why:
        body += f"<section><p>{escape(why)}</p></section>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{page.STYLE}</style></head>'
        f"<body><main><header><h1>{title}</h1></header>{body}</main></body></html>\n"
    )
