"""Runs beside each other: what their configs say otherwise, their losses over the steps, their last scores by class."""

import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from bevfn.evaluation import markup, page, plots, score, tables
from bevfn.evaluation.slices import ALL
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
    report: Path | None = None
    """of the same"""
    slices: Mapping[str, Any] = field(default_factory=dict)
    """of the same, see `breakdown`"""


def read(folder: Path, name: str, config: Mapping[str, str]) -> One:
    """A run's folder, whose config has been read. Raises ValueError for damaged files in it."""
    records = read_metrics(folder) if (folder / METRICS_FILE).is_file() else []
    own = (path for path in folder.glob("evaluations/step_*") if re.fullmatch(r"step_\d+", path.name))
    evaluated = sorted(path / score.METRICS for path in own if (path / score.METRICS).is_file())
    told = read_json(evaluated[-1].read_bytes()) if evaluated else {}
    detects = "classes" in told  # which a pretraining does not
    report = evaluated[-1].with_name(page.REPORT) if evaluated else None
    scores = score.read(evaluated[-1]) if detects else None
    found = report if report is not None and report.is_file() else None
    return One(name, config, records, scores, found, told.get("breakdown", {}).get("slices", {}))


def differences(runs: Sequence[One]) -> list[tuple[str, ...]]:
    """Rows (flag, its value in each run) of the flags that are not the same in all."""
    flags = dict.fromkeys(flag for run in runs for flag in run.config)
    rows = [(flag, *(run.config.get(flag, ABSENT) for run in runs)) for flag in flags]
    return [row for row in rows if len(set(row[1:])) > 1]


def scored(runs: Sequence[One]) -> dict[str, score.Scores]:
    """The scores of the runs that have some."""
    return {run.name: run.scores for run in runs if run.scores is not None}


def parts(runs: Sequence[One]) -> tables.Rows:
    """Recall and AP at 2 m of all classes by distance, length, visibility and points, a column of each run that has been evaluated
    on the same key frames; the head alone where none has them."""
    known = {
        run.name: {
            f"{what} {one['part']}": one for what, of in run.slices.items() for one in of.get(ALL, of.get("all", ()))
        }
        for run in runs  # "all": what it was called before a class could have that name
    }
    known = {name: of for name, of in known.items() if of}

    def text(one: Mapping[str, float | None] | None) -> str:
        values = [] if one is None else [value for value in (one["recall"], one["AP"]) if value is not None]
        return ", ".join(map(tables.number, values)) or "-"

    names = dict.fromkeys(name for of in known.values() for name in of)
    return [["recall, AP", *known], *([name, *(text(of.get(name)) for of in known.values())] for name in names)]


def losses(runs: Sequence[One], theme: plots.Theme = plots.LIGHT) -> bytes:
    """The total losses of the runs over their steps, a PNG."""
    curves = {}
    for run in runs:
        pairs = [(r["step"], r["loss/total"]) for r in run.records if math.isfinite(r.get("loss/total", math.nan))]
        if pairs:
            steps, values = np.array(pairs, dtype=np.float64).T
            curves[run.name] = steps, values
    return plots.curves(curves, "loss", theme)


def write(out: Path, runs: Sequence[One], width: int = 80) -> str:
    """Writes compare.html, losses.png and classes.png (of runs that were scored on the same key frames) into `out`; returns what
    to print in a terminal of so many columns."""
    rows = differences(runs)
    text = [
        "the configs say the same" if not rows else "configs:",
        *(_wrapped(f"  {row[0]}: {' | '.join(row[1:])}", width) for row in rows),
    ]
    pictures = {"losses": (losses(runs), losses(runs, plots.DARK))}
    scores, why, by_part = scored(runs), "", list[list[str]]()
    if len(scores) > 1:
        try:
            text += ["", tables.compare(scores, width)]
            pictures["classes"] = (plots.comparison(scores), plots.comparison(scores, plots.DARK))
            by_part = parts(runs)
        except ValueError as error:
            why = str(error)
    else:
        why = f"{len(scores)} of {len(runs)} runs have been evaluated, so no scores are compared"
    for name, (light, _) in pictures.items():
        write_atomically(out / f"{name}.png", light)
    write_atomically(out / "compare.html", _page(out, runs, rows, pictures, by_part, why).encode())
    return "\n".join([*text, *([why] if why else [])])


def _wrapped(line: str, width: int) -> str:
    """In lines that fit, but for one word that does not, such as a path."""
    how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": " " * 6}
    return "\n".join(textwrap.wrap(line, width, **how))


def _page(
    out: Path,
    runs: Sequence[One],
    rows: list[tuple[str, ...]],
    pictures: Mapping[str, tuple[bytes, bytes]],
    by_part: tables.Rows,
    why: str,
) -> str:
    head = ["", *(run.name for run in runs)]
    same = "<p>They say the same.</p>"
    sections = [("Configs", markup.table([head, *map(list, rows)], "config") if rows else same)]
    sections += [(name.capitalize(), markup.themed(name, both)) for name, both in pictures.items()]
    if len(by_part) > 1:
        rule = "<p>Recall from the score on at which each run's own F1 is highest; AP at 2 m.</p>"
        sections.append(("Where they fail", rule + markup.table(by_part)))
    reports = {run.name: quote(os.path.relpath(run.report, out)) for run in runs if run.report is not None}
    links = "".join(f'<li><a href="{escape(link)}">{escape(name)}</a></li>' for name, link in reports.items())
    sections += [("Reports of the last evaluations", f"<ul>{links}</ul>")] if links else []
    sections += [("Scores", f"<p>{escape(why)}</p>")] if why else []
    return markup.document(" and ".join(run.name for run in runs), "", sections)
