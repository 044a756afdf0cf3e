"""Names that come from data (tokens, file names, categories): how they are printed, and what they may be as paths.

A data set's author chooses them, so they may hold anything: newlines, a terminal's control sequences, another path.
"""

import hashlib
import re

LONGEST = 100  # letters of a file's name that is made of a name


def printable(text: object) -> str:
    """The text with everything in it that is no visible letter or blank spelled out ("\\n", "\\x1b"), so that it stays in its
    line and cannot command a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def file_name(name: str) -> str:
    """A name as one part of a path: letters, digits, "-", "_" and "." stay, the rest becomes %XX; other names, other parts."""
    kept = re.sub(
        r"[^A-Za-z0-9._-]|^\.", lambda c: "".join(f"%{b:02X}" for b in c[0].encode(errors="backslashreplace")), name
    )
    if len(kept) <= LONGEST:
        return kept or "%"
    digest = hashlib.sha256(kept.encode()).hexdigest()[:16]
    return f"{kept[:LONGEST]}%{digest}"


def leaves(path: str) -> bool:
    """Whether a path that should be relative to a root is absolute or climbs out of it."""
    return (
        path.startswith(("/", "\\"))
        or ".." in re.split(r"[/\\]", path)
        or re.match(r"[A-Za-z]:[/\\]", path) is not None
    )
