"""Whether TensorRT's ONNX parser takes a graph: operators, types and settings, as far as its documents say. Nothing of TensorRT
runs here: its libraries are not to be had from PyPI without a GPU, and a graph that passes may still be refused.

Source: onnx-tensorrt 96e7811 (TensorRT 10.1), docs/operators.md and onnxOpImporters.cpp; NVIDIA's page of TopK (K <= 3840).
"""

import onnx
import onnx_ir as ir
from onnx import TensorProto
from onnx_ir.tape import Tape

OPSETS = range(9, 21)
MOST_K = 3840
FLOATS: set[int] = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
INTEGERS: set[int] = {TensorProto.INT32, TensorProto.INT64}
BOOL: set[int] = {TensorProto.BOOL}
UINT8: set[int] = {TensorProto.UINT8}
NUMBERS, ALL = FLOATS | INTEGERS, FLOATS | INTEGERS | BOOL
OPERATORS: dict[str, set[int]] = {
    **dict.fromkeys(("Abs", "Add", "Sub", "Mul", "Div", "Neg", "Max", "Min", "Sum", "Sign", "Mod", "Relu"), NUMBERS),
    **dict.fromkeys(("ReduceSum", "ReduceMax", "ReduceMin", "ReduceMean", "ReduceProd", "TopK", "Pad"), NUMBERS),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Range", "IsNaN"), NUMBERS),
    **dict.fromkeys(("ScatterND", "ScatterElements", "ArgMax", "ArgMin"), NUMBERS),
    **dict.fromkeys(("Concat", "ConstantOfShape", "Expand", "Flatten", "Gather", "GatherElements", "GatherND"), ALL),
    **dict.fromkeys(("Identity", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Tile", "Transpose"), ALL),
    **dict.fromkeys(("Unsqueeze", "Where", "Trilu", "OneHot"), ALL),
    "Cast": ALL | UINT8,
    **dict.fromkeys(("And", "Or", "Not", "Xor"), BOOL),
    **dict.fromkeys(("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "MaxPool", "AveragePool"), FLOATS),
    **dict.fromkeys(("BatchNormalization", "LayerNormalization", "Softmax", "Sigmoid", "Tanh", "Erf", "Gelu"), FLOATS),
    **dict.fromkeys(
        ("Exp", "Log", "Sqrt", "Pow", "Reciprocal", "Sin", "Cos", "Floor", "Ceil", "Round", "Clip"), FLOATS
    ),
    **dict.fromkeys(("Atan", "CumSum", "Resize", "GlobalAveragePool", "HardSigmoid"), FLOATS),
    "NonZero": {TensorProto.FLOAT, TensorProto.FLOAT16},
}
"""{operator: types of what it computes with}; indices and shapes, which come second, are int32 or int64"""
CONSTANT = {
    "TopK": (1,),
    "ReduceSum": (1,),
    "ReduceMax": (1,),
    "ReduceMin": (1,),
    "ReduceMean": (1,),
    "ReduceProd": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "CumSum": (1,),
    "Slice": (3,),
}
"""{operator: inputs that must be initializers}"""


def without_equal_bools(graph: ir.Graph) -> None:
    """Equal of truth values, which TensorRT has of numbers alone, as Not(Xor)."""
    equals = [(node, node.inputs[0]) for node in graph if node.op_type == "Equal"]
    for node in [node for node, first in equals if first is not None and first.dtype == ir.DataType.BOOL]:
        same = node.outputs[0]
        differs = ir.Value(type=same.type, shape=same.shape)
        Tape(graph).op("Xor", node.inputs, output=differs)
        equal = Tape(graph).op("Not", [differs], output=ir.Value(type=same.type, shape=same.shape))
        ir.convenience.replace_all_uses_with(same, equal)
        graph.remove(node, safe=True)
    graph.sort()


def check(model: onnx.ModelProto, domains: frozenset[str]) -> None:
    """Raises ValueError, one sentence that names the node, for what the parser would not take; nodes of `domains` are plugins."""
    (opset,) = (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset not in OPSETS:
        raise ValueError(f"TensorRT takes opsets {OPSETS[0]} to {OPSETS[-1]}, not {opset}")
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    types = {name: tensor.data_type for name, tensor in held.items()}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    for entry in (*inferred.value_info, *inferred.input, *inferred.output):
        types[entry.name] = entry.type.tensor_type.elem_type
    for node in model.graph.node:
        if node.domain not in domains and (why := _refused(node, held, types)):
            raise ValueError(f"TensorRT's parser does not take the file: {node.op_type} {node.name}: {why}")


def _refused(node: onnx.NodeProto, held: dict[str, TensorProto], types: dict[str, int]) -> str:
    """What is wrong with a node of the default domain; empty if nothing is."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
        return "it has no such operator"
    place = 1 if node.op_type == "Where" else 0
    kinds = [types.get(name, 0) for name in (*node.input[place : place + 1], *node.output[:1]) if name]
    kinds = kinds[1:] if node.op_type in ("ConstantOfShape", "Shape", "Size", "NonZero", "Range") else kinds
    computes = kinds[:1] if node.op_type in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual") else kinds
    allowed = OPERATORS[node.op_type] | (
        {TensorProto.INT64} if node.op_type in ("NonZero", "ArgMax", "Shape") else set()
    )
    for kind in computes:
        if kind not in allowed:
            return f"not of type {TensorProto.DataType.Name(kind)}"
    for place in CONSTANT.get(node.op_type, ()):
        if len(node.input) > place and node.input[place] and node.input[place] not in held:
            return f"its input {place} is no constant"
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "ScatterND" and "reduction" in attributes:
        return "it knows no reduction"
    if node.op_type == "TopK":
        (k,) = onnx.numpy_helper.to_array(held[node.input[1]]).reshape(-1)
        if k > MOST_K or not attributes.get("sorted", 1):
            return f"it takes {MOST_K} at most, and sorted; this is {k}"
    return ""
