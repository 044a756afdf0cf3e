"""A step on an Ascend NPU: the aten graph that `bevfn graph` converts offline, given to torchair's compiler.

Nothing here has run on a device. The graph is traced on fake CPU tensors (`trace`), with the same decompositions,
rewrites and converters as offline, and then says "npu" where it said "cpu". It goes to `torchair.get_compiler` and not to
`get_npu_backend`, which would trace it once more, on NPU tensors and with torchair's own decompositions.

- torchair: mode max-autotune, one GE graph; operators become GE nodes by torchair's converters and ours;
- npugraph-ex: mode npugraph_ex (in torch_npu 2.13 reduce-overhead, its older name, warns of its end), the aten graph is
  run once by torch_npu's kernels and captured; no converters.

Source: torch_npu 2.13.0, dynamo/torchair (public names).
"""

import ctypes
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from bevfn.ascend import cache, lower, torchair
from bevfn.ascend.fixes import refusals
from bevfn.ascend.trace import Traced, placeholders

Backend = Literal["torchair", "npugraph-ex"]
MODES: dict[str, str] = {"torchair": "max-autotune", "npugraph-ex": "npugraph_ex"}
INSTALLATIONS = (Path("/usr/local/Ascend"), Path("~/Ascend"))
"""where CANN installs itself, for all users or for one"""
DEVICES = Path("/dev")


def check(backend: str) -> None:
    """Raises ValueError unless this process can use an NPU."""
    instead = "`bevfn graph EXPERIMENT` lowers and checks the same step without one"
    if torchair.loaded():
        raise ValueError(
            f"backend {backend!r} cannot run in a process that lowers graphs offline; start a new one, or use {instead}"
        )
    if not available():
        raise ValueError(f"backend {backend!r} needs an Ascend NPU with CANN and torch_npu, not found here; {instead}")


def available() -> bool:
    """Whether torch_npu is installed with CANN and sees a device. Does not import torch_npu where it would fail."""
    if importlib.util.find_spec(torchair.PACKAGE) is None:
        return False
    try:
        ctypes.CDLL("libascendcl.so")  # of CANN, without which importing torch_npu raises
        importlib.import_module(torchair.PACKAGE)
    except (OSError, ImportError):
        return False
    return torch.get_device_module("npu").is_available()


def hindrance() -> str | None:
    """Why this process cannot use the NPU or the CANN that the machine has, and what to do; None where it has neither, or CANN
    alone, as a machine that only lowers graphs may."""
    scripts = [script for folder in INSTALLATIONS for script in sorted(folder.expanduser().glob("*/set_env.sh"))]
    npus = sorted(DEVICES.glob("davinci[0-9]*"))
    try:
        ctypes.CDLL("libascendcl.so")
    except OSError:
        if scripts:
            return f"CANN is installed at {scripts[0].parent} and this shell does not have it: source {scripts[0]}"
        if npus:
            return f"the machine has an NPU ({npus[0]}) and no CANN was found: install it, and source its set_env.sh"
        return None
    if not npus:
        return None
    if importlib.util.find_spec(torchair.PACKAGE) is None:
        return f"the machine has an NPU ({npus[0]}) and CANN, and no torch_npu: pip install -e '.[npu]'"
    return f"torch_npu sees no device beside {npus[0]}: look at npu-smi info and ASCEND_RT_VISIBLE_DEVICES"


def compiled(f: Callable, backend: Backend, *, hf32: bool = lower.HF32) -> Callable:
    """f(*pytrees of NPU tensors) -> pytree as one compiled graph, compiled on the first call; without gradients.

    hf32: see `set_hf32`.

    Raises ValueError if a tensor is not on an NPU, if a later call has other shapes or dtypes, and what `trace` raises.
    """
    check(backend)
    made: tuple[Traced, Callable] | None = None

    def call(*arguments: Any) -> Any:
        nonlocal made
        tensors = [x for x in pytree.tree_leaves(arguments) if x is not None]
        if made is None:
            device = npu(tensors, backend)
            set_hf32(hf32)
            traced = aten(f, arguments)
            check_module(traced.module, backend)
            made = traced, _compile(retargeted(traced.module, device), device, backend)
        traced, run = made
        check_inputs(traced, tensors)
        with torch.no_grad():
            # The graph was traced for contiguous inputs, and GE reads memory as it lies.
            outputs = run(*(x.contiguous() for x in tensors))
        return pytree.tree_unflatten([None if i is None else outputs[i] for i in traced.returned], traced.spec)

    return call


def aten(f: Callable, arguments: tuple) -> Traced:
    """`lower.aten` of `f(*arguments)`; of the tensors only shapes and dtypes matter."""
    with FakeTensorMode(static_shapes=True):
        fakes = pytree.tree_map(lambda x: None if x is None else torch.empty(x.shape, dtype=x.dtype), arguments)
    return lower.aten(f, fakes)


def retargeted(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A copy whose device arguments and constants are on `device` instead of the CPU."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    moved = fx.GraphModule(module, graph)
    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, lambda x: _moved(x, device))
        node.kwargs = fx.node.map_aggregate(node.kwargs, lambda x: _moved(x, device))
        if node.op == "get_attr":
            setattr(moved, node.target, getattr(module, node.target).to(device))
    moved.recompile()
    return moved


def config(backend: Backend) -> Any:
    """torchair's CompilerConfig: that of the offline lowering, in the backend's mode."""
    made = lower.config()
    made.mode = MODES[backend]
    return made


def set_hf32(allowed: bool) -> None:
    """Whether float32 may be convolved and multiplied with HF32's 11 bits: `torch.npu`'s flags, of which torchair makes
    GE's option once per process. By default convolutions are, and no precision of bevfn means that (`lower.HF32`)."""
    npu: Any = torch.get_device_module("npu")
    npu.conv.allow_hf32 = npu.matmul.allow_hf32 = allowed


def npu(tensors: Sequence[Tensor], backend: str) -> torch.device:
    """The device of all tensors. Raises ValueError unless it is one NPU."""
    devices = {x.device for x in tensors}
    if len(devices) != 1 or next(iter(devices)).type != "npu":
        found = ", ".join(sorted(map(str, devices))) or "none"
        raise ValueError(f"backend {backend!r} needs all tensors on one NPU, and they are on {found}; add --device npu")
    return next(iter(devices))


def check_inputs(traced: Traced, tensors: Sequence[Tensor]) -> None:
    """Raises ValueError naming the first tensor that is not as in the first call: the graph is static."""
    for value, x in zip(traced.inputs, tensors, strict=True):
        if (tuple(x.shape), x.dtype) != (value.shape, value.dtype):
            raise ValueError(
                f"{value.name} is {x.dtype} {list(x.shape)}, and the graph was compiled for {value.dtype} "
                f"{list(value.shape)}; pad it to the same capacity"
            )


_ANYWHERE = (
    *(torch.ops.bevfn.wait_for.default, torch.ops.bevfn.batch_norm.default),
    torch.ops.bevfn.batch_norm_backward.default,
)
"""Operators of this package that are aten operators on any device."""


def check_module(module: fx.GraphModule, backend: Backend) -> None:
    """Raises ValueError naming an operator that would be wrong on the device, or cannot be captured there."""
    for node in module.graph.nodes:
        where = f"{node.target} at {node.meta.get('source') or 'an unknown line'}"
        if backend == "torchair" and (reason := refusals.reason(node)):
            raise ValueError(f"no Ascend converter for {where}: {reason}")
        own = getattr(node.target, "namespace", "") == "bevfn" and node.target not in _ANYWHERE
        if backend == "npugraph-ex" and own:
            raise ValueError(f"backend 'npugraph-ex' cannot capture {where}, which runs on the host; use torchair")


def propagated(module: fx.GraphModule, device: torch.device) -> list[Tensor]:
    """Fake inputs of `module` on `device`; every node's `meta["val"]` becomes what it is there."""
    mode = FakeTensorMode(static_shapes=True, allow_non_fake_inputs=True)
    with mode:
        inputs = [
            torch.empty(node.meta["val"].shape, dtype=node.meta["val"].dtype, device=device)
            for node in placeholders(module)
        ]
    with torch.no_grad():
        FakeTensorProp(module, mode).propagate_dont_convert_inputs(*inputs)
    return inputs


def _compile(module: fx.GraphModule, device: torch.device, backend: Backend) -> Callable:
    """The module through torchair; the only function that needs a device."""
    import torchair as ta

    if backend == "torchair":
        lower.register_converters()
    inputs: list[Any] = propagated(module, device)
    with torch._guards.tracing(torch._guards.TracingContext(inputs[0].fake_mode)), torch.no_grad():
        compiled = ta.get_compiler(config(backend))(module, inputs)
        return cache.kept(compiled) if backend == "torchair" else compiled


def _moved(value: Any, device: torch.device) -> Any:
    return device if isinstance(value, torch.device) and value.type == "cpu" else value
