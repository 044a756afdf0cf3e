"""`bevfn graph EXPERIMENT`: the train step and the inference step as Ascend graphs, without an Ascend."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from bevfn import optim, train
from bevfn.data.batch import Batch
from bevfn.files import write_atomically
from bevfn.models import bevfusion
from bevfn.precision import Policy

MODELS = {
    "bevfusion": bevfusion.lidar_camera, "bevfusion_lidar": bevfusion.lidar_only, "bevfusion_camera": bevfusion.camera_only,
}  # fmt: skip
# Points and boxes of a sample: ten nuScenes sweeps, or a few.
CAPACITIES = {"published": (350_000, 256), "mini": (40_000, 64)}
# Names of what a step takes and returns.
NAMES: dict[str, dict[str, Any]] = {
    "train": {"takes": ("train_state", "batch"), "returns": ("train_state", "metrics")},
    "inference": {"takes": ("params", "state", "batch")},
}


def graph(
    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EXPERIMENT")],
    *,
    precision: Literal["fp32", "fp16", "bf16"] = "fp32",
    scale: Literal["published", "mini"] = "published",
    batch_size: int = 4,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    out: Path | None = None,
) -> int:
    """Lower an experiment's steps to Ascend graphs and report what is in them; needs `pip install 'bevfn[npu]'`, no NPU.

    The whole train step and the inference step are traced with fake tensors and go through torchair's own converters.
    Exit code 1 if a step is not one static graph: docs/ascend.md says how to read the report.

    Args:
        experiment: bevfusion, bevfusion_lidar or bevfusion_camera
        precision: of the step
        scale: published sizes, or the mini ones of demos and CI
        batch_size: samples per device
        json_file: also write the figures there
        out: folder for the graphs, as .pbtxt for reading and .air (the serialized model)
    """
    from bevfn.ascend import files
    from bevfn.ascend.lower import lower
    from bevfn.ascend.report import report, text

    if out is not None:
        files.check_writable(out)
    reports = []
    for name, (step, arguments) in steps(experiment, scale, precision, batch_size).items():
        lowered = lower(step, arguments, **NAMES[name], strict=False)
        reports.append(report(name, lowered))
        print(text(reports[-1]), flush=True)
        if out is not None:
            files.write(lowered.graph, out / f"{experiment}_{scale}_{precision}_{name}")
    if json_file is not None:
        figures = {
            "experiment": experiment, "scale": scale, "precision": precision, "batch_size": batch_size,
            "steps": {made.step: made.to_json() for made in reports},
        }  # fmt: skip
        write_atomically(json_file, json.dumps(figures, indent=1).encode())
    return 0 if all(made.complete for made in reports) else 1


def steps(experiment: str, scale: str, precision: str, batch_size: int = 1) -> dict[str, tuple[Callable, tuple]]:
    """{"train": (step, example arguments), "inference": ...}, the batches empty at their capacities.

    Raises ValueError for an unknown experiment.
    """
    if experiment not in MODELS:
        raise ValueError(f"experiment {experiment!r} is unknown; choose one of {', '.join(MODELS)}")
    model, policy = MODELS[experiment](), Policy.of(precision)
    model = bevfusion.mini(model) if scale == "mini" else model
    optimizer = optim.Config(
        lr=optim.Schedule(2e-4, (optim.Phase(1000, 2e-8),), 500, 1 / 3), beta1=optim.beta1_cycle(400, 1000)
    )
    batch = empty_batch(model, batch_size, *CAPACITIES[scale])
    params, state = bevfusion.init(model, seed=0)
    loss = partial(bevfusion.loss, config=model, policy=policy)
    train_state = train.init(params, state, optimizer, precision=policy)
    predict = partial(bevfusion.predict, config=model, policy=policy)
    return {
        "train": (train.make_step(loss, optimizer, precision=policy), (train_state, batch)),
        "inference": (predict, (params, state, batch)),
    }


def empty_batch(model: bevfusion.Config, B: int, P: int, G: int, N: int = 6) -> Batch:
    """A Batch of zeros for the model's sensors."""
    cameras: dict[str, Any] = {}
    if model.camera is not None:
        H, W = model.camera.view.image_size
        poses = ("image_from_lidar", "lidar_from_camera", "intrinsics", "image_aug")
        cameras = {name: torch.zeros(B, N, 4, 4) for name in poses}
        cameras |= {name: torch.zeros(B, N, 3, 3) for name in ("undo_image_aug", "lidar_from_pixel")}
        cameras["images"] = torch.zeros(B, N, H, W, 3, dtype=torch.uint8)
    return Batch(
        points=torch.zeros(B, P, 5), points_valid=torch.zeros(B, P, dtype=torch.bool), boxes=torch.zeros(B, G, 9),
        labels=torch.zeros(B, G, dtype=torch.int64), boxes_valid=torch.zeros(B, G, dtype=torch.bool),
        lidar_aug=torch.zeros(B, 4, 4), undo_lidar_aug=torch.zeros(B, 3, 3), **cameras,
    )  # fmt: skip
