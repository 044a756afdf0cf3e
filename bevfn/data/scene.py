"""From a key frame of an Index to a Sample: every part that a Reading asks for, augmented in the published order.

Random numbers are drawn in the order images, sweeps, pasted objects, base frame, order of the points.

Source: mmdetection3d projects/BEVFusion, both configs (fact sheet bevfusion_lidar_cam, part B); BEVDepth (fact sheet
bevdepth_r50_2key); BEVNeXt (fact sheets bevnext_stage1, recipe_bevnext_awml). One difference: a frame whose boxes are all
filtered away is a sample without boxes unless `Reading.redraw` says so, where mmdetection3d always draws another one.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bevfn.data import annotations, augment, cameras, depth, points
from bevfn.data import paste as pasting
from bevfn.data import sweeps as aggregation
from bevfn.data.batch import Base, Sample
from bevfn.data.index import Frame, Index
from bevfn.data.reading import Cameras, Points, Reading
from bevfn.names import printable

REDRAWS = 20  # key frames without boxes, one drawn for the other


def load(
    index: Index,
    place: int,
    reading: Reading,
    generator: np.random.Generator | None = None,
    *,
    database: pasting.Database | None = None,
) -> Sample:
    """The key frame at `place` of the index. Column 4 of the points is the time lag [s], 0 for the key frame's own.

    Where an earlier key frame is missing (a scene's start, or not in the index), the current one stands in its place; of
    `Cameras.history` "time" see there. With `Reading.redraw` another key frame, drawn of all, takes the place of one without
    boxes, and is counted (`empty/redrawn`).
    generator: the sample's random numbers, needed where the reading has anything random (`sampling.generator`).
    database: needed for `reading.paste`.

    Raises ValueError, one sentence naming the file, for anything missing, truncated or of another size; and where REDRAWS
    key frames have no boxes.
    """
    if generator is None and reading.random:
        raise ValueError("a random augmentation needs a generator; give `sampling.generator(seed, epoch, position)`.")
    rng = generator if generator is not None else np.random.default_rng(0)  # of which nothing is drawn
    if not reading.redraw:
        return _load(index, place, reading, rng, database)
    for redrawn in range(REDRAWS):
        sample = _load(index, place, reading, rng, database)
        if sample.boxes is not None and len(sample.boxes):
            return replace(sample, counts=sample.counts | {"empty/redrawn": redrawn})
        place = int(rng.integers(len(index)))
    raise ValueError(
        f"{index.root}: {REDRAWS} key frames in a row, drawn of {len(index):,}, have no annotated box of "
        f"{', '.join(reading.class_names)} in range to learn from; check the annotations, or train with --no-redraw"
    )


def _load(
    index: Index, place: int, reading: Reading, rng: np.random.Generator, database: pasting.Database | None
) -> Sample:
    """`load` without drawing another key frame."""
    frame = index[place]
    parts, counts = ({}, {}) if reading.cameras is None else _seen(index, place, reading, reading.cameras, rng)
    cloud: np.ndarray | None = None
    if reading.points is not None:
        cloud, counts["bad/points"] = _scanned(frame, index.root, reading.points, rng)
        counts["bad/intensities"] = int(points.dim(cloud))
    boxes, labels = annotations.boxes(frame, reading.base, reading.channels, reading.class_names)
    if reading.paste is not None:
        assert cloud is not None
        cloud, boxes, labels = _pasted(database, cloud, boxes, labels, reading, rng)
    base_aug = np.eye(4, dtype=np.float32)
    if reading.augmentation is not None:
        base_aug = augment.draw_matrix(reading.augmentation, rng)
    # Boxes in ego have their angles from this, drawn or not; those in the LiDAR's frame keep what the data set says.
    if reading.augmentation is not None or reading.base is not Base.LIDAR:
        boxes = augment.move_boxes(boxes, base_aug)
    boxes, labels = annotations.in_range(boxes, labels, reading.range, reading.class_reach)
    counts["empty/boxes"] = int(len(boxes) == 0 and len(reading.class_names) > 0)  # of no class: none is asked for
    if cloud is not None:
        parts["points"] = cloud = _filtered(cloud, base_aug, reading, rng)
        counts["empty/points"] = int(len(cloud) == 0)
    return Sample(
        base=reading.base,
        base_aug=base_aug,
        boxes=boxes,
        labels=labels,
        token=frame.token,
        class_names=reading.class_names,
        counts=counts,
        **parts,
    )


def files(index: Index, place: int, reading: Reading) -> list[str]:
    """What `load` may read of the key frame at `place`: paths relative to the root. Raises ValueError for a camera that the
    data set has not at it."""
    frame, found = index[place], []
    if reading.points is not None or (reading.depth and depth.stored(index, reading.depths) is None):
        found.append(frame.lidar_path)
    if reading.points is not None:
        found += [sweep.path for sweep in frame.sweeps[: reading.points.oldest]]
    if reading.cameras is not None:
        for one in cameras.key_frames(index, place, reading.cameras.frames, reading.cameras.history):
            found += [camera.path for camera in one.rig(reading.cameras.channels)]
    return found


def whole(index: Index, places: np.ndarray, reading: Reading) -> tuple[np.ndarray, list[str]]:
    """(those of the `places` [n] whose files are all there, a sentence about each other one). Files are not opened."""
    folders: dict[str, frozenset[str]] = {}

    def is_there(path: str) -> bool:
        folder, _, name = path.rpartition("/")
        if folder not in folders:  # one listing for thousands of files
            there = index.root / folder
            folders[folder] = frozenset(os.listdir(there)) if there.is_dir() else frozenset()
        return name in folders[folder]

    kept, sentences = [], []
    for place in np.unique(places):
        try:
            missing = [path for path in files(index, int(place), reading) if not is_there(path)]
            what = f"key frame {printable(index[int(place)].token)} has no {printable(missing[0])}" if missing else ""
        except ValueError as error:
            what = str(error)
        if what:
            sentences.append(what)
        else:
            kept.append(place)
    return places[np.isin(places, kept)], sentences


def _seen(
    index: Index, place: int, reading: Reading, config: Cameras, rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, int]]:
    """The Sample's fields of cameras and depth, and counts about them."""
    root, frames = index.root, cameras.key_frames(index, place, config.frames, config.history)
    row = frames[0].rig(config.channels)
    moves = cameras.moves(row, root, config, rng)
    parts = cameras.read(frames, root, reading, moves)
    counts = {"missing/frames": len(frames) - len({frame.token for frame in frames})}
    if reading.depth:
        sizes = [cameras.image_size(camera, root) for camera in row]
        parts["depth"], found = depth.maps(index, frames[0], row, sizes, config.image_size, moves, reading.depths)
        counts |= found
    return parts, counts


def _scanned(frame: Frame, root: Path, config: Points, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """(points of the key frame and its sweeps, number of bad ones)."""
    return aggregation.aggregate(
        frame,
        root,
        count=config.sweeps,
        choice=config.sweep_choice,
        pool=config.sweep_pool,
        pad_empty=config.pad_empty_sweeps,
        published=config.published_sweeps,
        generator=rng,
    )


def _pasted(
    database: pasting.Database | None,
    cloud: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    reading: Reading,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(points, boxes, labels) with objects of the database behind the frame's own."""
    if database is None:
        raise ValueError("GT paste needs a database; build one with `bevfn data prepare`, or set paste to None.")
    assert reading.paste is not None and reading.points is not None
    new_boxes, new_labels, new = pasting.sample(
        database, boxes, labels, reading.class_names, reading.paste, rng, sweeps=reading.points.oldest
    )
    cloud = pasting.insert(cloud, new_boxes, new)
    return cloud, np.concatenate([boxes, new_boxes]), np.concatenate([labels, new_labels])


def _filtered(cloud: np.ndarray, base_aug: np.ndarray, reading: Reading, rng: np.random.Generator) -> np.ndarray:
    """The points where base_aug puts them, those in range, in random order if the reading says so."""
    assert reading.points is not None
    if reading.augmentation is not None:
        cloud = augment.move_points(cloud, base_aug)
    if reading.range is not None:
        cloud = cloud[points.in_range(cloud, reading.range)]
    return cloud.take(rng.permutation(len(cloud)), axis=0) if reading.points.shuffle else cloud
