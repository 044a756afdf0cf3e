"""The cameras' part of a sample: images of one or more key frames, resized and cropped, and where the cameras stand.

Sources: mmdetection3d projects/BEVFusion (fact sheet bevfusion_lidar_cam, part B); BEVDepth
bevdepth/datasets/nusc_det_dataset.py (behaviour; fact sheet bevdepth_r50_2key, "Inputs", "Recipe"); BEVNeXt (fact sheets
bevnext_stage1 and bevnext_stage2, "Coordinates"; recipe_bevnext_awml).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bevfn.data import augment, image, reading
from bevfn.data.batch import Base
from bevfn.data.index import Camera, Frame, Index, inverse

Moves = list[dict[str, Any]]  # per camera, arguments of `image.transform`


def key_frames(index: Index, place: int, count: int, history: reading.History = "scene") -> list[Frame]:
    """The key frame at `place` and the `count` - 1 before it, newest first; itself where there is none."""
    return (_of_scene if history == "scene" else _of_time)(index, place, count)


def _of_time(index: Index, place: int, count: int) -> list[Frame]:
    """k back is the k-th before it in the order of time of all scenes, the first one where that ends; the key frame itself
    in place of those of other scenes. Source: BEVNeXt (fact sheet recipe_bevnext_awml, "Rules")."""
    key, rank = index[place], int(index.ranks[place])
    frames = [key]
    for back in range(1, count):
        found = index[int(index.by_time[max(rank - back, 0)])]
        frames.append(found if found.scene and found.scene == key.scene and found.token != key.token else key)
    return frames


def _of_scene(index: Index, place: int, count: int) -> list[Frame]:
    """As long as every key frame names the one before it, and it is in the index."""
    frames = [index[place]]
    before: Frame | None = frames[0]
    for _ in range(count - 1):
        found = index.positions.get(before.previous) if before is not None and before.previous else None
        before = None if found is None else index[found]
        frames.append(frames[0] if before is None else before)
    return frames


def image_size(camera: Camera, root: Path) -> tuple[int, int]:
    """(H, W) of the image file, as the data set says, or of the file itself where it does not.

    Raises ValueError where the file's size cannot be the calibration's: its optical axis would lie outside.
    """
    if camera.size is not None:
        return camera.size
    height, width = image.size(root / camera.path)
    x, y = camera.intrinsics[:2, 2]
    if not (0 < x < width and 0 < y < height):
        raise ValueError(
            f"{root / camera.path}: the image is {width}x{height} but the calibration's optical axis is at pixel "
            f"({x:.0f}, {y:.0f}); use the original image, or intrinsics for its size."
        )
    return height, width


def check_sizes(index: Index, config: reading.Cameras) -> None:
    """Raises ValueError, one sentence, where images of a size that the data set says cannot become the model's."""
    known = {key: path for key, path in index.image_files.items() if key[0] in config.channels and key[1] is not None}
    sizes = _as_moved([size for _, size in known if size is not None], config)
    for ((channel, _), path), size in zip(known.items(), sizes):
        try:
            _move(size, replace(config, augmentation=None), np.random.default_rng(0))
        except ValueError as error:
            more = (
                " Or let factors follow the size of each image: --no-published-resize."
                if config.covering is None
                else ""
            )
            raise ValueError(f"{index.root / path}, {channel}: {error}{more}") from None


def moves(row: list[Camera], root: Path, config: reading.Cameras, rng: np.random.Generator) -> Moves:
    """How the images of each camera of the key frame, and of those before it, are resized, cropped, mirrored, turned."""
    return [_move(size, config, rng) for size in _as_moved([image_size(camera, root) for camera in row], config)]


def _as_moved(sizes: list[tuple[int, int]], config: reading.Cameras) -> list[tuple[int, int]]:
    """(H, W) of a key frame's images as they are resized and cropped: with `covering` None all as large as the largest."""
    if config.covering is not None or not sizes:
        return sizes
    heights, widths = zip(*sizes)
    return [(max(heights), max(widths))] * len(sizes)


def _move(source: tuple[int, int], config: reading.Cameras, rng: np.random.Generator) -> dict[str, Any]:
    size, relative, drawn = config.image_size, config.relative(source), config.augmentation
    if drawn is not None:
        low, high = drawn.resize
        return augment.draw_image(replace(drawn, resize=(low * relative, high * relative)), source, size, rng)
    resize = reading.cover(source, size) if config.resize is None else config.resize * relative
    return {"resize": resize, "crop": image.centre_crop(source, size, resize)}


def read(frames: list[Frame], root: Path, config: reading.Reading, drawn: Moves) -> dict[str, Any]:
    """The Sample's camera fields; `drawn`: see `moves`. Raises ValueError for a camera or pose that is not there."""
    assert config.cameras is not None
    channels, size = config.cameras.channels, config.cameras.image_size
    rows = [frame.rig(channels) for frame in frames]  # T N
    intrinsics = np.stack([[_square(camera.intrinsics) for camera in row] for row in rows])
    poses = [[_pose(config.base, frames[0], *pair) for pair in zip(channels, row)] for row in rows]
    base_from_camera, camera_from_base = (np.array([[p[i] for p in row] for row in poses]) for i in range(2))
    return {
        "images": _images(frames, rows, root, config.cameras, drawn),
        "image_aug": np.stack([[image.matrix(size=size, **move) for move in drawn]] * len(frames)),
        "intrinsics": intrinsics,
        "base_from_camera": base_from_camera,
        "image_from_base": intrinsics @ camera_from_base,
        "image_paths": tuple(root / camera.path for camera in rows[0]),
        "camera_names": channels,
    }


def _images(
    frames: list[Frame], rows: list[list[Camera]], root: Path, config: reading.Cameras, drawn: Moves
) -> np.ndarray:
    """[T,N,H,W,3] uint8; a frame that stands for another is read once."""
    turned: image.Filter = "nearest" if config.augmentation is None else config.augmentation.turned
    how: dict[str, Any] = {"size": config.image_size, "turned": turned}
    made: dict[str, np.ndarray] = {}
    wanted = [image_size(camera, root) for camera in rows[0]]
    for frame, row in zip(frames, rows):
        if frame.token not in made:
            for camera, of_key in zip(row, wanted):
                _check_alike(camera, root, of_key)
            pictures = [image.read(root / camera.path, size=known) for camera, known in zip(row, wanted)]
            made[frame.token] = np.stack([image.transform(p, **how, **move)[0] for p, move in zip(pictures, drawn)])
    return np.stack([made[frame.token] for frame in frames])


def _check_alike(camera: Camera, root: Path, of_key: tuple[int, int]) -> None:
    """A camera's frames are cropped as one: of another size, one would lie elsewhere in the model's image, or outside."""
    if (found := image_size(camera, root)) != of_key:
        raise ValueError(
            f"{root / camera.path}: the image of this earlier key frame is {found[1]}x{found[0]}, that of the current one "
            f"{of_key[1]}x{of_key[0]}; all frames of a camera must have one size, so resize them and their intrinsics."
        )


def _square(intrinsics: np.ndarray) -> np.ndarray:
    """3 3 -> 4 4 float32."""
    matrix = np.eye(4, dtype=np.float32)
    matrix[:3, :3] = intrinsics
    return matrix


def _pose(base: Base, key: Frame, channel: str, then: Camera) -> tuple[np.ndarray, np.ndarray]:
    """(base_from_camera, camera_from_base), 4 4 float32, of the key frame's camera `channel`, or of an earlier `then`."""
    if base is Base.LIDAR:
        camera_from_base = then.camera_from_lidar
        if then is not key.cameras[channel]:
            camera_from_base = inverse(then.global_from_ego @ then.ego_from_camera) @ key.global_from_lidar
        rounded = camera_from_base.astype(np.float32)
        return inverse(rounded), rounded  # of the rounded one, as upstream
    (global_from_base,) = key.ego_poses(base.clocks((channel,)))
    base_from_camera = inverse(global_from_base) @ then.global_from_ego @ then.ego_from_camera
    return base_from_camera.astype(np.float32), inverse(base_from_camera).astype(np.float32)
