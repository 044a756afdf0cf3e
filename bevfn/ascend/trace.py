"""A whole step as one aten graph: traced with fake CPU tensors, every transform of torch.func resolved.

On an NPU too the graph is traced here and moved there: traced with NPU tensors, torch_npu dispatches to other operators,
some without converters, one with a wrong gradient (docs/ascend.md). A fake tensor has no values, so nothing is computed,
and code that needs a value (a branch, `.item()`, `nonzero`) is an error that names its line.
"""

import contextlib
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import bevfn
from bevfn import tree

_PACKAGE = Path(bevfn.__file__).resolve().parent
_LIBRARIES = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
_DYNAMIC = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@dataclass(frozen=True)
class Value:
    """An input or output of a graph."""

    name: str
    """the argument's name and the leaf's dotted path: `train_state.params.head.out.weight`"""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of its elements."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class CodeLine:
    """The line that a node of a graph was written in."""

    line: str
    """the innermost line that is not torch's: `bevfn/layers/conv.py:42`"""
    layer: str
    """the functions around it, outermost first: `bevfusion.apply > conv_norm.apply > conv.apply`"""
    backward: bool = False
    """the node belongs to the gradient of that line"""

    def __str__(self) -> str:
        return f"{'the gradient of ' if self.backward else ''}{self.line} in {self.layer}"


@dataclass(frozen=True)
class Traced:
    """One step as a graph from tensors to tensors."""

    module: fx.GraphModule
    """Nodes carry `meta["val"]` (fake tensor) and, if they come from a line, `meta["source"]` (CodeLine)."""
    inputs: tuple[Value, ...]
    """of the placeholders, in order"""
    outputs: tuple[Value, ...]
    """of the graph, in order; none shares memory with an input or with another output"""
    spec: pytree.TreeSpec
    """of what the step returns"""
    returned: tuple[int | None, ...]
    """for every leaf of `spec` its place in `outputs`, None for None"""


def trace(
    step: Callable,
    arguments: tuple,
    *,
    decompositions: Mapping[Any, Callable] | None = None,
    takes: tuple[str, ...] = (),
    returns: tuple[str, ...] = (),
) -> Traced:
    """The graph of `step(*arguments)`: pytrees of CPU tensors (real or fake) in, one pytree out.

    Args:
        decompositions: {aten overload: function}, applied while tracing.
        takes: names of the arguments; the step's own by default.
        returns: names of what the step returns, if it returns a tuple.

    Raises ValueError naming operator and line where a size, or the path through the Python code, depends on values.
    """
    # make_fx takes tensors only: the pytrees are folded outside it, and None leaves are put back inside.
    leaves, spec = pytree.tree_flatten(arguments)
    mode = FakeTensorMode(static_shapes=True, allow_non_fake_inputs=True)  # constants that the step holds
    fakes = [mode.from_tensor(x) for x in leaves if x is not None]
    made: list[tuple[list, pytree.TreeSpec]] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        given = pytree.tree_unflatten([None if x is None else next(rest) for x in leaves], spec)
        with _Sources() as sources, sources.of_gradients():
            made.append(pytree.tree_flatten(step(*given)))
        return [x for x in made[-1][0] if x is not None]

    module = make_fx(
        dispatch_functionalize(flat), dict(decompositions or {}), tracing_mode="fake", _allow_non_fake_inputs=True
    )(*fakes)
    result, result_spec = made[-1]
    module.graph.eliminate_dead_code()  # `outputs` names every boundary of a network; a step uses a few of them
    _own_outputs(module)
    module.recompile()
    places = iter(range(len(result)))
    return Traced(
        module,
        _values(_paths(arguments, takes or _parameters(step)), [n.meta["val"] for n in placeholders(module)]),
        _values(_paths(_numbered(result, result_spec), returns), [n.meta["val"] for n in results(module)]),
        result_spec,
        tuple(None if x is None else next(places) for x in result),
    )


def placeholders(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes of the inputs, in order."""
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def results(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes of the outputs, in order."""
    returned: Any = module.graph.output_node().args[0]
    return list(returned)


def _values(names: list[str], tensors: list[Tensor]) -> tuple[Value, ...]:
    return tuple(Value(name, tuple(x.shape), x.dtype) for name, x in zip(names, tensors, strict=True))


def _paths(values: Any, names: tuple[str, ...]) -> list[str]:
    """Dotted paths of the leaves, the first component a name instead of a number."""
    paths = []
    for path in tree.flatten(values):
        first, _, rest = path.partition(".")
        first = names[int(first)] if first.isdigit() and int(first) < len(names) else first
        paths.append(f"{first}.{rest}" if rest else first)
    return paths


def _parameters(step: Callable) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(step).parameters)
    except ValueError:  # a builtin
        return ()


def _numbered(leaves: list, spec: pytree.TreeSpec) -> Any:
    return pytree.tree_unflatten([None if x is None else i for i, x in enumerate(leaves)], spec)


def _own_outputs(module: fx.GraphModule) -> None:
    """Copies outputs that are inputs, views of inputs, or returned twice: a GE graph lists each tensor once."""
    taken = {node.meta["val"].untyped_storage()._cdata for node in placeholders(module)}
    output, seen = module.graph.output_node(), set()
    owned = []
    for node in results(module):
        if node in seen or node.meta["val"].untyped_storage()._cdata in taken:
            with module.graph.inserting_before(output):
                copy = module.graph.call_function(torch.ops.aten.clone.default, (node,))
            copy.meta = {"val": node.meta["val"].clone(), "source": node.meta.get("source")}
            node = copy
        seen.add(node)
        owned.append(node)
    output.args = (owned,)


# ------------------------------------------------------------------------------------------------------ source lines


class _Sources(TorchDispatchMode):
    """Writes where an operator was called to the nodes that it makes, and turns dynamic operators into errors."""

    def __init__(self) -> None:
        super().__init__()
        mode: Any = get_proxy_mode()
        self.graph: fx.Graph = mode.tracer.graph
        self.forward: dict[int, CodeLine] = {}  # by sequence number of the autograd node
        self.gradient: CodeLine | None = None  # what is being differentiated

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        source = self.gradient or _source(sys._getframe(1))
        self.forward.setdefault(torch._C._autograd._get_sequence_nr() - 1, source)
        last = next(iter(reversed(self.graph.nodes)), None)
        try:
            out = func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if _DYNAMIC & set(func.tags):
                raise ValueError(
                    f"{func} makes the graph depend on values at {source}; use sizes that are known before and torch.where"
                ) from error
            raise
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            node.meta.setdefault("source", source)
        return out

    @contextlib.contextmanager
    def of_gradients(self) -> Iterator[None]:
        """Operators of a backward pass get the source of the operator that is being differentiated."""
        original = torch.autograd.grad

        def grad(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            before = self.gradient
            for node in _autograd_nodes(outputs):
                node.register_prehook(self._enter(self.forward.get(node._sequence_nr())))
            try:
                return original(outputs, *args, **kwargs)
            finally:
                self.gradient = before

        torch.autograd.grad = grad
        try:
            yield
        finally:
            torch.autograd.grad = original

    def _enter(self, source: CodeLine | None) -> Callable:
        def hook(_: Any) -> None:
            self.gradient = None if source is None else CodeLine(source.line, source.layer, backward=True)

        return hook


def _autograd_nodes(outputs: Any) -> set:
    waiting = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                waiting.append(node)
    return seen


def _source(frame: FrameType | None) -> CodeLine:
    """Of the frames from here to `trace`, those of bevfn and of its user."""
    lines = []
    while frame is not None and frame.f_code is not trace.__code__:
        place = _place(frame.f_code)
        if place is not None:
            lines.append((f"{place[0]}:{frame.f_lineno}", place[1]))
        frame = frame.f_back
    if not lines:
        return CodeLine("no line of bevfn", "torch")
    outer = [name for _, name in reversed(lines)]
    named = [name for name in outer if "<" not in name and not name.startswith("train.")]  # <lambda>, <listcomp>
    return CodeLine(lines[0][0], " > ".join(named or outer[-1:]))


@cache
def _place(code: CodeType) -> tuple[str, str] | None:
    """(file, module.function) of code that is bevfn's or its user's, None for libraries."""
    path = Path(code.co_filename)
    if code.co_filename.startswith("<") or code.co_filename == __file__:
        return None
    if not path.is_relative_to(_PACKAGE) and any(path.is_relative_to(folder) for folder in _LIBRARIES):
        return None
    name = path.parent.name if path.stem == "__init__" else path.stem
    return str(path.relative_to(_PACKAGE.parent) if path.is_relative_to(_PACKAGE.parent) else path), (
        f"{name}.{code.co_name}"
    )
