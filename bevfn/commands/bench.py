"""`bevfn bench`: speed and memory as ratios, against peers and the machine's limits in the same run."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from bevfn.files import write_atomically


def bench(
    what: Annotated[tyro.conf.Positional[Literal["ops", "step", "data"]], tyro.conf.arg(metavar="ops|step|data")],
    *,
    frame: Path | None = None,
    modality: Literal["lidar-camera", "lidar", "camera"] = "lidar-camera",
    precision: Literal["fp32", "fp16", "bf16"] = "fp32",
    batch_size: int = 1,
    device: str = "cpu",
    threads: int = 0,
    repeats: int = 3,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> int:
    """Measure the ops, the full-size forward pass and train step, or the reading of samples.

    ops: sparse encoder against spconv (`pip install 'bevfn[bench]'`) and plain torch, sparse convolution against the
    machine's GEMM peak, voxel pooling against its copy bandwidth.
    step: forward and train step, eager and compiled, as a share of the machine's GEMM peak, with peak memory.
    data: training samples per second and core of both published pipelines, and where the time goes.

    Args:
        what: ops, step or data
        frame: folder of a real key frame, such as ../shared/nuscenes_frame; a generated frame without it (step, data)
        modality: sensors of the model (step)
        precision: of the step
        batch_size: copies of the frame in a batch (step)
        device: torch device (step)
        threads: CPU threads; 0: all cores (sparse convolution is measured with one)
        repeats: timed repetitions; the median counts (step); tens of samples (data)
        json_file: also write the figures there, with the machine named
    """
    from bevfn.bench import data, machine, ops, step

    torch.set_num_threads(threads or torch.get_num_threads())
    if what == "ops":
        figures = ops.measure()
    elif what == "data":
        figures = data.data(frame=frame, samples=10 * repeats)
    else:
        figures = step.measure(
            step.Setting(modality, frame, precision, batch_size, device, torch.get_num_threads(), repeats)
        )
    result = {
        "benchmark": what, "date": datetime.now(UTC).date().isoformat(), "machine": machine.describe(device),
        "command": _command(what, modality, precision, batch_size, device, frame), "figures": figures,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if json_file is not None:
        write_atomically(json_file, text.encode())
    return 0


def _command(what: str, modality: str, precision: str, batch_size: int, device: str, frame: Path | None) -> str:
    """What to type to measure it again."""
    words = ["bevfn", "bench", what]
    if what == "step":
        words += ["--modality", modality, "--precision", precision, "--batch-size", str(batch_size), "--device", device]
    return " ".join([*words, *(["--frame", str(frame)] if frame else [])])
