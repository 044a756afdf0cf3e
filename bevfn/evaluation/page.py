"""A folder about one evaluation: numbers, tables, pictures, and one HTML page that holds them all and needs nothing else.

out/report.html   everything below in one file, light or dark as the reader's system is
out/metrics.json  out/summary.md
out/classes.png   precision_recall.png   training.png   comparison.png   frames.png
out/frames/best_1.png ... worst_1.png    a key frame's cameras and its view from above
"""

import base64
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from bevfn import draw
from bevfn.data.batch import needed
from bevfn.data.index import Index
from bevfn.data.reading import CLASS_NAMES
from bevfn.evaluation import frame_quality, plots, results, tables
from bevfn.evaluation import score as scoring
from bevfn.evaluation.results import RANGES
from bevfn.evaluation.score import ERRORS, UNITS, Scores
from bevfn.files import as_read, to_json, write_atomically
from bevfn.metrics import METRICS_FILE, read_metrics

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
    num_frames: int = 3,
    ranges: Mapping[str, float] = RANGES,
    extra: tables.Extra | None = None,
) -> Path:
    """Writes the folder `out`, creating it, and returns the page's path.

    index, found: the key frames and the results document that were scored; with them, the num_frames best and worst key
    frames are drawn from the sensor files. run_dir: a run folder whose metrics.jsonl is drawn. config: plain data, any
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
    charts: dict[str, Plot] = {
        "classes": lambda theme: plots.classes(scores, theme),
        "precision_recall": lambda theme: plots.precision_recall(scores, theme),
    }
    if others:
        charts["comparison"] = lambda theme: plots.comparison(side_by_side, theme)
    if run_dir is not None and (Path(run_dir) / METRICS_FILE).is_file():
        records = [*read_metrics(run_dir), *_evaluations(Path(run_dir), out, scores)]
        if records:
            charts["training"] = lambda theme: plots.training(records, theme)
    pictures = {chart: (plot(plots.LIGHT), plot(plots.DARK)) for chart, plot in charts.items()}
    scenes = _frames(out, index, found, num_frames, ranges) if index is not None and found is not None else []
    markdown = tables.summary(scores, title, counts, extra) + (f"\n{tables.compare(side_by_side)}" if others else "")
    for chart, (light, _) in pictures.items():
        write_atomically(out / f"{chart}.png", light)
    write_atomically(out / "summary.md", markdown.encode())
    html = _page(title, scores, side_by_side if others else {}, pictures, scenes, config or {}, counts or {}, extra)
    write_atomically(out / "report.html", html.encode())
    more = {"t4": extra.numbers} if extra is not None else {}
    scoring.write(out / scoring.METRICS, scores, counts, more)  # last: with it, the evaluation is done
    return out / "report.html"


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


Scene = tuple[str, str, bytes]  # heading, remark, PNG


def _frames(
    out: Path, index: Index, found: Mapping[str, Any], num_frames: int, ranges: Mapping[str, float]
) -> list[Scene]:
    """Writes frames.png and frames/*.png, and returns them, the overview first."""
    ranking = frame_quality.rank(index, found, ranges)
    names = CLASS_NAMES if ranges is RANGES else tuple(ranges)
    best, worst = ranking.ends(num_frames)
    named = [(f"best {i + 1}", c) for i, c in enumerate(best)]
    named += [(f"worst {len(worst) - i}", c) for i, c in enumerate(worst)]
    panels, scenes = [], []
    for heading, counted in named:
        frame = index[index.position(counted.token)]
        entries = found["results"].get(counted.token, [])
        sample = draw.sample(frame, index.root, names)
        detections = results.to_lidar(entries, frame, names)
        matched = frame_quality.compare(frame, entries, ranges)
        panels.append(plots.Panel(heading, frame, needed(sample.points, "points"), counted, matched, detections))
        path = out / "frames" / f"{heading.replace(' ', '_')}.png"
        arrays = detections.boxes, detections.scores, detections.labels
        draw.draw(sample, *arrays, path, score_threshold=ranking.score_threshold, title=f"{heading}: {counted.token}")
        remark = f"{frame.scene or 'scene unknown'}, key frame {counted.token}: {_counts(counted)}"
        scenes.append((heading, remark, path.read_bytes()))
    if not panels:
        return []
    overview = plots.outcomes(panels, ranking.score_threshold, columns=max(1, len(best)))
    write_atomically(out / "frames.png", overview)
    remark = (
        f"Matched within {frame_quality.DISTANCE:g} m at score ≥ {ranking.score_threshold:.3f}, the threshold with the highest "
        f"F1 over all {len(ranking.frames):,} key frames with annotations."
    )
    return [("overview", remark, overview), *scenes]


def _counts(counted: frame_quality.Counted) -> str:
    false = counted.predicted - counted.found
    return f"{counted.found} of {counted.annotated} found, {false} false alarm{'' if false == 1 else 's'}"


def _page(
    title: str,
    scores: Scores,
    others: Mapping[str, Scores],
    pictures: Mapping[str, tuple[bytes, bytes]],
    scenes: Sequence[Scene],
    config: Mapping[str, Any],
    counts: Mapping[str, float],
    extra: tables.Extra | None,
) -> str:
    """The whole document."""
    sections = [] if extra is None else [(heading, table(rows)) for heading, rows in extra.tables.items()]
    sections += [("Classes", _class_table(scores) + themed("AP and errors of each class", pictures["classes"]))]
    if others:
        chart = themed("scores side by side", pictures["comparison"])
        sections.append(("Comparison", _comparison_table(others) + chart))
    sections.append(
        ("Precision and recall", themed("precision over recall of each class", pictures["precision_recall"]))
    )
    if "training" in pictures:
        sections.append(("Training", themed("training curves", pictures["training"])))
    if scenes:
        (_, remark, overview), *rest = scenes
        body = f"<p>{escape(remark)}</p>" + _image("best and worst key frames from above", overview, "paper")
        for heading, note, png in rest:
            picture = _image(f"{heading}: cameras and view from above", _jpeg(png), "paper", "jpeg")
            body += f"<details><summary><b>{escape(heading)}</b> {escape(note)}</summary>{picture}</details>"
        sections.append(("Best and worst key frames", body))
    if counts:
        lost = "".join(f"<p>{escape(line)}</p>" for line in tables.counted(counts)) or "<p>nothing was dropped</p>"
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{v:,.0f}</td></tr>" for k, v in counts.items())
        sections.append(("What did not fit, was broken or missing", lost + f'<table class="config">{rows}</table>'))
    if config:
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in _flat(config))
        sections.append(
            ("Configuration", f'<details><summary>every field</summary><table class="config">{rows}</table></details>')
        )
    body = "".join(f"<section><h2>{escape(heading)}</h2>{content}</section>" for heading, content in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><style>{STYLE}</style></head><body><main>'
        f"<header><h1>{escape(title)}</h1>{_tiles({}, extra.note, extra.headline) if extra is not None else ''}"
        f"{_tiles(UNITS, tables.note(scores), scores.headline)}</header>{body}"
        "</main></body></html>\n"
    )


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
    return _scrolling(f"<tr><th>class</th><th>boxes</th><th>AP</th>{head}</tr>", "".join(rows))


def _comparison_table(others: Mapping[str, Scores]) -> str:
    columns = list(next(iter(others.values())).headline)
    values = {name: s.headline for name, s in others.items()}
    marks = {k: tables.best([v[k] for v in values.values()], k in tables.LOWER_IS_BETTER) for k in columns}
    rows = ""
    for name, row in values.items():
        texts = [(tables.number(value), marks[k]) for k, value in row.items()]
        rows += f"<tr><th>{escape(name)}</th>"
        rows += "".join(f"<td>{f'<b>{text}</b>' if text == mark else text}</td>" for text, mark in texts) + "</tr>"
    return _scrolling("<tr><th></th>" + "".join(f"<th>{k}</th>" for k in columns) + "</tr>", rows)


def table(rows: tables.Rows) -> str:
    """An HTML table of texts, the first row its head and the first column its names."""
    head, *others = ["".join(f"<th>{escape(cell)}</th>" for cell in rows[0])] + [
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in rows[1:]
    ]
    return _scrolling(f"<tr>{head}</tr>", "".join(others))


def _scrolling(head: str, rows: str) -> str:
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def themed(text: str, pictures: tuple[bytes, bytes]) -> str:
    """A light picture, and a dark one for readers whose system is dark."""
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{_data(pictures[1])}">'
    return f"<picture>{dark}{_image(text, pictures[0])}</picture>"


def _image(text: str, data: bytes, kind: str = "", form: str = "png") -> str:
    return f'<img class="{kind}" alt="{escape(text)}" src="{_data(data, form)}">'


def _data(data: bytes, form: str = "png") -> str:
    return f"data:image/{form};base64,{base64.b64encode(data).decode()}"


def _jpeg(png: bytes) -> bytes:
    """Camera pictures as JPEG: a tenth of the PNG's bytes."""
    encoded = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(encoded, "JPEG", quality=85)
    return encoded.getvalue()


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, text) of every leaf."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else to_json(as_read(value)).decode()


STYLE = """
:root { --surface: #ffffff; --page: #f4f6f9; --ink: #1c2430; --muted: #66707e; --line: #e3e7ed; --bar: #dce8fc; }
@media (prefers-color-scheme: dark) {
  :root { --surface: #171b22; --page: #0f1216; --ink: #e6e9ee; --muted: #98a2b1; --line: #2b323d; --bar: #253a60; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 0 0 12px; }
header p, section > p { color: var(--muted); margin: 4px 0 16px; }
section { background: var(--surface); border: 1px solid var(--line); border-radius: 12px; padding: 20px; margin-top: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(120px, 1fr)); gap: 12px; }
.tile { background: var(--surface); border: 1px solid var(--line); border-radius: 12px; padding: 12px 16px; }
.tile span, .tile small { display: block; color: var(--muted); font-size: 12px; }
.tile strong { font-size: 22px; font-variant-numeric: tabular-nums; } .tile.main strong { font-size: 32px; line-height: 1.2; }
.tile.main { border-color: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin-bottom: 16px; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; } th:first-child { text-align: left; } thead th { color: var(--muted); font-size: 13px; }
thead small { display: block; font-weight: 400; } tr.mean > * { border-bottom: 0; font-weight: 600; }
td.bar { min-width: 140px;
  background: linear-gradient(to right, var(--bar) var(--share), transparent var(--share)) 0 50% / 100% 65% no-repeat; }
img { display: block; width: 100%; height: auto; } .paper { border-radius: 8px; background: #fff; }
details { border-top: 1px solid var(--line); padding: 8px 0; } summary { cursor: pointer; color: var(--muted); }
summary b { color: var(--ink); } details img { margin-top: 8px; }
.config th, .config td { text-align: left; white-space: normal; font: 13px/1.4 ui-monospace, monospace; word-break: break-word; }
"""
