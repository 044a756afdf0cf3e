"""What the numbers of a point are in a cloud's file, as a text: "x y z intensity/1 ring:u1".

A word for each number, in their order: a name, behind ":" its type where it is not a little-endian float32, of the intensity
behind "/" the highest one there is, where that is not 255. x, y and z [m] must be among them; intensity and ring may; other
numbers are passed over.
"""

import functools
import re
from dataclasses import dataclass

import numpy as np

from bevfn.names import printable

NUSCENES = "x y z intensity ring"  # nuScenes' and T4's
HIGHEST = 255.0  # intensity, which published weights know
WORD = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::([<>]?[fiu][1248]))?(?:/([0-9.]+))?")
MOST_NAMES = 64


@dataclass(frozen=True)
class Columns:
    """The numbers of a point."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    """numpy's types, "<f4" """
    highest: float = HIGHEST
    """intensity"""

    @property
    def dtype(self) -> np.dtype:
        """Of a point in a file without header; several numbers may be called "_", or begin so."""
        return np.dtype(
            [(f"_{i}" if name.startswith("_") else name, k) for i, (name, k) in enumerate(zip(self.names, self.kinds))]
        )

    def __str__(self) -> str:
        return " ".join(name if kind == "<f4" else f"{name}:{kind}" for name, kind in zip(self.names, self.kinds))


@functools.lru_cache(maxsize=64)
def parse(text: str) -> Columns:
    """The columns of a text, "" being nuScenes'. Raises ValueError, which names the word and what it must be."""
    names, kinds, highest = list[str](), list[str](), HIGHEST
    for word in (text or NUSCENES).split():
        found = WORD.fullmatch(word)
        if found is None or (found[3] and found[1] != "intensity"):
            raise ValueError(
                f"'{printable(word)}' is no column of a point file such as x, ring:u1, intensity/1 or _:f8"
            )
        kind = np.dtype(found[2] or "<f4") if not (found[2] or "").endswith("f1") else None
        if kind is None or (not found[1].startswith("_") and found[1] in names):
            raise ValueError(
                f"'{printable(word)}' is there twice, or of no type of numbers; correct the columns of points"
            )
        names.append(found[1])
        kinds.append(kind.str)
        highest = float(found[3]) if found[3] else highest
    if missing := [name for name in ("x", "y", "z") if name not in names]:
        raise ValueError(f"the columns of points '{printable(text)}' have no {', '.join(missing)}; name x, y and z")
    if len(names) > MOST_NAMES or not highest > 0:
        raise ValueError(
            f"the columns of points '{printable(text)}' are more than {MOST_NAMES}, or of a highest intensity of 0"
        )
    return Columns(tuple(names), tuple(kinds), highest)


def five(rows: np.ndarray, columns: Columns) -> np.ndarray:
    """[P,5] float32 x, y, z [m], intensity 0..255 (or 0), ring (or -1) of structured rows [P] or numbers [P,C]."""
    made = np.zeros((len(rows), 5), dtype=np.float32)
    made[:, 4] = -1.0
    there = rows.dtype.names or columns.names
    for i, name in enumerate(("x", "y", "z", "intensity", "ring")):
        if name in there:
            made[:, i] = rows[name] if rows.dtype.names else rows[:, columns.names.index(name)]
    if columns.highest != HIGHEST:
        made[:, 3] *= HIGHEST / columns.highest
    return made
