"""The thirteen tables of nuScenes' schema (v1.0) for a written world.

Source: nuScenes schema, github.com/nutonomy/nuscenes-devkit docs/schema_nuscenes.md. No radars, no maps but the
drivable mask. Tokens are hashes of what they name, so a world always has the same ones.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from bevfn.synth.rig import CAMERAS, LIDAR, Rig, quaternion
from bevfn.synth.world import TICK, TICKS_PER_FRAME, World

TABLES = (
    *("category", "attribute", "visibility", "sensor"),  # the same for every scene
    *("instance", "calibrated_sensor", "ego_pose", "log", "scene", "sample", "sample_data", "sample_annotation", "map"),
)
_PEOPLE = ("adult", "child", "wheelchair", "stroller", "personal_mobility", "police_officer", "construction_worker")
_VEHICLES = ("car", "motorcycle", "bicycle", "bus.bendy", "bus.rigid", "truck", "construction")
CATEGORIES = (
    *(f"human.pedestrian.{kind}" for kind in _PEOPLE),
    "animal",
    *(f"vehicle.{kind}" for kind in (*_VEHICLES, "emergency.ambulance", "emergency.police", "trailer")),
    *(f"movable_object.{kind}" for kind in ("barrier", "trafficcone", "pushable_pullable", "debris")),
    "static_object.bicycle_rack",
)
ATTRIBUTES = (
    *(f"vehicle.{state}" for state in ("moving", "stopped", "parked")),
    *(f"cycle.{state}" for state in ("with_rider", "without_rider")),
    *(f"pedestrian.{state}" for state in ("sitting_lying_down", "standing", "moving")),
)
VISIBILITIES = ("v0-40", "v40-60", "v60-80", "v80-100")  # tokens "1" to "4"
EPOCH = 1_700_000_000_000_000  # us, start of scene 0; a scene is 100 s later than the one before
LOG = {"vehicle": "bevfn", "date_captured": "2023-11-14", "location": "bevfn-town"}  # the same for all logs
STANDS = 0.2  # m/s, slower is not moving


Namer = Callable[..., str]  # a scene's own `token`


@dataclass(frozen=True)
class Seen:
    """What a key frame's sensors saw of the objects: lidar points [G] in the box, and the visible share [G] 0..1."""

    points: np.ndarray
    visible: np.ndarray


def token(*parts: object) -> str:
    """32 hexadecimal digits."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def timestamp(number: int, t: float) -> int:
    """us; t in s from the first key frame of scene `number`."""
    return EPOCH + number * 100_000_000 + round(t * 1e6)


def file_name(number: int, channel: str, t: float, key: bool) -> str:
    """Path of a sensor file below the data set's root, named as nuScenes does; t in s."""
    ending = "pcd.bin" if channel == LIDAR else "jpg"
    return f"{'samples' if key else 'sweeps'}/{channel}/{logfile(number)}__{channel}__{timestamp(number, t)}.{ending}"


def logfile(number: int) -> str:
    """Name of a scene's log."""
    return f"bevfn-{number:04d}"


@dataclass(frozen=True)
class Layout:
    """What a format says of times, frames and files; the defaults are nuScenes'."""

    ticks: int = TICKS_PER_FRAME
    """of a key frame"""
    scan_ticks: int = 1
    """of a lidar turn; those between key frames are sweeps"""
    in_ego: bool = False
    """clouds are written in the vehicle's frame, of no ring, by a lidar that is mounted there"""
    velocities: bool = False
    """annotations have them"""
    file: Callable[[int, str, float, bool], str] = file_name
    """see `file_name`; relative to the folder of the tables' files"""


NUSCENES = Layout()


def map_file(seed: int, number: int) -> str:
    """Path of the scene's drivable mask below the data set's root."""
    return f"maps/{token(seed, number, 'map')}.png"


def shared() -> dict[str, list[dict]]:
    """The tables that are the same for every scene."""
    return {
        "category": [
            {"token": token("category", n), "name": n, "description": n.replace(".", ", ")} for n in CATEGORIES
        ],
        "attribute": [
            {"token": token("attribute", n), "name": n, "description": n.replace(".", ", ")} for n in ATTRIBUTES
        ],
        "visibility": [
            {"token": str(i + 1), "level": level, "description": f"visibility of whole object is between {level[1:]} %"}
            for i, level in enumerate(VISIBILITIES)
        ],
        "sensor": [
            {"token": token("sensor", c), "channel": c, "modality": "lidar" if c == LIDAR else "camera"}
            for c in (LIDAR, *CAMERAS)
        ],
    }


def scene(
    world: World, rig: Rig, seen: list[Seen], *, seed: int, number: int, name: str, layout: Layout = NUSCENES
) -> dict[str, list[dict]]:
    """The rows of one scene, table by table; seen: one entry per key frame."""
    own = partial(token, seed, number)
    frames = len(seen)
    samples = [own("sample", k) for k in range(frames)]
    rows: dict[str, list[dict]] = {table: [] for table in TABLES}
    rows["log"] = [{"token": own("log"), "logfile": logfile(number), **LOG}]
    drawn = {"token": own("map"), "filename": map_file(seed, number), "log_tokens": [own("log")]}
    rows["map"] = [{"category": "semantic_prior", **drawn}]
    span = {"nbr_samples": frames, "first_sample_token": samples[0], "last_sample_token": samples[-1]}
    told = {"name": name, "description": world.story}
    rows["scene"] = [{"token": own("scene"), "log_token": own("log"), **span, **told}]
    for k, (previous, this, following) in enumerate(zip(["", *samples], samples, [*samples[1:], ""])):
        when = timestamp(number, k * TICK * layout.ticks)
        link = {"prev": previous, "next": following}
        rows["sample"].append({"token": this, "timestamp": when, **link, "scene_token": own("scene")})
    for channel, matrix in rig.ego_from_sensor.items():
        mounted = {"translation": matrix[:3, 3].tolist(), "rotation": quaternion(matrix)}
        lens = rig.intrinsics[channel].tolist() if channel in rig.intrinsics else []
        tokens = {"token": own("calibration", channel), "sensor_token": token("sensor", channel)}
        rows["calibrated_sensor"].append({**tokens, **mounted, "camera_intrinsic": lens})
        poses, data = _recordings(world, rig, channel, number, own, samples, layout)
        rows["ego_pose"] += poses
        rows["sample_data"] += data
    rows["instance"], rows["sample_annotation"] = _annotations(world, seen, own, samples, layout)
    return rows


def moments(channel: str, frames: int, layout: Layout = NUSCENES) -> list[tuple[float, int, bool]]:
    """(t s, number of the sample it belongs to, key frame?) of a sensor's recordings, in order.

    The lidar turns (20 Hz in nuScenes' layout) from the first key frame to the last; a sweep belongs to the key frame that
    follows it. The cameras have key frames only.
    """
    ticks = layout.ticks
    if channel != LIDAR:
        return [(k * ticks * TICK + CAMERAS[channel][3], k, True) for k in range(frames)]
    last = (frames - 1) * ticks
    return [(i * TICK, -(-i // ticks), i % ticks == 0) for i in range(0, last + 1, layout.scan_ticks)]


def _recordings(
    world: World, rig: Rig, channel: str, number: int, own: Namer, samples: list[str], layout: Layout
) -> tuple[list[dict], list[dict]]:
    """Rows of ego_pose and sample_data of one sensor."""
    poses, data = [], []
    height, width = (0, 0) if channel == LIDAR else rig.image_size
    every = moments(channel, len(samples), layout)
    tokens = [own("data", channel, i) for i in range(len(every))]
    for i, (t, k, key) in enumerate(every):
        pose, when = world.global_from_ego(t), timestamp(number, t)
        moved = {"rotation": quaternion(pose), "translation": pose[:3, 3].tolist()}
        poses.append({"token": tokens[i], "timestamp": when, **moved})
        of = {"sample_token": samples[k], "ego_pose_token": tokens[i]}
        file = {"fileformat": "pcd" if channel == LIDAR else "jpg", "is_key_frame": key}
        size = {"height": height, "width": width, "filename": layout.file(number, channel, t, key)}
        link = {"prev": tokens[i - 1] if i else "", "next": tokens[i + 1] if i + 1 < len(every) else ""}
        taken = {"calibrated_sensor_token": own("calibration", channel), "timestamp": when}
        data.append({"token": tokens[i], **of, **taken, **file, **size, **link})
    return poses, data


def annotated(seen: list[Seen]) -> np.ndarray:
    """Mask [frames,G]: an object is annotated from the first to the last key frame in which the lidar meets it."""
    met = np.array([s.points > 0 for s in seen])
    return np.logical_or.accumulate(met) & np.logical_or.accumulate(met[::-1])[::-1]


def _annotations(
    world: World, seen: list[Seen], own: Namer, samples: list[str], layout: Layout
) -> tuple[list[dict], list[dict]]:
    """Rows of instance and sample_annotation."""
    instances, annotations = [], []
    mask = annotated(seen)
    times = np.arange(len(seen)) * TICK * layout.ticks
    boxes = np.array([world.boxes(t) for t in times])  # F G 7
    velocities = np.array([world.velocities(t) for t in times])  # F G 2
    speeds = np.hypot(velocities[..., 0], velocities[..., 1])  # F G
    for g in np.flatnonzero(mask.any(axis=0)):
        frames = np.flatnonzero(mask[:, g])
        tokens = [own("annotation", g, k) for k in frames]
        kind = {"token": own("instance", g), "category_token": token("category", world.categories[g])}
        ends = {"first_annotation_token": tokens[0], "last_annotation_token": tokens[-1]}
        instances.append({**kind, "nbr_annotations": len(frames), **ends})
        for k, previous, this, following in zip(frames, ["", *tokens], tokens, [*tokens[1:], ""]):
            x, y, z, length, width, height, yaw = boxes[k, g].tolist()
            level = int(np.searchsorted([0.4, 0.6, 0.8], seen[k].visible[g], side="right")) + 1
            of = {"sample_token": samples[k], "instance_token": own("instance", g), "visibility_token": str(level)}
            box = {"translation": [x, y, z], "size": [width, length, height]}
            spin = {"rotation": [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))]}
            link = {"prev": previous, "next": following}
            met = {"num_lidar_pts": int(seen[k].points[g]), "num_radar_pts": 0}
            named = {"attribute_tokens": attribute(world, g, speeds[k, g])}
            moving = {"velocity": [*velocities[k, g].tolist(), 0.0]} if layout.velocities else {}
            annotations.append({"token": this, **of, **named, **box, **spin, **link, **met, **moving})
    return instances, annotations


def attribute(world: World, g: int, speed: float) -> list[str]:
    """Tokens: one attribute for vehicles, cycles and pedestrians, none for barriers and cones."""
    category, moving = world.categories[g], speed > STANDS
    if category.startswith("movable_object"):
        return []
    if category in ("vehicle.bicycle", "vehicle.motorcycle"):
        name = "cycle.with_rider" if world.riders[g] else "cycle.without_rider"
    elif category.startswith("human"):
        name = "pedestrian.moving" if moving else "pedestrian.standing"
    else:
        name = "vehicle.parked" if world.parked[g] else "vehicle.moving" if moving else "vehicle.stopped"
    return [token("attribute", name)]
