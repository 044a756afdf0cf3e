"""From a detector to a folder for a runtime: the file, its manifest, and an example of its inputs and outputs.

What is in the folder was run and compared; a file that differs is not left there.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch

from bevfn import tree
from bevfn.data.batch import Batch
from bevfn.detector import Detector
from bevfn.export.flow import Entry
from bevfn.files import new_folder, to_json, write_atomically, writing

FILE, EXAMPLE = "model.onnx", "example.npz"


class Differs(Exception):
    """A file that was verified and is not what the detector is: the first thing that differs, one sentence."""


def check() -> None:
    """Raises ValueError, one sentence, where the extra's packages are not installed."""
    found = {
        "onnx": importlib.util.find_spec("onnx"),
        "onnxscript": importlib.util.find_spec("onnxscript"),
        "onnxruntime": importlib.util.find_spec("onnxruntime"),
    }
    if missing := [name for name, place in found.items() if place is None]:
        raise ValueError(f"an ONNX export needs {' and '.join(missing)}: pip install 'bevfn[export]'")


def onnx_folder(
    detector: Detector, reference: Detector, batch: Batch, out: Path, *, entry: Entry = "points", data: str = ""
) -> str:
    """Writes `out`, new or empty, which appears complete or not at all; returns what was compared, as a table.

    Args:
        detector: in the file's precision.
        reference: the same in float32, against whose boxes the file's are held.
        batch: what is computed and compared on, of one sample, not augmented; the file has its shapes.
        data: for the manifest: what the batch is.

    Raises ValueError, one sentence, for what cannot be exported, and Differs.
    """
    from bevfn.export import flow, manifest, onnx, verify  # of the extra

    graph = flow.make(detector, batch, entry=entry, table=onnx.table())
    inputs = {name: value.numpy() for name, value in graph.inputs.items()}
    with new_folder(out) as folder:
        file = folder / FILE
        boundaries = onnx.write(graph, file)
        at_boundaries = eager(detector, batch)
        ours = verify.run(file, inputs, boundaries)
        truth = at_boundaries if reference is detector else eager(reference, batch)
        verdict = verify.compare(ours, at_boundaries, truth, graph.outputs, detector.config.precision)
        plain = verify.run(file, inputs)  # as it is used: the runtime may merge what is not asked for
        again = verify.paired(plain, ours, verdict.boxes.near_m)
        failed = verdict.failed or (
            ""
            if again.share >= verify.LIMITS[detector.config.precision].found
            else "run without its boundaries it differs"
        )
        if failed:
            raise Differs(f"{verdict.text()}\nrefused, nothing is written: {failed}")
        made = manifest.make(detector, file, inputs, plain, opset=onnx.OPSET, verdict=verdict, data=data)
        write_atomically(folder / manifest.NAME, to_json(made, indent=1))
        with writing(folder / EXAMPLE):
            np.savez_compressed(folder / EXAMPLE, **inputs, **plain)
    return verdict.text()


def eager(detector: Detector, batch: Batch) -> dict[str, np.ndarray]:
    """Outputs and boundaries of the detector itself."""
    task = detector.task
    assert task.apply is not None and task.decode is not None
    with torch.no_grad():
        outputs, _ = task.apply(detector.params, detector.state, batch)
        made = {**tree.flatten(outputs), **task.decode(outputs)}
    return {name: value.numpy() for name, value in made.items()}
