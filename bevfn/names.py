"""Names that come from data (tokens, file names, categories): how they are printed, and what they may be as paths.

A data set's author chooses them, so they may hold anything: newlines, a terminal's control sequences, another path.
"""

import hashlib
import re

LONGEST = 100  # letters of a file's name that is made of a name
LARGEST = 4096  # bytes of a token or path, as of a path on Linux
SHOWN = 120  # letters of a name in a sentence; nuScenes' paths have up to 100
WORD, SENTENCE = 300, 4000  # letters of a word, a user's own path say, and of a whole sentence


def printable(name: object, most: int = SHOWN) -> str:
    """A name for a sentence: everything in it that is no visible letter or blank spelled out ("\\n", "\\x1b"), so that it stays
    in its line and cannot command a terminal; of one of more than `most` letters both ends."""
    return _ends(_spelled(str(name)), most)


def sentence(text: object) -> str:
    """A whole sentence likewise, whatever names somebody put into it; also of its very long words both ends."""
    words = re.sub(rf"\S{{{WORD + 1},}}", lambda word: _ends(word[0], WORD), _spelled(str(text)))
    return _ends(words, SENTENCE)


def lines(text: str) -> str:
    """Each of the text's lines as a `sentence`."""
    return "\n".join(map(sentence, text.split("\n")))


def _spelled(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _ends(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 3) :]}"


def file_name(name: str) -> str:
    """A name as one part of a path: letters, digits, "-", "_" and "." stay, the rest becomes %XX; other names, other parts."""
    kept = re.sub(
        r"[^A-Za-z0-9._-]|^\.", lambda c: "".join(f"%{b:02X}" for b in c[0].encode(errors="backslashreplace")), name
    )
    if len(kept) <= LONGEST:
        return kept or "%"
    digest = hashlib.sha256(kept.encode()).hexdigest()[:16]
    return f"{kept[:LONGEST]}%{digest}"


def unusable(name: str) -> str:
    """Why no file could hold or be called what somebody gave as a name; empty if one can."""
    if name.isascii() and "\0" not in name and len(name) <= LARGEST:
        return ""
    if "\0" in name:
        return "has a NUL"
    if name.encode(errors="replace").decode() != name:
        return "has half of a letter (a lone surrogate)"
    return f"has more than {LARGEST:,} bytes" if len(name.encode()) > LARGEST else ""


def leaves(path: str) -> bool:
    """Whether a path that should be relative to a root is absolute or climbs out of it."""
    return (
        path.startswith(("/", "\\"))
        or ".." in re.split(r"[/\\]", path)
        or re.match(r"[A-Za-z]:[/\\]", path) is not None
    )
