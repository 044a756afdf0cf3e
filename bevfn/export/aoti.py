"""A flow compiled ahead of time for this CPU: a package that libtorch runs, from C++ or Python, without bevfn.

What dominates a LiDAR detector stays this package's C++, linked into the file: in operators of torch's own the sparse convolutions
multiply the padding too (`kernels.aoti`). What is verified is the package, in a process of its own that imports torch and numpy
alone; its boundaries are fused away and cannot be asked for.

Source: torch 2.13's torch._inductor (aoti_compile_and_package, aoti_load_package).
"""

import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from bevfn import compile as compilation
from bevfn import provenance
from bevfn.data.batch import Batch
from bevfn.detector import Detector
from bevfn.export import flow
from bevfn.export.build import Arrays, Kind, Run
from bevfn.files import writing
from bevfn.kernels import aoti as kernels
from bevfn.kernels import native

FILE, LIBRARY = "model.pt2", "bevfn_kernels"
OPTIONS = {
    "cpp.dynamic_threads": True,  # else the exporting process' number of threads would be compiled in
    "aot_inductor.precompile_headers": False,  # one file includes them: once is what it would cost beforehand too
}
CHILD = """
import sys, numpy, torch
package, given, found, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
with numpy.load(given) as inputs, torch.no_grad():
    outputs = torch._inductor.aoti_load_package(package)(*[torch.from_numpy(inputs[name]) for name in inputs.files])
numpy.savez(found, *[value.numpy() for value in outputs])
"""


def check() -> None:
    """Raises ValueError, one sentence, where there is no C++ compiler."""
    try:
        native.compiler()
    except FileNotFoundError as error:
        raise ValueError(f"an AOTInductor package is compiled as C++ here: {error}") from None


def make(detector: Detector, batch: Batch, entry: flow.Entry) -> flow.Flow:
    """The flow without boundaries, in torch's own operators but for those that `kernels.aoti` links."""
    made = flow.make(detector, batch, entry=entry, table=kernels.table())
    graph = fx.Graph()
    copied: Any = graph.graph_copy(made.module.graph, {})
    graph.output(list(copied)[: len(made.outputs)])
    graph.eliminate_dead_code()
    return flow.Flow(fx.GraphModule(made.module, graph), made.inputs, made.outputs, ())


def write(made: flow.Flow, path: Path) -> tuple[Run, dict[str, Any]]:
    """Compiles the package; returns how it runs, and what it was compiled for."""
    from bevfn.export.program import exported

    compilation.ready()
    with writing(path), torch.no_grad(), warnings.catch_warnings(), _linked() as options:
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own parts
        torch._inductor.aoti_compile_and_package(exported(made), package_path=str(path), inductor_configs=options)

    def ran(inputs: Arrays, _: bool) -> dict[str, np.ndarray]:
        return dict(zip(made.outputs, run(path, inputs), strict=True))

    return ran, {"compiled_for": target()}


@contextlib.contextmanager
def _linked() -> Iterator[dict[str, Any]]:
    """Inductor's options with this package's kernels, in a library that the linker finds meanwhile."""
    with tempfile.TemporaryDirectory(prefix="bevfn-kernels-") as folder:
        kernels.archive(Path(folder) / f"lib{LIBRARY}.a")
        with _searched_for_libraries(folder):
            yield {
                **OPTIONS,
                "aot_inductor.custom_ops_to_c_shims": kernels.functions(),
                "aot_inductor.custom_op_libs": [LIBRARY],
            }


@contextlib.contextmanager
def _searched_for_libraries(folder: str) -> Iterator[None]:
    """By the linkers that start inside, before the places of this process' own LIBRARY_PATH."""
    before = os.environ.get("LIBRARY_PATH")
    os.environ["LIBRARY_PATH"] = folder + (os.pathsep + before if before else "")
    try:
        yield
    finally:
        if before is None:
            del os.environ["LIBRARY_PATH"]
        else:
            os.environ["LIBRARY_PATH"] = before


def target() -> dict[str, str]:
    """What the code that is compiled here needs: it does not run on a processor without these instructions."""
    from torch._inductor import cpu_vec_isa

    compiler = subprocess.run([native.compiler(), "--version"], capture_output=True, text=True).stdout
    return {
        "system": sys.platform,
        "machine": platform.machine(),
        "processor": provenance.processor(),
        "instruction_set": str(cpu_vec_isa.pick_vec_isa()),
        "compiler": compiler.partition("\n")[0],
    }


def run(path: Path, inputs: Arrays) -> list[np.ndarray]:
    """Outputs of a package, in order, in a fresh process on as many threads as this one's. Raises RuntimeError if it dies."""
    with tempfile.TemporaryDirectory(prefix="bevfn-package-") as folder:
        given, found = Path(folder) / "given.npz", Path(folder) / "found.npz"
        np.savez(given, **inputs)
        command = [sys.executable, "-I", "-c", CHILD, str(path), str(given), str(found), str(torch.get_num_threads())]
        alone = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=alone)
        if done.returncode != 0:
            raise RuntimeError(
                f"{path.name} does not run ({done.returncode}): {done.stderr.strip()[-1000:] or 'no message'}"
            )
        with np.load(found) as outputs:
            return [outputs[name] for name in outputs.files]


KIND = Kind(
    file=FILE,
    runtime="torch alone, in a process of its own",
    packages=("torch",),
    check=check,
    make=make,
    write=write,
)
