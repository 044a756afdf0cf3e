"""Capacities by what a data set needs: the counts, the file, and what it is refused for."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import small_world
import tiny_experiment as tiny
import torch

from bevfn import cli
from bevfn.data import scene
from bevfn.data.batch import Capacities, collate
from bevfn.data.reading import Points, Reading
from bevfn.experiments import bevfusion, bevfusion_lidar
from bevfn.models import bevfusion as family
from bevfn.models import capacities

READING = Reading(points=Points(sweeps=1), range=tiny.RANGE, capacities=Capacities(points=12_000, boxes=64))


@pytest.fixture(scope="module")
def measured():
    index = small_world.index()
    return capacities.measure(index, np.arange(len(index)), READING, tiny.model())


def test_counts_are_those_of_a_model_with_room_for_all(measured):
    index, model = small_world.index(), tiny.model()
    roomy = family.with_capacities(model, (12_000, 12_000), (24_000, 24_000))
    most = np.zeros(3, dtype=np.int64)
    for place in range(len(index)):
        batch, _ = collate([scene.load(index, place, READING)], capacities=READING.capacities)
        tables = family.with_tables(batch, config=roomy, train=True).tables
        found = [tables.voxels["found"][0], *(way["found"] for way in tables.neighbours.strided)]
        most = np.maximum(most, [int(n) for n in found])
        assert list(capacities.counts(batch.points, batch.points_valid, model)) == [int(n) for n in found]
    assert (measured.voxels, *measured.sites) == tuple(most) and measured.voxels > 1000
    assert (measured.samples, measured.sweeps) == (len(index), 1)
    nothing = list(capacities.counts(torch.zeros(1, 0, 5), torch.zeros(1, 0, dtype=torch.bool), model))
    assert nothing == [0, 0, 0]


def test_rooms_have_the_headroom_in_whole_steps(measured):
    some = replace(measured, voxels=1000, sites=(0, 256, 257))
    assert some.rooms(0.0) == (1024, (256, 256, 512))
    assert some.rooms(0.5) == (1536, (256, 512, 512))


def test_a_file_is_read_as_it_was_written_and_refused_for_other_data_and_voxels(measured, tmp_path):
    index, grid, path = small_world.index(), tiny.model().voxels, tmp_path / "x" / "capacities.json"
    capacities.write(path, measured)
    assert capacities.read(path, index, grid, 1) == measured
    for other, sentence in (
        (
            replace(grid, size=(0.5, 0.5, 0.2)),
            r"is of voxels of .* m \(0.75, 0.75, 0.2\), the run has \(0.5, 0.5, 0.2\)",
        ),
        (replace(grid, upper=(24.0, 24.0, 4.0)), r"a range to .* \(24.0, 24.0, 3.0\), the run has \(24.0, 24.0, 4.0\)"),
    ):
        with pytest.raises(ValueError, match=sentence + ".*measure again with `bevfn data prepare"):
            capacities.read(path, index, other, 1)
    with pytest.raises(ValueError, match="is of this number of sweeps: 1, the run has 9; measure again"):
        capacities.read(path, index, grid, 9)
    with pytest.raises(ValueError, match=r"was made of other key frames .* make it again with `bevfn data prepare`"):
        capacities.read(path, index.select([0, 1]), grid, 1)
    content = json.loads(path.read_text())
    wrong = {"voxels": (-1, 10**30, 1.5), "sites": ([], [3, "x"]), "samples": ("x", 0), "format": (0,)}
    changed = (json.dumps({**content, name: value}) for name, values in wrong.items() for value in values)
    for broken in ("{", "[]", "{}", *changed):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"capacity file .* is damaged \(.*\); measure again"):
            capacities.read(path, index, grid, 1)
    with pytest.raises(ValueError, match=r"capacity file .* cannot be read \(No such file"):
        capacities.read(tmp_path / "none.json", index, grid, 1)


def test_prepare_counts_for_a_model_and_its_recipe_takes_the_numbers(monkeypatch, capsys):
    root = small_world.index().root
    words = ["bevfn", "data", "prepare", str(root), "--split", "val", "--no-paste", "--no-depth", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", [*words, "--capacities", "bevfusion-lidar-camera", "--sweeps", "1"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr().out
    assert not stop.value.code and "samples with 1 sweeps need room for" in printed
    file = capacities.folder(small_world.index()) / "bevfusion-lidar-camera_1.json"
    assert f"use it: --capacity-file {file}" in printed
    found = json.loads(file.read_text())
    default = bevfusion.DEFAULTS["bevfusion-lidar-camera"]["synthetic"]
    config = replace(
        default, data_root=root, train_split="val", eval_split="val", sweeps=1, capacity_file=file, headroom=0.5
    )
    made = config.completed()
    assert made.voxel_capacity == -(-int(found["voxels"] * 1.5) // 256) * 256
    assert made.site_capacity == tuple(-(-int(n * 1.5) // 256) * 256 for n in found["sites"])
    network = bevfusion.task(made).network
    assert network.voxels.max_voxels == (made.voxel_capacity,) * 2
    assert network.lidar.encoder.capacities == made.site_capacity
    assert made.completed() == made  # a run that is repeated or evaluated elsewhere has the numbers
    chosen = replace(config, voxel_capacity=77).completed()
    assert (chosen.voxel_capacity, chosen.site_capacity) == (77, made.site_capacity)
    with pytest.raises(ValueError, match="is of voxels of"):
        replace(config, scale="published").completed()
    more = file.with_name("more.json")
    more.write_text(json.dumps({**found, "sites": [*found["sites"], 5]}))
    with pytest.raises(ValueError, match=r"--site-capacity .* \(of .*more.json\) must be . numbers, one for each"):
        bevfusion.task(replace(config, capacity_file=more).completed())
    lidar = bevfusion_lidar.DEFAULTS["bevfusion-lidar"]["synthetic"]
    assert (
        replace(
            lidar,
            **{
                n: getattr(config, n)
                for n in ("data_root", "train_split", "eval_split", "sweeps", "headroom", "capacity_file")
            },
        )
        .completed()
        .site_capacity
        == made.site_capacity
    )
    monkeypatch.setattr(sys, "argv", [*words, "--capacities", "bevdepth-2key", "--sweeps", "1"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "bevdepth-2key has no voxels; leave it out" in capsys.readouterr().err
