"""One GE node as the protobuf states it, bound to the function that means it; nothing is taken on trust.

A node's operands and attributes are bound by name to a function's parameters: positional parameters are the prototype's
inputs in order (default None: optional; `list[Tensor]`: a dynamic input x0, x1, ...; None as annotation: an optional
input that the function does not know), keyword-only ones its attributes (a default is the prototype's default; `fixed`
names those that may have no other value). A name that is a Python keyword ends in an underscore. `image_layout` receives the layout that the node states for its images.

Source: torchair's ge_ir.proto (container, the two numberings of data types).
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

# protobuf's enum (descriptors, constants), GE's enum (attributes)
DTYPES = (
    (1, 0, torch.float32),
    (2, 1, torch.float16),
    (27, 27, torch.bfloat16),
    (12, 11, torch.float64),
    (3, 2, torch.int8),
    (5, 6, torch.int16),
    (7, 3, torch.int32),
    (8, 9, torch.int64),
    (4, 4, torch.uint8),
    (6, 7, torch.uint16),
    (9, 8, torch.uint32),
    (10, 10, torch.uint64),
    (11, 12, torch.bool),
)
_OF_PROTO = {proto: dtype for proto, _, dtype in DTYPES}
_OF_GE = {ge: dtype for _, ge, dtype in DTYPES}
Function = TypeVar("Function", bound=Callable[..., Any])
_FLOAT = 1  # what torchair also writes where it does not know the dtype

# Repeat the descriptors, or say where a value came from; they do not change what a node computes.
BOOKKEEPING = {
    "_input_name_key",
    "_input_name_value",
    "_output_name_key",
    "_output_name_value",
    "_readable_value",
    "_host_tensor",
    "_inputs_all_sym",
    "_inference_rule",
    "input_layout_info",
    "output_layout_info",
}
_META_SHAPE = re.compile(r"shape=torch\.Size\(\[([0-9, ]*)\]\)")


class Unsupported(ValueError):
    """A node's type, one of its attributes or their values, or an optional operand, is not known here."""


class Invalid(ValueError):
    """A node's operands or results contradict the prototype of its type or its own descriptors."""


class Opaque:
    """A value whose bits mean something to one device kernel only: no tensor, and only that kernel's node reads it."""


Value = Tensor | Opaque
Output = tuple[str, int]  # a node's name and the number of its output


@dataclass(frozen=True)
class Described:
    """What a descriptor states about a value; None: it does not say."""

    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...] | None
    elements: int | None  # torchair notes the shape of a later view of the value, so only its number of elements holds

    def problem(self, value: Value) -> str | None:
        """How `value` contradicts this descriptor."""
        if isinstance(value, Opaque):
            return None
        if self.dtype is not None and value.dtype != self.dtype:
            return f"{self.name} should be {short(self.dtype)}, is {show(value)}"
        if self.shape is not None and tuple(value.shape) != self.shape:
            return f"{self.name} should have the shape {list(self.shape)}, is {show(value)}"
        if self.elements is not None and value.numel() != self.elements:
            return f"{self.name} should have {self.elements} elements, is {show(value)}"
        return None


@dataclass(frozen=True)
class Node:
    """A node with its sources resolved: what an interpreter runs, and a watcher sees."""

    name: str
    type: str
    sources: tuple[Output | None, ...]  # of the operands; None: an optional operand that is not fed
    operands: tuple[str, ...]  # the prototype's names of the operands
    outputs: tuple[Described, ...]
    after: tuple[str, ...]  # nodes that must have run: sources and control edges

    @property
    def written(self) -> tuple[int, ...]:
        """Positions of operands written in place: an output of an operand's name is that operand (GE's rule)."""
        names = {output.name for output in self.outputs}
        return tuple(i for i, operand in enumerate(self.operands) if operand in names)

    def __str__(self) -> str:
        return f"GE node {self.name} ({self.type})"


def read(op: Any) -> Node:
    """The node of an OpDef."""
    sources = [source for source in op.input if not source.endswith(":-1")]  # :-1 is a control edge
    names = tuple(desc.name for desc in op.input_desc)
    if op.type in ("Data", "RefData"):
        sources, names = [], ()
    if len(sources) != len(names):
        raise Invalid(f"GE node {op.name} ({op.type}): {len(sources)} operands, but {len(names)} descriptors")
    after = tuple(source.rsplit(":", 1)[0] for source in op.input if source)
    return Node(
        name=op.name,
        type=op.type,
        sources=tuple(_output(source) for source in sources),
        operands=names,
        outputs=tuple(described(desc) for desc in op.output_desc),
        after=after,
    )


def _output(text: str) -> Output | None:
    if not text:
        return None
    name, index = text.rsplit(":", 1)
    return name, int(index)


def described(desc: Any) -> Described:
    """What a TensorDescriptor states. torchair writes float32 and no shape where a converter left them open."""
    meta = desc.attr["_meta"].s.decode() if "_meta" in desc.attr else ""
    sure = desc.dtype != 0 and (bool(meta) or desc.HasField("shape") or desc.dtype != _FLOAT)
    shape = tuple(desc.shape.dim) if desc.HasField("shape") else None
    if shape is not None and any(size < 0 for size in shape):
        raise Unsupported(f"descriptor {desc.name!r} has the dynamic shape {list(shape)}; only static graphs run here")
    match = _META_SHAPE.search(meta)
    elements = None
    if match:
        elements = 1
        for size in match[1].split(","):
            elements *= int(size) if size.strip() else 1
    return Described(desc.name, proto_dtype(desc.dtype) if sure else None, shape, elements)


def proto_dtype(code: int) -> torch.dtype:
    """The dtype of a number of the protobuf's enum."""
    if code not in _OF_PROTO:
        raise Unsupported(f"data type {code} of the protobuf is not known")
    return _OF_PROTO[code]


def constant(op: Any) -> Tensor:
    """The tensor of a Const node: raw little-endian storage in C order."""
    definition = op.attr["value"].t
    dtype, shape = proto_dtype(definition.desc.dtype), list(definition.desc.shape.dim)
    tensor = torch.empty(shape, dtype=dtype)
    if len(definition.data) != tensor.nbytes:
        raise Invalid(f"GE node {op.name} (Const): {len(definition.data)} bytes for {show(tensor)}")
    if tensor.numel():
        tensor = torch.frombuffer(bytearray(definition.data), dtype=torch.uint8).view(dtype).reshape(shape)
    return tensor


def fixed(**values: Any) -> Callable[[Function], Function]:
    """Attributes of which one value is known, the prototype's default: `bind` checks them, the function has none."""

    def mark(function: Function) -> Function:
        vars(function)["fixed"] = values
        return function

    return mark


def bind(op: Any, function: Callable[..., Any]) -> Callable[[list[Value | None]], Any]:
    """`function` with the node's attributes filled in, as a function of its operands in the node's order.

    Raises Unsupported or Invalid where the node and the function's parameters do not fit; see the module's docstring.
    """
    parameters = inspect.signature(function).parameters.values()
    slots = _slots([desc.name for desc in op.input_desc], [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD])
    own = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    attributes = _attributes(op, own, vars(function).get("fixed", {}))

    def call(values: list[Value | None]) -> Any:
        arguments = [
            _listed(parameter, values[where]) if isinstance(where, slice) else _single(parameter, where, values)
            for parameter, where in slots
        ]
        return function(*arguments, **attributes)

    return call


def _slots(names: list[str], parameters: list[inspect.Parameter]) -> list[tuple[inspect.Parameter, slice | int | None]]:
    """Where each parameter finds its operand(s) among the descriptors `names`; None: nowhere."""
    dynamic = [p for p in parameters if p.annotation == list[Tensor]]
    single = sum(_prototype_name(p) in names for p in parameters if p not in dynamic)
    each = (len(names) - single) // len(dynamic) if dynamic else 0  # several dynamic inputs are equally long
    slots: list[tuple[inspect.Parameter, slice | int | None]] = []
    position = 0
    for parameter in parameters:
        name = _prototype_name(parameter)
        if parameter in dynamic:
            if names[position : position + each] != [f"{name}{i}" for i in range(each)]:
                raise Invalid(f"operands {names} do not hold the dynamic input {name!r}")
            slots.append((parameter, slice(position, position + each)))
            position += each
        elif position < len(names) and names[position] == name:
            slots.append((parameter, position))
            position += 1
        elif parameter.default is parameter.empty:
            raise Invalid(f"operand {name!r} is missing among {names}")
        else:
            slots.append((parameter, None))
    if position < len(names):
        raise Unsupported(f"operand {names[position]!r} is not known")
    return slots


def _prototype_name(parameter: inspect.Parameter) -> str:
    return parameter.name.rstrip("_")


def _listed(parameter: inspect.Parameter, values: list[Value | None]) -> list[Tensor]:
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) != len(values):
        raise Invalid(f"an operand of the dynamic input {parameter.name!r} is not fed or is no tensor")
    return tensors


def _single(parameter: inspect.Parameter, where: int | None, values: list[Value | None]) -> Value | None:
    value = None if where is None else values[where]
    name = _prototype_name(parameter)
    if value is None:
        if parameter.default is parameter.empty:
            raise Invalid(f"operand {name!r} is required, but not fed")
        return parameter.default
    if parameter.annotation is None:
        raise Unsupported(f"optional operand {name!r} is fed, and its meaning is not known")
    if isinstance(value, Opaque) and not (
        isinstance(parameter.annotation, type) and isinstance(value, parameter.annotation)
    ):
        raise Invalid(f"operand {name!r} is {value}")
    return value


def _attributes(op: Any, parameters: dict[str, inspect.Parameter], fixed: dict[str, Any]) -> dict[str, Any]:
    """The node's attributes by the parameters' names, defaults filled in; `fixed` ones only checked."""
    values = {}
    for name, attribute in op.attr.items():
        if name in BOOKKEEPING:
            continue
        if name in fixed:
            only(name, _value(attribute), fixed[name])
            continue
        if name not in parameters:
            raise Unsupported(f"attribute {name!r} = {_value(attribute)!r} is not known")
        values[name] = _typed(name, _value(attribute), parameters[name].annotation)
    for name, parameter in parameters.items():
        if name == "image_layout":
            values[name] = _image_layout(op)
        elif name not in values and parameter.default is parameter.empty:
            raise Invalid(f"required attribute {name!r} is missing")
    return values


def _image_layout(op: Any) -> str:
    """The one layout other than ND that the node states for its operands; "" if none."""
    if "input_layout_info" not in op.attr:
        return ""
    layouts = {layout.decode() for layout in op.attr["input_layout_info"].list.s} - {"ND"}
    if len(layouts) > 1:
        raise Unsupported(f"operands of several image layouts {sorted(layouts)}")
    return layouts.pop() if layouts else ""


def _value(attribute: Any) -> Any:
    """A Python value; raises Unsupported for functions, graphs, and expressions."""
    kind = attribute.WhichOneof("value")
    if kind == "s":
        return attribute.s.decode()
    if kind in ("i", "f", "b", "dt"):
        return getattr(attribute, kind)
    if kind == "list":
        filled = [field for field in ("s", "i", "f", "b", "dt") if len(getattr(attribute.list, field))]
        values = list(getattr(attribute.list, filled[0])) if filled else []
        return [value.decode() if isinstance(value, bytes) else value for value in values]
    raise Unsupported(f"attribute values of the kind {kind!r} are not known")


def _typed(name: str, value: Any, annotation: Any) -> Any:
    """`value` if it is of the annotated type; numbers of data types become torch's."""
    if annotation is torch.dtype:
        if value not in _OF_GE:
            raise Unsupported(f"attribute {name!r} = {value!r} is no data type known here")
        return _OF_GE[value]
    inner = getattr(annotation, "__args__", None)
    wanted = isinstance(value, list) and all(type(v) is inner[0] for v in value) if inner else type(value) is annotation
    if not wanted:
        raise Unsupported(f"attribute {name!r} = {value!r} is not of the type {getattr(annotation, '__name__', '')}")
    return value


# ------------------------------------------------------------------------------------------- helpers of the operators


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def show(value: Value | None) -> str:
    """A value in a message: float32 [2, 3]."""
    return f"{short(value.dtype)} {list(value.shape)}" if isinstance(value, Tensor) else str(value)


def ints(tensor: Tensor) -> list[int]:
    """A shape-like operand: integers of a scalar or vector."""
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.dim() > 1:
        raise Invalid(f"sizes and axes are int32 or int64 [n], not {show(tensor)}")
    return [int(value) for value in tensor.reshape(-1).tolist()]


def one_int(tensor: Tensor) -> int:
    """A shape-like operand that holds one integer."""
    values = ints(tensor)
    if len(values) != 1:
        raise Invalid(f"one integer is wanted, not {show(tensor)}")
    return values[0]


def same_dtype(*tensors: Tensor | None) -> None:
    """Raises Invalid if operands differ in dtype: GE promotes nothing unless the prototype says so."""
    dtypes = {tensor.dtype: None for tensor in tensors if tensor is not None}
    if len(dtypes) > 1:
        raise Invalid(f"operands must have one dtype, got {' and '.join(short(dtype) for dtype in dtypes)}")


def of_dtype(tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        raise Invalid(f"an operand must be {' or '.join(map(short, dtypes))}, got {show(tensor)}")


def floating(*tensors: Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise Invalid(f"an operand must be floating point, got {show(tensor)}")


def only(name: str, value: Any, *known: Any) -> None:
    """Raises Unsupported unless an attribute has one of the values whose meaning is known."""
    if value not in known:
        raise Unsupported(f"attribute {name!r} = {value!r} is not known, only {' or '.join(map(repr, known))}")


def image(image_layout: str, wanted: str = "NCHW") -> None:
    """Raises Invalid if images are not marked with the layout they are in: GE would take ND for another one."""
    if image_layout != wanted:
        raise Invalid(f"image operands must be marked {wanted}, not {image_layout or 'ND'}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a value of `dtype` is computed: half precision is computed in float32 and rounded once."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def poison(shape: list[int] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory nobody wrote: NaN, or the integer farthest from any use; it shows wherever it gets into a result."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype)
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    info = torch.iinfo(dtype)
    return torch.full(shape, info.min or info.max, dtype=dtype)
