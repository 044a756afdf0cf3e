"""Too little memory in one sentence: what was wanted, what is there, and what would fit.

There is no common error for it: the allocators of CUDA, of NPUs, of the host, numpy's, C++'s and
inductor's workers each say it in their own words.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

SIGNS = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory: you tried to allocate",
    "std::bad_alloc",
    "MemoryError",
    "unable to mmap",
)
SAYS = (RuntimeError, OSError, ImportError)  # any of which may be about something else
UNITS = {"bytes": 1, **{f"{unit}iB": 1 << 10 * (i + 1) for i, unit in enumerate("KMGTPE")}}
SIZE = r"([\d.]+) (bytes|[KMGTPE]iB)"
WANTED = re.compile(rf"allocate {SIZE}")
FREE = re.compile(rf"{SIZE} (?:is )?free")
TOTAL = re.compile(rf"total capacity of {SIZE}|{SIZE} total capacity")


class TooLittle(MemoryError):
    """Whose text is the sentence."""


def missing(error: BaseException) -> str | None:
    """The sentence where an exception says that memory is missing, else None."""
    text = str(error)
    if isinstance(error, TooLittle):
        return text
    if not isinstance(error, MemoryError) and not (isinstance(error, SAYS) and any(x in text for x in SIGNS)):
        return None
    wanted, free, total = _size(WANTED, text), _size(FREE, text), _size(TOTAL, text)
    if free is None or total is None:  # of the host
        free, total = free_and_total()
    there = f"{_gib(free)} of {_gib(total)} GiB are free" if free is not None and total is not None else ""
    more = "" if wanted is None else f"{_gib(wanted)} GiB more are wanted"
    return ": ".join(filter(None, ["there is not enough memory for this", ", ".join(filter(None, [more, there]))]))


@contextlib.contextmanager
def advised(advice: str) -> Iterator[None]:
    """Raises TooLittle, the sentence and behind it `advice`, where memory is missing inside."""
    try:
        yield
    except (MemoryError, *SAYS) as error:
        if (why := missing(error)) is None:
            raise
        raise TooLittle(f"{why}; {advice}") from error


def smaller(batch_size: int, accumulate: int, checkpoint_activations: bool) -> str:
    """The flags with which a train step of these needs less."""
    parts = next((n for n in range(2, batch_size + 1) if batch_size % n == 0), 1)
    flags = [] if parts == 1 else [f"--batch-size {batch_size // parts} --accumulate {accumulate * parts}"]
    if not checkpoint_activations:
        flags.append("--checkpoint-activations")
    if not flags:
        return "one sample with --checkpoint-activations is the least a step can be: use a device with more memory"
    share = f"activations of {batch_size // parts} instead of {batch_size} samples at once" if parts > 1 else ""
    return f"what needs less: {' and '.join(flags)}" + (f" ({share})" if share else "")


def free_and_total() -> tuple[int | None, int | None]:
    """Bytes of the host that can still be used, and all; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
        return fields["MemAvailable"], fields["MemTotal"]
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        return None, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None, None


def _size(pattern: re.Pattern, text: str) -> int | None:
    found = pattern.search(text)
    if found is None:
        return None
    number, unit = (part for part in found.groups() if part is not None)
    return int(float(number) * UNITS[unit])


def _gib(size: int) -> str:
    return f"{size / 2**30:,.3g}" if size < 2**40 else f"{size / 2**30:,.0f}"
