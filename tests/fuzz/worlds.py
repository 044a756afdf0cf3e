"""Data sets: nuScenes' and T4's tables, mmdetection3d's info files, clouds and images, as `data check` and training read them."""

import io
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import small_root
import small_world
from PIL import Image

from bevfn import synth
from bevfn.commands import data
from bevfn.data import infos, nuscenes, paste, scene, source, t4_classes
from bevfn.data.batch import Capacities, collate
from bevfn.data.index import Index
from bevfn.data.reading import Cameras, Points, Reading
from bevfn.synth import key_frame
from fuzz import mutate
from fuzz.table import Row

TABLES = f"root/{small_root.VERSION}/*.json"
READING = Reading(
    points=Points(sweeps=3), cameras=Cameras(image_size=(8, 16)), capacities=Capacities(points=200, boxes=20)
)
FRAME = Reading(
    points=Points(sweeps=0), cameras=Cameras(image_size=(64, 176)), capacities=Capacities(points=60_000, boxes=64)
)
T4 = replace(
    READING, cameras=Cameras(image_size=(8, 16)), class_names=t4_classes.CLASSES, capacities=Capacities(9_000, 90)
)
T4_TABLES = "root/*/*/0/annotation/*.json"
CLOUD, CAMERA = "root/samples/LIDAR_TOP/*__4.pcd.bin", "root/samples/CAM_FRONT/*__4.jpg"
CACHES = (".bevfn",)


def rows() -> list[Row]:
    return [
        Row("tables, read", _root, TABLES, mutate.as_json, _read, 26, CACHES),
        Row("tables, checked", _root, TABLES, mutate.as_json, _check, 26, CACHES),
        Row("tables' numbers", _root, f"root/{small_root.VERSION}/[ces]*.json", _numbers, _read, 26, CACHES),
        Row("clouds", _root, CLOUD, _cloud, _read, 26, CACHES),
        Row("images", _root, CAMERA, _image, _read, 26, CACHES),
        Row("clouds and images, checked", _root, "root/samples/[CL]*/*__4.[jp][pc]*", _sensor, _check, 26, CACHES),
        Row("an info file in JSON", _frame, "frame.json", mutate.as_json, _read_frame, 26),
        Row("an info file, pickled", _pickled, "frame.pkl", _info, _read_pickled, 26),
        Row("T4's tables, checked", _t4, T4_TABLES, mutate.as_json, _check_t4, 13, CACHES),
        Row("T4's numbers", _t4, "root/*/*/0/annotation/[ces]*.json", _numbers, _check_t4, 13, CACHES),
        Row("T4's lists", _t4, "root/*.yaml", mutate.raw, _read_t4, 13, CACHES),
        Row("clouds with a header", _t4, "root/*/*/0/data/LIDAR_CONCAT/*.pcd", mutate.early, _check_t4, 13, CACHES),
        Row("what data prepare made", _prepared, "root/*bevfn*/**/*.*[nbs]*", mutate.raw, _read_prepared, 26, CACHES),
    ]


def _prepared(folder: Path) -> None:
    """Of a world whose LiDAR sees something."""
    shutil.copytree(small_world.index().root, folder / "root")
    data.prepare(folder / "root", split="train", workers=1)


def _read_prepared(folder: Path) -> None:
    index = nuscenes.index(folder / "root", "v1.0-trainval", "train")
    reading = replace(
        READING,
        cameras=Cameras(image_size=(32, 88)),
        depth=True,
        paste=paste.Config(),
        capacities=Capacities(60_000, 200),
    )
    database = paste.read(paste.folder(index), min_points=1)
    for place in range(len(index)):
        for seed in range(3):
            sample = scene.load(index, place, reading, np.random.default_rng(seed), database=database)
            assert np.isfinite(sample.depth).all() and (sample.depth >= 0).all() and (sample.depth <= 2000).all()
            assert np.isfinite(sample.points).all() and (np.abs(sample.points[:, :3]) < 2e4).all()
            assert (sample.boxes[:, 3:6] > 0).all() and np.isfinite(sample.boxes[:, :7]).all()


def _root(folder: Path) -> None:
    small_root.write(folder / "root")


def _t4(folder: Path) -> None:
    """A world whose first scene has clouds with a header."""
    synth.write(
        folder / "root",
        scenes=2,
        frames_per_scene=2,
        image_size=(32, 48),
        azimuths=90,
        format="t4",
        workers=1,
        progress=False,
    )
    home = sorted(folder.glob("root/*/*/0"))[0]
    for path in home.glob("data/LIDAR_CONCAT/*.bin"):
        head = f"FIELDS x y z intensity ring\nSIZE 4 4 4 4 4\nTYPE F F F F F\nPOINTS {path.stat().st_size // 20}\nDATA binary\n"
        path.with_name(path.name.removesuffix(".bin")).write_bytes(head.encode() + path.read_bytes())
        path.unlink()
    table = home / "annotation/sample_data.json"
    table.write_text(table.read_text().replace(".pcd.bin", ".pcd"))


def _frame(folder: Path) -> None:
    key_frame.write_frame(folder, seed=1, image_size=(90, 160))


def _pickled(folder: Path) -> None:
    _frame(folder)
    document = json.loads((folder / "frame.json").read_text())
    (folder / "frame.json").unlink()
    for instance in document["data_list"][0]["instances"]:
        instance["bbox_3d"] = np.array(instance["bbox_3d"])
    (folder / "frame.pkl").write_bytes(pickle.dumps(document))


# ---------------------------------------------------------------------------------------------------------- mutations


def _numbers(content: bytes, draw: Random) -> bytes:
    """One number of a table by another, as a damaged or differently measured one."""
    document = json.loads(content)
    places = []

    def walk(node: object) -> None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in pairs:
            if isinstance(value, int | float) and not isinstance(value, bool):
                places.append((node, key))
            walk(value)

    walk(document)
    if places:
        holder, key = draw.choice(places)
        right = holder[key]
        holder[key] = draw.choice(
            (
                mutate.NAN,
                mutate.INFINITE,
                0,
                -1,
                -right,
                right * 1000,
                right / 1000,
                right * 1e30,
                right + 1,
                10**400,
                None,
                str(right),
            )
        )
    return mutate.written(document)


def _cloud(content: bytes, draw: Random) -> bytes:
    points = np.frombuffer(content, "<f4").reshape(-1, 5)
    wrong = points.copy()
    match draw.randrange(14):
        case 12:
            return content[: len(content) // 2] + bytes(len(content) // 2)
        case 0:
            return wrong[:, :4].tobytes()
        case 1:
            return np.concatenate([wrong, wrong[:, :1]], axis=1).tobytes()
        case 2:
            return wrong.astype("<f8").tobytes()
        case 3:
            return wrong.astype(">f4").tobytes()
        case 4:
            made = io.BytesIO()
            np.save(made, wrong)
            return made.getvalue()
        case 5:
            return b"# .PCD v0.7\nVERSION 0.7\nDATA binary\n" + content
        case 6:
            wrong[:, 3] = draw.choice((-5.0, 1e30, float("nan")))
            return wrong.tobytes()
        case 7:
            wrong[:, 3] = wrong[:, 3] / 255
            return wrong.tobytes()
        case 8:
            wrong[:, draw.randrange(3)] = draw.choice((1e30, float("inf"), float("nan")))
            return wrong.tobytes()
        case _:
            return mutate.raw(content, draw)


def _image(content: bytes, draw: Random) -> bytes:
    picture, made = Image.open(io.BytesIO(content)), io.BytesIO()
    match draw.randrange(12):
        case 0:
            exif = Image.Exif()
            exif[0x0112] = draw.randrange(2, 9)
            picture.save(made, "JPEG", exif=exif)
        case 1:
            picture.save(made, draw.choice(("GIF", "TIFF", "PPM", "ICO")))
        case 2:
            Image.fromarray(np.full((9, 16), 40_000, np.uint16)).save(made, "PNG")
        case 3:
            picture.resize(draw.choice(((16, 10), (9, 16), (1, 1), (1600, 900)))).save(made, "JPEG")
        case 4:  # a head of 65,500 x 65,500
            place = content.index(b"\xff\xc0")
            return content[: place + 5] + struct.pack(">HH", 65_500, 65_500) + content[place + 9 :]
        case 5:
            return (
                b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
                + struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
                + bytes(4)
            )
        case _:
            return mutate.raw(content, draw)
    return made.getvalue()


def _sensor(content: bytes, draw: Random) -> bytes:
    return _image(content, draw) if content.startswith(b"\xff\xd8") else _cloud(content, draw)


def _info(content: bytes, draw: Random) -> bytes:
    if draw.randrange(3) == 0:
        return mutate.raw(content, draw)
    if draw.randrange(10) == 0:
        return draw.choice((
            b"\x80\x04cbuiltins\nbytearray\nJ\x00\x5e\xd0\xb2\x85R.", b"\x80\x02Nr\xff\xff\xff\x0f.", b"\x80\x04\x8e" + b"\xff" * 8,
            b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", b"(" * 100_000, b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        ))  # fmt: skip
    return pickle.dumps(mutate.value(pickle.loads(content), draw), draw.choice((2, 4, 5)))


# ----------------------------------------------------------------------------------------------------------- commands


def _read(folder: Path) -> None:
    """What training does of both splits: the index, then every sample, then a batch."""
    found = source.open(folder / "root", small_root.VERSION)
    for index in (found.training, found.evaluation):
        _load(index, READING)


def _read_t4(folder: Path) -> None:
    found = source.open(folder / "root", "v1.0-trainval")
    for index in (found.training, found.evaluation):
        _load(index, replace(T4, cameras=replace(T4.cameras, channels=index.channels)) if index.channels else T4)


def _check_t4(folder: Path) -> int:
    return _check(folder, _read_t4)


def _read_frame(folder: Path) -> None:
    _load(infos.read(folder / "frame.json"), FRAME)


def _read_pickled(folder: Path) -> None:
    _load(infos.read(folder / "frame.pkl"), FRAME)


def _check(folder: Path, read: Callable[[Path], None] = _read) -> int:
    """What it passes can be trained on."""
    code = data.check(folder / "root", deep=True)
    if code == 0:
        try:
            read(folder)
        except ValueError as error:
            raise AssertionError(f"data check --deep passes what training refuses: {error}") from None
    return code


def _load(index: Index, reading: Reading) -> None:
    """Reads every frame and asserts, by rules of its own, that what came of it can be."""
    for place in range(len(index)):
        sample = scene.load(index, place, reading)
        sizes, centres, velocities = sample.boxes[:, 3:6], sample.boxes[:, :3], sample.boxes[:, 7:]
        assert (sizes > 0).all() and (sizes < 1001).all() and (np.abs(centres) < 1.1e4).all()
        assert np.isfinite(sample.boxes[:, 6]).all() and not (np.abs(velocities) > 1.1e3).any()
        assert ((sample.labels >= 0) & (sample.labels < len(sample.class_names))).all()
        assert np.isfinite(sample.points).all() and (np.abs(sample.points[:, :3]) < 2e4).all()
        assert (sample.points[:, 3] >= 0).all() and (sample.points[:, 3] <= 255).all()
        assert sample.points[:, :3].any(axis=1).mean() > 0.99
        assert (sample.points[:, 4] >= 0).all() and (sample.points[:, 4] < 100).all()  # the lag [s]
        assert np.isfinite(sample.image_from_base).all()
        batch, _ = collate([sample], capacities=reading.capacities)
        batch.validate()
