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
WIDTH, GAP, TITLE = 1180, 12, 36  # pixels of a sheet at most, between its pictures, and of the line above them
COLOURS = 128  # of a sheet, which is half of the file that it is without a palette; of fewer, classes look alike


def pictures(notebook: dict) -> Iterator[Image.Image]:
    """The stored PNGs, from the first cell to the last."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            if stored := output.get("data", {}).get("image/png"):
                yield Image.open(io.BytesIO(base64.b64decode(stored))).convert("RGB")


def rows(shown: list[Image.Image]) -> list[list[Image.Image]]:
    """The pictures in rows, as large as they are stored, which is how their letters can be read: as many in a row as fit."""
    made: list[list[Image.Image]] = []
    for picture in shown:
        if made and sum(one.width + GAP for one in (*made[-1], picture)) + GAP <= WIDTH:
            made[-1].append(picture)
        else:
            made.append([picture])
    return made


def _height(row: list[Image.Image]) -> int:
    return max(picture.height for picture in row)


def sheet(title: str, shown: list[Image.Image]) -> Image.Image:
    """A title, and the pictures below it."""
    placed = rows(shown)
    width = max(sum(picture.width + GAP for picture in row) + GAP for row in placed)
    made = Image.new("RGB", (width, TITLE + sum(_height(row) + GAP for row in placed)), "white")
    ImageDraw.Draw(made).text((GAP, GAP), title, "black", ImageFont.truetype(FONT, 18))
    top = TITLE
    for row in placed:
        left = GAP
        for picture in row:
            made.paste(picture, (left, top))
            left += picture.width + GAP
        top += _height(row) + GAP
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
