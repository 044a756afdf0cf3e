"""What one row of the fuzzer's table is, and how one case of it runs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fuzz import bounded

FOUND, FINDINGS = 1, ("problem", "finding")  # of `bevfn data check`, which lists them


@dataclass(frozen=True)
class Row:
    """(what, mutation, command)."""

    what: str
    make: Callable[[Path], None]
    """writes right files into an empty folder"""
    files: str
    """glob of those of them that are made wrong, one in a case"""
    mutate: Callable[[bytes, Random], bytes]
    command: Callable[[Path], int | None]
    """a command of bevfn on the folder; asserts that what it took from the files is possible"""
    cases: int
    """in CI; twelve times as many under `slow`"""
    leaves: tuple[str, ...] = ()
    """names that a refused command may leave: locks and caches"""
    older: bool = False
    """an older file takes the wrong one's place, which is said"""


def run(row: Row, folder: Path, seed: int) -> str:
    """One case: "refused", "accepted" (and shown harmless by the command's assertions) or "unchanged".

    Raises AssertionError for a traceback, a sentence that is none, a wrong exit code, a command past its time or memory, partial
    output, and an impossible value that is accepted.
    """
    draw = Random(f"{row.what} {seed}")
    path = draw.choice([path for path in sorted(folder.glob(row.files)) if path.is_file() and path.stat().st_size])
    right = path.read_bytes()
    wrong = row.mutate(right, draw)
    if wrong == right:
        return "unchanged"
    path.write_bytes(wrong)
    before = dict(_contents(folder, row.leaves))
    try:
        outcome = bounded.run(lambda: row.command(folder))
        case = f"{row.what}, seed {seed}, {path.name}: {_difference(right, wrong)}\n{outcome}"
        assert outcome.code in (0, FOUND, bounded.exits.REFUSED), case
        assert all(line.isprintable() for line in outcome.out.splitlines()), case
        if outcome.code == 0:
            return "accepted"
        assert outcome.refused or (outcome.code == FOUND and any(word in outcome.out for word in FINDINGS)), case
        assert not outcome.refused or str(folder) in outcome.out, f"no file is named by {case}"
        assert dict(_contents(folder, row.leaves)) == before, f"output is left by {case}"
        return "refused"
    finally:
        path.write_bytes(right)


def _contents(folder: Path, leaves: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file() and not set(path.relative_to(folder).parts) & set(leaves):
            yield str(path.relative_to(folder)), path.read_bytes()


def _difference(right: bytes, wrong: bytes) -> str:
    """Where two contents first differ, for the reader of a failure."""
    place = next((i for i, (a, b) in enumerate(zip(right, wrong)) if a != b), min(len(right), len(wrong)))
    start = max(0, place - 40)
    return f"{len(right)} -> {len(wrong)} bytes, from {place} on: {right[start : place + 60]!r} -> {wrong[start : place + 60]!r}"
