"""GE graphs for tests: of a function through the converters, or of single GE nodes; and operands drawn for them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import strategies as st
from torch import Tensor

from bevfn.ascend import interpret, torchair
from bevfn.ascend.lower import lower

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int32, torch.int64)
DEVICES: tuple[interpret.Device, ...] = ("published", "a2")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # a few units in the last place


def need_torchair() -> None:
    """Skips the whole module where torchair's converters cannot be had."""
    try:
        torchair.load()
    except ValueError as error:
        pytest.skip(str(error), allow_module_level=True)


def node_graph(build: Callable[..., Any], *tensors: Tensor) -> Any:
    """The GraphDef of build(ge, *operands), ge being torchair's builders of GE types, with one input per tensor."""
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair.ge._ge_graph import GeGraph, torch_type_to_ge_type

    with GeGraph() as graph:
        operands = [
            ge.Data(index=i, dtype=torch_type_to_ge_type(x.dtype), shape=list(x.shape), placement="NPU")
            for i, x in enumerate(tensors)
        ]
        results = build(ge, *operands)
        ge.NetOutput(list(results) if isinstance(results, (tuple, list)) else [results])
    return graph._proto


def run_node(build: Callable[..., Any], *tensors: Tensor) -> list[Tensor]:
    return interpret.run(node_graph(build, *tensors), tensors)


def round_trip(function: Callable[..., Any], *tensors: Tensor) -> set[str]:
    """Checks that the lowered function computes what the function does, by the types' published meaning and as an A2's kernels
    do; returns the GE types in its graph."""
    lowered = lower(function, tensors)
    expected = function(*(x.clone() for x in tensors))
    for device in DEVICES:
        program = interpret.prepare(lowered.graph, device=device)
        assert_same(lowered.results(interpret.run(program, lowered.arguments(*tensors))), expected)
    return {op.type for op in lowered.graph.op}


def assert_same(actual: Any, expected: Any) -> None:
    """Dtypes, shapes, and values: the largest error over the largest value, NaN and infinities in the same places."""
    ours, theirs = ([x for x in pytree.tree_leaves(v) if x is not None] for v in (actual, expected))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if not b.is_floating_point():
            assert torch.equal(a, b)
            continue
        a, b, tolerance = a.double(), b.double(), TOLERANCE[b.dtype]
        finite = b.isfinite()
        assert torch.equal(a[~finite].nan_to_num(7e300), b[~finite].nan_to_num(7e300))
        if finite.any():
            error = (a - b)[finite].abs().max()
            assert error <= tolerance * max(1.0, b[finite].abs().max().item()), (error.item(), a, b)


class Drawn:
    """Draws operands and attributes; values come from a seed, so that examples stay small."""

    def __init__(self, draw: Callable) -> None:
        self.draw = draw

    def int(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def among(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def shape(self, low: int = 0, high: int = 3, largest: int = 5) -> tuple[int, ...]:
        return tuple(self.draw(st.lists(st.integers(1, largest), min_size=low, max_size=high)))

    def tensor(
        self, shape: Sequence[int] | None = None, dtypes: Sequence[torch.dtype] = FLOATS, *, positive: bool = False
    ) -> Tensor:
        dtype = self.among(*dtypes)
        shape = self.shape() if shape is None else shape
        generator = torch.Generator().manual_seed(self.int(0, 9))
        if dtype == torch.bool:
            return torch.randint(0, 2, shape, generator=generator) > 0
        if not dtype.is_floating_point:
            return torch.randint(1 if positive else -9, 10, shape, generator=generator).to(dtype)
        x = torch.randn(shape, generator=generator)
        return (x.abs() + 0.1 if positive else x).to(dtype)

    def pair(self, dtypes: Sequence[torch.dtype] = FLOATS, *, positive: bool = False) -> tuple[Tensor, Tensor]:
        """Two operands of one dtype that broadcast; `positive`: the second one."""
        a = self.tensor(dtypes=dtypes)
        shape = [size if self.flag() else 1 for size in a.shape[self.int(0, a.dim()) :]]
        return a, self.tensor(shape, (a.dtype,), positive=positive)

    def axis(self, x: Tensor) -> int:
        return self.int(-x.dim(), x.dim() - 1)

    def axes(self, x: Tensor) -> list[int]:
        return self.draw(st.lists(st.integers(0, x.dim() - 1), min_size=1, max_size=x.dim(), unique=True))

    def index(self, shape: Sequence[int], size: int, *, low: int = 0) -> Tensor:
        """int64 indices from low to size - 1."""
        generator = torch.Generator().manual_seed(self.int(0, 9))
        return torch.randint(low, size, tuple(shape), generator=generator)


def drawn(make: Callable[[Drawn], Any]) -> st.SearchStrategy:
    """The strategy of make(Drawn)."""
    return st.composite(lambda draw: make(Drawn(draw)))()
