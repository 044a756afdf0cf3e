"""HTML that reports and comparisons share: the page itself, tables, pictures in it."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from bevfn.evaluation.tables import Rows


def document(title: str, headline: str, sections: Sequence[tuple[str, str]], script: str = "") -> str:
    """A page of (heading, HTML) under a title; headline, script: HTML."""
    body = "".join(f"<section><h2>{escape(heading)}</h2>{content}</section>" for heading, content in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><style>{beside("report.css")}</style></head><body><main>'
        f"<header><h1>{escape(title)}</h1>{headline}</header>{body}</main>{script}</body></html>\n"
    )


def beside(name: str) -> str:
    """A file that is installed beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def table(rows: Rows, kind: str = "") -> str:
    """An HTML table of texts, the first row its head and the first column its names; kind: its class."""
    head, *others = ["".join(f"<th>{escape(cell)}</th>" for cell in rows[0])] + [
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in rows[1:]
    ]
    return scrolling(f"<tr>{head}</tr>", "".join(others), kind)


def scrolling(head: str, rows: str, kind: str = "") -> str:
    """A table of HTML rows that scrolls where it is too wide; kind: its class."""
    return f'<div class="scroll"><table class="{kind}"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def themed(text: str, pictures: tuple[bytes, bytes]) -> str:
    """A light picture, and a dark one for readers whose system is dark."""
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{_data(pictures[1])}">'
    return f"<picture>{dark}{_image(text, pictures[0])}</picture>"


def _image(text: str, data: bytes) -> str:
    return f'<img alt="{escape(text)}" src="{_data(data)}">'


def _data(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
