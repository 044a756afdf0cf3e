"""What `bevfn graph` does: the train step and the inference step of an experiment as Ascend graphs, and what is in them."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bevfn import catalogue, provenance, recipes, tree, waiting
from bevfn.data import source
from bevfn.data.batch import needed
from bevfn.files import check_json, check_writable
from bevfn.models import bevfusion
from bevfn.precision import Precision
from bevfn.synth import key_frame, rig
from bevfn.training import assembly, command_line, limits, tasks

# Names of what a step takes and returns.
NAMES: dict[str, dict[str, Any]] = {
    "train": {"takes": ("train_state", "batch"), "returns": ("train_state", "metrics")},
    "inference": {"takes": ("params", "state", "batch")},
}


def graph(
    experiment: str,
    *,
    model: str | None,
    stage: int | None,
    precision: Precision,
    scale: command_line.Scale,
    batch_size: int | None,
    ops: Literal["stock", "drivingsdk"],
    execute: int,
    kernels: Literal["published", "a2", "a2-hf32"],
    checkpoint_activations: bool,
    host_tables: bool,
    capacities: tuple[int, ...] | None,
    opp: Path | None,
    estimate: bool,
    calibrate: Path | None,
    rates: Path | None,
    json_file: Path | None,
    out: Path | None,
) -> int:
    """`bevfn graph` of these flags, see `commands.graph`: its exit code."""
    from bevfn.ascend import dump
    from bevfn.ascend.estimate import estimate as seconds_of
    from bevfn.ascend.estimate import read_profile
    from bevfn.ascend.execute import execute as compare
    from bevfn.ascend.lower import lower
    from bevfn.ascend.opp import read
    from bevfn.ascend.rates import PUBLISHED, SCENARIOS, probed
    from bevfn.ascend.report import report, text
    from bevfn.ascend.uses import used_by

    check_json(json_file)
    if calibrate is not None and not estimate:
        raise ValueError("--calibrate is of the estimate; add --estimate")
    if rates is not None and not estimate:
        raise ValueError("--rates is of the estimate; add --estimate")
    if kernels != "published" and not execute:
        raise ValueError(f"--kernels {kernels} is of the steps that --execute runs; add --execute 5")
    if out is not None:
        check_writable(out)
    tables = None if opp is None else read(opp)
    profile = None if calibrate is None else read_profile(calibrate)
    scenarios = SCENARIOS if rates is None else {**SCENARIOS, "probed": probed(rates)}
    if stage is not None:
        model = _of_stage(experiment, model, stage)
    of_scale = {
        "published": recipes.published(experiment, model),
        "mini": recipes.defaults(experiment, model)["synthetic"],
    }
    config = of_scale[scale].plain()
    batch_size = batch_size or (config.batch_size if scale == "published" else 1)
    changes: dict[str, Any] = {"batch_size": batch_size, "checkpoint_activations": checkpoint_activations}
    if catalogue.MODELS[config.model].family in ("bevfusion", "bevnext"):
        changes["host_tables"] = host_tables
    elif not host_tables:
        raise ValueError(
            f"--no-host-tables is of BEVFusion and BEVNeXt, and {config.model} has no tables; leave it out"
        )
    changes |= _rooms(config, capacities)
    config = replace(config, precision=precision, device="cpu", **changes)  # fake tensors, whatever devices are here
    made: dict[str, dict] = {}
    complete = True
    with waiting.told("making the steps", waiting.aside):
        both = steps(experiment, config, comparable=execute > 0)
    for name, (step, arguments) in both.items():
        with waiting.told(f"lowering the {name} step", waiting.aside):
            lowered = lower(step, arguments, **NAMES[name], ops=ops, strict=False)
        uses = list(used_by(lowered)) if estimate and not lowered.missing else None
        reported = report(name, lowered, tables, uses)
        print(text(reported), flush=True)
        made[name] = reported.to_json()
        if uses is not None and reported.complete:
            of_train = name == "train"  # what is published and what is profiled is training
            guess = seconds_of(
                lowered,
                uses,
                batch=batch_size,
                memory=reported.bytes,
                tables=tables,
                published=PUBLISHED.get(config.model) if of_train and scale == "published" else None,
                profile=profile if of_train else None,
                scenarios=scenarios,
            )
            print(guess.text(), flush=True)
            made[name]["estimate"] = guess.to_json()
        complete &= reported.complete and not reported.no_kernel
        if out is not None:
            again = "_recomputed" if checkpoint_activations else ""
            dump.write(lowered.graph, out / f"{model or experiment}_{scale}_{precision}_{name}{again}")
        if execute and name == "train" and reported.complete:
            with waiting.told(f"executing {execute} steps", waiting.aside):
                comparison = compare(step, lowered, *arguments, steps=execute, device=kernels)
            print(comparison.text(), flush=True)
            made[name]["execute"] = {"kernels": kernels, **comparison.to_json()}
    if json_file is not None:
        what = {"experiment": experiment, "model": config.model, "scale": scale, "precision": precision, **changes}
        provenance.write(json_file, {**what, "ops": ops, "steps": made})
    return 0 if complete else 1


def _rooms(config: command_line.Config, capacities: tuple[int, ...] | None) -> dict[str, Any]:
    """The fields of the config that --capacities are short for."""
    if capacities is None:
        return {}
    if not hasattr(config, "voxel_capacity"):
        raise ValueError(f"--capacities are voxels and sites, which {config.model} has not; leave them out")
    limits.check({"capacities": capacities})
    shown = bevfusion.Config() if config.scale == "published" else bevfusion.mini(bevfusion.Config())
    assert shown.lidar is not None
    strided = len(shown.lidar.encoder.paddings)
    if len(capacities) != strided + 2:
        raise ValueError(
            f"--capacities are {strided + 2} numbers at {config.scale} scale: voxels, then active sites after each of the "
            f"encoder's {strided} strided convolutions and after its last one; there are {len(capacities)}"
        )
    return {"voxel_capacity": capacities[0], "site_capacity": capacities[1:]}


def _of_stage(experiment: str, model: str | None, stage: int) -> str:
    """The experiment's model that --stage is short for."""
    named = f"{experiment}-stage{stage}"
    if named not in catalogue.MODELS or model not in (None, named):
        raise ValueError(f"--stage {stage} is short for --model bevnext-stage{stage} of bevnext; leave it out")
    return named


def steps(
    experiment: str, config: command_line.Config, *, comparable: bool = False
) -> dict[str, tuple[Callable, tuple]]:
    """{"train": (step, example arguments), "inference": ...} of an experiment's task, on a generated frame.

    The batch has the capacities of the recipe on nuScenes (published), or on the synthetic world (mini).

    comparable: four things are changed, so that several steps of two implementations can be compared. With AdamW's eps
    of 1e-8 the first updates are lr x sign(gradient), and parameters whose gradient is rounding only walk at random; 1
    makes the update proportional to the gradient. A loss scale of 2^16 overflows, and skipped steps compare nothing; it
    starts at 64. One annotated box per class stays: before training, the matching of several boxes of a class is
    degenerate (pairs can be exchanged at equal cost), and rounding decides. And deformable convolutions start off their
    offsets of 0, where the slope of bilinear sampling jumps and rounding decides again.
    """
    image_size = rig.CALIBRATED_SIZE if config.scale == "published" else source.WORLD_IMAGE
    with tempfile.TemporaryDirectory(prefix="bevfn-frame-") as folder:
        key_frame.write_frame(Path(folder), image_size=image_size)
        config = replace(config, data_root=Path(folder), lr=None)
        task = recipes.load(experiment).task(config)
        if comparable:
            optimizer = task.optimizer
            task = replace(task, optimizer=lambda plan: replace(optimizer(plan), eps=1.0))
        made = tasks.Run(task, config, tasks.Plan(steps_per_epoch=1000, total_steps=1000, batch=config.recipe_batch))
        batch = assembly.example(made)
    if comparable:
        valid, labels = needed(batch.boxes_valid, "boxes_valid"), needed(batch.labels, "labels")
        batch = replace(batch, boxes_valid=valid & _first_of_its_class(labels))
    train_state = assembly.initial_state(made)
    finish = task.finishing(train=False)  # other capacities than in training
    seen = batch if finish is None else finish(replace(batch, tables=None))
    if comparable:
        for path, leaf in tree.flatten(train_state.params).items():
            if path.endswith("offset.bias"):
                leaf.fill_(0.3)
        if train_state.loss_scale is not None:
            train_state.loss_scale.scale.fill_(64.0)
    return {
        "train": (assembly.pure_step(made), (train_state, batch)),
        "inference": (task.predict, (train_state.params, train_state.state, seen)),
    }


def _first_of_its_class(labels: Tensor) -> Tensor:
    """bool [B G] of labels [B G]."""
    same = labels[:, :, None] == labels[:, None, :]  # B G G
    return ~torch.tril(same, diagonal=-1).any(2)
