"""`bevfn data synth|check|prepare`: a data set to try things on; what is wrong with one; what is made of one before."""

import os
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from bevfn.files import check_json, write_atomically


def synth(
    out: Positional[Path],
    *,
    scenes: int = 10,
    seed: int = 0,
    frames: int = 20,
    image_size: tuple[int, int] = (900, 1600),
    workers: int = 0,
) -> None:
    """Writes a synthetic data set in nuScenes' format, which nuscenes-devkit loads and scores.

    Args:
        out: folder of the data set
        scenes: how many; every fourth, beginning with the second, is of the split val, the others of train
        seed: the same seed writes the same bytes
        frames: key frames of a scene, 0.5 s apart
        image_size: height and width in pixels
        workers: processes; 0: one for each processor
    """
    from bevfn import synth

    path = synth.write(
        out, scenes=scenes, seed=seed, frames_per_scene=frames, image_size=image_size, workers=workers or None
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
    """Says what of a nuScenes data set is there, missing or damaged, file by file, and what training does with odd values.
    Exit code 1 if something is missing, damaged, refused or left out.

    Args:
        root: the folder that holds samples/, sweeps/, maps/ and the version's tables
        version: v1.0-trainval, v1.0-mini, ...; needed if the root has several
        split: train, val, ...; all that the root has without it
        train_split: the one that a run would train on, which may share no scene with
        eval_split: the one that it would be evaluated on; without either, the defaults are compared, and every two of splits.json
        deep: decode every file, instead of looking at sizes and ends
        workers: threads; 0: twice the processors
        show: problems to print
        json_file: write all of them there
    """
    from bevfn.data import check

    check_json(json_file)
    report = check.check(root, version, split, training=train_split, evaluation=eval_split, deep=deep, workers=workers)
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
    workers: int = 0,
) -> None:
    """Builds the index, the GT-paste database and the depth ground truth of a split; a build that was stopped goes on.

    All of it lies where training looks for it: in the root, or, where that cannot be written, in `$BEVFN_CACHE`
    (~/.cache/bevfn).

    Args:
        root: the folder that holds samples/, sweeps/, maps/ and the version's tables
        version: v1.0-trainval, v1.0-mini, ...; needed if the root has several
        split: one to train on, also of the version's splits.json; train or mini_train without it
        paste: build the GT-paste database, for bevfusion_lidar
        published_sweeps: with sweeps as the published recipe moves them, off by up to 0.6 m when the car turns; the recipe's
            flag of that name must say the same
        published_paste: with objects of no class (police cars, debris, bicycle racks) as barriers, as published; likewise
        depth: build the depth ground truth, for BEVDepth and MatrixVT (270 kB a key frame, 3 % of a sample's time); where
            there is none, training makes it of the LiDAR files, with the same numbers
        workers: processes; 0: one for each processor
    """
    from bevfn.data import depth as ground_truth
    from bevfn.data import nuscenes, tables
    from bevfn.data import paste as pasting
    from bevfn.data.reading import CLASS_NAMES

    workers = workers or os.cpu_count() or 1
    version = version or tables.only_version(root)
    tables.check_root(root, version)
    if split is None:
        split, _ = tables.default_splits(root, version) or ("train", "")
    index = nuscenes.index(root, version, split)
    print(f"{len(index):,} key frames of {version} {split}")
    if paste:
        folder = pasting.folder(index)
        making = pasting.Making(published_sweeps, published_paste)
        database = pasting.build(index, folder, class_names=CLASS_NAMES, making=making, workers=workers)
        print(f"{folder}: {len(database):,} objects ({making})")
    if depth:
        files = ground_truth.build(index, ground_truth.folder(index), workers=workers)
        print(f"{files}: depth ground truth of {sum(len(frame.cameras) for frame in index):,} images")
