"""The synthetic world in T4's format: a folder a scene, clouds in base_link, key frames at 10 Hz with annotated velocities.

Source: tier4/t4-devkit v0.8.0 schema (fact sheet t4dataset, sections 1 and 2).
"""

import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np

from bevfn.files import to_json
from bevfn.synth import tables
from bevfn.synth.rig import CAMERAS, LIDAR, Rig
from bevfn.synth.world import TICK

DATABASE = "db_bevfn_v1"
CONCAT = "LIDAR_CONCAT"
TICKS = 2  # of a key frame: 10 Hz
RENAMED = {  # nuScenes' categories that T4 calls otherwise
    "vehicle.bus.bendy": "vehicle.bus (bendy & rigid)",
    "vehicle.bus.rigid": "vehicle.bus (bendy & rigid)",
    "vehicle.emergency.ambulance": "vehicle.ambulance",
    "vehicle.emergency.police": "vehicle.police",
}
LEVELS = {"v0-40": "none", "v40-60": "partial", "v60-80": "most", "v80-100": "full"}
MAP = "map/lanelet2_map.osm"
LANELETS = '<?xml version="1.0" encoding="UTF-8"?>\n<osm version="0.6" generator="bevfn"></osm>\n'  # no lanes are told


def _file(number: int, channel: str, t: float, key: bool) -> str:
    frame = round(t / (TICK * TICKS))  # cameras expose less than half a frame before
    return f"data/{CONCAT}/{frame:05d}.pcd.bin" if channel == LIDAR else f"data/{channel}/{frame:05d}.jpg"


LAYOUT = tables.Layout(ticks=TICKS, scan_ticks=TICKS, in_ego=True, velocities=True, file=_file)


def home(seed: int, number: int) -> str:
    """A scene's folder below the data set's root."""
    return f"{DATABASE}/{_identity(seed, number)}/0"


def _identity(seed: int, number: int) -> str:
    return str(uuid.UUID(hex=tables.token(seed, number, "t4")))


def folders(seed: int, scenes: int) -> list[str]:
    """The folders of a data set."""
    inside = ("annotation", "map", f"data/{CONCAT}", *(f"data/{channel}" for channel in CAMERAS))
    return [f"{home(seed, number)}/{name}" for number in range(scenes) for name in inside]


def lists(seed: int, scenes: int) -> str:
    """The list of scenes that lies beside the database, in AWML's form; every fourth, beginning with the second, is of val."""
    named = {"train": [i for i in range(scenes) if i % 4 != 1], "val": [i for i in range(scenes) if i % 4 == 1]}
    lines = ["version: 1", f"dataset_version: {DATABASE}"]
    for split, numbers in named.items():
        lines += ["", f"{split}:", *(f"  - {_identity(seed, number)}/0 # scene {number}" for number in numbers)]
    return "\n".join(lines) + "\n"


def grounded(rig: Rig) -> Rig:
    """The rig with its LiDAR in base_link, as the tables and the counts of points have it."""
    return replace(rig, ego_from_sensor=rig.ego_from_sensor | {LIDAR: np.eye(4)})


def in_ego(cloud: np.ndarray, rig: Rig) -> np.ndarray:
    """A turn of the LiDAR [P,5] moved into base_link, of no ring."""
    mount = rig.ego_from_sensor[LIDAR]
    moved = np.full_like(cloud, -1.0)
    moved[:, :3] = cloud[:, :3] @ mount[:3, :3].T + mount[:3, 3]
    moved[:, 3] = cloud[:, 3]
    return moved


def write(folder: Path, rows: dict[str, list[dict]]) -> None:
    """Tables, map and status of a scene, whose rows are those of nuScenes' tables."""
    for table, content in converted(rows, folder.parent.name).items():
        (folder / "annotation" / f"{table}.json").write_bytes(to_json(content))
    (folder / MAP).write_text(LANELETS)
    status = {"dataset_name": folder.parent.name, "purpose": "synthetic", "status": "ready"}
    (folder / "status.json").write_bytes(to_json(status, indent=1))


def converted(rows: dict[str, list[dict]], identity: str) -> dict[str, list[dict]]:
    """nuScenes' tables of one scene as T4's; identity: the data set's."""
    names = {row["token"]: _category(row["name"]) for row in rows["category"]}
    first = {name: token for token, name in reversed(names.items())}  # two of nuScenes' may be one
    logs, levels = rows["log"], rows["visibility"]
    return rows | {
        "category": [{"token": token, "name": name, "description": "", "index": None} for name, token in first.items()],
        "attribute": [row | {"name": _attribute(row["name"])} for row in rows["attribute"]],
        "visibility": [row | {"level": LEVELS[row["level"]]} for row in levels],
        "sensor": [row | {"channel": CONCAT if row["channel"] == LIDAR else row["channel"]} for row in rows["sensor"]],
        "calibrated_sensor": [row | {"camera_distortion": []} for row in rows["calibrated_sensor"]],
        "instance": [
            row | {"category_token": first[names[row["category_token"]]], "instance_name": f"{identity}::{i}"}
            for i, row in enumerate(rows["instance"])
        ],
        "log": [{"data_captured" if k == "date_captured" else k: v for k, v in row.items()} for row in logs],
        "map": [row | {"filename": MAP} for row in rows["map"]],
        "sample_data": [
            row | {"is_valid": True, "fileformat": row["filename"].partition(".")[2]} for row in rows["sample_data"]
        ],
        "sample_annotation": [row | {"automatic_annotation": False} for row in rows["sample_annotation"]],
    }


def _category(name: str) -> str:
    return RENAMED.get(name, name.removeprefix("human."))


def _attribute(name: str) -> str:
    """vehicle.parked -> vehicle_state.parked"""
    return name.replace(".", "_state.", 1)
