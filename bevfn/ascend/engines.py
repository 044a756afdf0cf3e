"""Which GE types the AI Core of Atlas A2 (Ascend 910B) computes, by the dtype of the operand that decides.

Anything else runs on the chip's AI CPU, two orders of magnitude slower, or not at all. Source: the lists that CANN's
published operators choose their kernel by: hicann/ops-math at c4193324 and hicann/ops-nn at e5c3fa93, `op_api/*.cpp`
(support lists of ASCEND910B). GE chooses by operator libraries of the installed CANN, so this is what to expect and to
look for in a profile, not a verdict. A type that is not listed has not been looked up.
"""

_FLOATS = "float16 float32 bfloat16"
_COMMON = f"{_FLOATS} int32"

# {GE type: dtypes with an AI Core kernel}
AI_CORE: dict[str, str] = {
    "Abs": f"{_COMMON} int64",
    "Add": f"{_COMMON} int64 int8 uint8 bool",
    "Atan2": _FLOATS,
    "BitwiseAnd": "int16 uint16 int32 int64",
    "BitwiseOr": "int16 uint16 int32 int64",
    "BitwiseXor": "int16 uint16 int32 int64",
    "BroadcastTo": f"{_COMMON} int64 uint32 int8 uint8 bool",
    "Cast": f"{_COMMON} int64 int16 uint16 uint32 int8 uint8 bool",  # to one another
    "ClipByValueV2": f"{_COMMON} int64",
    "Cos": _FLOATS,
    "Cumsum": _COMMON,
    "Equal": f"{_COMMON} int64 int8 uint8 bool",
    "Erf": _FLOATS,
    "Exp": _FLOATS,
    "Expm1": _FLOATS,
    "FloorDiv": f"{_COMMON} int8 uint8",
    "FloorMod": f"{_COMMON} int64",
    "GatherElements": f"{_COMMON} int64 uint32 int16 uint16 int8 uint8 uint64",
    "GatherV2": f"{_COMMON} int64 int16 uint16 uint32 uint64 int8 uint8 bool",
    "Greater": f"{_COMMON} int64 int8 uint8",
    "GreaterEqual": f"{_COMMON} int64 int8 uint8",
    "LeftShift": "",
    "Less": f"{_COMMON} int64 int8 uint8 bool",
    "LessEqual": f"{_COMMON} int64 int8 uint8",
    "Log": _FLOATS,
    "Log1p": _FLOATS,
    "LogicalAnd": "bool",
    "LogicalOr": f"{_COMMON} int64 int16 int8 uint8 bool",
    "MaskedFill": f"{_COMMON} int8 bool",
    "Maximum": f"{_COMMON} int64 int8",
    "Minimum": f"{_COMMON} int64 int8",
    "Mul": f"{_COMMON} int64 int8 uint8 bool",
    "Neg": f"{_COMMON} int64 int8",
    "NotEqual": f"{_COMMON} int64 int8 uint8 bool",
    "OnesLike": f"{_COMMON} int8 uint8 bool",
    "PadV3": f"{_COMMON} int8",
    "Pow": "float16 float32 int32 int8 uint8",
    "Range": f"{_COMMON} int64",
    "RealDiv": f"{_COMMON} bool",
    "Reciprocal": _FLOATS,
    "ReduceMax": f"{_COMMON} int64 int8 uint8",
    "ReduceMean": _FLOATS,
    "ReduceMin": f"{_COMMON} int64 int8 uint8",
    "ReduceProd": f"{_COMMON} int64 int8 uint8",
    "ReduceSum": f"{_COMMON} int64",
    "ReverseV2": "float16 float32 int16 int32 int64",
    "RightShift": "",
    "Rsqrt": _FLOATS,
    "ScatterElements": "",  # that of torch's eager mode is ScatterElementsV2
    "SearchSorted": "",
    "SelectV2": f"{_COMMON} int64 int8 uint8",
    "Sigmoid": _FLOATS,
    "SigmoidGrad": _FLOATS,
    "Sign": _COMMON,
    "Sin": _FLOATS,
    "SoftmaxV2": _FLOATS,
    "Sort": _FLOATS,
    "SplitV": f"{_FLOATS} int64 int8 uint8",
    "Sub": f"{_COMMON} int64 int8 uint8 bool",
    "Tile": f"{_COMMON} int64 int16 int8 uint8 bool",
    "TopKV2": _FLOATS,
    "ZerosLike": f"{_COMMON} int64 int8 uint8 bool",
}
DECIDES = {"SelectV2": 1}  # the operand whose dtype chooses the kernel, if it is not the first
# Types that are made for the AI CPU: `kernels/linear_assignment/ascend.py`.
AI_CPU = frozenset({"BevfnLinearAssignment"})


def problem(kind: str, dtype: str) -> str | None:
    """Why a node of type `kind` whose deciding operand is `dtype` ("int64") leaves the AI Core; None if it does not."""
    if kind in AI_CPU:
        return "an AI CPU operator"
    if kind not in AI_CORE or dtype in AI_CORE[kind].split():
        return None
    return f"no AI Core kernel for {dtype}" if AI_CORE[kind] else "no AI Core kernel"
