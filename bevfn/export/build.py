"""From a detector to a folder for a runtime: the file, its manifest, and an example of its inputs and outputs.

What is in the folder was run and compared; a file that differs is not left there.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bevfn import tree
from bevfn.data.batch import Batch
from bevfn.detector import Detector
from bevfn.export.flow import Entry, Flow
from bevfn.files import new_folder, to_json, write_atomically, writing
from bevfn.precision import Precision

if TYPE_CHECKING:  # which needs the extra's packages
    from bevfn.export import verify

FILE, EXAMPLE = "model.onnx", "example.npz"
ONNX_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")  # whose versions make an ONNX file what it is
Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays, bool], Arrays]
"""(inputs, whether boundaries are asked for) -> outputs, and boundaries, by name"""


class Differs(Exception):
    """A file that was verified and is not what the detector is: the first thing that differs, one sentence."""


@dataclass(frozen=True)
class Kind:
    """A kind of file; its functions import what they need when they are called."""

    file: str
    runtime: str
    """where it is verified, for the manifest"""
    packages: tuple[str, ...]
    """whose versions make it what it is"""
    make: Callable[[Detector, Batch, Entry], Flow]
    write: Callable[[Flow, Path], tuple[Run, dict[str, Any]]]
    """writes the file; returns how it runs, and what the manifest says of it besides. Raises ValueError, one sentence"""
    merges: bool = False
    """whether the runtime computes otherwise what nobody asks for: then the file runs again as it will be used"""


def check() -> None:
    """Raises ValueError, one sentence, where the extra's packages are not installed."""
    found = {
        "onnx": importlib.util.find_spec("onnx"),
        "onnxscript": importlib.util.find_spec("onnxscript"),
        "onnxruntime": importlib.util.find_spec("onnxruntime"),
    }
    if missing := [name for name, place in found.items() if place is None]:
        raise ValueError(f"an ONNX export needs {' and '.join(missing)}: pip install 'bevfn[export]'")


def onnx_folder(detector: Detector, reference: Detector, batch: Batch, out: Path, **how: Any) -> str:
    """`folder` of an ONNX file."""
    return folder(onnx_kind(), detector, reference, batch, out, **how)


def onnx_kind() -> Kind:
    """An ONNX file. Needs the extra's packages."""
    from bevfn.export import flow, onnx, verify

    def write(graph: Flow, file: Path) -> tuple[Run, dict[str, Any]]:
        boundaries = onnx.write(graph, file)
        return lambda given, inside: verify.run(file, given, boundaries if inside else ()), {"opset": onnx.OPSET}

    return Kind(
        file=FILE,
        runtime="onnxruntime, CPU",
        packages=ONNX_PACKAGES,
        make=lambda detector, batch, entry: flow.make(detector, batch, entry=entry, table=onnx.table()),
        write=write,
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
) -> str:
    """Writes `out`, new or empty, which appears complete or not at all; returns what was compared, as a table.

    Args:
        detector: in the file's precision.
        reference: the same in float32, against whose boxes the file's are held.
        batch: what is computed and compared on, of one sample, not augmented; the file has its shapes.
        data: for the manifest: what the batch is.

    Raises ValueError, one sentence, for what cannot be exported, and Differs.
    """
    from bevfn.export import manifest, verify

    graph = kind.make(detector, batch, entry)
    inputs = {name: value.numpy() for name, value in graph.inputs.items()}
    with new_folder(out) as made:
        file = made / kind.file
        run, facts = kind.write(graph, file)
        at_boundaries = eager(detector, batch)
        ours = run(inputs, True)
        truth = at_boundaries if reference is detector else eager(reference, batch)
        verdict = verify.compare(ours, at_boundaries, truth, graph.outputs, detector.config.precision)
        plain = run(inputs, False) if kind.merges else {name: ours[name] for name in graph.outputs}
        refuse(verdict, verify.paired(plain, ours, verdict.boxes.near_m), detector.config.precision)
        said = manifest.make(
            detector,
            file,
            inputs,
            plain,
            facts=facts,
            runtime=kind.runtime,
            packages=kind.packages,
            verdict=verdict,
            data=data,
        )
        describe(made, said, {**inputs, **plain})
    return verdict.text()


def refuse(verdict: "verify.Verdict", again: "verify.Boxes", precision: Precision) -> None:
    """Raises Differs for a file that is not what the detector is; again: its detections as it is used, without its boundaries,
    with those that were compared."""
    from bevfn.export import verify

    failed = verdict.failed
    if not failed and again.share < verify.LIMITS[precision].found:
        failed = "run without its boundaries it differs"
    if failed:
        raise Differs(f"{verdict.text()}\nrefused, nothing is written: {failed}")


def describe(made: Path, said: Mapping[str, Any], example: Arrays) -> None:
    """Writes the manifest, and the example of inputs and outputs."""
    from bevfn.export import manifest

    write_atomically(made / manifest.NAME, to_json(said, indent=1))
    with writing(made / EXAMPLE):
        np.savez_compressed(made / EXAMPLE, **example)


def eager(detector: Detector, batch: Batch) -> dict[str, np.ndarray]:
    """Outputs and boundaries of the detector itself."""
    task = detector.task
    assert task.apply is not None and task.decode is not None
    with torch.no_grad():
        outputs, _ = task.apply(detector.params, detector.state, batch)
        made = {**tree.flatten(outputs), **task.decode(outputs)}
    return {name: value.numpy() for name, value in made.items()}
