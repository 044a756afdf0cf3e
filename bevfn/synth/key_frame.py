"""One generated key frame in the on-disk form that `frame.load` reads: no data set is needed to run a demo or a test.

A flat ground with boxes of the ten classes, seen by a 32-beam lidar (ray-cast, with occlusion) and six pinhole cameras
with nuScenes-like calibration (painted). The world is made in the lidar frame: x right, y forward, z up, metres.
Everything is simultaneous and, like `seed`, deterministic.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from bevfn.boxes import corners
from bevfn.files import to_json, write_atomically
from bevfn.synth.lidar import AZIMUTHS, BEAMS, MAX_RANGE
from bevfn.synth.rig import CALIBRATED_SIZE, CAMERAS, EGO_FROM_LIDAR, camera_mount

# class: (length, width, height [m]: nuScenes means; how many; top speed [m/s]; RGB; lidar intensity 0..255)
CLASSES: dict[str, tuple[tuple[float, float, float], int, float, tuple[int, int, int], int]] = {
    "car": ((4.63, 1.96, 1.74), 7, 9.0, (60, 110, 230), 30),
    "truck": ((6.93, 2.51, 2.84), 2, 8.0, (230, 140, 40), 35),
    "construction_vehicle": ((6.37, 2.85, 3.19), 1, 0.0, (240, 210, 40), 40),
    "bus": ((10.5, 2.94, 3.47), 1, 8.0, (200, 50, 50), 35),
    "trailer": ((12.29, 2.90, 3.87), 1, 0.0, (150, 90, 60), 25),
    "barrier": ((0.50, 2.53, 0.98), 4, 0.0, (240, 120, 190), 60),
    "motorcycle": ((2.11, 0.77, 1.47), 2, 9.0, (40, 190, 190), 20),
    "bicycle": ((1.70, 0.60, 1.28), 2, 4.0, (120, 220, 60), 18),
    "pedestrian": ((0.73, 0.67, 1.77), 5, 1.5, (170, 70, 220), 12),
    "traffic_cone": ((0.41, 0.41, 1.07), 4, 0.0, (250, 80, 20), 90),
}
NAMES = tuple(CLASSES)
LIDAR_FILE = "LIDAR_TOP.pcd.bin"
LIDAR_HEIGHT = float(EGO_FROM_LIDAR[2, 3])  # m above ground
RANGE_NOISE = 0.01  # m, standard deviation along the ray
SUN = np.array([0.35, 0.50, 0.79])  # unit vector towards the light
NEAR = 0.1  # m, near plane of the cameras
# corner numbers of `boxes.corners` and outward normals in the box frame: front, left, rear, right, top
FACES = (
    ((3, 0, 4, 7), (1, 0, 0)),
    ((0, 1, 5, 4), (0, 1, 0)),
    ((1, 2, 6, 5), (-1, 0, 0)),
    ((2, 3, 7, 6), (0, -1, 0)),
    ((4, 5, 6, 7), (0, 0, 1)),
)


@dataclass(frozen=True)
class World:
    """boxes [G,9] (bottom centre, dims, yaw, velocity; lidar frame) and labels [G] into NAMES."""

    boxes: np.ndarray
    labels: np.ndarray

    @property
    def radii(self) -> np.ndarray:
        """[G] m, of the circles around the footprints; these circles do not overlap."""
        return np.hypot(self.boxes[:, 3], self.boxes[:, 4]) / 2


def write_frame(folder: Path, seed: int = 0, *, image_size: tuple[int, int] = CALIBRATED_SIZE) -> Path:
    """Writes frame.json, six JPEGs of image_size (H,W) and LIDAR_TOP.pcd.bin into `folder`; returns it.

    frame.json is written last and every file atomically, so a folder with a frame.json is complete.
    """
    folder = Path(folder)
    rng = np.random.default_rng(seed)
    world = place(rng)
    points, hit = scan(world, rng)
    images = {}
    for name, (heading, position, focal, _) in CAMERAS.items():
        ego_from_camera = camera_mount(heading, position)
        camera_from_lidar = np.linalg.inv(ego_from_camera) @ EGO_FROM_LIDAR
        intrinsics = _intrinsics(focal, image_size)
        encoded = io.BytesIO()
        paint(world, camera_from_lidar, intrinsics, image_size).save(encoded, "JPEG", quality=90)
        write_atomically(folder / f"{name}.jpg", encoded.getvalue())
        images[name] = {
            "img_path": f"{name}.jpg",
            "cam2img": intrinsics.tolist(),
            "cam2ego": ego_from_camera.tolist(),
            "lidar2cam": camera_from_lidar.tolist(),
            "height": image_size[0],
            "width": image_size[1],
        }
    write_atomically(folder / LIDAR_FILE, points.tobytes())
    returns = np.bincount(hit[hit >= 0], minlength=len(world.boxes))  # G
    info = {
        "token": f"synthetic-{seed}",
        "timestamp": 0.0,
        "ego2global": np.eye(4).tolist(),
        "images": images,
        "lidar_points": {"num_pts_feats": 5, "lidar_path": LIDAR_FILE, "lidar2ego": EGO_FROM_LIDAR.tolist()},
        "instances": [_instance(*item) for item in zip(world.boxes, world.labels, returns)],
    }
    metainfo = {
        "categories": {name: i for i, name in enumerate(NAMES)},
        "dataset": "synthetic",
        "version": "1",
        "info_version": "1.1",
    }
    write_atomically(folder / "frame.json", to_json({"metainfo": metainfo, "data_list": [info]}, indent=1))
    return folder


def place(rng: np.random.Generator) -> World:
    """Boxes of every class on the ground, 5 to 48 m away, no two footprints' circles touching."""
    boxes, labels = np.zeros((0, 9)), np.zeros(0, dtype=np.int64)
    kinds = [label for label, name in enumerate(NAMES) for _ in range(CLASSES[name][1])]
    for label in sorted(kinds, key=lambda kind: -max(CLASSES[NAMES[kind]][0])):  # long ones find room first
        size, _, top_speed, _, _ = CLASSES[NAMES[label]]
        dims = np.array(size) * rng.uniform(0.9, 1.1, 3)
        radius = np.hypot(dims[0], dims[1]) / 2
        taken = World(boxes, labels)
        while True:
            distance, angle = rng.uniform(5.0 + radius, 48.0), rng.uniform(-np.pi, np.pi)
            xy = distance * np.array([np.cos(angle), np.sin(angle)])
            if (np.linalg.norm(boxes[:, :2] - xy, axis=1) > taken.radii + radius + 0.3).all():
                break
        yaw = rng.uniform(-np.pi, np.pi)
        velocity = rng.uniform(0.0, top_speed) * np.array([np.cos(yaw), np.sin(yaw)])
        boxes = np.vstack([boxes, np.concatenate([xy, [-LIDAR_HEIGHT], dims, [yaw], velocity])])
        labels = np.append(labels, label)
    return World(boxes, labels)


def scan(world: World, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One turn of the lidar: (points [P,5] float32: x, y, z, intensity, ring; hit [P] box of each point, -1 ground)."""
    azimuth = np.linspace(np.pi, -np.pi, AZIMUTHS, endpoint=False)  # clockwise, as the sensor turns
    azimuth, elevation = (a.ravel() for a in np.meshgrid(azimuth, BEAMS, indexing="ij"))
    flat = np.cos(elevation)
    rays = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], axis=1)  # R 3, unit
    with np.errstate(divide="ignore"):
        ground = np.where(rays[:, 2] < 0, -LIDAR_HEIGHT / rays[:, 2], np.inf)  # R
    distance = np.concatenate([_enter(world.boxes, rays), ground[None]])  # G+1 R
    first = distance.argmin(axis=0)
    reach = distance.min(axis=0) + rng.normal(0.0, RANGE_NOISE, len(rays))
    brightness = np.append([CLASSES[NAMES[label]][4] for label in world.labels], 8)  # G+1
    intensity = np.round(brightness[first] * rng.uniform(0.7, 1.3, len(rays)))
    ring = np.tile(np.arange(len(BEAMS)), AZIMUTHS)
    seen = reach < MAX_RANGE
    points = np.column_stack([rays[seen] * reach[seen, None], intensity[seen], ring[seen]]).astype("<f4")
    return points, np.where(first < len(world.boxes), first, -1)[seen]


def _enter(boxes: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Distance [G,R] at which rays [R,3] from the origin enter each box (slab test), infinite where they miss."""
    cos, sin = np.cos(boxes[:, 6, None]), np.sin(boxes[:, 6, None])  # G 1

    def into(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:  # lidar axes to box axes
        return np.stack([cos * x + sin * y, cos * y - sin * x, z + 0 * cos])

    along = into(*rays.T)  # 3 G R
    half = boxes[:, 3:6].T[..., None] / 2  # 3 G 1
    start = -into(*boxes[:, :3].T[..., None])  # 3 G 1
    start[2] -= half[2]  # from the box's centre
    with np.errstate(divide="ignore"):
        t0, t1 = (-half - start) / along, (half - start) / along
    enter = np.minimum(t0, t1).max(axis=0)
    leave = np.maximum(t0, t1).min(axis=0)
    return np.where((enter <= leave) & (enter > 0), enter, np.inf)


def paint(world: World, camera_from_lidar: np.ndarray, intrinsics: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The camera's picture of size (H,W): sky, ground with a 4 m chequer, shaded boxes from far to near.

    The order is exact: seen from a point, disjoint circles are sorted by their power d^2 - r^2 (power diagram).
    """
    rotation, position = camera_from_lidar[:3, :3], np.linalg.inv(camera_from_lidar)[:3, 3]
    canvas = Image.fromarray(_background(rotation, position, intrinsics, size))
    draw = ImageDraw.Draw(canvas)
    power = ((world.boxes[:, :2] - position[:2]) ** 2).sum(axis=1) - world.radii**2
    loops = corners(torch.from_numpy(world.boxes)).numpy()  # G 8 3
    for g in np.argsort(-power):
        cos, sin = np.cos(world.boxes[g, 6]), np.sin(world.boxes[g, 6])
        for loop, (nx, ny, nz) in FACES:
            normal = np.array([cos * nx - sin * ny, sin * nx + cos * ny, nz])
            face = loops[g, list(loop)]  # 4 3
            if (position - face[0]) @ normal <= 0:
                continue
            seen = _clip((face @ rotation.T) + camera_from_lidar[:3, 3])
            if len(seen) >= 3:
                pixels = seen @ intrinsics.T
                shade = 0.55 + 0.45 * max(0.0, float(normal @ SUN))
                colour = tuple(int(c * shade) for c in CLASSES[NAMES[world.labels[g]]][3])
                edge = tuple(int(c * 0.6) for c in colour)
                draw.polygon([(u, v) for u, v in pixels[:, :2] / pixels[:, 2:]], fill=colour, outline=edge)
    return canvas


def _background(rotation: np.ndarray, position: np.ndarray, intrinsics: np.ndarray, size: tuple) -> np.ndarray:
    """Sky above the horizon, and the ground where a pixel's ray meets it, [H,W,3] uint8; size (H,W)."""
    v, u = np.mgrid[: size[0], : size[1]]
    pixels = np.stack([u, v, np.ones_like(u)], axis=-1) + np.array([0.5, 0.5, 0.0])  # H W 3
    rays = pixels @ (rotation.T @ np.linalg.inv(intrinsics)).T  # H W 3, lidar frame
    with np.errstate(divide="ignore"):
        reach = np.where(rays[..., 2] < 0, -(position[2] + LIDAR_HEIGHT) / rays[..., 2], np.inf)
    near = np.where(reach < 300.0, reach, 0.0)
    place = position[:2] + rays[..., :2] * near[..., None]  # H W 2
    chequer = (np.floor(place / 4.0).sum(axis=-1) % 2)[..., None]
    fade = np.exp(-near / 60.0)[..., None]  # distance washes the pattern out, which hides its aliasing
    ground = 105.0 + 14.0 * (chequer - 0.5) * fade + np.zeros(3)
    sky = np.array([150.0, 185.0, 225.0]) + 50.0 * (v / size[0])[..., None]
    return np.clip(np.where((reach < 300.0)[..., None], ground, sky), 0, 255).astype(np.uint8)


def _clip(polygon: np.ndarray) -> np.ndarray:
    """The part of a polygon [n,3] (camera frame) in front of the near plane (Sutherland-Hodgman)."""
    kept = []
    for a, b in zip(polygon, np.roll(polygon, -1, axis=0)):
        if a[2] >= NEAR:
            kept.append(a)
        if (a[2] >= NEAR) != (b[2] >= NEAR):
            kept.append(a + (b - a) * (NEAR - a[2]) / (b[2] - a[2]))
    return np.array(kept).reshape(-1, 3)


def _intrinsics(focal: float, image_size: tuple[int, int]) -> np.ndarray:
    """[3,3]; the focal length is for CALIBRATED_SIZE, the principal point a little below the centre as on nuScenes."""
    down, right = image_size[0] / CALIBRATED_SIZE[0], image_size[1] / CALIBRATED_SIZE[1]
    return np.array([[focal * right, 0.0, 812.0 * right], [0.0, focal * down, 491.0 * down], [0.0, 0.0, 1.0]])


def _instance(box: np.ndarray, label: int, returns: int) -> dict:
    """One entry of `instances`; the file holds the gravity centre."""
    centre = [*box[:2].tolist(), float(box[2] + box[5] / 2)]
    seen = {"bbox_3d_isvalid": bool(returns > 0), "num_lidar_pts": int(returns), "num_radar_pts": 0}
    what = {"bbox_3d": [*centre, *box[3:7].tolist()], "bbox_label_3d": int(label), "velocity": box[7:9].tolist()}
    return {**what, **seen}
