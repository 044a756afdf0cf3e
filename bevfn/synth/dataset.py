"""Writes a world to disk in nuScenes' format or in T4's, several key frames at a time in several processes."""

import errno
import glob
import os
import shutil
import socket
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from bevfn import host, waiting
from bevfn.files import as_read, read_json, to_json
from bevfn.synth import camera, lidar, t4, tables
from bevfn.synth.rig import CAMERAS, LIDAR, Rig, mounted, quaternion
from bevfn.synth.roads import GROUND_INTENSITY, GROUND_RGB, ground
from bevfn.synth.tables import Seen
from bevfn.synth.world import TICK, World, build

VERSION = "v1.0-trainval"
DESCRIPTION = "world.json"  # of what was made
OFFICIAL_VAL = 150  # scenes of nuScenes' split val, whose names are used
FORM = 1  # changes when the same settings give other files
Format = Literal["nuscenes", "t4"]
CHUNK = 4  # key frames a process makes at a time
ANNOTATION_RANGE = 75.0  # m from the lidar
FINE = 40.0, 0.05  # m of ground painted beyond the ego vehicle's path, m a pixel: what the cameras see nearby
WIDE = 110.0, 0.3  # the same for the rest


@dataclass(frozen=True)
class Settings:
    """All that a world depends on: equal settings, equal bytes (on one machine with its libraries)."""

    scenes: int
    seed: int
    frames_per_scene: int
    image_size: tuple[int, int]
    azimuths: int
    form: int = FORM
    format: Format = "nuscenes"

    @property
    def layout(self) -> tables.Layout:
        """Of its format."""
        return t4.LAYOUT if self.format == "t4" else tables.NUSCENES

    @property
    def described(self) -> Any:
        """As world.json has them; worlds in nuScenes' format are older than the choice of one."""
        told = asdict(self)
        return as_read(told if self.format != "nuscenes" else {k: v for k, v in told.items() if k != "format"})


def write(
    out: Path,
    *,
    scenes: int = 10,
    seed: int = 0,
    frames_per_scene: int = 20,
    image_size: tuple[int, int] = (900, 1600),
    azimuths: int = lidar.AZIMUTHS,
    format: Format = "nuscenes",
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Writes the world `seed` into the new or empty folder `out` and returns it.

    Scene i does not depend on how many there are. Every fourth scene, beginning with the second, has a name of the
    official val split, the others of train. Key frames (2 Hz) have six JPEGs of image_size (H,W) and a lidar turn of
    `azimuths` firings; between them lie nine lidar sweeps (20 Hz); cameras have no sweeps. In T4's format (`t4`) key frames
    come at 10 Hz, without sweeps, and a list beside the scenes says which are of train and of val.

    All is written beside `out` and renamed at the end, so `out` is complete or not there. A folder that already holds
    this very world is left as it is, also one that another process has made meanwhile. Raises ValueError, one sentence, for a folder with anything else in it, a folder
    that cannot be written, and settings out of range.
    """
    if len(image_size) != 2 or min(image_size) < 32:
        raise ValueError(f"image_size is {image_size}; give (height, width) in pixels, at least 32 each.")
    settings = Settings(scenes, seed, frames_per_scene, (image_size[0], image_size[1]), azimuths, format=format)
    _check(settings)
    out = Path(out).absolute()
    partial = out.with_name(f"{_partials(out)}{os.getpid()}")
    try:
        if _holds(out, settings):
            return out
        _sweep(out)
        for folder in t4.folders(seed, scenes) if format == "t4" else folders():
            (partial / folder).mkdir(parents=True)
        _fill(partial, settings, workers or os.cpu_count() or 1, progress)
        if not _holds(out, settings):
            partial.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and _holds(out, settings):
            return out
        raise ValueError(
            f"{out} cannot be written ({error.strerror or error}); choose a folder on a disk with room that you may write to."
        ) from error
    except BrokenProcessPool as error:
        raise ValueError(f"a process that wrote {out} was killed, perhaps for memory; try fewer workers.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _partials(out: Path) -> str:
    """How the names begin of what processes of this machine write beside `out`; others may share the file system."""
    return f".{out.name}.partial-{socket.gethostname()}-"


def _sweep(out: Path) -> None:
    """Removes what killed processes of this machine left beside `out`."""
    for folder in out.parent.glob(f"{glob.escape(_partials(out))}*"):
        try:
            os.kill(int(folder.name.rpartition("-")[2]), 0)  # signal 0 only asks whether the process is there
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (PermissionError, ValueError):
            pass


def scene_names(scenes: int) -> list[str]:
    """Names from the devkit's official splits; scene i is in val if i % 4 == 1."""
    from nuscenes.utils.splits import train, val  # imports for seconds

    return [val[i // 4] if i % 4 == 1 else train[i - (i + 2) // 4] for i in range(scenes)]


def folders() -> list[str]:
    """The folders of a data set."""
    return [VERSION, "maps", f"sweeps/{LIDAR}", *(f"samples/{channel}" for channel in (LIDAR, *CAMERAS))]


def _check(settings: Settings) -> None:
    limits = {
        "scenes": (1, 4 * OFFICIAL_VAL),
        "frames_per_scene": (1, 180),
        "azimuths": (16, 4096),
        "seed": (0, 2**63 - 1),
    }
    for field, (low, high) in limits.items():
        value = getattr(settings, field)
        if not low <= value <= high:
            raise ValueError(f"{field} is {value}; choose {low} to {high}.")


def _holds(out: Path, settings: Settings) -> bool:
    """True if `out` is this very world, False if there is nothing yet; ValueError for anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        described = read_json((out / DESCRIPTION).read_bytes())
    except (OSError, ValueError):
        described = None
    if described == settings.described:
        return True
    what = "another synthetic world" if isinstance(described, dict) else "something else"
    raise ValueError(f"{out} holds {what}; choose a new or empty folder, or delete it first.")


def _fill(root: Path, settings: Settings, workers: int, progress: bool) -> None:
    """Writes everything below `root`, the tables last."""
    jobs = [
        (root, settings, number, first, min(first + CHUNK, settings.frames_per_scene))
        for number in range(settings.scenes)
        for first in range(0, settings.frames_per_scene, CHUNK)
    ]
    seen: dict[tuple[int, int], Seen] = {}
    total = settings.scenes * settings.frames_per_scene
    with waiting.counted("synthetic world", total, quiet=not progress) as advance:
        for found in host.unordered(_chunk, jobs, min(workers, len(jobs))):
            seen.update(found)
            advance(len(found))
    (_fill_t4 if settings.format == "t4" else _fill_nuscenes)(root, settings, seen)
    (root / DESCRIPTION).write_bytes(to_json(settings.described))


def _fill_nuscenes(root: Path, settings: Settings, seen: dict[tuple[int, int], Seen]) -> None:
    """Tables and maps of all scenes."""
    rows: dict[str, list[dict]] = {table: [] for table in tables.TABLES} | tables.shared()
    for number, name in enumerate(scene_names(settings.scenes)):
        world, more = _scene(settings, seen, number, name)
        for table, new in more.items():
            rows[table] += new
        mask = (world.map > 0).astype(np.uint8) * 255
        (root / tables.map_file(settings.seed, number)).write_bytes(cv2.imencode(".png", mask)[1].tobytes())
    for table, content in rows.items():
        (root / VERSION / f"{table}.json").write_bytes(to_json(content))


def _fill_t4(root: Path, settings: Settings, seen: dict[tuple[int, int], Seen]) -> None:
    """Tables and maps, a folder a scene, and the list of scenes."""
    for number, name in enumerate(scene_names(settings.scenes)):
        _, rows = _scene(settings, seen, number, name)
        t4.write(root / t4.home(settings.seed, number), rows | tables.shared())
    (root / f"{t4.DATABASE}.yaml").write_text(t4.lists(settings.seed, settings.scenes))


def _scene(
    settings: Settings, seen: dict[tuple[int, int], Seen], number: int, name: str
) -> tuple[World, dict[str, list[dict]]]:
    """A scene and its rows."""
    layout, (world, rig) = settings.layout, _built(settings, number)
    frames = [seen[number, k] for k in range(settings.frames_per_scene)]
    written = t4.grounded(rig) if layout.in_ego else rig
    rows = tables.scene(world, written, frames, seed=settings.seed, number=number, name=name, layout=layout)
    return world, rows


def _built(settings: Settings, number: int) -> tuple[World, Rig]:
    world = build(settings.seed, number, settings.frames_per_scene, settings.layout.ticks)
    return world, mounted(settings.seed, number, settings.image_size)


def _chunk(root: Path, settings: Settings, number: int, first: int, end: int) -> dict[tuple[int, int], Seen]:
    """Writes the sensor files of the key frames first..end-1 of a scene, with the sweeps before each."""
    cv2.setNumThreads(1)
    world, rig = _built(settings, number)
    layout, home = settings.layout, root / t4.home(settings.seed, number) if settings.format == "t4" else root
    textures = _textures(world, settings, number, first, end)
    directions = lidar.rays(settings.azimuths)
    written = t4.grounded(rig) if layout.in_ego else rig
    result = {}
    for k in range(first, end):
        for i in range(max(0, (k - 1) * layout.ticks + layout.scan_ticks), k * layout.ticks + 1, layout.scan_ticks):
            rng = np.random.default_rng([settings.seed, number, 2, i])
            cloud = scan(world, rig, i * TICK, directions, rng)
            cloud = t4.in_ego(cloud, rig) if layout.in_ego else cloud
            name = layout.file(number, LIDAR, i * TICK, i == k * layout.ticks)
            (home / name).write_bytes(cloud.tobytes())
        t = k * layout.ticks * TICK
        pixels = np.zeros((2, len(world.names)))
        for channel in CAMERAS:
            moment = t + CAMERAS[channel][3]
            picture, *seen = photograph(world, rig, channel, moment, textures)
            pixels += seen
            (home / layout.file(number, channel, moment, True)).write_bytes(camera.encode(picture))
        result[number, k] = Seen(count(world, written, t, cloud), pixels[0] / np.maximum(pixels[1], 1))
    return result


def photograph(
    world: World, rig: Rig, channel: str, t: float, textures: tuple
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`camera.render` of one of the rig's cameras at t s; textures: of the ground, near and far."""
    camera_from_global = np.linalg.inv(world.global_from_ego(t) @ rig.ego_from_sensor[channel])
    near, far = textures
    intrinsics, objects = rig.intrinsics[channel], len(world.names)
    return camera.render(
        world.placed(t), near, far, world.weather, camera_from_global, intrinsics, rig.image_size, objects
    )


def scan(world: World, rig: Rig, t: float, directions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A lidar turn [P,5] float32 in the lidar frame at t s, along directions [A,32,3]."""
    global_from_lidar = world.global_from_ego(t) @ rig.ego_from_sensor[LIDAR]
    lidar_from_global = np.linalg.inv(global_from_lidar)
    solids = world.placed(t).moved(lidar_from_global[:3, :3], lidar_from_global[:3, 3])
    up = lidar_from_global[:3, 2]
    reach, hit = lidar.cast(solids, directions, np.append(up, up @ lidar_from_global[:3, 3]))
    brightness = np.append(solids.brightness, 0.0)[hit]
    flat = (hit < 0) & (reach < lidar.MAX_RANGE)
    xy = (directions[flat] * reach[flat, None]) @ global_from_lidar[:2, :3].T + global_from_lidar[:2, 3]
    brightness[flat] = GROUND_INTENSITY[world.ground_at(xy)]
    return lidar.points(directions, reach, brightness.astype(np.float32), world.weather.dropout, rng)


def count(world: World, rig: Rig, t: float, cloud: np.ndarray) -> np.ndarray:
    """Points [G] in each box by the devkit's own arithmetic; 0 for objects beyond ANNOTATION_RANGE."""
    pose, mount = world.global_from_ego(t), rig.ego_from_sensor[LIDAR]
    origin = (pose @ mount)[:2, 3]
    from nuscenes.utils.data_classes import Box  # imports for seconds
    from nuscenes.utils.geometry_utils import points_in_box
    from pyquaternion import Quaternion

    xyz = np.ascontiguousarray(cloud[:, :3].T)
    result = np.zeros(len(world.names), dtype=np.int64)
    for g, (x, y, z, length, width, height, yaw) in enumerate(world.boxes(t).tolist()):
        if np.hypot(x - origin[0], y - origin[1]) > ANNOTATION_RANGE:
            continue
        box = Box([x, y, z], [width, length, height], Quaternion([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]))
        for frame in (pose, mount):
            box.translate(-frame[:3, 3])
            box.rotate(Quaternion(quaternion(frame)).inverse)
        (u, v, _), reach = box.center, np.float32(max(length, width, height))
        near = (np.abs(xyz[0] - np.float32(u)) < reach) & (np.abs(xyz[1] - np.float32(v)) < reach)  # only to be quick
        result[g] = np.count_nonzero(points_in_box(box, xyz[:, near]))
    return result


def _textures(
    world: World, settings: Settings, number: int, first: int, end: int
) -> tuple[camera.Texture, camera.Texture]:
    """The ground around the ego vehicle's way to these key frames: near and fine, wide and coarse."""
    times = (k * settings.layout.ticks * TICK for k in range(max(0, first - 1), end))
    way = np.array([world.global_from_ego(t)[:2, 3] for t in times])
    rgb = (GROUND_RGB * camera.lit(world.weather, world.weather.sun[2])).astype(np.float32)
    grain = np.random.default_rng([settings.seed, number, 3]).normal(1.0, 0.05, (256, 256, 1)).astype(np.float32)
    made = []
    for around, step in (FINE, WIDE):
        corner = np.floor(way.min(axis=0) - around)
        width, height = np.ceil((way.max(axis=0) + around - corner) / step).astype(int).tolist()
        finer = max(1, round(step / 0.1))  # painted finer where coarse, so that lines do not flicker
        raster = ground(world.roads, world.crossing, corner, (height * finer, width * finer), step / finer)
        colours = cv2.resize(rgb.astype(np.uint8)[raster], (width, height), interpolation=cv2.INTER_AREA)
        colours = colours * np.tile(grain, (height // 256 + 1, width // 256 + 1, 1))[:height, :width]
        made.append(camera.Texture(np.clip(colours, 0, 255).astype(np.uint8), corner, step))
    return made[0], made[1]
