"""Runs the notebooks from top to bottom and stores them with what they show, small enough for a repository.

    python notebooks/execute.py                                    # in the environment that bevfn is installed in; no Jupyter
    python notebooks/execute.py notebooks/3_boundaries.ipynb

A cell shows what IPython would show: what it prints, pyplot's figures, and its last value if no ; follows it.
"""

import ast
import base64
import contextlib
import io
import json
import os
import pprint
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).resolve().parent
COLOURS = 256
"""of a stored picture, which is a third of the file that it is without a palette"""


def run(path: Path, sizes: Mapping[str, Any] = {}) -> tuple[dict[str, Any], list[list[Any]]]:
    """(names after the last code cell, what each code cell shows: printed text, figures, its last value).

    sizes: names that have other values from the cell on that says them.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for number, cell in enumerate(code(json.loads(path.read_text()))):
        source = "".join(cell["source"])
        tree, where = ast.parse(source), f"{path.name}[{number}]"
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(tree, where, "exec"), names)
            value = None if last is None else eval(compile(ast.Expression(last.value), where, "eval"), names)
        names |= {name: small for name, small in sizes.items() if name in names}
        figures = [plt.figure(number) for number in plt.get_fignums()]
        text = [printed.getvalue()] if printed.getvalue() else []
        shown.append([*text, *figures, *([] if value is None or source.endswith(";") else [_Value(value)])])
        plt.close("all")
    return names, shown


class _Value:
    """A cell's last value: not what it printed, even if it is a text."""

    def __init__(self, value: Any):
        self.value = value


def code(notebook: dict) -> list[dict]:
    """Its code cells."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def figure_of(shown: Any) -> Figure | None:
    """The figure that one of `run`'s shown things is."""
    value = shown.value if isinstance(shown, _Value) else shown
    return value if isinstance(value, Figure) else None


def output(shown: Any, number: int) -> dict:
    """One of `run`'s shown things in nbformat 4's form."""
    if (figure := figure_of(shown)) is not None:
        data = {"image/png": _png(figure), "text/plain": "a figure"}
        return {"output_type": "display_data", "metadata": {}, "data": data}
    if isinstance(shown, _Value):
        data = {"text/plain": pprint.pformat(shown.value, width=110, sort_dicts=False).splitlines(keepends=True)}
        return {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}
    return {"output_type": "stream", "name": "stdout", "text": shown.splitlines(keepends=True)}


def _png(figure: Figure) -> str:
    """A base64 PNG with a palette."""
    drawn, stored = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", bbox_inches="tight")
    how = Image.Quantize.FASTOCTREE  # keeps colours of thin lines, which a median cut drops
    picture = Image.open(drawn).convert("RGB").quantize(COLOURS, how, dither=Image.Dither.NONE)
    picture.save(stored, "png", optimize=True)
    return base64.b64encode(stored.getvalue()).decode()


def execute(path: Path) -> None:
    """Runs a notebook and stores it; a cell that fails raises, and nothing is stored then."""
    _, shown = run(path)
    notebook = json.loads(path.read_text())
    for number, (cell, of_cell) in enumerate(zip(code(notebook), shown), start=1):
        cell |= {"execution_count": number, "outputs": [output(one, number) for one in of_cell]}
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    print(f"{path.name}: {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    matplotlib.use("Agg")
    chosen = [Path(name).resolve() for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))
    sys.path.insert(0, str(HERE))
    os.chdir(HERE)
    for path in chosen:
        execute(path)
