"""A nuScenes root of a few kilobytes for tests: random poses (tilted too), sweeps, ragged annotations, tiny files."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from bevfn.data.index import CAMERAS

VERSION = "v1.0-mini"
SCENES = ("scene-0061", "scene-0103")  # of mini_train and of mini_val
CATEGORIES = ("vehicle.car", "human.pedestrian.adult", "animal", "movable_object.barrier")


def write(
    root: Path,
    *,
    seed: int = 0,
    scenes: tuple[str, ...] = SCENES,
    samples: int = 4,
    scans: int = 4,
    version: str = VERSION,
    annotated: bool = True,
) -> Path:
    """`scans` LiDAR scans for each of `samples` key frames of each scene; returns root."""
    random = np.random.default_rng(seed)
    tables: dict[str, list[dict]] = {name: [] for name in (*_FIXED, "instance", "calibrated_sensor", "ego_pose")}
    tables |= {name: [] for name in ("log", "scene", "sample", "sample_data", "sample_annotation", "map")}
    tables |= {name: list(rows) for name, rows in _FIXED.items()}
    (root / "maps").mkdir(parents=True)
    Image.new("L", (4, 4)).save(root / "maps" / "plan.png")
    tables["map"].append(
        {
            "token": "map",
            "category": "semantic_prior",
            "filename": "maps/plan.png",
            "log_tokens": ["of another version"],
        }
    )
    for name in scenes:
        _scene(root, tables, name, samples, scans, random)
    if not annotated:
        tables |= {"instance": [], "sample_annotation": []}
    (root / version).mkdir()
    for name, rows in tables.items():
        (root / version / f"{name}.json").write_text(json.dumps(rows))
    return root


_FIXED: dict[str, list[dict]] = {
    "category": [{"token": name, "name": name, "description": ""} for name in CATEGORIES],
    "attribute": [{"token": "a1", "name": "vehicle.moving", "description": ""}],
    "visibility": [{"token": str(i), "level": level} for i, level in enumerate(("v0-40", "v40-60", "v60-80"), 1)],
    "sensor": [
        {"token": name, "channel": name, "modality": name.split("_")[0].lower().replace("cam", "camera")}
        for name in ("LIDAR_TOP", *CAMERAS, "RADAR_FRONT")
    ],
}


def _pose(random: np.random.Generator, spread: float) -> dict:
    """Any yaw, tilted by a few degrees; the quaternion not quite of unit length, as in files."""
    quaternion = np.array([random.normal(), *(0.05 * random.normal(size=2)), random.normal()])
    quaternion *= (1 + 1e-7) / np.linalg.norm(quaternion)
    return {"translation": (spread * random.normal(size=3)).tolist(), "rotation": quaternion.tolist()}


def _scene(root: Path, tables: dict, name: str, samples: int, scans: int, random: np.random.Generator) -> None:
    tables["log"].append({"token": f"log {name}", "logfile": "", "vehicle": "", "date_captured": "", "location": ""})
    tables["map"][0]["log_tokens"].append(f"log {name}")
    ends = {"first_sample_token": f"{name} 0", "last_sample_token": f"{name} {samples - 1}"}
    scene = {"token": f"token {name}", "name": name, "log_token": f"log {name}", "nbr_samples": samples}
    tables["scene"].append(scene | ends | {"description": ""})
    for channel in ("LIDAR_TOP", *CAMERAS, "RADAR_FRONT"):
        intrinsic = [[12.0 + random.random(), 0, 8], [0, 12, 4.5], [0, 0, 1]] if "CAM" in channel else []
        row = {"token": f"{name} {channel}", "sensor_token": channel, "camera_intrinsic": intrinsic}
        tables["calibrated_sensor"].append(row | _pose(random, 1.0))
        first, step = (1 - scans, 1) if channel == "LIDAR_TOP" else (0, scans)
        last = (samples - 1) * scans
        times = range(first, last + 1, step)
        for k in times:
            _data(root, tables, name, channel, k, scans, last, random)
            rows = tables["sample_data"]
            if k != times[0]:
                rows[-1]["prev"], rows[-2]["next"] = rows[-2]["token"], rows[-1]["token"]
    for i in range(samples):
        row = {"token": f"{name} {i}", "timestamp": _time(i * scans), "scene_token": f"token {name}"}
        chain = {"prev": f"{name} {i - 1}" if i else "", "next": f"{name} {i + 1}" if i + 1 < samples else ""}
        tables["sample"].append(row | chain)
    for k in range(5):  # objects
        _object(tables, name, k, samples, scans, random)


def _time(scan: int) -> int:
    return 1_532_402_927_000_000 + 100_000 * scan  # us


def _data(
    root: Path, tables: dict, name: str, channel: str, k: int, scans: int, last: int, random: np.random.Generator
) -> None:
    """One row of sample_data with its ego pose and its file."""
    key = k % scans == 0
    suffix = "pcd.bin" if channel == "LIDAR_TOP" else "jpg" if "CAM" in channel else "pcd"
    file = Path("samples" if key else "sweeps") / channel / f"{name}__{channel}__{k}.{suffix}"
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    if channel == "LIDAR_TOP":
        cloud = random.normal(size=(10, 5))
        cloud[:, 3:] = np.abs(cloud[:, 3:] * 20).round()  # intensity and ring
        (root / file).write_bytes(cloud.astype("<f4").tobytes())
    elif "CAM" in channel:
        Image.fromarray(random.integers(0, 255, (9, 16, 3), dtype=np.uint8)).save(root / file)
    token = f"{name} {channel} {k}"
    jitter = 0 if channel == "LIDAR_TOP" else int(random.integers(-40_000, 0))
    tables["ego_pose"].append({"token": token, "timestamp": _time(k)} | _pose(random, 2.0))
    tables["ego_pose"][-1]["translation"][0] += 1000.0 + k
    sample = min(max(0, -(-k // scans)), last // scans)  # a sweep belongs to the key frame after it
    tables["sample_data"].append(
        {"token": token, "sample_token": f"{name} {sample}", "ego_pose_token": token, "prev": "", "next": "",
         "calibrated_sensor_token": f"{name} {channel}", "timestamp": _time(k) + jitter, "is_key_frame": key,
         "filename": str(file), "fileformat": suffix.split(".")[0], "height": 9, "width": 16}
    )  # fmt: skip


def _object(tables: dict, name: str, k: int, samples: int, scans: int, random: np.random.Generator) -> None:
    """An object that is annotated in k + 1 frames, so that velocities are centred, one-sided and unknown."""
    token = f"{name} object {k}"
    category = CATEGORIES[k % len(CATEGORIES)]
    tables["instance"].append({"token": token, "category_token": category, "nbr_annotations": min(k + 1, samples)})
    rows = []
    for i in range(min(k + 1, samples)):
        pose = _pose(random, 20.0)
        pose["translation"][0] += 1000.0
        rows.append(
            {"token": f"{token} {i}", "sample_token": f"{name} {i}", "instance_token": token, "prev": "", "next": "",
             "visibility_token": str(1 + k % 3), "attribute_tokens": ["a1"] if category == "vehicle.car" else [],
             "size": (np.array([1, 3, 1]) + random.random(3)).tolist(), "num_lidar_pts": k - 1 if k else 0,
             "num_radar_pts": int(k == 1)} | pose
        )  # fmt: skip
    for before, after in pairwise(rows):
        before["next"], after["prev"] = after["token"], before["token"]
    tables["sample_annotation"] += rows
    tables["instance"][-1] |= {"first_annotation_token": rows[0]["token"], "last_annotation_token": rows[-1]["token"]}
