"""Draws what a command shows in terminals of 80 and of 160 columns, beside this file: `python docs/img/terminal.py NAME WORDS …`.

    pip install pyte
    python docs/img/terminal.py terminal_help bevfn --help

gives terminal_help_80.png and terminal_help_160.png: the screen as it stands at the end. The command runs once for each, in an
empty folder.
"""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
from pathlib import Path

import matplotlib
import pyte
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
HEIGHT = 200  # lines of the terminal, of which empty ones are cut off
SIZE = 15  # pixels of the font
COLOURS = {"default": "#d4d4d4", "black": "#808080", "red": "#f48771", "green": "#89d185", "brown": "#e5c07b"}
COLOURS |= {"blue": "#6cb6ff", "magenta": "#d7a0ff", "cyan": "#7fdbe3", "white": "#ffffff"}


def shown(words: list[str], columns: int) -> pyte.Screen:
    """The screen after a command."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns)}
    with tempfile.TemporaryDirectory() as folder:
        running = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=folder)
        os.close(theirs)
        screen = followed(ours, columns)
        running.wait()
    return screen


def followed(told: int, columns: int) -> pyte.Screen:
    """The screen of a terminal's descriptor, when nobody writes to it any more."""
    screen = pyte.Screen(columns, HEIGHT)
    stream = pyte.ByteStream(screen)
    try:
        while written := os.read(told, 65536):
            stream.feed(written)
    except OSError:  # what Linux says when the last writer has gone
        pass
    return screen


def drawn(screen: pyte.Screen, typed: str) -> Image.Image:
    """The screen's lines below what was typed."""
    font = ImageFont.truetype(FONT, SIZE)
    width, height = font.getlength("x"), SIZE * 1.3
    used = max((row for row, line in enumerate(screen.display) if line.strip()), default=0) + 1
    prompt = textwrap.wrap(f"$ {typed}", screen.columns - 2, break_on_hyphens=False)
    lines = [f"{line} \\" for line in prompt[:-1]] + prompt[-1:]
    rows = used + len(lines)
    picture = Image.new("RGB", (round(width * screen.columns) + 20, round(height * rows) + 20), "#1e1e1e")
    pen = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        pen.text((10, 10 + row * height), line, COLOURS["white"], font)
    for row in range(used):
        for column in range(screen.columns):
            letter = screen.buffer[row][column]
            colour = COLOURS.get(letter.fg.removeprefix("bright"), f"#{letter.fg}")
            pen.text((10 + column * width, 10 + (row + len(lines)) * height), letter.data, colour, font)
    return picture


def main(name: str, words: list[str]) -> None:
    for columns in (80, 160):
        drawn(shown(words, columns), " ".join(words)).save(HERE / f"{name}_{columns}.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
