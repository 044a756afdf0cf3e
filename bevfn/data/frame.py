"""One key frame on disk, in mmdetection3d's v1.1 info form as JSON, to a Sample.

A folder holds `frame.json` (`metainfo.categories`: class name -> label number; `data_list`: one entry with
`lidar_points`, `images` and `instances`), the images and the point file, named relative to the folder.
Boxes, points and matrices come out as mmdetection3d's training pipeline of BEVFusion has them before augmentation.

Source: mmdetection3d projects/BEVFusion (loading.py, configs); golden cases bevfusion_lidar and bevfusion_lidar_cam.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bevfn.boxes import limit_yaw
from bevfn.data import image, points
from bevfn.data.batch import Capacities, Sample

CLASS_NAMES = (
    "car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
    "traffic_cone",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """How a frame is read. The defaults are BEVFusion's on nuScenes."""

    cameras: bool = True
    """Read the images; False for LiDAR-only models."""
    source_size: tuple[int, int] = (900, 1600)
    """(H, W) of the image files in pixels, for which the intrinsics are made; any other size is an error."""
    image_size: tuple[int, int] = (256, 704)
    """(H, W) of the model's images in pixels."""
    resize: float = 0.48
    """Factor before the crop, which is centred in width and aligned with the bottom in height."""
    point_cloud_range: tuple[float, float, float, float, float, float] = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)
    """Lower x, y, z, upper x, y, z [m, lidar]; points must lie strictly inside, box centres only in x and y."""
    class_names: tuple[str, ...] = CLASS_NAMES
    """Label i is class_names[i]; annotations of other classes are dropped."""
    capacities: Capacities = field(default_factory=Capacities)
    """Padded sizes that `batch.collate` makes of the samples."""


def load(root: Path, *, config: Config) -> Sample:
    """The frame in the folder `root`; nothing is augmented or shuffled, `lidar_aug` is the identity.

    Column 4 of the points, the ring in the file, becomes the time lag of a key frame: 0 s.
    Raises ValueError, one sentence with file and field, for anything missing, truncated or of another size.
    """
    path = Path(root) / "frame.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a frame folder, or make one with `bevfn.data.synthetic`.")
    try:
        document = json.loads(path.read_text())
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"{path} is not valid JSON ({error}); copy it again.") from error
    frames = _get(document, path, "data_list", list)
    if len(frames) != 1:
        raise ValueError(f"{path}: data_list has {len(frames)} entries; a frame folder holds exactly one.")
    info = frames[0]
    categories = _get(document, path, "metainfo.categories", dict)

    cloud, bad = points.read(path.parent / _get(info, path, "lidar_points.lidar_path", str))
    lower, upper = np.split(np.array(config.point_cloud_range, dtype=np.float32), 2)
    cloud = cloud[((cloud[:, :3] > lower) & (cloud[:, :3] < upper)).all(axis=1)]
    cloud[:, 4] = 0.0
    boxes, labels = _boxes(info, path, categories, config)
    return Sample(
        points=cloud,
        boxes=boxes,
        labels=labels,
        lidar_aug=np.eye(4, dtype=np.float32),
        **_cameras(info, path, config),
        token=str(info.get("token", "")),
        timestamp=float(info.get("timestamp", 0.0)),
        class_names=config.class_names,
        counts={"bad/points": bad, "empty/points": int(len(cloud) == 0), "empty/boxes": int(len(boxes) == 0)},
    )


def _boxes(info: dict, path: Path, categories: dict[str, int], config: Config) -> tuple[np.ndarray, np.ndarray]:
    """(boxes [G,9] float32, labels [G] int64): valid, of a known class, centre inside the BEV range, file order."""
    names = {number: name for name, number in categories.items()}
    rows, labels = [], []
    for i, instance in enumerate(info.get("instances") or []):
        where = f"{path}: data_list[0].instances[{i}]"
        box = _numbers(instance, where, "bbox_3d", (7,))
        velocity = (
            _numbers(instance, where, "velocity", (2,), finite=False) if instance.get("velocity") else np.zeros(2)
        )
        name = names.get(_get(instance, where, "bbox_label_3d", int))
        # upstream's use_valid_flag: lidar + radar points > 0, not lidar points > 0
        if instance.get("bbox_3d_isvalid", True) and name in config.class_names:
            rows.append(np.concatenate([box, np.where(np.isfinite(velocity), velocity, 0.0)]).astype(np.float32))
            labels.append(config.class_names.index(name))
    boxes = np.stack(rows) if rows else np.zeros((0, 9), dtype=np.float32)
    boxes[:, 2] -= 0.5 * boxes[:, 5]  # the file has the gravity centre
    lower_x, lower_y, _, upper_x, upper_y, _ = config.point_cloud_range
    x, y = boxes[:, 0], boxes[:, 1]
    inside = (x > lower_x) & (x < upper_x) & (y > lower_y) & (y < upper_y)
    boxes = boxes[inside]
    boxes[:, 6] = limit_yaw(torch.from_numpy(boxes[:, 6])).numpy()
    return boxes, np.array(labels, dtype=np.int64)[inside]


def _cameras(info: dict, path: Path, config: Config) -> dict[str, Any]:
    """The Sample's camera fields, in the file's camera order; none if the frame has no cameras."""
    cameras = info.get("images") or {}
    if not cameras:
        if config.cameras:
            raise ValueError(f"{path}: data_list[0].images names no camera; set cameras to False for LiDAR only.")
        return {}
    files, intrinsics, image_from_lidar, lidar_from_camera = [], [], [], []
    for name, camera in cameras.items():
        where = f"{path}: data_list[0].images.{name}"
        files.append(path.parent / _get(camera, where, "img_path", str))
        camera_from_lidar = _numbers(camera, where, "lidar2cam", (4, 4))
        inverse = np.eye(4, dtype=np.float32)  # of a rigid motion, spelled as upstream for its rounding
        inverse[:3, :3] = camera_from_lidar[:3, :3].T
        inverse[:3, 3] = -(camera_from_lidar[:3, :3].T @ camera_from_lidar[:3, 3])
        image_from_camera = np.eye(4, dtype=np.float32)
        image_from_camera[:3, :3] = _numbers(camera, where, "cam2img", (3, 3))
        intrinsics.append(image_from_camera)
        image_from_lidar.append(image_from_camera @ camera_from_lidar)
        lidar_from_camera.append(inverse)
    fields = {
        "image_paths": tuple(files),
        "camera_names": tuple(cameras),
        "intrinsics": np.stack(intrinsics),
        "image_from_lidar": np.stack(image_from_lidar),
        "lidar_from_camera": np.stack(lidar_from_camera),
    }
    if config.cameras:
        crop = image.centre_crop(config.source_size, config.image_size, config.resize)
        pairs = [
            image.transform(
                image.decode(file, size=config.source_size), size=config.image_size, resize=config.resize, crop=crop
            )
            for file in files
        ]
        fields["images"] = np.stack([pixels for pixels, _ in pairs])
        fields["image_aug"] = np.stack([matrix for _, matrix in pairs])
    return fields


def _get(tree: Any, where: Path | str, key: str, kind: type) -> Any:
    """tree[key] for a dotted key, checked to be of type `kind`."""
    value = tree
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"{where}: {key} is missing; the file is not in mmdetection3d's v1.1 info form.")
        value = value[part]
    if not isinstance(value, kind):
        raise ValueError(f"{where}: {key} must be a {kind.__name__}, not {type(value).__name__}.")
    return value


def _numbers(tree: dict, where: str, key: str, shape: tuple[int, ...], *, finite: bool = True) -> np.ndarray:
    """tree[key] as float32 of that shape; null becomes NaN."""
    entries = _get(tree, where, key, list)
    try:
        value = np.array(entries, dtype=np.float32)
    except (TypeError, ValueError) as error:  # ragged rows, or words
        raise ValueError(f"{where}: {key} must hold numbers in the shape {list(shape)} ({error}).") from error
    if value.shape != shape:
        raise ValueError(f"{where}: {key} must hold numbers in the shape {list(shape)}, not {list(value.shape)}.")
    if finite and not np.isfinite(value).all():
        raise ValueError(f"{where}: {key} has NaN or infinite numbers; repair or remove the entry.")
    return value
