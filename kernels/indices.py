"""Rows, points and pixels are numbered by 32-bit integers in the kernels; elements of a row are counted in 64 bits."""

LARGEST = 2**31 - 1


def check(op: str, what: str, count: int, *, smaller: str = "batch") -> None:
    """Raises ValueError, which asks for a smaller `smaller`, where `count` of `what` are more than an index can number."""
    if count > LARGEST:
        raise ValueError(
            f"{op}: {count} {what} are more than the {LARGEST} that its kernel can number: use a smaller {smaller}."
        )
