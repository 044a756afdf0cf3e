"""T4 data sets of a few kilobytes for tests, by a writer that is not ours (autoware-carla-scenario-t4), and what was put in."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

START = 1_700_000_000_000_000  # us
STEP = 100_000  # us: 10 Hz
CAMERAS = {  # channel: (H, W), focal length
    "CAM_FRONT": ((60, 80), 70.0),
    "CAM_BACK_WIDE": ((40, 96), 30.0),
    "CAM_TRAFFIC_LIGHT_FAR": ((90, 50), 400.0),
}


@dataclass
class Truth:
    """What a scene was made of, frame by frame."""

    root: Path
    poses: list[np.ndarray] = field(default_factory=list)  # 4 4, map from base_link
    clouds: list[np.ndarray] = field(default_factory=list)  # P 4
    boxes: list[list[dict]] = field(default_factory=list)  # add_annotation's arguments
    mounts: dict[str, np.ndarray] = field(default_factory=dict)  # 4 4, base_link from sensor
    intrinsics: dict[str, np.ndarray] = field(default_factory=dict)


def pose(rng: np.random.Generator, spread: float, tilt: float = 0.05) -> np.ndarray:
    """4 4 of any yaw, tilted by a few degrees."""
    made = np.eye(4)
    made[:3, :3] = Rotation.from_euler("ZYX", [rng.uniform(-3, 3), *(tilt * rng.normal(size=2))]).as_matrix()
    made[:3, 3] = spread * rng.normal(size=3)
    return made


def told(matrix: np.ndarray) -> tuple[list[float], list[float]]:
    """(translation, rotation w x y z)."""
    x, y, z, w = Rotation.from_matrix(matrix[:3, :3]).as_quat()
    return matrix[:3, 3].tolist(), [w, x, y, z]


def annotation(rng: np.random.Generator, number: int, category: str, centre: np.ndarray, **more) -> dict:
    """An upright box of a category, with a velocity."""
    yaw = rng.uniform(-3, 3)
    return {
        "instance_id": number,
        "category": category,
        "translation": centre.tolist(),
        "size": rng.uniform([1.5, 3.5, 1.4], [2.5, 6.0, 3.0]).tolist(),
        "rotation": [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))],
        "velocity": [*rng.uniform(-10, 10, 2).tolist(), 0.0],
    } | more


def write(
    root: Path,
    *,
    seed: int = 0,
    frames: int = 3,
    lidar: str = "LIDAR_CONCAT",
    cameras: dict = CAMERAS,
    categories: tuple[str, ...] = ("car", "vehicle.bus", "pedestrian.adult", "bicycle"),
    step: int = STEP,
    name: str | None = None,
    map_file: Path | None = None,
    velocities: bool = True,
    unseen: tuple[tuple[str, int], ...] = (),
    intensity: float = 255.0,
) -> Truth:
    """A scene: an object of each category, far from the others, with points in it. unseen: (camera, frame) without an image."""
    from autoware_carla_scenario_t4 import T4Writer

    rng = np.random.default_rng(seed)
    truth = Truth(root)
    writer = T4Writer(root, scene_name=name or f"scene {seed}")
    if map_file is not None:
        writer.add_lanelet2_map(map_file)
    truth.mounts[lidar] = np.eye(4) if lidar == "LIDAR_CONCAT" else pose(rng, 1.0)
    writer.add_sensor(lidar, "lidar", *told(truth.mounts[lidar]))
    for channel, ((height, width), focal) in cameras.items():
        truth.mounts[channel] = pose(rng, 1.0)
        truth.intrinsics[channel] = np.array([[focal, 0, width / 2 - 1], [0, 1.1 * focal, height / 2 + 1], [0, 0, 1]])
        lens = truth.intrinsics[channel].tolist()
        writer.add_sensor(channel, "camera", *told(truth.mounts[channel]), camera_intrinsic=lens)
    start, way = pose(rng, 100.0), np.append(rng.uniform(3, 8, 2), 0.0)
    places = [np.array([12.0 * i - 15, 25.0 * (-1) ** i, 1.5]) for i in range(len(categories))]
    for k in range(frames):
        now = start.copy()
        now[:3, 3] += way * k * step * 1e-6
        truth.poses.append(now)
        writer.begin_frame(START + k * step, *told(now))
        boxes = []
        for i, (category, place) in enumerate(zip(categories, places)):
            made = annotation(rng, i + 1, category, (now @ np.append(place, 1))[:3])
            boxes.append(made if velocities else {key: v for key, v in made.items() if key != "velocity"})
        for made in boxes:
            writer.add_annotation(**made)
        inside = [np.linalg.inv(now) @ np.append(b["translation"], 1) for b in boxes]
        cloud = np.concatenate([rng.uniform(-40, 40, (200, 3)), *(p[:3] + rng.normal(0, 0.1, (9, 3)) for p in inside)])
        cloud = np.column_stack([cloud, rng.uniform(0, intensity, len(cloud))])
        cloud[:, :3] = (cloud[:, :3] - truth.mounts[lidar][:3, 3]) @ truth.mounts[lidar][:3, :3]
        writer.add_lidar(lidar, cloud.astype(np.float32))
        for channel, ((height, width), _) in cameras.items():
            if (channel, k) not in unseen:
                writer.add_camera(channel, rng.integers(0, 255, (height, width, 3), dtype=np.uint8), "rgb")
        writer.end_frame()
        truth.boxes.append(boxes)
        truth.clouds.append(cloud.astype(np.float32))
    writer.finish()
    return truth
