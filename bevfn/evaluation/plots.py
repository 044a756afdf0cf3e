"""Scores and training curves as PNG pictures, for a light or a dark page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bevfn import draw
from bevfn.evaluation.score import DISTANCES, ERRORS, UNITS, Scores
from bevfn.evaluation.tables import check_comparable, number

DPI = 160


@dataclass(frozen=True)
class Theme:
    """Colours of a picture."""

    surface: str
    ink: str
    muted: str
    """Ticks and secondary text."""
    grid: str
    bar: str
    quiet: str
    """Bars where less is better."""
    distances: tuple[str, str, str, str]
    """One hue, from the strictest distance to the loosest."""
    series: tuple[str, ...]
    """Things that are compared, in fixed order."""


LIGHT = Theme(
    *("#ffffff", "#1c2430", "#66707e", "#e6e9ee", "#cfdff9", "#d5d9e0"),
    distances=("#0b3c8c", "#2f6fde", "#6ea3f2", "#a9c8f8"),
    series=("#2f6fde", "#e0761a", "#178a66", "#b0407d", "#7a5ccf", "#8a7a1f"),
)
DARK = Theme(
    *("#171b22", "#e6e9ee", "#98a2b1", "#2b323d", "#2a4272", "#414a57"),
    distances=("#c5dafc", "#8db6fa", "#5b93f5", "#3766b8"),
    series=("#5b93f5", "#f0913d", "#3fbf93", "#dd6fae", "#a48cf0", "#c9b548"),
)
FOUND, MISSED, HIT, FALSE, NOT_COUNTED = "#178a66", "#d62839", "#2f6fde", "#e8890c", "#b4bac4"


def classes(scores: Scores, theme: Theme = LIGHT) -> bytes:
    """AP and the five errors of every class on one class axis, classes in falling order of AP."""
    ranked = sorted(scores.classes, key=lambda c: (c.annotated > 0, c.ap), reverse=True)
    figure = _figure((13.5, 0.38 * len(ranked) + 1.6), theme)
    panels = figure.subplots(1, 6, sharey=True, gridspec_kw={"width_ratios": [2.2, 1, 1, 1, 1, 1]})
    ends = [max(c.ap_at) for c in ranked]  # the numbers stand behind the dots
    _bars(panels[0], [c.ap if c.annotated else math.nan for c in ranked], ends, "AP", theme.bar, theme)
    for place, one in enumerate(ranked):
        for value, colour in zip(one.ap_at if one.annotated else (), theme.distances):
            axes_dot = {"marker": "o", "markersize": 4.5, "markeredgecolor": theme.surface, "markeredgewidth": 0.7}
            panels[0].plot(value, place, color=colour, zorder=4, clip_on=False, **axes_dot)
    panels[0].axvline(scores.mean_ap, color=theme.muted, linewidth=1, linestyle=(0, (3, 2)), zorder=1)
    for axes, name in zip(panels[1:], ERRORS):
        values = [c.errors[name] if c.annotated else math.nan for c in ranked]
        _bars(axes, values, values, f"{name} [{UNITS[name]}]", theme.quiet, theme)
        axes.axvline(scores.errors[name], color=theme.muted, linewidth=1, linestyle=(0, (3, 2)), zorder=1)
    panels[0].set_yticks(range(len(ranked)), [f"{pretty(c.name)}  ({c.annotated:,})" for c in ranked], color=theme.ink)
    panels[0].invert_yaxis()
    _legend(figure, [f"AP at {d:g} m" for d in DISTANCES], theme.distances, theme, marker="o")
    return _png(figure, theme)


def comparison(scores: Mapping[str, Scores], theme: Theme = LIGHT) -> bytes:
    """NDS, mAP and the AP of each class, a bar per name. Raises ValueError as `tables.compare` does."""
    check_comparable(scores)
    groups = ["NDS", "mAP", *(c.name for c in next(iter(scores.values())).classes if c.annotated)]
    figure = _figure((12.5, 3.6), theme)
    axes = figure.subplots()
    _style(axes, theme, grid="y")
    width = 0.8 / len(scores)
    for place, ((_, one), colour) in enumerate(zip(scores.items(), _cycle(theme.series, len(scores)))):
        values = [one.nds, one.mean_ap, *(c.ap for c in one.classes if c.annotated)]
        x = np.arange(len(groups)) + (place - (len(scores) - 1) / 2) * width
        axes.bar(x, values, width=width * 0.92, color=colour, zorder=2)
        for at, value in zip(x, values):
            axes.text(at, value + 0.012, f"{value:.2f}", ha="center", fontsize=7, color=theme.muted)
    axes.axvline(1.5, color=theme.grid, linewidth=1)
    axes.set(ylim=(0, 1.05), xlim=(-0.6, len(groups) - 0.4))
    axes.set_xticks(range(len(groups)), [name.replace("_", "\n") for name in groups])
    axes.tick_params(axis="x", labelcolor=theme.ink, labelsize=8.5)
    _legend(figure, list(scores), _cycle(theme.series, len(scores)), theme, marker="s")
    return _png(figure, theme)


def training(records: Sequence[Mapping[str, float]], theme: Theme = LIGHT) -> bytes:
    """Loss and its terms, evaluation scores if any (`eval/...`), gradient norm and learning rate over the steps.

    records: `read_metrics`.
    """
    names = list(dict.fromkeys(name for record in records for name in record))
    terms = [n for n in names if n.startswith("loss/") and n != "loss/total"]
    total = [n for n in ("loss/total", "loss") if n in names][:1]
    evaluations = [n for n in names if n in ("eval/NDS", "eval/mAP")]
    panels: list[tuple[str, list[str]]] = [("loss", [*total, *terms])] if total or terms else []
    panels += [("evaluation", evaluations)] if evaluations else []
    panels += [(title, [n]) for n, title in (("grad_norm", "gradient norm"), ("lr", "learning rate")) if n in names]
    figure = _figure((12.5, 3.2), theme)
    grid = figure.subplots(1, max(1, len(panels)), squeeze=False, width_ratios=[2, *([1] * (len(panels) - 1))])
    for axes, (title, shown) in zip(grid.flat, panels):
        _style(axes, theme)
        for name, colour in zip(shown, _cycle(theme.series, len(shown))):
            pairs = [(r["step"], r[name]) for r in records if name in r and math.isfinite(r[name])]
            if pairs:
                steps, values = np.array(pairs, dtype=np.float64).T
                _curve(axes, steps, values, colour, name.removeprefix("loss/").removeprefix("eval/"), title)
        axes.set_title(title, loc="left", fontsize=10, color=theme.ink, fontweight="bold")
        axes.set_xlabel("step", color=theme.muted, fontsize=9)
        if shown is evaluations:
            axes.set_ylim(bottom=0)  # shares of 1; a lone point would set an axis of thousandths
        if len(shown) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=theme.ink)
    return _png(figure, theme)


def curves(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str, theme: Theme = LIGHT) -> bytes:
    """(steps, values) by name in one picture; `title` is what they are of, as "loss"."""
    figure = _figure((12.5, 3.6), theme)
    axes = figure.subplots()
    _style(axes, theme)
    colours = _cycle(theme.series, len(pairs))
    for (name, (steps, values)), colour in zip(pairs.items(), colours):
        _curve(axes, steps, values, colour, name, title)
    axes.set_title(title, loc="left", fontsize=10, color=theme.ink, fontweight="bold")
    axes.set_xlabel("step", color=theme.muted, fontsize=9)
    _legend(figure, list(pairs), colours, theme)
    return _png(figure, theme)


def pretty(name: str) -> str:
    """ "construction_vehicle" -> "construction vehicle"."""
    return name.replace("_", " ")


def _figure(size: tuple[float, float], theme: Theme) -> Figure:
    return Figure(figsize=size, layout="constrained", facecolor=theme.surface)


def _style(axes: Axes, theme: Theme, grid: Literal["both", "x", "y"] = "both") -> None:
    axes.set_facecolor(theme.surface)
    axes.grid(True, axis=grid, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.muted, labelsize=8.5, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)


def _bars(axes: Axes, values: Sequence[float], ends: Sequence[float], title: str, colour: str, theme: Theme) -> None:
    """Horizontal bars and their values, written to the right of `ends`."""
    _style(axes, theme, grid="x")
    axes.barh(range(len(values)), np.nan_to_num(values), height=0.62, color=colour, zorder=2)
    limit = max([1.0, *np.nan_to_num(ends)])
    for place, (value, end) in enumerate(zip(values, np.nan_to_num(ends))):
        behind = {"facecolor": theme.surface, "edgecolor": "none", "pad": 0.8}
        axes.text(
            end + 0.05 * limit, place, number(value), va="center", fontsize=8.5, color=theme.ink, zorder=5, bbox=behind
        )
    axes.set(xlim=(0, limit * 1.25), xticks=(0, 0.5, 1) if limit < 2 else (0, 1, int(limit)))
    axes.set_title(title, loc="left", fontsize=10, color=theme.ink, fontweight="bold")


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str, title: str) -> None:
    """The values faintly and their running median over 2 % of the run; dots where there are few."""
    if len(values) < 50 or title == "learning rate":
        axes.plot(steps, values, color=colour, linewidth=1.8, label=label, marker="o" if len(values) < 20 else "", ms=4)
    else:
        half = max(2, len(values) // 100)
        # A median, for one step's outlier would bend a mean for the whole window.
        middle = [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
        axes.plot(steps, middle, color=colour, linewidth=1.8, label=label)
    if title in ("loss", "gradient norm") and values.min() > 0:  # they fall by orders of magnitude
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _legend(
    figure: Figure, labels: Sequence[str], colours: Sequence[str], theme: Theme, marker: str | None = None
) -> None:
    style: dict[str, Any] = {"linestyle": "", "marker": marker, "markersize": 7} if marker else {"linewidth": 2.5}
    handles = [Line2D([], [], color=colour, label=label, **style) for label, colour in zip(labels, colours)]
    where: dict[str, Any] = {"loc": "outside lower center", "ncols": len(handles)}
    figure.legend(handles=handles, fontsize=9, frameon=False, labelcolor=theme.ink, **where)


def _cycle(colours: Sequence[str], count: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(count)]


def _png(figure: Figure, theme: Theme) -> bytes:
    return draw.png(figure, dpi=DPI, facecolor=theme.surface)
