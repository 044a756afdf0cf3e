"""`bevfn data synth|check|prepare`: a data set to try things on; what is wrong with one; what is made of one before."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from tyro.conf import Positional

from bevfn import catalogue, waiting
from bevfn.choices import ModelName
from bevfn.data.index import Index
from bevfn.files import check_json, write_atomically


def synth(
    out: Positional[Path],
    *,
    scenes: int = 10,
    seed: int = 0,
    frames: int = 20,
    image_size: tuple[int, int] = (900, 1600),
    format: Literal["nuscenes", "t4"] = "nuscenes",
    workers: int = 0,
) -> None:
    """Writes a synthetic data set in nuScenes' format, which nuscenes-devkit loads and scores, or in T4's.

    Args:
        out: folder of the data set
        scenes: how many; every fourth, beginning with the second, is of the split val, the others of train
        seed: the same seed writes the same bytes
        frames: key frames of a scene, 0.5 s apart, in T4's format 0.1 s
        image_size: height and width in pixels
        format: nuscenes; or t4: a folder a scene, clouds in base_link, and a list of scenes beside them
        workers: processes; 0: one for each processor
    """
    from bevfn import synth

    path = synth.write(
        out,
        scenes=scenes,
        seed=seed,
        frames_per_scene=frames,
        image_size=image_size,
        format=format,
        workers=workers or None,
    )
    print(f"{path}: {scenes} scenes of {frames} key frames")


def check(
    root: Positional[Path],
    *,
    version: str | None = None,
    split: str | None = None,
    train_split: str | None = None,
    eval_split: str | None = None,
    deep: bool = False,
    workers: int = 0,
    show: int = 20,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> int:
    """Says what of a nuScenes, T4 or own data set is there, missing or damaged, file by file, and what training does with odd
    values. Exit code 1 if something is missing, damaged, refused, left out or suspect.

    Args:
        root: the folder that holds samples/, sweeps/, maps/ and the version's tables, a T4 data set (docs/t4.md), or data of
            one's own (docs/custom_data.md)
        version: v1.0-trainval, v1.0-mini, ...; needed if the root has several. Of T4 scenes the revision, the highest without it
        split: train, val, ...; all that the root has without it
        train_split: the one that a run would train on, which may share no scene with
        eval_split: the one that it would be evaluated on; without either, the defaults are compared, and every two of splits.json
        deep: decode every file, instead of looking at sizes and ends, and look at the values of all scans instead of a few
        workers: threads; 0: twice the processors
        show: problems to print
        json_file: write all of them there
    """
    from bevfn.data import check, own_check, source, t4_check

    check_json(json_file)
    found = source.kind(root)
    if found == "mixed":
        raise ValueError(f"{root} is a mixture; check each of its data sets by itself")
    look = {"t4": t4_check.check, "own": own_check.check}.get(found, check.check)
    with waiting.told("looking at tables and values", waiting.aside):
        report = look(root, version, split, training=train_split, evaluation=eval_split, deep=deep, workers=workers)
    print(report.text(show))
    if json_file is not None:
        write_atomically(json_file, report.json())
    return 0 if report.good else 1


def prepare(
    root: Positional[Path],
    *,
    version: str | None = None,
    split: str | None = None,
    paste: bool = True,
    published_sweeps: bool = True,
    published_paste: bool = True,
    depth: bool = True,
    capacities: ModelName | None = None,
    sweeps: int | None = None,
    workers: int = 0,
) -> None:
    """Builds the index, the GT-paste database and the depth ground truth of a split, and counts what a model needs room for; a
    build that was stopped goes on.

    All of it lies where training looks for it: in the root, or, where that cannot be written, in `$BEVFN_CACHE`
    (~/.cache/bevfn).

    Args:
        root: the folder that holds samples/, sweeps/, maps/ and the version's tables, a T4 data set (docs/t4.md), or data of
            one's own (docs/custom_data.md)
        version: v1.0-trainval, v1.0-mini, ...; needed if the root has several. Of T4 scenes the revision, the highest without it
        split: one to train on, also of the version's splits.json or a T4 data set's lists; train or mini_train without it
        paste: build the GT-paste database, for bevfusion_lidar
        published_sweeps: with sweeps as the published recipe moves them, off by up to 0.6 m when the car turns; the recipe's
            flag of that name must say the same
        published_paste: with objects of no class (police cars, debris, bicycle racks) as barriers, as published; likewise
        depth: build the depth ground truth, for BEVDepth and MatrixVT (270 kB a key frame, 3 % of a sample's time); where
            there is none, training makes it of the LiDAR files, with the same numbers
        capacities: count the voxels and active sites of the samples of an epoch, as this model of BEVFusion's family is trained;
            --capacity-file takes the file
        sweeps: of the samples that are counted; by default the recipe's
        workers: processes; 0: one for each processor
    """
    from bevfn.data import depth as ground_truth
    from bevfn.data import paste as pasting
    from bevfn.data import source
    from bevfn.data.reading import CLASS_NAMES

    workers = workers or os.cpu_count() or 1
    with waiting.told("reading the data set"):
        index = source.training(root, version, split, workers=workers)
    print(f"{len(index):,} key frames of {index.version} {index.split}")
    if paste:
        folder = pasting.folder(index)
        making = pasting.Making(published_sweeps, published_paste)
        names = CLASS_NAMES if set(CLASS_NAMES) <= set(index.class_names) else index.class_names
        with waiting.told("GT-paste database"):
            database = pasting.build(index, folder, class_names=names, making=making, workers=workers)
        print(f"{folder}: {len(database):,} objects ({making})")
    if depth:
        with waiting.told("depth ground truth"):
            files = ground_truth.build(index, ground_truth.folder(index), workers=workers)
        print(f"{files}: depth ground truth of {sum(len(frame.cameras) for frame in index):,} images")
    if capacities is not None:
        print(_count(index, capacities, sweeps, workers))


def _count(index: Index, model: str, sweeps: int | None, workers: int) -> str:
    """Counts what the samples of a split need, and writes the file; what to say of it."""
    from bevfn import recipes
    from bevfn.data import source
    from bevfn.models import bevfusion
    from bevfn.models import capacities as counting
    from bevfn.training import command_line

    experiment = catalogue.MODELS[model].experiment
    config: Any = command_line.fitting_root(recipes.defaults(experiment, model), index.root)
    refusal = ValueError(f"--capacities is of BEVFusion's detectors with a LiDAR, {model} has no voxels; leave it out")
    if not hasattr(config, "capacity_file"):
        raise refusal
    config = replace(config, data_root=index.root, **({} if sweeps is None else {"sweeps": sweeps}))
    task = recipes.load(experiment).task(config, source.Source(index, index))
    network, data = task.network, task.data
    if not isinstance(network, bevfusion.Config) or network.lidar is None:
        raise refusal
    places = np.unique(data.items)
    with waiting.batches(f"counting for {model}", len(places)) as progress:
        measured = counting.measure(
            *(index, places, data.reading(0), network),
            database=data.database,
            workers=min(workers, len(places)),
            progress=progress,
        )
    file = counting.folder(index) / f"{model}_{measured.sweeps}.json"
    counting.write(file, measured)
    voxels, sites = measured.rooms(config.headroom)
    now = (network.voxels.max_voxels[0], *network.lidar.encoder.capacities)
    rows = zip(
        ("voxels", *(f"sites {i + 1}" for i in range(len(sites)))),
        (measured.voxels, *measured.sites),
        (voxels, *sites),
        now,
    )
    lines = [f"{file}: {measured.samples:,} samples with {measured.sweeps} sweeps need room for"]
    lines += [
        f"  {name:<8} {most:>9,}, with headroom {room:>9,}; the recipe has {had:>9,}" for name, most, room, had in rows
    ]
    return "\n".join([*lines, f"use it: --capacity-file {file}"])
