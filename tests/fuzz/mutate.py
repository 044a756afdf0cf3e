"""Wrong files, drawn: of bytes, of JSON documents, of pickles. Each function takes what is right and a random.Random."""

import copy
import json
from random import Random
from typing import Any

NAN, INFINITE = float("nan"), float("inf")
# What stands where something else belongs. The strings are those that break printing, paths and formulas.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3.5, -0.5, -0.0, 1e-30, 1e30, -1e30, 2**31, 2**63, 10**400, NAN, INFINITE, -INFINITE,
    "", "x", "0", "nan", "../../x", "/etc/passwd", "a\nb\x1b[31m", "$\\frac{", "\ud800", "x" * 5000, [], [1], [[]], {}, {"a": 1},
    [0.0, 0.0, 0.0], [1, 0, 0, 0], [NAN, 1.0, 1.0], [1e30, 1e30, 1e30], [-1.0, 2.0, 3.0], ["a", "b", "c"],
)  # fmt: skip
WHOLES = (
    b"",
    b"{",
    b"[",
    b"[]",
    b"{}",
    b"null",
    b"7",
    b'"x"',
    b"\x00" * 100,
    b"\xff\xfe",
    b"[" * 200_000,
    b'{"a":' * 200_000,
)


def raw(content: bytes, draw: Random) -> bytes:
    """One of what disks, copies and editors do: a flipped bit, a cut, zeros, a block twice, foreign bytes, another file."""
    place, size = draw.randrange(len(content)), draw.choice((1, 8, 64, 1000))
    kind = draw.randrange(12)
    if kind < 5:
        return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
    if kind == 5:
        return content[:place]
    if kind == 6:
        return content[:place] + bytes(size) + content[place + size :]
    if kind == 7:
        return content[:place] + content[place : place + size] + content[place:]
    if kind == 8:
        return content[:place] + draw.randbytes(size) + content[place + size :]
    if kind == 9:
        return content[:place] + content[place + size :]
    if kind == 10:
        return content + draw.randbytes(size)
    return draw.choice(WHOLES)


def early(content: bytes, draw: Random) -> bytes:
    """`raw` in the first 2,000 bytes, where headers are."""
    return raw(content[:2000], draw) + content[2000:]


def value(document: Any, draw: Random) -> Any:
    """A JSON document, or what a pickle holds, with one thing in it replaced, removed, twice, or moved."""
    document = copy.deepcopy(document)
    holder, key = _place(document, draw)
    kind = draw.randrange(8)
    if kind < 5:
        holder[key] = copy.deepcopy(draw.choice(VALUES))
    elif kind == 5:
        del holder[key]
    elif kind == 6 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif isinstance(holder, dict):
        holder[str(draw.choice(VALUES))[:50]] = holder.pop(key)
    else:
        other = draw.randrange(len(holder))
        holder[key], holder[other] = holder[other], holder[key]
    return document


def _place(document: Any, draw: Random) -> tuple[Any, Any]:
    """A container in the document and a key of it, every depth as likely as another."""
    path = []
    node = document
    while isinstance(node, dict | list) and node:
        key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        path.append((node, key))
        node = node[key]
    return draw.choice(path[min(1, len(path) - 1) :])  # the whole is `raw`'s


def as_json(content: bytes, draw: Random) -> bytes:
    """`value` of a JSON file; every fifth time `raw`."""
    if draw.randrange(5) == 0:
        return raw(content, draw)
    return written(value(json.loads(content), draw))


def as_lines(content: bytes, draw: Random) -> bytes:
    """`as_json` of one line of many."""
    lines = content.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    lines[place] = as_json(lines[place].strip(), draw) + b"\n"
    return b"".join(lines)


def written(document: Any) -> bytes:
    """As a careless writer does: with NaN, and whatever fits into a string."""
    return json.dumps(document).encode()
