"""An op's operands a few at a time, for lowerings that store something large between two nodes of a static graph.

What is alive at once no longer grows with the batch: BEVNeXt's 432 images of a batch of 8 took 175 GB in pooling and 53 GB in
the deformable convolution, of the 64 GB that an Ascend 910B has.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

BYTES = 1 << 32  # of what is stored at once; float32 elements stay within int32


def parts(bytes_of_one: int, *operands: Tensor | None) -> list[tuple[Any, ...]]:
    """The operands, all of one length along the first axis, in parts of which `BYTES` holds what is stored.

    bytes_of_one: stored for one index of that axis; an operand may be None and is None in every part.
    """
    length = next(len(operand) for operand in operands if operand is not None)
    few = max(1, BYTES // max(1, bytes_of_one))
    if few >= length:
        return [operands]
    # Not a split: that of int32 and bool would leave the AI Core.
    slices = [slice(start, start + few) for start in range(0, length, few)]
    return [tuple(None if operand is None else operand[part] for operand in operands) for part in slices]


def joined(found: Iterable[Tensor]) -> Tensor:
    """The parts' results side by side again along the first axis."""
    first, *rest = found
    return torch.cat([first, *rest]) if rest else first


def summed(found: Iterable[Tensor]) -> Tensor:
    """What the parts add to one result."""
    first, *rest = found
    for other in rest:
        first = first + other
    return first
