"""What the CUDA lowerings become for GPUs that need not be there: registers, memory and tensor cores of every binary.

A lowering runs on the host with its launches recorded instead of made, so that what is compiled is what a GPU would be
given for those operands: dtypes, constants, integers that are 1 or multiples of 16. Triton brings ptxas, which compiles
for any GPU, and the tools that read the binaries.
"""

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

GPUS = {"sm_80": 80, "sm_90": 90}  # A100 and H100, H200
ROWS = 1024  # of the operands; no constant depends on it


class Launch(NamedTuple):
    """A kernel, as a lowering would start it."""

    kernel: Any
    operands: dict[str, Any]  # by the kernel's names
    options: dict[str, int]  # num_warps and the like


def measure(only: str = "") -> dict:
    """{GPU: {case: {kernel: figures}}} of the cases whose name contains `only`; see `binary`.

    Raises:
        ValueError: no case does.
        RuntimeError: Triton is missing.
    """
    cases = {name: lower for name, lower in CASES.items() if only in name}
    if not cases:
        raise ValueError(f"--only {only!r} is in no case's name; choose of {', '.join(CASES)}")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("bench cuda compiles with Triton, which is not installed: pip install -e '.[cuda]'")
    launches = {name: recorded(lower) for name, lower in cases.items()}
    return {
        gpu: {
            name: {launch.kernel.__name__.lstrip("_"): binary(launch, number) for launch in made}
            for name, made in launches.items()
        }
        for gpu, number in GPUS.items()
    }


def recorded(lower: Callable[[], Any]) -> list[Launch]:
    """The kernels that `lower` would launch, each once: several launches of one differ in their operands' values only."""
    with _recording() as made:
        lower()
    last: dict[str, Launch] = {launch.kernel.__name__: launch for launch in made}
    return list(last.values())


@contextmanager
def _recording() -> Iterator[list[Launch]]:
    from triton.runtime.jit import JITFunction

    made: list[Launch] = []

    def record(kernel: Any, *operands: Any, grid: Any, warmup: bool, **named: Any) -> None:
        names = kernel.arg_names
        options = {name: named.pop(name) for name in list(named) if name not in names}
        made.append(Launch(kernel, {**dict(zip(names, operands)), **named}, options))

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield made
    finally:
        JITFunction.run = run


def binary(launch: Launch, gpu: int) -> dict:
    """Compiles a launch and reads what came out.

    Returns:
        registers (of a thread), shared_bytes (of a block), stack_bytes and local_bytes (registers that did not fit),
        warps, tensor_core_instructions, asynchronous_copies, atomic_instructions and cubin_bytes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, multiples = {}, {}, {}
    for place, (name, parameter) in enumerate(zip(launch.kernel.arg_names, launch.kernel.params)):
        value = launch.operands[name]
        signature[name], even = _type_of(value, parameter.is_constexpr)
        if signature[name] == "constexpr":
            constants[name] = value
        elif even:
            multiples[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=multiples)
    made = triton.compile(source, target=GPUTarget("cuda", gpu, 32), options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(made.asm["cubin"])
        usage, listing = _tool("cuobjdump", "-res-usage", file), _tool("nvdisasm", "-c", file)
    used = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": used["REG"],
        "shared_bytes": made.metadata.shared,
        "stack_bytes": used["STACK"],
        "local_bytes": used["LOCAL"],
        "warps": made.metadata.num_warps,
        "tensor_core_instructions": len(re.findall(r"\b(?:HGMMA|HMMA)\b", listing)),
        "asynchronous_copies": len(re.findall(r"\bLDGSTS\b", listing)),
        "atomic_instructions": len(re.findall(r"\b(?:ATOM|ATOMG|ATOMS|RED|REDG)\b", listing)),
        "cubin_bytes": len(made.asm["cubin"]),
    }


def _type_of(value: Any, constant: bool) -> tuple[str, bool]:
    """(Triton's name of an operand's type, whether its address or value is a multiple of 16)."""
    from triton.runtime.jit import type_canonicalisation_dict

    if constant or value is None or (isinstance(value, int) and value == 1):
        return "constexpr", False
    if isinstance(value, Tensor):
        name = type_canonicalisation_dict[str(value.dtype).removeprefix("torch.")]
        return f"*{name}", value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    return ("i32" if abs(value) < 2**31 else "i64"), value % 16 == 0


def _tool(name: str, *words: Any) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    done = subprocess.run([path, *map(str, words)], capture_output=True, text=True)
    return done.stdout + done.stderr


def _sparse_conv(dtype: torch.dtype, channels_in: int, channels_out: int, precision: str = "highest") -> None:
    from bevfn.kernels.sparse_conv import cuda

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        x, grad = torch.empty(ROWS, channels_in, dtype=dtype), torch.empty(ROWS, channels_out, dtype=dtype)
        weight = torch.empty(27, channels_in, channels_out, dtype=dtype)
        table = torch.zeros(27, ROWS, dtype=torch.int32)
        cuda.sparse_conv(x, weight, table)
        cuda.weight_grad(x, grad, table)
    finally:
        torch.set_float32_matmul_precision(before)


def _sparse_conv_input_grad(dtype: torch.dtype, channels: int) -> None:
    from bevfn.kernels.sparse_conv import cuda

    weight = torch.empty(27, channels, channels, dtype=dtype).transpose(1, 2)
    cuda.sparse_conv(torch.empty(ROWS, channels, dtype=dtype), weight, torch.zeros(27, ROWS, dtype=torch.int32))


def _voxel_pool(dtype: torch.dtype, channels: int = 80) -> None:
    from bevfn.kernels.voxel_pool import cuda

    depth, context = torch.empty(1, 4, 16, 16, dtype=dtype), torch.empty(1, 16, 16, channels, dtype=dtype)
    cell = torch.zeros(depth.shape, dtype=torch.int32)
    cuda.forward(depth, context, cell, 64)
    cuda.backward(torch.empty(64, channels, dtype=dtype), depth, context, cell)


def _voxelize() -> None:
    from bevfn.kernels.voxelize import cuda

    points, valid = torch.zeros(1, ROWS, 5), torch.ones(1, ROWS, dtype=torch.bool)
    cuda.voxelize(points, valid, [-54.0, -54.0, -5.0], [0.075, 0.075, 0.2], [1440, 1440, 40], 10, ROWS)


def _neighbours() -> None:
    from bevfn.kernels.neighbours import cuda

    coords, valid = torch.zeros(ROWS, 4, dtype=torch.int32), torch.ones(ROWS, dtype=torch.bool)
    cuda.submanifold(coords, valid, [3, 3, 3], [1440, 1440, 41])
    cuda.strided(coords, valid, [3, 3, 3], [2, 2, 2], [1, 1, 1], [1440, 1440, 41], ROWS, 1)


def _deform_conv(dtype: torch.dtype, channels: int = 512, groups: int = 4) -> None:
    from bevfn.kernels.deform_conv import cuda

    x, offset = torch.zeros(1, channels, 8, 8, dtype=dtype), torch.zeros(1, 18, 8, 8, dtype=dtype)
    weight = torch.zeros(channels, channels // groups, 3, 3, dtype=dtype)
    cuda.backward(torch.zeros_like(x), x, offset, None, weight, 1, 1, 1)


def _deform_attn(dtype: torch.dtype, heads: int = 8, channels: int = 32, levels: int = 4, points: int = 8) -> None:
    from bevfn.kernels.deform_attn import cuda

    value = torch.zeros(1, levels * 64, heads, channels, dtype=dtype)
    weights = torch.zeros(1, 16, heads, levels, points, dtype=dtype)
    locations, mask = torch.zeros(*weights.shape, 2, dtype=dtype), torch.ones(1, 16, dtype=torch.bool)
    cuda.forward(value, locations, weights, mask, (8, 8) * levels)
    cuda.backward(torch.zeros(1, 16, heads * channels, dtype=dtype), value, locations, weights, mask, (8, 8) * levels)


def _linear_assignment(queries: int, boxes: int) -> None:
    from bevfn.kernels.linear_assignment import cuda

    cuda.linear_assignment(torch.zeros(1, queries, boxes), torch.ones(1, boxes, dtype=torch.bool))


CASES: dict[str, Callable[[], Any]] = {
    "sparse_conv fp16 5 to 16": lambda: _sparse_conv(torch.float16, 5, 16),
    "sparse_conv fp16 16 to 16": lambda: _sparse_conv(torch.float16, 16, 16),
    "sparse_conv fp16 32 to 32": lambda: _sparse_conv(torch.float16, 32, 32),
    "sparse_conv fp16 64 to 64": lambda: _sparse_conv(torch.float16, 64, 64),
    "sparse_conv fp16 128 to 128": lambda: _sparse_conv(torch.float16, 128, 128),
    "sparse_conv bf16 128 to 128": lambda: _sparse_conv(torch.bfloat16, 128, 128),
    "sparse_conv fp32 128 to 128": lambda: _sparse_conv(torch.float32, 128, 128),
    "sparse_conv fp32 as tf32 128 to 128": lambda: _sparse_conv(torch.float32, 128, 128, "high"),
    "sparse_conv input gradient fp16 128": lambda: _sparse_conv_input_grad(torch.float16, 128),
    "voxel_pool fp16": lambda: _voxel_pool(torch.float16),
    "voxel_pool fp32": lambda: _voxel_pool(torch.float32),
    "voxelize": _voxelize,
    "neighbours": _neighbours,
    "deform_conv fp16 512": lambda: _deform_conv(torch.float16),
    "deform_conv fp32 512": lambda: _deform_conv(torch.float32),
    "deform_attn fp16": lambda: _deform_attn(torch.float16),
    "deform_attn fp32": lambda: _deform_attn(torch.float32),
    "linear_assignment 200 queries": lambda: _linear_assignment(200, 128),
    "linear_assignment 900 queries": lambda: _linear_assignment(900, 300),
}
