"""From a key frame of an Index to a Sample: read, paste, augment, filter, shuffle, in the published order.

Source: mmdetection3d projects/BEVFusion, both configs (fact sheet bevfusion_lidar_cam, part B). One difference: a frame
whose boxes are all filtered away is a sample without boxes, where upstream draws another frame instead.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bevfn.boxes import limit_yaw
from bevfn.data import annotations, augment, image, points
from bevfn.data import paste as pasting
from bevfn.data import sweeps as aggregation
from bevfn.data.batch import Base, Capacities, Sample
from bevfn.data.index import Frame

CLASS_NAMES = (  # in the order of BEVFusion's labels, which is not the devkit's
    "car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
    "traffic_cone",
)  # fmt: skip
TEN_SWEEPS = Capacities(points=330_000, boxes=160)  # at most ten times 34,720 points, of which 93 % lie in range


@dataclass(frozen=True)
class Config:
    """How a frame is read. The defaults are BEVFusion's evaluation on nuScenes."""

    cameras: bool = True
    """Read the images; False for LiDAR-only models."""
    source_size: tuple[int, int] = (900, 1600)
    """(H, W) of the image files in pixels, for which the intrinsics are made; any other size is an error."""
    image_size: tuple[int, int] = (256, 704)
    """(H, W) of the model's images in pixels."""
    resize: float = 0.48
    """Factor before the crop, which is centred in width and aligned with the bottom in height; without augmentation."""
    sweeps: int = 9
    """Earlier LiDAR scans added to the key frame's."""
    sweep_choice: aggregation.Choice = "newest"
    """Which ones, if there are more; upstream takes random ones, when testing too. See `sweeps.aggregate`."""
    pad_empty_sweeps: bool = True
    """Repeat the key frame where there is no sweep at all, as upstream."""
    point_cloud_range: tuple[float, float, float, float, float, float] = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)
    """Lower x, y, z, upper x, y, z [m, lidar]; points must lie strictly inside, box centres only in x and y."""
    class_names: tuple[str, ...] = CLASS_NAMES
    """Label i is class_names[i]; annotations of other classes are dropped."""
    image_augmentation: augment.Images | None = None
    """Drawn for every camera; None: `resize` and the centre crop."""
    paste: pasting.Config | None = None
    """GT paste from a database; None: nothing is pasted."""
    global_augmentation: augment.Global | None = None
    """Of points and boxes; None: base_aug is the identity."""
    grid_mask: augment.GridMask | None = None
    shuffle_points: bool = False
    """Random order of the points, which decides which ones a full voxel keeps."""
    capacities: Capacities = field(default_factory=Capacities)
    """Padded sizes that `batch.collate` makes of the samples."""

    @property
    def random(self) -> bool:
        """Whether `load` draws random numbers."""
        drawn = (self.image_augmentation, self.paste, self.global_augmentation, self.grid_mask)
        return self.shuffle_points or self.sweep_choice == "random" or any(part is not None for part in drawn)


def bevfusion_eval(*, cameras: bool = True) -> Config:
    """Test time of both BEVFusion recipes: ten sweeps, the nine newest instead of upstream's random ones."""
    return Config(cameras=cameras, capacities=TEN_SWEEPS)


def bevfusion_lidar_train() -> Config:
    """Training of BEVFusion LiDAR-only; needs a GT-paste database. The last 5 of 20 epochs have paste=None."""
    return replace(
        bevfusion_eval(cameras=False),
        sweep_choice="random",
        paste=pasting.Config(),
        global_augmentation=augment.Global(scale_translation=False),
        shuffle_points=True,
    )


def bevfusion_lidar_camera_train() -> Config:
    """Training of BEVFusion LiDAR-camera. Its GridMask has probability 0, so it is left out."""
    return replace(
        bevfusion_eval(),
        sweep_choice="random",
        image_augmentation=augment.Images(),
        global_augmentation=augment.Global(),
        shuffle_points=True,
    )


def load(
    frame: Frame,
    root: Path,
    config: Config,
    generator: np.random.Generator | None = None,
    *,
    database: pasting.Database | None = None,
) -> Sample:
    """The frame as a Sample. Column 4 of the points is the time lag [s], 0 for the key frame's own.

    root: folder that the frame's paths are relative to. generator: the sample's random numbers, needed where config
    has anything random (`sampling.generator`). database: needed for `config.paste`.

    Raises ValueError, one sentence naming the file, for anything missing, truncated or of another size.
    """
    if generator is None and config.random:
        raise ValueError("a random augmentation needs a generator; give `sampling.generator(seed, epoch, position)`.")
    rng = generator if generator is not None else np.random.default_rng(0)  # of which nothing is drawn
    cameras = _cameras(frame, Path(root), config, rng)
    cloud, bad = aggregation.aggregate(
        frame, root, count=config.sweeps, choice=config.sweep_choice, pad_empty=config.pad_empty_sweeps, generator=rng
    )
    boxes, labels = annotations.valid(frame, config.class_names)
    if config.paste is not None:
        if database is None:
            raise ValueError("GT paste needs a database; build one with `bevfn data prepare`, or set paste to None.")
        new_boxes, new_labels, pasted = pasting.sample(database, boxes, labels, config.class_names, config.paste, rng)
        cloud = pasting.insert(cloud, new_boxes, pasted)
        boxes, labels = np.concatenate([boxes, new_boxes]), np.concatenate([labels, new_labels])
    base_aug = np.eye(4, dtype=np.float32)
    if config.global_augmentation is not None:
        base_aug = augment.draw_matrix(config.global_augmentation, rng)
        cloud, boxes = augment.move_points(cloud, base_aug), augment.move_boxes(boxes, base_aug)
    cloud = cloud[points.in_range(cloud, config.point_cloud_range)]
    boxes, labels = _known_and_in_range(boxes, labels, config)
    if config.grid_mask is not None and "images" in cameras:
        cameras["images"] *= augment.draw_grid_mask(config.grid_mask, config.image_size, rng)[..., None]
    if config.shuffle_points:
        cloud = cloud.take(rng.permutation(len(cloud)), axis=0)
    return Sample(
        base=Base.LIDAR,
        points=cloud,
        boxes=boxes,
        labels=labels,
        base_aug=base_aug,
        **cameras,
        token=frame.token,
        class_names=config.class_names,
        counts={"bad/points": bad, "empty/points": int(len(cloud) == 0), "empty/boxes": int(len(boxes) == 0)},
    )


def _known_and_in_range(boxes: np.ndarray, labels: np.ndarray, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Boxes with a label and their centre strictly inside the BEV range; yaw in [-pi, pi)."""
    lower_x, lower_y, _, upper_x, upper_y, _ = config.point_cloud_range
    x, y = boxes[:, 0], boxes[:, 1]
    kept = (x > lower_x) & (x < upper_x) & (y > lower_y) & (y < upper_y) & (labels >= 0)
    boxes = boxes[kept]
    boxes[:, 6] = limit_yaw(torch.from_numpy(boxes[:, 6])).numpy()
    return boxes, labels[kept]


def _cameras(frame: Frame, root: Path, config: Config, rng: np.random.Generator) -> dict[str, Any]:
    """The Sample's camera fields, in the frame's camera order; none if the frame has no cameras."""
    if not frame.cameras:
        if config.cameras:
            raise ValueError(f"frame {frame.token} names no camera; set cameras to False for LiDAR only.")
        return {}
    files, intrinsics, image_from_lidar, lidar_from_camera = [], [], [], []
    for camera in frame.cameras.values():
        files.append(root / camera.path)
        camera_from_lidar = camera.camera_from_lidar.astype(np.float32)
        inverse = np.eye(4, dtype=np.float32)  # of a rigid motion, spelled as upstream for its rounding
        inverse[:3, :3] = camera_from_lidar[:3, :3].T
        inverse[:3, 3] = -(camera_from_lidar[:3, :3].T @ camera_from_lidar[:3, 3])
        image_from_camera = np.eye(4, dtype=np.float32)
        image_from_camera[:3, :3] = camera.intrinsics
        intrinsics.append(image_from_camera)
        image_from_lidar.append(image_from_camera @ camera_from_lidar)
        lidar_from_camera.append(inverse)
    fields = {
        "image_paths": tuple(files),
        "camera_names": tuple(frame.cameras),
        "intrinsics": np.stack(intrinsics)[None],
        "image_from_base": np.stack(image_from_lidar)[None],
        "base_from_camera": np.stack(lidar_from_camera)[None],
    }
    if not config.cameras:
        return {name: fields[name] for name in ("image_paths", "camera_names")}
    return {**fields, **_images(files, config, rng)}


def _images(files: list[Path], config: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Images [1,N,H,W,3] and their matrices [1,N,4,4], each resized, cropped, mirrored and turned on its own."""
    source, size = config.source_size, config.image_size
    if config.image_augmentation is not None:
        moves = [augment.draw_image(config.image_augmentation, source, size, rng) for _ in files]
    else:
        crop = image.centre_crop(source, size, config.resize)
        moves = [{"resize": config.resize, "crop": crop}] * len(files)
    pairs = [image.transform(image.read(file, size=source), size=size, **move) for file, move in zip(files, moves)]
    images, matrices = zip(*pairs)
    return {"images": np.stack(images)[None], "image_aug": np.stack(matrices)[None]}
