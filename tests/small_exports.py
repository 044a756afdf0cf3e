"""What tests of exported files share: a run's mini LiDAR-only model and its frame, flows of functions, the command."""

import sys
from pathlib import Path

import pytest
import small_runs
import torch

from bevfn import cli
from bevfn.ascend.trace import trace
from bevfn.data import inputs, scene
from bevfn.data.batch import collate
from bevfn.export import flow
from bevfn.synth import key_frame

LIDAR = "bevfusion-lidar"
SMALL = {"sweeps": 1, "point_capacity": 40_000, "voxel_capacity": 20_000, "site_capacity": (20_000, 15_000, 9_000)}


def flow_of(step, *given: torch.Tensor, table, bits: bool = False) -> flow.Flow:
    """The flow of a function of tensors that returns some."""
    traced = trace(
        lambda *x: {f"outputs.{i}": value for i, value in enumerate(step(*x))},
        given,
        decompositions=table,
        takes=tuple("abcdefgh"[: len(given)]),
    )
    flow.simplified(traced.module, bits=bits)
    names = [value.name for value in traced.inputs]
    return flow.Flow(traced.module, dict(zip(names, given)), tuple(v.name for v in traced.outputs), ())


def write_run(folder: Path) -> Path:
    """A run's folder."""
    return small_runs.write(folder, LIDAR, **SMALL).parent.parent


def write_frame(folder: Path) -> Path:
    """A key frame with small images."""
    return key_frame.write_frame(folder, image_size=(90, 160))


def shown(detector, frame: Path):
    """(the detector as it reads the frame, the batch)."""
    index = inputs.read(frame)
    made = detector.at(frame)
    reading = made.ready(index)
    return made, collate([scene.load(index, 0, reading)], capacities=reading.capacities)[0]


def export(monkeypatch, *arguments) -> int:
    """`bevfn export ...`: its exit code."""
    monkeypatch.setattr(sys, "argv", ["bevfn", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def refused(monkeypatch, capsys, says: str, *arguments) -> None:
    """The command ends with 2 and one line that says so."""
    assert export(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1, said
