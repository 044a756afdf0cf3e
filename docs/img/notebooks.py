"""Draws what each notebook shows, its stored pictures on one sheet, beside this file: `python docs/img/notebooks.py [NAME …]`.

notebook_1_frame.png and so on; again after `python notebooks/execute.py`, which stores the pictures.
"""

import base64
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parents[1] / "notebooks"
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
WIDTH, GAP, TITLE = 800, 8, 30  # pixels of a sheet, between its pictures, and of the line above them
TALLEST = 210  # pixels of a picture, but for one that fills a row alone
COLOURS = 64  # of a sheet, which is a third of the file that it is without a palette


def pictures(notebook: dict) -> Iterator[Image.Image]:
    """The stored PNGs, from the first cell to the last."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            if stored := output.get("data", {}).get("image/png"):
                yield Image.open(io.BytesIO(base64.b64decode(stored))).convert("RGB")


def rows(shown: list[Image.Image]) -> list[list[Image.Image]]:
    """The pictures in rows of WIDTH, those of a row of one height."""
    made, row = [], []
    for picture in shown:
        row.append(picture)
        if _height(row) <= TALLEST:
            made.append(row)
            row = []
    made += [row] if row else []
    return [[_scaled(picture, min(_height(row), TALLEST)) for picture in row] for row in made]


def _height(row: list[Image.Image]) -> int:
    """At which they fill the sheet's width."""
    return int((WIDTH - GAP * (len(row) + 1)) / sum(picture.width / picture.height for picture in row))


def _scaled(picture: Image.Image, height: int) -> Image.Image:
    return picture.resize((round(picture.width * height / picture.height), height), Image.Resampling.LANCZOS)


def sheet(title: str, shown: list[Image.Image]) -> Image.Image:
    """A title, and the pictures below it."""
    placed = rows(shown)
    made = Image.new("RGB", (WIDTH, TITLE + sum(row[0].height + GAP for row in placed)), "white")
    ImageDraw.Draw(made).text((GAP, GAP), title, "black", ImageFont.truetype(FONT, 15))
    top = TITLE
    for row in placed:
        left = GAP
        for picture in row:
            made.paste(picture, (left, top))
            left += picture.width + GAP
        top += row[0].height + GAP
    return made.quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def main(names: list[str]) -> None:
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        notebook = json.loads(path.read_text())
        title = notebook["cells"][0]["source"][0].strip("# \n")
        to = HERE / f"notebook_{path.stem}.png"
        sheet(title, list(pictures(notebook))).save(to, optimize=True)
        print(f"{to.name}: {to.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
