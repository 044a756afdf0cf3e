"""From a detector to a folder for a runtime: the file, its manifest, and an example of its inputs and outputs.

What is in the folder was run and compared; a file that differs is not left there.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bevfn import tree, waiting
from bevfn.data.batch import Batch
from bevfn.detector import Detector
from bevfn.export import flow
from bevfn.export.flow import Entry, Flow
from bevfn.files import new_folder, to_json, write_atomically, writing

if TYPE_CHECKING:  # which needs the extra's packages
    from bevfn.export import verify

FILE, EXAMPLE = "model.onnx", "example.npz"
ONNX_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")  # whose versions make an ONNX file what it is
OPENVINO = "OpenVINO computes wrong voxels from points, without a word: export --input voxels for it"
NONE: Mapping[str, int] = MappingProxyType({})
Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays, bool], Arrays]
"""(inputs, whether boundaries are asked for) -> outputs, and boundaries, by name"""


class Differs(Exception):
    """A file that was verified and is not what the detector is: the first thing that differs, one sentence."""


@dataclass(frozen=True)
class Kind:
    """A kind of file that a flow becomes; its functions import what they need when they are called."""

    file: str
    runtime: str
    """where it is verified, for the manifest"""
    packages: tuple[str, ...]
    """whose versions make it what it is"""
    check: Callable[[], None]
    """raises ValueError, one sentence, where what it needs is missing"""
    make: Callable[[Detector, Batch, Entry], Flow]
    write: Callable[[Flow, Path], tuple[Run, dict[str, Any]]]
    """writes the file; returns how it runs, and what the manifest says of it besides. Raises ValueError, one sentence"""
    merges: bool = False
    """whether the runtime computes otherwise what nobody asks for: then the file runs again as it will be used"""


@dataclass(frozen=True)
class Compared:
    """What a file computes of an example, and what it is held against."""

    inputs: Arrays
    outputs: Arrays
    """as it is used, without its boundaries"""
    found: Arrays
    """detections and boundaries"""
    again: Arrays
    """detections, of `outputs`"""
    eager: Arrays
    """as `found`, of the eager detector of its precision"""
    truth: Arrays
    """detections of the eager detector in float32"""
    names: Sequence[str]
    """of `found`, what are no boundaries"""
    counts: Mapping[str, int]
    """of the key frame, before the file"""


def check() -> None:
    """Raises ValueError, one sentence, where the extra's packages are not installed."""
    found = {
        "onnx": importlib.util.find_spec("onnx"),
        "onnxscript": importlib.util.find_spec("onnxscript"),
        "onnxruntime": importlib.util.find_spec("onnxruntime"),
    }
    if missing := [name for name, place in found.items() if place is None]:
        raise ValueError(f"an ONNX export needs {' and '.join(missing)}: pip install -e '.[export]'")


def _make(detector: Detector, batch: Batch, entry: Entry) -> Flow:
    from bevfn.export import onnx

    return flow.make(detector, batch, entry=entry, table=onnx.table())


def _write(graph: Flow, file: Path) -> tuple[Run, dict[str, Any]]:
    from bevfn.export import onnx, verify

    boundaries = onnx.write(graph, file)
    facts: dict[str, Any] = {"opset": onnx.OPSET}
    if "points" in graph.inputs and flow.VOXELS[0] not in graph.inputs:
        facts["warnings"] = [OPENVINO]
    return lambda given, inside: verify.run(file, given, boundaries if inside else ()), facts


ONNX = Kind(
    file=FILE,
    runtime="onnxruntime, CPU",
    packages=ONNX_PACKAGES,
    check=check,
    make=_make,
    write=_write,
    merges=True,
)


def folder(
    kind: Kind,
    detector: Detector,
    reference: Detector,
    batch: Batch,
    out: Path,
    *,
    entry: Entry = "points",
    data: str = "",
    counts: Mapping[str, int] = NONE,
) -> str:
    """Writes `out`, new or empty, which appears complete or not at all; returns what was compared, as a table.

    Args:
        detector: in the file's precision.
        reference: the same in float32, against whose boxes the file's are held.
        batch: what is computed and compared on, of one sample, not augmented; the file has its shapes.
        data: for the manifest: what the batch is.
        counts: and how many "points" it has, and "overflow/points" that it had no room for.

    Raises ValueError, one sentence, for what cannot be exported, and Differs.
    """
    with waiting.told("tracing the detector"):
        graph = kind.make(detector, batch, entry)
    inputs = {name: value.numpy() for name, value in graph.inputs.items()}
    with new_folder(out) as made:
        with waiting.told(f"writing {kind.file}"):
            run, facts = kind.write(graph, made / kind.file)
        with waiting.told(f"running {kind.file} ({kind.runtime})"):
            ours = run(inputs, True)
            plain = run(inputs, False) if kind.merges else {name: ours[name] for name in graph.outputs}
        with waiting.told("running the detector itself"):
            at_boundaries = eager(detector, batch)
            truth = at_boundaries if reference is detector else eager(reference, batch)
        compared = Compared(inputs, plain, ours, plain, at_boundaries, truth, graph.outputs, counts)
        how = {"facts": facts, "runtime": kind.runtime, "packages": kind.packages, "data": data}
        verdict, said = judged(detector, made / kind.file, compared, **how)
        describe(made, said, compared)
    return verdict.text()


def judged(detector: Detector, file: Path, compared: Compared, **how: Any) -> tuple["verify.Verdict", dict[str, Any]]:
    """(what was compared, the file's manifest); how: as of `manifest.make`. Raises Differs for a file that is not what the
    detector is."""
    from bevfn.export import manifest, verify

    precision = detector.config.precision
    verdict = verify.compare(compared.found, compared.eager, compared.truth, compared.names, precision, compared.counts)
    limits, failed = verify.LIMITS[precision], verdict.failed
    again = verify.paired(compared.again, compared.found, limits.near_m, limits.alike)
    if not failed and verify.beyond(again, limits):
        failed = "run without its boundaries it differs"
    if failed:
        raise Differs(f"{verdict.text()}\nrefused, nothing is written: {failed}")
    return verdict, manifest.make(detector, file, compared.inputs, compared.outputs, verdict=verdict, **how)


def describe(made: Path, said: Mapping[str, Any], compared: Compared) -> None:
    """Writes the manifest, and the example of inputs and outputs."""
    from bevfn.export import manifest

    write_atomically(made / manifest.NAME, to_json(said, indent=1))
    with writing(made / EXAMPLE):
        np.savez_compressed(made / EXAMPLE, **compared.inputs, **compared.outputs)


def eager(detector: Detector, batch: Batch) -> dict[str, np.ndarray]:
    """Outputs and boundaries of the detector itself."""
    task = detector.task
    assert task.apply is not None and task.decode is not None
    with torch.no_grad():
        outputs, _ = task.apply(detector.params, detector.state, batch)
        made = {**tree.flatten(outputs), **task.decode(outputs)}
    return {name: value.numpy() for name, value in made.items()}
