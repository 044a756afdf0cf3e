"""The parts of a report that `report.js` moves: their places in the page, their tables, and the data that the script reads."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bevfn import draw
from bevfn.evaluation import frame_quality, markup, plots, tables
from bevfn.evaluation.score import DISTANCES, Scores
from bevfn.evaluation.slices import ALL
from bevfn.files import to_json


def data_of(scores: Scores, known: Mapping[str, Any] | None, reach: float) -> dict[str, Any]:
    """What report.js reads. reach: the farthest box that counts [m]."""
    known = known or {"breakdown": None, "frames": []}
    curves = [
        {"name": c.name, "annotated": c.annotated, "ap_at": c.ap_at, "precision": c.precision} for c in scores.classes
    ]
    names = known["breakdown"]["classes"] if known["breakdown"] else [c.name for c in scores.classes]
    return {
        **known,
        "scores": curves,
        "classes": names,
        "distances": DISTANCES,
        "range": reach,
        "colours": draw.COLOURS,
        "series": plots.LIGHT.series,
        "outcome_colours": {
            "found": plots.FOUND,
            "missed": plots.MISSED,
            "hit": plots.HIT,
            "false_alarm": plots.FALSE,
            "not_counted": plots.NOT_COUNTED,
        },
    }


def script(data: Mapping[str, Any]) -> str:
    """The data and the script, at the page's end."""
    # In JSON "<" can be spelled out, so that no name in the data ends the script or begins a comment.
    embedded = to_json(data).decode().replace("<", "\\u003c")
    return f'<script type="application/json" id="data">{embedded}</script><script>{markup.beside("report.js")}</script>'


def sections(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(heading, HTML) of what there is data of."""
    made = [("Precision and recall", _precision_recall())]
    made += _broken_down(data["breakdown"]) if data["breakdown"] else []
    return made + ([("Key frames", _frames(data))] if data["frames"] else [])


def _precision_recall() -> str:
    choices = "".join(f'<option value="{i}">{d:g} m</option>' for i, d in enumerate(DISTANCES))
    chosen = choices.replace('value="2"', 'value="2" selected')
    return (
        f'<p><label>matched within <select id="pr-distance">{chosen}</select></label> The grey margins below 0.1 do not count. '
        'The pointer on a class lets the others fade, a click takes it away.</p><div id="pr"></div>'
        "<noscript><p>The charts and key frames of this page need JavaScript; the tables do not.</p></noscript>"
    )


def _options(names: Sequence[str]) -> str:
    """Choices of a class, or of `ALL`, whose name is empty."""
    return "".join(
        f'<option value="{escape(name)}">{escape(plots.pretty(name)) or "all classes"}</option>' for name in names
    )


def _broken_down(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Sections of `breakdown.of`."""
    threshold = made["threshold"]
    least = f"from score {threshold:.3f} on, where the F1 of all key frames is highest"
    choice = f'<label class="choice">class <select id="class">{_options([ALL, *made["classes"]])}</select></label>'
    rule = f"Matched within a class at {frame_quality.DISTANCE:g} m. "
    return [
        (
            "Where it fails",
            f"<p>{rule}Recall {least}; AP over all scores, of all classes their mean. A false alarm has no visibility and no points, "
            f'so by these there is recall alone.</p>{choice}<div id="slices" class="charts"></div>'
            '<h3>Scores</h3><div id="scores" class="charts"></div>'
            f"<h3>Errors of what is found</h3><p>F{least[1:]}; the last bin has what is larger.</p>"
            '<div id="errors" class="charts"></div>',
        ),
        (
            "Confusion",
            f"<p>F{least[1:]}. A row is what is annotated, a column what was detected there; the shade is the row's share."
            f"</p>{_confusion(made)}",
        ),
        (
            "Scenes",
            f"<p>F{least[1:]}; AP at {frame_quality.DISTANCE:g} m. A click on a head sorts.</p>{_scenes(made)}",
        ),
    ]


def _confusion(made: Mapping[str, Any]) -> str:
    names = [plots.pretty(name) for name in made["classes"]]
    head = "".join(f"<th>{escape(name)}</th>" for name in ["", *names, "missed"])
    rows = ""
    for name, counts in zip([*names, "nothing (false alarms)"], made["confusion"]):
        total = sum(counts)
        cells = "".join(
            f'<td class="cell" style="--share:{count / total if total else 0:.3f}">{count:,}</td>'
            for count in counts[:-1]
        )
        last = counts[-1] if name in names else None  # nothing that is missed is no number
        share = 0 if last is None or not total else last / total
        cells += f'<td class="cell bad" style="--share:{share:.3f}">{"-" if last is None else f"{last:,}"}</td>'
        rows += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    return markup.scrolling(f"<tr>{head}</tr>", rows)


def _scenes(made: Mapping[str, Any]) -> str:
    columns = {"frames": "key frames", "annotated": "annotated", "found": "found", "false_alarms": "false alarms"}
    columns |= {name: name for name in ("recall", "precision", "F1", "AP")}

    def text(value: float | int | None) -> str:
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else tables.number(value)

    rows = [[row["scene"] or "unknown", *(text(row[name]) for name in columns)] for row in made["scenes"]]
    return markup.table([["scene", *columns.values()], *rows], "sortable")


def _frames(data: Mapping[str, Any]) -> str:
    """The controls of key frames, whose data report.js shows."""
    frames, threshold = data["frames"], data["breakdown"]["threshold"]
    named = [f"{one['why']}: F1 {one['f1']:.2f}, {one['scene'] or one['token']}" for one in frames]
    listed = "".join(f'<option value="{n}">{escape(name)}</option>' for n, name in enumerate(named))
    colours = data["outcome_colours"]
    kinds = (
        ("show-found", "annotated, found", "found", "checked"),
        ("show-missed", "annotated, missed", "missed", "checked"),
        ("show-hits", "detected, right", "hit", "checked"),
        ("show-alarms", "detected, false alarm", "false_alarm", "checked"),
        ("show-others", "annotated, not counted", "not_counted", ""),
    )
    boxes = "".join(
        f'<label style="--colour:{colours[kind]}"><input type="checkbox" id="{name}" {on}><i></i>{text}</label>'
        for name, text, kind, on in kinds
    )
    return (
        f"<p>{len(frames)} key frames are in this page: the worst, the best, and others at random. Annotated boxes are dashed; arrows "
        "show where a box is in a second. Drag the view from above to turn and tilt it, the wheel zooms.</p>"
        f'<div class="controls"><button type="button" id="previous">&larr;</button><select id="frame">{listed}</select>'
        f'<button type="button" id="next">&rarr;</button><label>class <select id="frame-class">'
        f"{_options([ALL, *data['classes']])}</select></label>"
        f'<label>score from <input type="range" id="least" min="0" max="1" step="0.01" value="{threshold:.2f}"> '
        f'<output id="least-shown"></output></label><button type="button" id="upright">from above</button></div>'
        f'<div class="controls">{boxes}</div><p id="frame-text"></p>'
        '<div class="scene"><div id="cameras"></div><canvas id="above" width="640" height="640"></canvas></div>'
    )
