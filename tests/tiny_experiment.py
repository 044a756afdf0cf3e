"""An experiment like those in experiments/, of the smallest LiDAR-only model, for tests that start real processes.

python tests/tiny_experiment.py --data-root WORLD --run-dir RUN ...
"""

import os
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from bevfn.backbones import second, sparse_encoder
from bevfn.data import augment, source
from bevfn.data.batch import Capacities
from bevfn.data.reading import Points, Reading
from bevfn.evaluation import page
from bevfn.heads import transfusion
from bevfn.models import bevfusion
from bevfn.necks import second_fpn
from bevfn.precision import Policy
from bevfn.training import command_line, optim, run, tasks

RANGE = (-24.0, -24.0, -5.0, 24.0, 24.0, 3.0)


@dataclass(frozen=True)
class Config(command_line.Config):
    backend: str = "eager"
    eval_backend: str = "eager"
    batch_size: int = 2
    workers: int = 0
    epochs: int = 3
    eval_every: int = 0
    lr: float | None = 1e-3


def model() -> bevfusion.Config:
    voxels = bevfusion.Voxels(lower=RANGE[:3], upper=RANGE[3:], size=(0.75, 0.75, 0.2), max_voxels=(1500, 1500))
    encoder = sparse_encoder.Config(
        channels=(8, 16), channels_out=8, blocks=1, paddings=((1, 1, 0),), capacities=(1500, 1200)
    )
    return bevfusion.Config(
        voxels=voxels, lidar=bevfusion.Lidar(encoder), camera=None, fused_channels=16,
        backbone=second.Config(
            channels_in=8 * sparse_encoder.output_grid(encoder, (64, 64, 41))[2], channels=(8, 16), layers=1
        ),
        neck=second_fpn.Config(channels_in=(8, 16), channels=(8, 8)),
        head=transfusion.Config(
            channels_in=16, channels=16, queries=10, heads=2, ffn_channels=16, head_channels=8, lower=RANGE[:2],
            voxel=(0.75, 0.75), stride=2, cells=(32, 32),
        ),
    )  # fmt: skip


def task(config: Config) -> tasks.Task:
    splits = source.open(config.data_root, config.version, config.train_split, config.eval_split)
    reading = Reading(points=Points(sweeps=1), range=RANGE, capacities=Capacities(points=12_000, boxes=64))
    augmented = replace(reading, points=Points(sweeps=1, shuffle=True), augmentation=augment.Global())
    bound = {"config": model(), "policy": Policy.of(config.precision)}
    return tasks.Task(
        title="tiny",
        data=tasks.Data(
            splits.training, np.arange(len(splits.training)), lambda epoch: augmented, splits.evaluation, reading
        ),
        needs=bevfusion.needs(bound["config"]),
        init=partial(bevfusion.init, bound["config"], config.seed),
        loss=partial(bevfusion.loss, **bound),
        predict=partial(bevfusion.predict, **bound),
        optimizer=lambda plan: optim.Config(
            lr=optim.Schedule(tasks.scaled_lr(config, plan), (optim.Phase(plan.total_steps, 1e-6),))
        ),
        tables=partial(bevfusion.with_tables, config=model()) if "BEVFN_TINY_TABLES" in os.environ else None,
    )


DEFAULTS = {"": {"nuscenes": Config()}}

if __name__ == "__main__":
    if "BEVFN_TINY_BARE" in os.environ:  # as conftest.bare, in a process of its own
        page.write = lambda *_, **__: None
    run.cli(DEFAULTS, task, __doc__)
