"""Changes to the traced graph for the device."""

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

aten = torch.ops.aten
_CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
_VIEWS = (aten.permute.default, aten.transpose.int, aten.t.default, aten.view.default, aten.reshape.default)
_NOTHING = (aten.detach.default, aten.detach_.default, aten.alias.default)


def apply(module: fx.GraphModule) -> None:
    """All of them, in place."""
    from torch._inductor.fx_passes.post_grad import remove_noop_ops

    own_constants(module)
    without_aliases(module)
    half_convolutions(module)
    shifts(module)
    remove_noop_ops(module.graph)  # here, and not in torchair: it would take out the copies of the next line
    contiguous_views(module)
    module.graph.eliminate_dead_code()
    module.recompile()


def own_constants(module: fx.GraphModule) -> None:
    """Tensors that the step holds go through lift_fresh_copy, as those that it makes do: converters expect nodes.

    They are made contiguous: torchair writes the whole memory that a constant is a part of.
    """
    for node in list(module.graph.nodes):
        if node.op != "get_attr":
            continue
        value = getattr(module, node.target)
        setattr(module, node.target, value.clone(memory_format=torch.contiguous_format))
        readers = [user for user in node.users if user.target is not aten.lift_fresh_copy.default]
        if readers:
            with module.graph.inserting_after(node):
                lifted = module.graph.call_function(aten.lift_fresh_copy.default, (node,))
            lifted.meta = dict(readers[0].meta, val=node.meta["val"])
            for reader in readers:
                reader.replace_input_with(node, lifted)


def without_aliases(module: fx.GraphModule) -> None:
    """Drops detach and alias, each a node of the GE graph: gradients are resolved, and nothing writes in place."""
    for node in list(module.graph.nodes):
        if node.target in _NOTHING:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def half_convolutions(module: fx.GraphModule) -> None:
    """Convolutions of float16 numbers in float16 again.

    On a CPU `layers.conv` multiplies float16 operands in float32 and rounds the result to float16, which is fast there
    and is what the cube unit does with float16 operands: it accumulates in float32. So the casts around a convolution
    whose operands all come from float16 and whose results all go to float16 are dropped.
    """
    for node in list(module.graph.nodes):
        if node.target not in _CONVOLUTIONS:
            continue
        tensors = [a for a in node.args if isinstance(a, fx.Node)]
        results = [node] if node.target is _CONVOLUTIONS[0] else [user for user in node.users if user.users]
        casts = [cast for result in results for cast in result.users]
        if not all(_is_cast(a, torch.float16, torch.float32) for a in tensors):
            continue
        if not all(_is_cast(cast, torch.float32, torch.float16) for cast in casts):
            continue
        node.args = tuple(a.args[0] if isinstance(a, fx.Node) else a for a in node.args)
        for result in (node, *(user for user in node.users if user.target is operator.getitem)):
            result.meta["val"] = _to_half(result.meta["val"])
        for cast in casts:
            cast.replace_all_uses_with(cast.args[0])
            module.graph.erase_node(cast)


def shifts(module: fx.GraphModule) -> None:
    """Right shifts of integers of 32 bits, of which a mask keeps 24 at most, without a shift, which the AI Core has not.

    int32 as a division, which A2's kernel makes in float32: exact, as the mask clears what is shifted out and negative numbers
    are rounded down. int64, below 2^32, in float32 likewise.
    """
    for node in list(module.graph.nodes):
        if node.target is not aten.__rshift__.Scalar or node.args[0].target is not aten.bitwise_and.Scalar:
            continue
        (masked, bits), mask = node.args, node.args[0].args[1]
        value, dtype = node.meta["val"], masked.meta["val"].dtype
        most, whole = (30, -(1 << 31) <= mask < 0) if dtype == torch.int32 else (31, 0 <= mask < 1 << 32)
        if not (8 <= bits <= most and whole and mask % (1 << bits) == 0):
            continue
        with module.graph.inserting_before(node):
            if dtype == torch.int32:
                step: dict[str, Any] = {"rounding_mode": "floor"}
                shifted = module.graph.call_function(aten.div.Tensor_mode, (masked, 1 << bits), step)
            else:
                wide = module.graph.call_function(aten._to_copy.default, (masked,), {"dtype": torch.float32})
                scaled = module.graph.call_function(aten.mul.Tensor, (wide, 2.0**-bits))
                shifted = module.graph.call_function(aten._to_copy.default, (scaled,), {"dtype": dtype})
                wide.meta = scaled.meta = dict(node.meta, val=value.float())
        shifted.meta = dict(node.meta)
        node.replace_all_uses_with(shifted)
        module.graph.erase_node(node)


def contiguous_views(module: fx.GraphModule) -> None:
    """A copy before every reshape that is a view in the step's memory, but not in memory in the order of the axes.

    Torchair passes views on to whoever reads them and then works out transposes from strides, as if all memory were
    contiguous. A permuted channels-last tensor that is reshaped has none left: the transpose is forgotten, silently.
    """
    memory: dict[fx.Node, torch.Tensor] = {}  # of the node's value if what is no view is contiguous
    for node in list(module.graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        memory[node] = torch.empty(value.shape, device="meta")
        if node.target not in _VIEWS:
            continue
        view = aten.view.default if node.target is aten.reshape.default else node.target
        source: Any = node.args[0]
        try:
            memory[node] = view(memory[source], *node.args[1:])
        except (RuntimeError, ValueError):  # not a view of that memory
            with module.graph.inserting_before(node):
                copy = module.graph.call_function(
                    aten.clone.default, (source,), {"memory_format": torch.contiguous_format}
                )
            copy.meta = dict(node.meta, val=source.meta["val"].clone(memory_format=torch.contiguous_format))
            node.args = (copy, *node.args[1:])


def _is_cast(node: fx.Node, before: torch.dtype, after: torch.dtype) -> bool:
    source: Any = node.args[0] if node.args else None
    return (
        node.target is aten._to_copy.default and source.meta["val"].dtype == before and node.meta["val"].dtype == after
    )


def _to_half(values: Any) -> Any:
    """Fake tensors in float16; of a backward convolution a tuple with None for what is not wanted."""
    if values is None:
        return None
    if isinstance(values, FakeTensor):
        with values.fake_mode:
            return values.half()
    return type(values)(_to_half(value) for value in values)
