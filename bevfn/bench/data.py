"""How fast one core reads training samples at the published size, and where its time goes.

A real key frame (or a generated one) stands for the data set: six 1600 x 900 JPEGs, and its point file read ten times
as key frame and nine of ten sweeps. Its files come from memory, so a disk's share is not in the figures. Times of one
core are CPU time of one process with one thread, which a busy machine does not stretch; the loader's rate is wall time.
    bevfn bench data --frame FRAME_FOLDER
    bevfn bench data --t4                       # T4's large clouds instead, against reading their bytes
"""

import cProfile
import dataclasses
import os
import pstats
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bevfn import synth, tree
from bevfn.data import augment, image, infos, loader, paste, points, sampling, scene, sweeps
from bevfn.data import t4 as t4_data
from bevfn.data.batch import collate, needed
from bevfn.data.index import Index, Sweep
from bevfn.data.reading import CLASS_NAMES, Reading
from bevfn.experiments import awml, bevfusion, bevfusion_lidar
from bevfn.models import bevfusion as detectors
from bevfn.synth import key_frame

TARGET = 4.1  # samples/s per device: BEVFusion LiDAR-camera, FP16, on 8 NPUs as published (32.8 samples/s)
WORKERS = 8
READINGS = {"lidar-camera": bevfusion.TRAIN, "lidar": bevfusion_lidar.TRAIN}
NETWORKS = {"lidar-camera": detectors.lidar_camera, "lidar": detectors.lidar_only}
SWEEPS = 10  # in the frame's info, of which 9 are drawn
T4_POINTS = 160_000  # of one cloud of several LiDARs, where AWML's deployment has room for 200,000
T4_CLOUDS = 12  # files, read one after the other: more than a cache of the processor holds
# Autoware's points with a header.
PCD = np.dtype([(name, "<f4") for name in "xyz"] + [("intensity", "u1"), ("return_type", "u1"), ("channel", "<u2")])


def data(*, frame: Path | None = None, samples: int = 30) -> dict:
    """Figures of both of BEVFusion's published ways of reading for training; prints a table of each.

    frame: folder with frame.json, six images and a point file; None: a generated frame.
    Returns per reading: samples_per_second (one core, loading and collating), milliseconds per sample in all and by
    part, points per sample; samples_per_second_of_workers (WORKERS times that) and whether it is feeds_target;
    tables_milliseconds and tables_megabytes, what a sample costs more with --host-tables (published capacities); and what
    the loader itself reaches with as many workers as this machine has cores, up to WORKERS.
    """
    torch.set_num_threads(1)
    figures: dict[str, Any] = {
        "frame": str(frame or "generated"),
        "workers": WORKERS,
        "target_samples_per_second": TARGET,
    }
    with tempfile.TemporaryDirectory(prefix="bevfn-bench-") as folder:
        index, database = _one_frame(frame, Path(folder))
        for name, config in READINGS.items():
            figures[name] = _measure(index, config, database, samples)
            figures[name] |= _tables(index, config, database, samples, NETWORKS[name]())
            _print(name, figures[name])
            made = figures[name]
            print(
                f"  with --host-tables {made['tables_milliseconds']:.0f} ms a sample more ({samples} of them), "
                f"{made['tables_megabytes']:.0f} MB a sample to the device"
            )
    return figures


def sample_seconds(reading: str, samples: int) -> np.ndarray:
    """[samples] CPU seconds of one core for each of so many training samples of a generated key frame; reading: of READINGS."""
    torch.set_num_threads(1)
    config = READINGS[reading]
    seconds = np.zeros(samples)
    with tempfile.TemporaryDirectory(prefix="bevfn-bench-") as folder:
        index, database = _one_frame(None, Path(folder))
        load = partial(scene.load, index, reading=config, database=database)
        load(0, generator=sampling.generator(0, 0, 0))  # warm
        for position in range(samples):
            started = time.process_time()
            collate([load(0, generator=sampling.generator(0, 0, position))], capacities=config.capacities)
            seconds[position] = time.process_time() - started
    return seconds


def _one_frame(frame: Path | None, folder: Path) -> tuple[Index, paste.Database]:
    """A key frame with ten sweeps, generated for None, and a database of its objects."""
    index = _with_sweeps(infos.read((frame or key_frame.write_frame(folder / "frame")) / "frame.json"))
    return index, paste.build(index, folder / "paste", class_names=CLASS_NAMES, progress=False)


def t4(*, root: Path | None = None, samples: int = 30) -> dict:
    """Figures of reading T4's clouds; prints them.

    root: a T4 data set, of whose clouds the first are taken; None: those of the synthetic world, with more points.
    Returns per form of file (as it is there, and with Autoware's header) its bytes and points, clouds, points and megabytes a
    second and core, and as a share of reading the same bytes into memory that is there, in the same run; and of AWML's LiDAR model
    samples_per_second and the others as `data`: two clouds a sample.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bevfn-bench-") as folder:
        index = t4_data.index(root or _dense_world(Path(folder) / "world"))
        places = range(min(len(index), T4_CLOUDS))
        files = [index.root / index[place].lidar_path for place in places]
        headed = [_with_header(file, Path(folder) / f"{i}.pcd") for i, file in enumerate(files)]
        figures: dict[str, Any] = {"clouds": str(root or "generated"), "files": len(files)}
        figures |= {"".join(some[0].suffixes[-2:]): _against_bytes(some, samples) for some in (files, headed)}
        reading = dataclasses.replace(awml.TRAIN, cameras=None)
        swept = next((place for place in places if len(index[place].sweeps) > 1), len(index) - 1)
        figures["awml-lidar"] = _measure(index.select([swept]), reading, None, samples)
    for name in ("samples_per_second_of_workers", "feeds_target"):  # nothing is published to compare with
        del figures["awml-lidar"][name]
    for form in (name for name, value in figures.items() if name.startswith(".") and isinstance(value, dict)):
        told = figures[form]
        print(
            f"{form}: {told['clouds_per_second']:.0f} clouds/s per core of {told['points']:,d} points, "
            f"{told['megabytes_per_second']:.0f} MB/s, {100 * told['of_reading_bytes']:.0f} % of reading the bytes alone"
        )
    print(f"awml-lidar: {figures['awml-lidar']['samples_per_second']:.1f} samples/s per core, two clouds each")
    return figures


def _dense_world(root: Path) -> Path:
    """A synthetic T4 scene whose points are there several times, a centimetre apart."""
    synth.write(
        root, scenes=1, frames_per_scene=T4_CLOUDS, image_size=(90, 160), format="t4", workers=1, progress=False
    )
    random = np.random.default_rng(0)
    for file in sorted(root.glob("**/data/LIDAR_CONCAT/*.bin")):
        cloud = points.read(file)[0]
        dense = np.resize(cloud, (T4_POINTS, cloud.shape[1]))
        dense[:, :3] += random.normal(0.0, 0.01, (T4_POINTS, 3)).astype(np.float32)
        dense.tofile(file)
    return root


def _with_header(file: Path, made: Path) -> Path:
    """The same cloud as a binary .pcd of Autoware's points."""
    cloud, _ = points.read(file)
    rows = np.zeros(len(cloud), PCD)
    for i, name in enumerate(("x", "y", "z", "intensity", "channel")):
        rows[name] = np.maximum(cloud[:, i], 0) if i > 2 else cloud[:, i]
    kinds = {"f": "F", "u": "U"}
    sizes = [PCD[name].itemsize for name in PCD.names or ()]
    head = {
        "FIELDS": " ".join(PCD.names or ()),
        "SIZE": " ".join(map(str, sizes)),
        "TYPE": " ".join(kinds[PCD[name].kind] for name in PCD.names or ()),
        "COUNT": " ".join("1" for _ in sizes),
        "WIDTH": len(cloud),
        "HEIGHT": 1,
        "POINTS": len(cloud),
        "DATA": "binary",
    }
    made.write_bytes("".join(f"{key} {value}\n" for key, value in head.items()).encode() + rows.tobytes())
    return made


def _against_bytes(files: list[Path], samples: int) -> dict[str, float]:
    """Reading clouds, and only the bytes of their files, one after the other, `samples` of each."""
    size = max(file.stat().st_size for file in files)
    buffer = memoryview(bytearray(size))

    def spent(read: Callable[[Path], object]) -> float:
        for file in files:
            read(file)  # from the disk, once
        started = time.process_time()
        for i in range(samples):
            read(files[i % len(files)])
        return (time.process_time() - started) / samples

    def plain(file: Path) -> None:
        with open(file, "rb", buffering=0) as opened:
            opened.readinto(buffer)

    count = len(points.read(files[0])[0])
    seconds, limit = spent(points.read), spent(plain)
    return {
        "points": count,
        "bytes": size,
        "milliseconds": 1e3 * seconds,
        "clouds_per_second": 1 / seconds,
        "points_per_second": count / seconds,
        "megabytes_per_second": size / seconds / 1e6,
        "milliseconds_of_bytes": 1e3 * limit,
        "of_reading_bytes": limit / seconds,
    }


def world(*, scenes: int = 10, **options: Any) -> dict:
    """Seconds and megabytes of a synthetic world as `bevfn data synth` writes it, with a process per core.

    options: of `synth.write`.
    """
    with tempfile.TemporaryDirectory(prefix="bevfn-bench-", dir=".") as folder:
        started = time.perf_counter()
        root = synth.write(Path(folder) / "world", scenes=scenes, seed=0, **options)
        seconds = time.perf_counter() - started
        sizes = {path: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    kinds = {"images": (".jpg",), "scans": (".bin",), "tables": (".json",)}
    of_kind = {k: sum(n for path, n in sizes.items() if path.suffix in ends) for k, ends in kinds.items()}
    return {
        "scenes": scenes,
        "seconds": seconds,
        "goal_seconds": 18.0 * scenes,  # ten scenes in three minutes on two cores
        "megabytes": sum(sizes.values()) / 1e6,
        **{f"megabytes of {kind}": size / 1e6 for kind, size in of_kind.items()},
        "files": len(sizes),
    }


def _with_sweeps(index: Index) -> Index:
    frame = index[0]
    earlier = [Sweep(frame.lidar_path, _backwards(0.3 * k), 0.05 * k) for k in range(1, SWEEPS + 1)]
    return dataclasses.replace(index, frames=(dataclasses.replace(frame, sweeps=tuple(earlier)),))


def _backwards(metres: float) -> np.ndarray:
    result = np.eye(4)
    result[1, 3] = -metres
    return result


def _measure(index: Index, config: Reading, database: paste.Database | None, samples: int) -> dict:
    load = partial(scene.load, index, reading=config, database=database)
    made = load(0, generator=sampling.generator(0, 0, 0))  # warm
    started = time.process_time()
    for position in range(samples):
        collate([load(0, generator=sampling.generator(0, 0, position))], capacities=config.capacities)
    seconds = (time.process_time() - started) / samples
    profile = cProfile.Profile(time.process_time)
    for position in range(samples):
        profile.runcall(load, 0, generator=sampling.generator(0, 0, position))
        profile.runcall(collate, [made], capacities=config.capacities)
    parts = {part: 1e3 * spent / samples for part, spent in _parts(pstats.Stats(profile)).items()}
    return {
        "samples_per_second": 1 / seconds,
        "milliseconds": 1e3 * seconds,
        "points": len(needed(made.points, "points")),
        "parts_milliseconds": parts,
        "samples_per_second_of_workers": WORKERS / seconds,
        "feeds_target": WORKERS / seconds >= TARGET,
        **_through_loader(load, config, min(WORKERS, os.cpu_count() or 1), samples),
    }


def _tables(
    index: Index, config: Reading, database: paste.Database, samples: int, network: detectors.Config
) -> dict[str, float]:
    """What the tables of a sample cost that workers make with --host-tables, by the published capacities."""
    load = partial(scene.load, index, reading=config, database=database)
    seconds, size = 0.0, 0
    for position in range(samples + 1):
        sample = load(0, generator=sampling.generator(0, 0, position))
        batch, _ = collate([sample], capacities=config.capacities)
        started = time.process_time()
        made = detectors.with_tables(batch, config=network, train=True).tables
        if position:  # the first one warms
            seconds += time.process_time() - started
        size = sum(leaf.nbytes for leaf in tree.leaves(made))
    return {"tables_milliseconds": 1e3 * seconds / samples, "tables_megabytes": size / 1e6}


def _through_loader(load: loader.Load, config: Reading, workers: int, samples: int) -> dict[str, float]:
    """Wall-clock rate of `loader.batches` that nobody keeps waiting, and the CPU time a sample costs in all processes."""
    settings = loader.Config(batch_size=1, workers=workers)
    skipped = 2 * workers * settings.prefetch  # what was read ahead while the workers started
    order = np.zeros(workers * samples + skipped, dtype=np.int64)
    used, started = _cpu_seconds(), time.perf_counter()
    for step, _ in enumerate(loader.batches(load, order, settings, seed=0, epoch=0, capacities=config.capacities)):
        if step == skipped - 1:
            started = time.perf_counter()
    return {
        "loader_workers": workers,
        "loader_samples_per_second": (len(order) - skipped) / (time.perf_counter() - started),
        "loader_cpu_milliseconds": 1e3 * (_cpu_seconds() - used) / len(order),
    }


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _parts(stats: Any) -> dict[str, float]:
    """Seconds of the named parts, none counted twice; "filter, shuffle, rest" is what is left of `load`."""

    def spent(*functions: Callable) -> float:
        total = 0.0
        for function in functions:
            code = function.__code__
            key = (code.co_filename, code.co_firstlineno, code.co_name)
            total += stats.stats[key][3] if key in stats.stats else 0.0  # cumulative
        return total

    resize = spent(Image.Image.resize)
    reading = spent(points.read)
    parts = {
        "decode JPEG": spent(image.read),
        "resize": resize,
        "crop, flip, rotate": spent(image.transform) - resize,
        "read points": reading,
        "move sweeps": spent(sweeps.aggregate) - reading,
        "paste": spent(paste.sample, paste.insert),
        "augment points, boxes": spent(augment.draw_matrix, augment.move_points, augment.move_boxes),
    }
    parts["filter, shuffle, rest"] = spent(scene.load) - sum(parts.values())
    parts["collate"] = spent(collate)
    return parts


def _print(name: str, figures: dict) -> None:
    print(
        f"{name}: {figures['samples_per_second']:.1f} samples/s per core ({figures['milliseconds']:.0f} ms, "
        f"{figures['points']:,d} points); {WORKERS} workers on {WORKERS} cores "
        f"{figures['samples_per_second_of_workers']:.0f} samples/s, {TARGET} needed: "
        f"{'enough' if figures['feeds_target'] else 'NOT enough'}; the loader with {figures['loader_workers']} workers "
        f"here {figures['loader_samples_per_second']:.1f} samples/s of wall time, {figures['loader_cpu_milliseconds']:.0f} "
        "ms of CPU time each"
    )
    for part, milliseconds in figures["parts_milliseconds"].items():
        print(f"  {part:<24} {milliseconds:7.1f} ms  {100 * milliseconds / figures['milliseconds']:3.0f} %")
