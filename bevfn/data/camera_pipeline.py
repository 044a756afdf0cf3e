"""A key frame and those before it to a Sample: images of several frames, calibration, depth, boxes in ego.

Everything lies in the vehicle's frame at the key frame, of which there are two kinds, as upstream: a camera's pose is
relative to the vehicle at that camera's own exposure (an earlier exposure's pose contains the motion since then), boxes
and results to the mean of these poses over the cameras (`ego_pose`). The exposures of a key frame are within 50 ms.

Source: BEVDepth bevdepth/datasets/nusc_det_dataset.py (behaviour; fact sheet bevdepth_r50_2key, "Inputs", "Recipe").
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from bevfn.data import annotations, augment, image, points
from bevfn.data import depth as ground_truth
from bevfn.data.batch import Base, Capacities, Sample
from bevfn.data.index import Camera, Frame, Index, inverse
from bevfn.data.pipeline import CLASS_NAMES  # BEVDepth's order is the same

CHANNELS = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
RESIZE = (0.386, 0.55)  # of training at the published size, where testing has 0.44


@dataclass(frozen=True)
class Config:
    """How key frames are read. The defaults are BEVDepth's evaluation with two key frames."""

    frames: int = 2
    """key frames, the current one first"""
    channels: tuple[str, ...] = CHANNELS
    """cameras, in the batch's order"""
    source_size: tuple[int, int] = (900, 1600)
    """(H, W) of the image files in pixels, for which the intrinsics are made; any other size is an error"""
    image_size: tuple[int, int] = (256, 704)
    """(H, W) of the model's images in pixels"""
    class_names: tuple[str, ...] = CLASS_NAMES
    """label i is class_names[i]; annotations of other classes are dropped"""
    image_augmentation: augment.Images | None = None
    """one draw per camera for all its frames; None: `resize`, centred in width, aligned with the bottom"""
    bev_augmentation: augment.Global | None = None
    """of the vehicle's frame; None: base_aug is the identity"""
    depth: bool = False
    """depth maps of the key frame, from the LiDAR"""
    capacities: Capacities = field(default_factory=lambda: Capacities(points=0, boxes=200))
    """padded number of boxes; no range filters them, as upstream"""

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"frames {self.frames} must be at least 1, the current key frame")

    @property
    def random(self) -> bool:
        """Whether `load` draws random numbers."""
        return self.image_augmentation is not None or self.bev_augmentation is not None

    @property
    def resize(self) -> float:
        """Factor before the crop without augmentation: the image just covers image_size."""
        return max(size / source for size, source in zip(self.image_size, self.source_size))


def bevdepth_eval(
    frames: int = 2, *, source_size: tuple[int, int] = (900, 1600), image_size: tuple[int, int] = (256, 704)
) -> Config:
    """Test time of BEVDepth and MatrixVT."""
    return Config(frames=frames, source_size=source_size, image_size=image_size)


def bevdepth_train(
    frames: int = 2, *, source_size: tuple[int, int] = (900, 1600), image_size: tuple[int, int] = (256, 704)
) -> Config:
    """Training. At other sizes the range of resizing moves with the test-time factor (as at 512 x 1408 upstream)."""
    relative = Config(source_size=source_size, image_size=image_size).resize / Config().resize
    low, high = (limit * relative for limit in RESIZE)
    return Config(
        frames=frames,
        source_size=source_size,
        image_size=image_size,
        image_augmentation=augment.Images(resize=(low, high)),
        bev_augmentation=augment.Global(rotation=math.radians(22.5), scale=(0.95, 1.05), translation=0.0),
        depth=True,
    )


def load(
    index: Index,
    place: int,
    config: Config,
    generator: np.random.Generator | None = None,
    *,
    depth_files: Path | None = None,
) -> Sample:
    """The key frame at `place` of the index with the key frames before it.

    Where an earlier key frame is missing (a scene's start, or not in the index), the current one stands in its place.
    generator: the sample's random numbers, needed where config has anything random (`sampling.generator`).
    depth_files: folder of stored depth points (`depth.folder_of_files`); None: made from the LiDAR file.

    Raises ValueError, one sentence, for anything missing, truncated or of another size, and, with config.depth, if no
    LiDAR point falls into any image.
    """
    if generator is None and config.random:
        raise ValueError("a random augmentation needs a generator; give `sampling.generator(seed, epoch, position)`.")
    rng = generator if generator is not None else np.random.default_rng(0)  # of which nothing is drawn
    frames = key_frames(index, place, config.frames)
    cameras = [_cameras(frame, config.channels) for frame in frames]
    moves = [_move(config, rng) for _ in config.channels]
    base_aug = np.eye(4, dtype=np.float32)
    if config.bev_augmentation is not None:
        base_aug = augment.draw_matrix(config.bev_augmentation, rng)
    image_aug = np.stack([image.matrix(size=config.image_size, **move) for move in moves])  # N 4 4
    boxes, labels = ego_boxes(frames[0], config.channels, config.class_names)
    counts = {"empty/boxes": int(len(boxes) == 0), "missing/frames": sum(f is frames[0] for f in frames[1:])}
    depth = None
    if config.depth:
        depth, found = _depth(frames[0], index.root, config, image_aug, depth_files)
        counts |= found
    intrinsics = np.stack([[_intrinsics(camera) for camera in row] for row in cameras])
    base_from_camera = np.stack([_poses(cameras[0], row) for row in cameras])
    camera_from_base = np.array([[inverse(pose) for pose in row] for row in base_from_camera], dtype=np.float32)
    return Sample(
        base=Base.EGO_AT_CAMERAS,
        images=_images(frames, cameras, index.root, config, moves),
        intrinsics=intrinsics,
        image_aug=np.stack([image_aug] * config.frames),
        base_from_camera=base_from_camera,
        image_from_base=intrinsics @ camera_from_base,
        base_aug=base_aug,
        boxes=augment.move_boxes(boxes, base_aug),
        labels=labels,
        depth=depth,
        token=frames[0].token,
        class_names=config.class_names,
        counts=counts,
    )


def key_frames(index: Index, place: int, count: int) -> list[Frame]:
    """The key frame at `place` and the `count` - 1 before it, newest first; itself where there is none."""
    frames = [index[place]]
    before: Frame | None = frames[0]
    for _ in range(count - 1):
        found = index.positions.get(before.previous) if before is not None and before.previous else None
        before = None if found is None else index[found]
        frames.append(frames[0] if before is None else before)
    return frames


def ego_pose(frame: Frame, channels: tuple[str, ...] = CHANNELS) -> np.ndarray:
    """global_from_ego [4,4] float64 of the frame in which boxes and detections lie: the mean over the cameras' vehicle
    poses of translation and of quaternion."""
    poses = np.stack([camera.global_from_ego for camera in _cameras(frame, channels)])  # N 4 4
    quaternions = Rotation.from_matrix(poses[:, :3, :3]).as_quat()  # N 4, whose sign is free
    quaternions *= np.where(quaternions @ quaternions[:1].T < 0, -1.0, 1.0)
    mean = np.eye(4)
    mean[:3, :3] = Rotation.from_quat(quaternions.mean(axis=0)).as_matrix()
    mean[:3, 3] = poses[:, :3, 3].mean(axis=0)
    return mean


def ego_boxes(frame: Frame, channels: tuple[str, ...], class_names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(boxes [G,9] float32, labels [G] int64) of the annotations with LiDAR or radar points of these classes.

    BOTTOM centre, in the frame of `ego_pose`; velocity 0 where it is unknown. Boxes are taken as upright in the LiDAR's
    frame, which at its tilt of a degree or two against the road differs from upstream by less than 1e-3 rad.
    """
    ego_from_lidar = inverse(ego_pose(frame, channels)) @ frame.global_from_lidar
    _, labels = annotations.valid(frame, class_names)
    boxes, labels = frame.boxes[frame.valid][labels >= 0], labels[labels >= 0]
    turn = ego_from_lidar[:3, :3]
    cos, sin = np.cos(boxes[:, 6]), np.sin(boxes[:, 6])
    moved = boxes.copy()
    moved[:, :3] = boxes[:, :3] @ turn.T + ego_from_lidar[:3, 3]
    moved[:, 2] -= 0.5 * boxes[:, 5]
    # of turn @ Rz: the yaw of pyquaternion's yaw_pitch_roll, which upstream takes (see data.nuscenes)
    moved[:, 6] = np.arctan2(turn[0, 0] * sin - turn[0, 1] * cos, turn[0, 0] * cos + turn[0, 1] * sin)
    moved[:, 7:9] = np.nan_to_num(boxes[:, 7:9], nan=0.0) @ turn[:2, :2].T
    return moved.astype(np.float32), labels


def _cameras(frame: Frame, channels: tuple[str, ...]) -> list[Camera]:
    """The frame's cameras in this order."""
    missing = [channel for channel in channels if channel not in frame.cameras]
    if missing:
        raise ValueError(f"key frame {frame.token} has no {', '.join(missing)}; leave them out of Config.channels.")
    cameras = [frame.cameras[channel] for channel in channels]
    if not all(np.isfinite(camera.global_from_ego).all() for camera in cameras):
        raise ValueError(f"key frame {frame.token} has cameras without ego pose; read the data set's own tables.")
    return cameras


def _move(config: Config, rng: np.random.Generator) -> dict[str, Any]:
    """Arguments of `image.transform` for one camera."""
    if config.image_augmentation is not None:
        return augment.draw_image(config.image_augmentation, config.source_size, config.image_size, rng)
    height, width = (int(side * config.resize) for side in config.source_size)
    left, top = int(max(0, width - config.image_size[1]) / 2), height - config.image_size[0]
    return {"resize": config.resize, "crop": (left, top)}


def _images(
    frames: list[Frame], cameras: list[list[Camera]], root: Path, config: Config, moves: list[dict[str, Any]]
) -> np.ndarray:
    """[T,N,H,W,3] uint8; a frame that stands for another is read once."""
    read: dict[str, np.ndarray] = {}
    for frame, row in zip(frames, cameras):
        if frame.token not in read:
            pictures = [image.read(root / camera.path, size=config.source_size) for camera in row]
            pairs = [image.transform(p, size=config.image_size, **move) for p, move in zip(pictures, moves)]
            read[frame.token] = np.stack([pixels for pixels, _ in pairs])
    return np.stack([read[frame.token] for frame in frames])


def _intrinsics(camera: Camera) -> np.ndarray:
    """[4,4] float32."""
    matrix = np.eye(4, dtype=np.float32)
    matrix[:3, :3] = camera.intrinsics
    return matrix


def _poses(key: list[Camera], then: list[Camera]) -> np.ndarray:
    """[N,4,4] float32: cameras of a frame to the vehicle's frame at the same cameras' exposure of the key frame."""
    pairs = zip(key, then)
    return np.stack(
        [inverse(k.global_from_ego) @ c.global_from_ego @ c.ego_from_camera for k, c in pairs], dtype=np.float32
    )


def _depth(
    frame: Frame, root: Path, config: Config, image_aug: np.ndarray, files: Path | None
) -> tuple[np.ndarray, dict[str, int]]:
    """(depth maps [N,H,W] float32, counts)."""
    cameras, bad = _cameras(frame, config.channels), 0
    if files is None:
        cloud, bad = points.read(root / frame.lidar_path)
        seen = [ground_truth.project(cloud, camera, config.source_size) for camera in cameras]
    else:
        seen = [ground_truth.read(files, camera.path) for camera in cameras]
    if not any(len(found) for found in seen):
        raise ValueError(
            f"{root / frame.lidar_path}: no point falls into an image of key frame {frame.token}, so its depth maps are "
            "empty; check the calibration, or set depth to False."
        )
    maps = [ground_truth.rasterize(found, move, config.image_size) for found, move in zip(seen, image_aug)]
    depth = np.stack(maps)
    return depth, {"bad/points": bad, "empty/depth": int((depth.max(axis=(1, 2)) == 0).sum())}
