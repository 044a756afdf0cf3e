"""Scores as Markdown tables: one evaluation, or several side by side."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bevfn.evaluation.score import ERRORS, UNITS, Scores
from bevfn.metrics import warnings

LOWER_IS_BETTER = {f"m{name}" for name in ERRORS}
LEAST = len("**0.123** | ")  # letters of a column
Rows = list[list[str]]
"""A table as text: the head, then the rows; the first column holds names."""


@dataclass(frozen=True)
class Extra:
    """What another metric than nuScenes' says about the same detections, to stand before it."""

    headline: dict[str, float]
    """More is better."""
    tables: dict[str, Rows]
    """By heading."""
    note: str
    """By what the numbers were made."""
    numbers: dict[str, Any]
    """All of them, as plain data."""


def summary(
    scores: Scores, title: str = "", counts: Mapping[str, float] | None = None, extra: Extra | None = None
) -> str:
    """Headline numbers, one row per class (`-` where it has no such error or no annotation), and what was `counted`; of
    another metric before."""
    lines = [f"## {title}", ""] if title else []
    if extra is not None:
        lines += [*_table([list(extra.headline), [number(value) for value in extra.headline.values()]]), ""]
        for heading, rows in extra.tables.items():
            lines += [f"{heading}:", "", *_table(rows), ""]
        lines += [extra.note, ""]
    lines += _table([list(scores.headline), [number(value) for value in scores.headline.values()]])
    rows = [["class", "boxes", "AP", *ERRORS]]  # 80 columns, as narrow terminals have
    for c in scores.classes:
        # The devkit gives a class without annotations AP 0 and errors 1: numbers that measure nothing.
        values = [c.ap, *c.errors.values()] if c.annotated else [math.nan] * 6
        rows.append([c.name, str(c.annotated), *map(number, values)])
    units = ", ".join(f"{name} [{UNITS[name]}]" for name in ERRORS)
    lost = [f"- {line}" for line in counted(counts or {})]
    return "\n".join([*lines, "", *_table(rows), "", f"{units}.", note(scores), *(["", *lost] if lost else []), ""])


def measured(numbers: Mapping[str, float], title: str, frames: int, counts: Mapping[str, float]) -> str:
    """The numbers of a model that detects nothing, of so many key frames, and what was `counted`."""
    head = [f"## {title}", "", *_table([list(numbers), [number(value) for value in numbers.values()]]), ""]
    lost = [f"- {line}" for line in counted(counts)]
    return "\n".join([*head, f"{frames:,} key frames.", *(["", *lost] if lost else []), ""])


def counted(counts: Mapping[str, float]) -> list[str]:
    """What did not fit, was broken or missing on the way to the scores, a sentence each; of points, which share."""
    dropped, kept = counts.get("overflow/points", 0), counts.get("points", 0)
    share = f" ({dropped / (dropped + kept):.1%} of all in range)" if dropped else ""
    return [f"{text}{share if text.startswith('overflow/points') else ''}." for text in warnings(counts)]


def note(scores: Scores) -> str:
    """By what the numbers were made, and what not to read into them."""
    absent = [c.name for c in scores.classes if not c.annotated]
    text = f"{scores.frames:,} key frames of {scores.version} {scores.split}, nuscenes-devkit DetectionEval, {scores.rule}."
    if absent:
        text += f" Not annotated here, so AP 0 and errors 1 in every mean: {', '.join(absent)}."
    return text


def compare(scores: Mapping[str, Scores], width: int | None = None) -> str:
    """A column per name, in the order given, of NDS, mAP, errors and the AP of each class; the best of a row bold. As many columns
    in one table as fit in `width` letters, the others below; None: all.

    Raises ValueError without scores, or if they are not of the same key frames.
    """
    check_comparable(scores)
    first = next(iter(scores.values()))
    of_all = {what: [one.headline[what] for one in scores.values()] for what in first.headline}
    for place, one in enumerate(first.classes):
        if one.annotated:
            of_all[f"AP {one.name}"] = [s.classes[place].ap for s in scores.values()]
    rows = [[what, *_marked(values, what in LOWER_IS_BETTER)] for what, values in of_all.items()]
    return "\n".join([*_beside([["", *scores], *rows], width), "", note(first), ""])


def check_comparable(scores: Mapping[str, Scores]) -> None:
    """Raises ValueError without scores, or if they are of different key frames or annotations."""
    if not scores:
        raise ValueError("there are no scores to compare; give at least one.")
    seen: dict[tuple, str] = {}
    for name, one in scores.items():
        key = (one.version, one.split, one.frames, tuple((c.name, c.annotated) for c in one.classes))
        seen.setdefault(key, name)
    if len(seen) > 1:
        (a, b), *_ = zip(seen.values(), list(seen.values())[1:])
        raise ValueError(f"{a} and {b} were scored on different key frames; evaluate both on the same split.")


def number(value: float) -> str:
    """Three decimals, `-` for NaN."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def best(values: list[float], lower: bool) -> str:
    """The text of the best value, "" if all are the same (so that equal texts are equally good)."""
    texts = {number(value): value for value in values if not math.isnan(value)}
    return "" if len(texts) < 2 else (min if lower else max)(texts, key=lambda text: texts[text])


def _marked(values: list[float], lower: bool) -> list[str]:
    """The numbers of a row, the best bold."""
    mark = best(values, lower)
    return [f"**{text}**" if text == mark else text for text in map(number, values)]


def _beside(rows: Rows, width: int | None) -> list[str]:
    """The table in as many as the width asks for, one below the other, the first column in each; longer heads lose their begin."""
    name = max(len(row[0]) for row in rows)
    room = sys.maxsize if width is None else max(width - name - len("|  |"), LEAST)
    heads = [head if len(head) <= room - 3 else "…" + head[4 - room :] for head in rows[0][1:]]
    blocks, used = [[0]], 0
    for column, cells in enumerate(zip(heads, *(row[1:] for row in rows[1:])), start=1):
        wide = max(map(len, cells)) + len(" | ")
        if blocks[-1] != [0] and used + wide > room:
            blocks.append([0])
            used = 0
        blocks[-1].append(column)
        used += wide
    shown = [["", *heads], *rows[1:]]
    made = (_table([[row[column] for column in block] for row in shown]) for block in blocks)
    return [line for number, table in enumerate(made) for line in (*([""] if number else []), *table)]


def _table(rows: list[list[str]]) -> list[str]:
    """Markdown, columns padded: the first one left, numbers right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = not rows[1][0].replace(".", "").isdigit()  # names, unless the first column holds numbers
    rule = [":" + "-" * (w - 1) if i == 0 and left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    aligned = [
        [cell.ljust(w) if i == 0 and left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        for row in rows
    ]
    return [f"| {' | '.join(row)} |" for row in (aligned[0], rule, *aligned[1:])]
