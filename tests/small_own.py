"""A folder of clouds and images as somebody may have one, and its converter: the synthetic world, told as docs/custom_data.md does."""

import json
import re
from pathlib import Path

import numpy as np
import small_world
from PIL import Image

from bevfn.data import points
from bevfn.data.index import Frame

PAGE = Path(__file__).parents[1] / "docs" / "custom_data.md"
CAMERAS = {"front": ("CAM_FRONT", (90, 160)), "left": ("CAM_FRONT_LEFT", (120, 180))}  # of other sizes and aspects
CLASSES = {"car": "car", "truck": "car", "pedestrian": "person", "traffic_cone": "cone"}


def blocks(language: str) -> list[str]:
    """The page's blocks of code of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def write(root: Path) -> Path:
    """drives/: two drives of three frames, x y z intensity (0 to 1) clouds, cameras of two sizes, poses, labels."""
    for drive, index in (("monday", small_world.training()), ("tuesday", small_world.index())):
        rows = json.loads((index.root / index.version / "sample_annotation.json").read_text())
        told = {"lidar2ego": index[0].ego_from_lidar.tolist(), "cameras": {}}
        tracks, poses = {row["token"]: row["instance_token"] for row in rows}, []
        for i, frame in enumerate(index):
            _write_frame(root / drive, f"{i:06d}", frame, index.root, told["cameras"], tracks)
            poses.append([frame.timestamp, *frame.global_from_ego.ravel()])
        np.savetxt(root / drive / "poses.txt", poses, fmt="%.12g")
        (root / drive / "calibration.json").write_text(json.dumps(told))
    return root


def _write_frame(drive: Path, name: str, frame: Frame, root: Path, calibration: dict, tracks: dict) -> None:
    for folder in ("clouds", "labels", *(f"images/{camera}" for camera in CAMERAS)):
        (drive / folder).mkdir(parents=True, exist_ok=True)
    cloud, _ = points.scan(frame, root)
    (cloud[:, :4] / [1, 1, 1, 255]).astype("<f4").tofile(drive / f"clouds/{name}.bin")
    for camera, (channel, (height, width)) in CAMERAS.items():
        known = frame.cameras[channel]
        with Image.open(root / known.path) as image:
            scale = np.diag([width / image.width, height / image.height, 1.0])
            image.resize((width, height)).save(drive / f"images/{camera}/{name}.jpg")
        # as where cameras and LiDAR see at one time
        lidar_from_ego = np.linalg.inv(frame.ego_from_lidar)
        pose = np.linalg.inv(known.ego_from_camera) @ np.linalg.inv(lidar_from_ego)
        told = {
            "cam2img": (scale @ known.intrinsics).tolist(),
            "lidar2cam": pose.tolist(),
            "height": height,
            "width": width,
        }
        calibration[camera] = told
    labels = [
        {"name": CLASSES[kind], "box": box[:7].tolist(), "track": tracks[token]}
        for kind, box, good, token in zip(frame.names, frame.boxes, frame.valid, frame.annotations)
        if kind in CLASSES and good
    ]
    (drive / f"labels/{name}.json").write_text(json.dumps(labels))


def convert(folder: Path, monkeypatch) -> Path:
    """`write` in a folder, and the page's first block of Python run there: the data set's root."""
    root = write(folder / "drives")
    monkeypatch.chdir(folder)
    exec(compile(blocks("python")[0], str(PAGE), "exec"), {})
    return root
