"""A folder about one evaluation: numbers, tables, pictures, and one HTML page that holds them all and needs nothing else.

out/report.html   one file for any browser, from a disk too: light or dark as the reader's system is, charts that answer to a choice
                  of class, key frames to be browsed; how large it can get says `browse`
out/metrics.json  out/summary.md
out/classes.png   training.png   comparison.png   worst.png (a key frame's cameras and its view from above)

What moves in the page is `report.js`, plain script over the page's own data: a charting library would be 1 to 4 MB of a page that has
about 100 kB of numbers, and one more thing to keep up to date.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from bevfn import draw
from bevfn.data.index import Index
from bevfn.data.reading import CLASS_NAMES
from bevfn.evaluation import breakdown, browse, frame_quality, interactive, markup, outcomes, plots, results, tables
from bevfn.evaluation import score as scoring
from bevfn.evaluation.results import RANGES
from bevfn.evaluation.score import ERRORS, UNITS, Scores
from bevfn.files import as_read, to_json, write_atomically
from bevfn.metrics import METRICS_FILE, read_metrics

REPORT, WORST = "report.html", "worst.png"
Plot = Callable[[plots.Theme], bytes]


def write(
    out: Path,
    scores: Scores,
    *,
    title: str = "Evaluation",
    index: Index | None = None,
    found: Mapping[str, Any] | None = None,
    run_dir: Path | None = None,
    config: Mapping[str, Any] | None = None,
    others: Mapping[str, Scores] | None = None,
    counts: Mapping[str, float] | None = None,
    name: str = "this run",
    num_frames: int = 6,
    ranges: Mapping[str, float] = RANGES,
    extra: tables.Extra | None = None,
) -> Path:
    """Writes the folder `out`, creating it, and returns the page's path.

    index, found: the key frames and the results document that were scored; with them the scores are broken down (`breakdown`,
    also in metrics.json), and the num_frames worst, best and some other key frames are in the page, from the sensor files. run_dir: a run folder whose metrics.jsonl is drawn. config: plain data, any
    depth. others: earlier scores of the same key frames, shown beside these, which are called `name`. counts: of what did
    not fit, was broken or missing (`detect`). ranges: distance [m] below which boxes of each class count. extra: of
    another metric, shown before these scores, and under "t4" in metrics.json.

    Raises ValueError if `out` is a file, if scores do not compare, or if a frame's point file cannot be read.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, so no folder can be made there; choose another folder for the report.")
    side_by_side = {**(others or {}), name: scores}
    tables.check_comparable(side_by_side)
    charts: dict[str, Plot] = {"classes": lambda theme: plots.classes(scores, theme)}
    if others:
        charts["comparison"] = lambda theme: plots.comparison(side_by_side, theme)
    if run_dir is not None and (Path(run_dir) / METRICS_FILE).is_file():
        records = [*read_metrics(run_dir), *_evaluations(Path(run_dir), out, scores)]
        if records:
            charts["training"] = lambda theme: plots.training(records, theme)
    pictures = {chart: (plot(plots.LIGHT), plot(plots.DARK)) for chart, plot in charts.items()}
    known = None if index is None or found is None else _looked_into(out, index, found, num_frames, ranges)
    markdown = tables.summary(scores, title, counts, extra) + (f"\n{tables.compare(side_by_side)}" if others else "")
    for chart, (light, _) in pictures.items():
        write_atomically(out / f"{chart}.png", light)
    write_atomically(out / "summary.md", markdown.encode())
    data = interactive.data_of(scores, known, max(ranges.values()))
    html = _page(title, scores, side_by_side if others else {}, pictures, data, config or {}, counts or {}, extra)
    write_atomically(out / REPORT, html.encode())
    more = {} if known is None else {"breakdown": known["breakdown"]}
    more |= {"t4": extra.numbers} if extra is not None else {}
    scoring.write(out / scoring.METRICS, scores, counts, more)  # last: with it, the evaluation is done
    return out / REPORT


def _evaluations(run_dir: Path, out: Path, scores: Scores) -> list[dict[str, float]]:
    """NDS and mAP over the steps, from the run's folders evaluations/step_..., of which `out` gets these scores."""
    home, found = (run_dir / "evaluations").resolve(), []
    for folder in sorted({*home.glob("step_*"), out.resolve()}):
        step, path = re.fullmatch(r"step_(\d+)", folder.name), folder / scoring.METRICS
        if step is None or folder.parent != home or not (folder == out.resolve() or path.is_file()):
            continue  # a user's own folder, or an evaluation that was killed
        one = scores if folder == out.resolve() else scoring.read(path)
        found.append({"step": int(step[1]), "eval/NDS": one.nds, "eval/mAP": one.mean_ap})
    return found


def _looked_into(
    out: Path, index: Index, found: Mapping[str, Any], num_frames: int, ranges: Mapping[str, float]
) -> dict[str, Any]:
    """ "breakdown" and "frames" of the page's data; writes the worst key frame's picture."""
    matched = frame_quality.match_all(index, found, ranges)
    ranking = frame_quality.ranked(matched)
    names = CLASS_NAMES if ranges is RANGES else tuple(ranges)
    ordered = {name: ranges[name] for name in names}
    made = breakdown.of(outcomes.of(index, found, matched, ordered), ranking.score_threshold)
    if ranking.frames:
        worst = ranking.frames[-1]
        frame = index[index.position(worst.token)]
        shown = results.to_lidar(found["results"].get(worst.token, []), frame, names)
        draw.draw(
            draw.sample(frame, index.root, names),
            *(shown.boxes, shown.scores, shown.labels, out / WORST),
            score_threshold=ranking.score_threshold,
            title=f"worst key frame: {worst.token}",
        )
    return {"breakdown": made, "frames": browse.of(index, found, matched, ranking, names, num_frames)}


def _page(
    title: str,
    scores: Scores,
    others: Mapping[str, Scores],
    pictures: Mapping[str, tuple[bytes, bytes]],
    data: Mapping[str, Any],
    config: Mapping[str, Any],
    counts: Mapping[str, float],
    extra: tables.Extra | None,
) -> str:
    """The whole document."""
    sections = [] if extra is None else [(heading, markup.table(rows)) for heading, rows in extra.tables.items()]
    sections += [("Classes", _class_table(scores) + markup.themed("AP and errors of each class", pictures["classes"]))]
    if others:
        chart = markup.themed("scores side by side", pictures["comparison"])
        sections.append(("Comparison", _comparison_table(others) + chart))
    sections += interactive.sections(data)
    if "training" in pictures:
        beside = "<p>Beside other runs: <code>bevfn compare RUN RUN</code></p>"
        sections.append(("Training", markup.themed("training curves", pictures["training"]) + beside))
    if counts:
        lost = "".join(f"<p>{escape(line)}</p>" for line in tables.counted(counts)) or "<p>nothing was dropped</p>"
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{v:,.0f}</td></tr>" for k, v in counts.items())
        sections.append(("What did not fit, was broken or missing", lost + f'<table class="config">{rows}</table>'))
    if config:
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in _flat(config))
        sections.append(
            ("Configuration", f'<details><summary>every field</summary><table class="config">{rows}</table></details>')
        )
    headline = _tiles({}, extra.note, extra.headline) if extra is not None else ""
    headline += _tiles(UNITS, tables.note(scores), scores.headline)
    return markup.document(title, headline, sections, interactive.script(data))


def _tiles(units: Mapping[str, str], note: str, headline: Mapping[str, float]) -> str:
    unit = {f"m{name}": f"{text}, less is better" for name, text in units.items()}
    tiles = "".join(
        f'<div class="tile{"" if name in unit else " main"}"><span>{name}</span><strong>{tables.number(value)}</strong>'
        f"<small>{unit.get(name, 'more is better')}</small></div>"
        for name, value in headline.items()
    )
    return f'<p>{escape(note)}</p><div class="tiles">{tiles}</div>'


def _class_table(scores: Scores) -> str:
    head = "".join(f"<th>{name}<small>{UNITS[name]}</small></th>" for name in ERRORS)
    rows = []
    for c in scores.classes:
        values = [c.errors[name] if c.annotated else math.nan for name in ERRORS]
        cells = "".join(f"<td>{tables.number(value)}</td>" for value in values)
        bar = f'<td class="bar" style="--share:{c.ap:.1%}">{tables.number(c.ap) if c.annotated else "-"}</td>'
        rows.append(f"<tr><th>{escape(plots.pretty(c.name))}</th><td>{c.annotated:,}</td>{bar}{cells}</tr>")
    errors = "".join(f"<td>{tables.number(value)}</td>" for value in scores.errors.values())
    total = sum(c.annotated for c in scores.classes)
    mean = f'<td class="bar" style="--share:{scores.mean_ap:.1%}">{tables.number(scores.mean_ap)}</td>'
    rows.append(f'<tr class="mean"><th>mean</th><td>{total:,}</td>{mean}{errors}</tr>')
    return markup.scrolling(f"<tr><th>class</th><th>boxes</th><th>AP</th>{head}</tr>", "".join(rows))


def _comparison_table(others: Mapping[str, Scores]) -> str:
    columns = list(next(iter(others.values())).headline)
    values = {name: s.headline for name, s in others.items()}
    marks = {k: tables.best([v[k] for v in values.values()], k in tables.LOWER_IS_BETTER) for k in columns}
    rows = ""
    for name, row in values.items():
        texts = [(tables.number(value), marks[k]) for k, value in row.items()]
        rows += f"<tr><th>{escape(name)}</th>"
        rows += "".join(f"<td>{f'<b>{text}</b>' if text == mark else text}</td>" for text, mark in texts) + "</tr>"
    return markup.scrolling("<tr><th></th>" + "".join(f"<th>{k}</th>" for k in columns) + "</tr>", rows)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, text) of every leaf."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else to_json(as_read(value)).decode()
