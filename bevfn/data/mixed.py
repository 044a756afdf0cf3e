"""Several data sets read as one: a mixture, told by a TOML file that stands for them at --data-root.

    classes = ["car", "truck", "bicycle", "pedestrian"]

    [[data]]
    root = "t4"                                   # relative to the file
    weight = 3                                    # of an epoch's samples, three of four are of it
    [data.classes]
    bus = "truck"                                 # "": is no object; a class of the mixture stays without being named

    [[data]]
    root = "nuscenes"
    version = "v1.0-trainval"
    weight = 1
    train = "train"                               # splits, of that data set's names; its defaults without
    evaluate = false                              # is trained on alone
    cameras = { CAM_FRONT = "front" }             # its name here

What the data sets count differently is made one: points, boxes and cameras lie in the vehicle's frame (x forward, y left, z
up), as T4's LIDAR_CONCAT has them; tokens and scenes begin with the data set's folder.
"""

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bevfn.data import faults
from bevfn.data.index import Index, Packed, Share, join, pack
from bevfn.names import printable, unusable

SUFFIX = ".toml"
VERSION = "mixture"  # of an Index
Split = Literal["train", "val"]


@dataclass(frozen=True)
class Member:
    """A data set of a mixture; the fields are the keys of its table."""

    root: Path
    weight: float | None = None
    """None, of all: its number of key frames"""
    classes: Mapping[str, str] = field(default_factory=dict)
    """Its names to the mixture's, "" for what is no object."""
    cameras: Mapping[str, str] = field(default_factory=dict)
    version: str | None = None
    train: str | None = None
    val: str | None = None
    evaluate: bool = True


@dataclass(frozen=True)
class Mixture:
    """What a file says."""

    path: Path
    classes: tuple[str, ...]
    members: tuple[Member, ...]


KINDS: dict[str, tuple[type, ...]] = {
    "root": (str,),
    "weight": (int, float),
    "classes": (dict,),
    "cameras": (dict,),
    **dict.fromkeys(("version", "train", "val"), (str,)),
    "evaluate": (bool,),
}


def is_mixture(root: Path) -> bool:
    """Whether a data root is such a file."""
    return root.suffix == SUFFIX


def read(path: Path) -> Mixture:
    """The file's mixture. Raises ValueError, one sentence, for a file that is none."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the TOML file of a mixture, or another data root.")
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML file ({error}); correct it.") from None
    if unknown := sorted(told.keys() - {"classes", "data"}):
        raise ValueError(f"{path} has the key '{printable(unknown[0])}'; a mixture has classes and [[data]].")
    classes, tables = told.get("classes"), told.get("data")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) and name for name in classes):
        raise ValueError(f'{path} has no classes; name those of all its data sets, classes = ["car", ...].')
    if len(set(classes)) < len(classes) or any(map(unusable, classes)):
        raise ValueError(f"{path}: classes has a name twice, or one that no file can hold; correct it.")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{path} names no data sets; give each a [[data]] with its root.")
    members = tuple(_member(path, i, table, classes) for i, table in enumerate(tables))
    weights = [member.weight for member in members if member.weight is not None]
    if weights and len(weights) < len(members):
        raise ValueError(
            f"{path} has {len(members)} data sets, but {len(weights)} of them a weight; give one to each, or to none, which takes "
            "every key frame once."
        )
    return Mixture(path, tuple(classes), members)


def _member(path: Path, i: int, table: dict[str, Any], classes: list[str]) -> Member:
    where = f"{path}: [[data]] {i + 1}"
    known = [one.name for one in fields(Member)]
    if unknown := sorted(table.keys() - set(known)):
        raise ValueError(f"{where} has the key '{printable(unknown[0])}'; it may have {', '.join(known)}.")
    for name, value in table.items():
        if not isinstance(value, KINDS[name]) or (isinstance(value, bool) and name != "evaluate"):
            wanted = {"dict": "table of names", "str": "text", "bool": "true or false"}.get(
                KINDS[name][0].__name__, "number"
            )
            raise ValueError(f"{where}: {name} is no {wanted}; correct it.")
        if isinstance(value, dict) and not all(isinstance(one, str) for one in value.values()):
            raise ValueError(f'{where}: {name} has an entry that is no text; write name = "other name".')
    if "root" not in table:
        raise ValueError(f"{where} has no root; name the data set's folder.")
    if not 0 < table.get("weight", 1) < np.inf:
        raise ValueError(
            f"{where}: weight is {table['weight']:g}, which must be above 0; leave out what is not to be read."
        )
    if foreign := [name for name in table.get("classes", {}).values() if name and name not in classes]:
        raise ValueError(
            f"{where}: classes has '{printable(foreign[0])}', which is none of the mixture's ({', '.join(classes)}); correct one "
            'of them, or write "" for what is no object.'
        )
    return Member(**{**table, "root": Path(os.path.abspath(path.parent / table["root"]))})


# --- one index of several ---


def mix(mixture: Mixture, members: Sequence[tuple[Member, Index]], split: Split) -> Index:
    """The key frames of these data sets' splits, one behind the other. Raises ValueError for classes that a map misses."""
    base = Path(os.path.commonpath([os.path.abspath(index.root) for _, index in members]))
    made, shares = list[Packed](), list[Share]()
    for member, index in members:
        inside = os.path.relpath(os.path.abspath(index.root), base)
        packed = index.frames if isinstance(index.frames, Packed) else pack(index)
        classes = _class_map(mixture, member, index)
        named = _named(packed, "" if inside == "." else inside, classes, member.cameras)
        made.append(to_vehicle(named, f"{index.root}"))
        shares.append(Share(inside, len(index), len(index) if member.weight is None else float(member.weight)))
    packed = faults.refuse(join(made), str(mixture.path))
    return Index(base, VERSION, split, packed, class_names=mixture.classes, metric="t4", shares=tuple(shares))


def _class_map(mixture: Mixture, member: Member, index: Index) -> dict[str, str]:
    """The data set's names to the mixture's."""
    known = {name: name for name in mixture.classes} | dict(member.classes)
    if missing := [name for name in index.class_names if name not in known]:
        raise ValueError(
            f"{mixture.path}: {index.root} annotates {', '.join(map(printable, missing))}, of which the file does not say what "
            f'they are; map each to one of {", ".join(mixture.classes)}, or to "" if it is no object, in its [data.classes].'
        )
    if unused := sorted(set(member.classes) - set(index.class_names)):
        raise ValueError(
            f"{mixture.path}: {index.root} annotates no {printable(unused[0])}, which its [data.classes] maps; it annotates "
            f"{', '.join(map(printable, index.class_names))}."
        )
    return {name: known[name] for name in index.class_names}


def _named(packed: Packed, folder: str, classes: Mapping[str, str], cameras: Mapping[str, str]) -> Packed:
    """With files, scenes and tokens below a folder, classes and cameras of other names. Raises ValueError."""
    columns = dict(packed.columns)
    if folder:
        for name in ("token", "previous", "lidar_path", "sweep_path", "camera_path", "scene_words"):
            texts = columns[name]
            columns[name] = np.where(texts == b"", b"", np.char.add(f"{folder}/".encode(), texts))
    for name, changes in (("names", dict(classes)), ("channel", dict(cameras))):
        words = [word.decode() for word in columns[f"{name}_words"]]
        columns[f"{name}_words"] = np.array([changes.get(word, word).encode() for word in words], dtype=np.bytes_)
    here = [word.decode() for word in columns["channel_words"]]
    if len(set(here)) < len(here):
        raise ValueError(f"{folder}: its cameras would be {', '.join(here)}; give each a name of its own in cameras.")
    return Packed(columns)


def to_vehicle(packed: Packed, where: str) -> Packed:
    """The frames with the vehicle's frame as the LiDAR's. Raises ValueError where the data set does not tell where that is."""
    column = packed.columns
    moves = _square(column["ego_from_lidar"])  # F 4 4
    if not np.isfinite(moves).all():
        raise ValueError(
            f"{where} does not tell where the LiDAR is on the vehicle (lidar2ego), in whose frame mixtures are."
        )
    if np.array_equal(moves, np.broadcast_to(np.eye(4), moves.shape)):
        return packed
    back = np.linalg.inv(moves)
    of = {
        table: np.repeat(np.arange(len(packed)), np.diff(column[f"{table}_start"]))
        for table in ("sweep", "camera", "box")
    }
    boxes, turn = column["boxes"].copy(), moves[of["box"], :3, :3]
    cos, sin = np.cos(boxes[:, 6]), np.sin(boxes[:, 6])
    boxes[:, :3] = np.einsum("gij,gj->gi", turn, boxes[:, :3]) + moves[of["box"], :3, 3]
    # boxes stay upright, as where LiDARs stand a degree or two askew (evaluation.results.moved)
    boxes[:, 6] = np.arctan2(turn[:, 1, 0] * cos + turn[:, 1, 1] * sin, turn[:, 0, 0] * cos + turn[:, 0, 1] * sin)
    boxes[:, 7:9] = np.einsum("gij,gj->gi", turn[:, :2, :2], boxes[:, 7:9])
    return Packed(
        dict(column)
        | {
            "ego_from_lidar": np.broadcast_to(np.eye(4)[:3], column["ego_from_lidar"].shape).copy(),
            "lidar_from_scan": (moves @ _square(column["lidar_from_scan"]))[:, :3],
            "sweep_transform": (moves[of["sweep"]] @ _square(column["sweep_transform"]))[:, :3],
            "camera_from_lidar": (_square(column["camera_from_lidar"]) @ back[of["camera"]])[:, :3],
            "boxes": boxes,
        }
    )


def _square(transforms: np.ndarray) -> np.ndarray:
    """n 3 4 -> n 4 4."""
    last = np.broadcast_to([[[0.0, 0.0, 0.0, 1.0]]], (len(transforms), 1, 4))
    return np.concatenate([transforms, last], axis=1)
