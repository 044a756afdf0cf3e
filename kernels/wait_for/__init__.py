"""A tensor that is not there before another one is: an edge of the step's graph that carries no numbers.

What is computed from it again is not merged with the first time by whoever looks for equal expressions, and cannot run
ahead of `cue`. `layers.remat` recomputes with it.
"""

import torch
from torch import Tensor

from bevfn.kernels.derivatives import differentiable

_library = torch.library.Library("bevfn", "FRAGMENT")
_library.define("wait_for(Tensor x, Tensor cue) -> Tensor")


def wait_for(x: Tensor, cue: Tensor) -> Tensor:
    """A copy of x, any shape and dtype, made after `cue`, any tensor of the same device. No gradient flows into `cue`.

    One copy on a CPU or GPU (an operator's result shares no memory with its operands), none on Ascend.
    """
    return _wait_for(x, cue)


def _operator(x: Tensor, cue: Tensor) -> Tensor:
    return torch.ops.bevfn.wait_for(x, cue)


def _gradients(wanted: frozenset[int], grad: Tensor, x: Tensor, cue: Tensor) -> tuple[Tensor, Tensor | None]:
    return grad.clone(), torch.zeros_like(cue) if 1 in wanted else None


def _copy(x: Tensor, cue: Tensor) -> Tensor:
    return x.clone()


_wait_for = differentiable(_operator, _gradients, _copy)


@torch.library.register_fake("bevfn::wait_for", lib=_library)
def _fake(x: Tensor, cue: Tensor) -> Tensor:
    return torch.empty_like(x)


_library.impl("wait_for", _copy, "CompositeExplicitAutograd")
