"""Who is on the roads: what stands there and what moves, as tracks in time; the ego vehicle's own drive.

A track is [T,3]: x, y, yaw (unwrapped) at the times [T] s that all functions here take.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator

from bevfn.synth.roads import LANE, STEP, STOP, STRIP, TURNED, WALK, Path, Road, joined

# class: length, width, height [m], nuScenes' means (two-wheelers: with a rider)
SIZES: dict[str, tuple[float, float, float]] = {
    "car": (4.63, 1.96, 1.74),
    "truck": (6.93, 2.51, 2.84),
    "construction_vehicle": (6.37, 2.85, 3.19),
    "bus": (10.5, 2.94, 3.47),
    "trailer": (12.29, 2.90, 3.87),
    "barrier": (0.50, 2.53, 0.98),
    "motorcycle": (2.11, 0.77, 1.62),
    "bicycle": (1.70, 0.60, 1.60),
    "pedestrian": (0.73, 0.67, 1.77),
    "traffic_cone": (0.41, 0.41, 1.07),
}
NAMES = tuple(SIZES)
RIDERLESS = 0.72  # of the height with a rider
CATEGORIES = {
    "car": "vehicle.car",
    "truck": "vehicle.truck",
    "construction_vehicle": "vehicle.construction",
    "bus": "vehicle.bus.rigid",
    "trailer": "vehicle.trailer",
    "barrier": "movable_object.barrier",
    "motorcycle": "vehicle.motorcycle",
    "bicycle": "vehicle.bicycle",
    "pedestrian": "human.pedestrian.adult",
    "traffic_cone": "movable_object.trafficcone",
}
EGO_SIZE = (4.08, 1.73, 1.56)  # m
EGO_FRONT = 3.4  # m from the ego frame's origin (rear axle) to the front bumper


Drive = tuple[Path, np.ndarray]  # a path, and the distance travelled on it [T], m
Reach = tuple[float, float]  # from one arc length to another, m


@dataclass(frozen=True)
class Thing:
    """An annotated object before it is placed. track [T,3]: x, y, yaw unwrapped, global, every TICK."""

    name: str
    size: np.ndarray
    track: np.ndarray
    shape: str
    category: str
    parked: bool = False
    paint: np.ndarray | None = None
    pulled_by: "Thing | None" = None  # left out where this one is


def drive_ego(
    rng: Generator, story: str, main: Road, side: Road, crossing: float, times: np.ndarray
) -> tuple[np.ndarray, Drive]:
    """Track [T,3] of the ego vehicle, and its (path, distance travelled [T] m), which its lane shares."""
    lane = {"right": main.lanes - 1, "left": 0}.get(story, int(rng.integers(main.lanes)))
    path = main.path.aside(-LANE * (lane + 0.5))
    speed = rng.uniform(4.0, 6.5) if story in ("right", "left") else rng.uniform(6.0, 11.0)
    if story in ("right", "left"):
        leaving = (side.path if story == "right" else side.path.back()).aside(-LANE / 2)
        room = side.half + (3.0 if story == "right" else 1.0)
        before = np.arange(path.start, crossing - room, STEP)
        after = np.arange(main.half + (3.0 if story == "right" else 1.0), leaving.end, STEP)
        path = joined(path.at(before), leaving.at(after), path.start)
        travel = speed * times
    elif story == "wait":
        queue = rng.choice([0.0, 8.0, 16.0])  # m, others wait in front
        room = crossing - side.half - STOP - EGO_FRONT - queue
        brake = speed**2 / (2 * room)
        moving = np.minimum(times, speed / brake)
        travel = speed * moving - brake * moving**2 / 2
    else:
        travel = speed * times + 0.8 * (1 - np.cos(0.6 * times)) / 0.6
    return path.at(travel), (path, travel)


def everything(
    rng: Generator, story: str, main: Road, side: Road, crossing: float, drive: Drive, times: np.ndarray
) -> list[Thing]:
    """Everything that might be there, the most wanted first."""
    busy = rng.uniform(0.4, 1.0)
    near, far = -70.0, 90.0 + 8.0 * times[-1]
    return [
        *_work_zone(rng, main, crossing, times),
        *_wanted(rng, main, times),
        *_parked(rng, main, crossing, (near, far), busy, times),
        *_vehicles(rng, story, main, side, crossing, drive, (near, far), busy, times),
        *_cyclists(rng, main, times),
        *_walkers(rng, main, crossing, (near, far), busy, times),
    ]


def _work_zone(rng: Generator, main: Road, crossing: float, times: np.ndarray) -> list[Thing]:
    """On the right, from about 10 m ahead of the start to before the crossing, beside the outermost lane."""
    edge = -LANE * main.lanes  # left offset of the lane's edge
    start = rng.uniform(9.0, 13.0)
    things = []
    for k in range(int(rng.integers(4, 7))):  # cones lead in
        s = start + 2.2 * k
        things.append(_thing(rng, "traffic_cone", _still(main.path.at(s, edge - 2.2 + 0.35 * k), times)))
    start = s + 2.5
    end = crossing - 10.0
    for k in range(min(int(rng.integers(3, 6)), int((end - start) / 2.9) + 1)):
        pose = main.path.at(start + 2.9 * k, edge - 0.45)
        things.append(_thing(rng, "barrier", _still(pose, times, np.pi / 2 + rng.normal(0, 0.04))))
    digger = main.path.at(min(start + rng.uniform(2.0, 8.0), end - 2.0), edge - 3.3)
    wiggle = 0.25 * np.sin(0.8 * times) * (rng.random() < 0.5)  # some diggers swing
    track = _still(digger, times, rng.choice([0.0, np.pi]) + rng.normal(0, 0.2))
    things.insert(0, _thing(rng, "construction_vehicle", track + np.outer(wiggle, [0, 0, 1]), parked=not wiggle.any()))
    for _ in range(int(rng.integers(1, 4))):
        pose = main.path.at(min(start + rng.uniform(-4.0, 14.0), end), edge - rng.uniform(1.4, 5.0))
        things.append(_thing(rng, "pedestrian", _still(pose, times, rng.uniform(-3, 3)), worker=True))
    return things


def _wanted(rng: Generator, main: Road, times: np.ndarray) -> list[Thing]:
    """One of each of the rarer classes near the start, so that every scene, also a short one, can show them."""
    oncoming, strip = main.path.back(), LANE * main.lanes + STRIP / 2
    things = [
        _thing(rng, "trailer", _still(main.path.at(rng.uniform(-22, -12), strip), times, np.pi), parked=True),
        _thing(rng, "bus", _still(main.path.at(rng.uniform(6, 12), strip), times, np.pi)),
    ]
    outer, flow = -LANE * (main.lanes - 0.5), rng.uniform(5.0, 7.0)  # oncoming, in the outer lane, one behind another
    for name, low, high, left, speed in (
        ("truck", 3.0, 8.0, outer, flow),
        ("bicycle", -9.0, -3.0, outer - 1.1, rng.uniform(2.8, 4.2)),  # at the lane's edge, overtaken
        ("motorcycle", -24.0, -16.0, outer + 0.3, flow),
    ):
        things.append(_thing(rng, name, oncoming.at(rng.uniform(low, high) + speed * times, left)))
    walk = main.half + WALK / 2
    for low, high in ((4, 14), (-12, 2)):
        track = main.path.at(rng.uniform(low, high) + rng.uniform(0.8, 1.7) * times, walk + rng.uniform(-1, 1))
        things.append(_thing(rng, "pedestrian", track))
    return things


def _parked(rng: Generator, main: Road, crossing: float, reach: Reach, busy: float, times: np.ndarray) -> list[Thing]:
    """Along both kerbs, away from the crossing."""
    things = []
    for side in (-1, 1):
        s = reach[0] + rng.uniform(0, 6)
        while s < reach[1]:
            name = str(
                rng.choice(["car", "truck", "trailer", "motorcycle", "bicycle"], p=[0.72, 0.08, 0.04, 0.08, 0.08])
            )
            length = SIZES[name][0]
            if rng.random() < 0.75 * busy and abs(s + length / 2 - crossing) > 12.0 + length / 2:
                two = name in ("motorcycle", "bicycle")
                left = side * (LANE * main.lanes + STRIP / 2 + (0.9 if two else rng.normal(0, 0.08)))
                yaw = (np.pi if side > 0 else 0.0) + rng.normal(0, 0.5 if two else 0.02)
                pose = main.path.at(s + length / 2, left)
                things.append(_thing(rng, name, _still(pose, times, yaw), parked=True, rider=False))
            s += length + rng.uniform(0.8, 4.0)
    return things


def _queue(rng: Generator, path: Path, travel: np.ndarray, reach: Reach, gap: float) -> list[Thing]:
    """Vehicles between the arc lengths `reach` of `path`, all having gone travel [T] m since t = 0."""
    things: list[Thing] = []
    s = reach[0] + rng.uniform(0, gap)
    while True:
        name = str(rng.choice(["car", "truck", "bus", "motorcycle"], p=[0.78, 0.1, 0.06, 0.06]))
        length = SIZES[name][0]
        if s + length > reach[1]:
            return things
        things.append(_thing(rng, name, path.at(s + length / 2 + travel, rng.normal(0, 0.12))))
        if name == "truck" and rng.random() < 0.4:
            behind = path.at(s - 0.8 - SIZES["trailer"][0] / 2 + travel)
            things.append(replace(_thing(rng, "trailer", behind), pulled_by=things[-1]))
        s += length + 3.0 + rng.exponential(gap)


def _vehicles(
    rng: Generator,
    story: str,
    main: Road,
    side: Road,
    crossing: float,
    drive: Drive,
    reach: Reach,
    busy: float,
    times: np.ndarray,
) -> list[Thing]:
    """Own lane, the other lanes, the side road; who must wait stands before the crossing."""
    path, travel = drive
    gap, still, waits = 16.0 / busy, np.zeros_like(times), story == "wait"
    line = side.half + STOP  # m before the crossing's middle
    things = _queue(rng, path, travel, (-60.0, EGO_FRONT - EGO_SIZE[0] - 3.0), gap)
    if waits:
        things += _queue(rng, path, still, (travel.max() + EGO_FRONT + 1.5, crossing - line), 1.0)
    else:
        things += _queue(rng, path, travel, (EGO_FRONT + 4.0, reach[1]), gap)
    for k in range(main.lanes):  # all lanes in the ego vehicle's direction; in its own, what fits
        lane, flow = main.path.aside(-LANE * (k + 0.5)), rng.uniform(5.0, 10.0) * times
        if waits:
            things += _queue(rng, lane, travel, (reach[0], -2.0), gap)
            things += _queue(rng, lane, flow, (crossing + line, reach[1]), gap)
        else:
            things += _queue(rng, lane, flow, reach, gap)
    for k in range(main.lanes):  # oncoming
        lane, flow = main.path.back().aside(-LANE * (k + 0.5)), rng.uniform(6.0, 11.0) * times
        if waits or story == "left":
            things += _queue(rng, lane, still, (-reach[1], -crossing - line), gap / 2)
            things += _queue(rng, lane, flow, (-crossing + line, -reach[0]), gap)
        else:
            things += _queue(rng, lane, flow, (-reach[1] - 40.0, -reach[0]), gap)
    line = main.half + STOP
    for way in (side.path, side.path.back()):
        lane, flow = way.aside(-LANE / 2), rng.uniform(5.0, 9.0) * times
        if waits:
            things += _queue(rng, lane, flow, (-100.0, 90.0), gap)
        else:
            things += _queue(rng, lane, still, (-60.0, -line), gap / 2)
            things += _queue(rng, lane, flow, (line, 80.0), gap)
    return things


def _cyclists(rng: Generator, main: Road, times: np.ndarray) -> list[Thing]:
    """On the line between the outer lane and the parking strip."""
    things = []
    for _ in range(int(rng.integers(0, 5))):
        path = main.path if rng.random() < 0.5 else main.path.back()
        track = path.at(rng.uniform(-40, 60) + rng.uniform(3.0, 6.5) * times, -LANE * main.lanes)
        things.append(_thing(rng, "bicycle", track))
    return things


def _walkers(rng: Generator, main: Road, crossing: float, reach: Reach, busy: float, times: np.ndarray) -> list[Thing]:
    """On the sidewalks, alone or in twos, most of them walking; some cross the road near the crossing."""
    things = []
    for _ in range(int(rng.integers(8, 30) * busy) + 2):
        s, side = rng.uniform(reach[0] + 20, reach[1] - 20), rng.choice([-1.0, 1.0])
        way = rng.choice([-1.0, 1.0])
        speed = 0.0 if rng.random() < 0.25 else rng.uniform(0.7, 1.8)
        left = side * (main.half + rng.uniform(0.5, WALK - 0.5))
        for k in range(1 + int(rng.random() < 0.3)):
            track = main.path.at(s + way * speed * times, left + 0.9 * k * side)
            things.append(_thing(rng, "pedestrian", track if way > 0 else track + TURNED))
    for _ in range(int(rng.integers(0, 4))):  # across the road, over the crosswalk
        way, speed = rng.choice([-1.0, 1.0]), rng.uniform(0.9, 1.6)
        x, y, yaw = main.path.at(crossing - 8.0 + rng.uniform(-0.8, 0.8))
        along = -way * (main.half + rng.uniform(0.0, 2.0)) + way * speed * times
        xy = np.column_stack([x - along * np.sin(yaw), y + along * np.cos(yaw)])
        heading = np.full(len(times), yaw + way * np.pi / 2)
        things.append(_thing(rng, "pedestrian", np.column_stack([xy, heading])))
    return things


def _size(rng: Generator, name: str) -> np.ndarray:
    return np.array(SIZES[name]) * np.clip(rng.normal(1.0, 0.06, 3), 0.85, 1.15)


def _thing(
    rng: Generator, name: str, track: np.ndarray, *, parked: bool = False, rider: bool = True, worker: bool = False
) -> Thing:
    size, shape, category, paint = _size(rng, name), name, CATEGORIES[name], None
    if name in ("motorcycle", "bicycle") and not rider:
        size, shape = size * [1, 1, RIDERLESS], f"{name} without rider"
    if name == "pedestrian" and worker:
        category, paint = "human.pedestrian.construction_worker", np.array([235, 225, 40])
    elif name == "pedestrian" and rng.random() < 0.1:
        size, category = size * 0.65, "human.pedestrian.child"
    return Thing(name, size, track, shape, category, parked, paint)


def ahead(track: np.ndarray, distance: float) -> np.ndarray:
    """The track [T,3] of a point `distance` m further forward on the same body."""
    yaw = track[:, 2]
    return track + distance * np.stack([np.cos(yaw), np.sin(yaw), np.zeros_like(yaw)], axis=-1)


def _still(pose: np.ndarray, times: np.ndarray, turned: float = 0.0) -> np.ndarray:
    return np.tile(pose + np.array([0.0, 0.0, turned]), (len(times), 1))


def without_contact(things: list[Thing]) -> list[Thing]:
    """Those that never touch an earlier one. A footprint is covered by circles along its length (or width)."""
    tracks = np.array([thing.track[::5] for thing in things])  # N T 3
    radii = np.array([np.hypot(*thing.size[:2]) / 2 for thing in things])
    kept: dict[int, np.ndarray] = {}  # number: circles
    for i, thing in enumerate(things):
        if thing.pulled_by is not None and not any(things[j] is thing.pulled_by for j in kept):
            continue
        mine, others = _circles(thing, tracks[i]), np.array(list(kept), dtype=int)
        distance = np.linalg.norm(tracks[others, :, :2] - tracks[i, :, :2], axis=-1)  # K T
        close = others[(distance < (radii[others] + radii[i])[:, None] + 0.3).any(axis=1)]
        if not any(_touch(mine, kept[j]) for j in close):
            kept[i] = mine
    return [things[i] for i in kept]


def _touch(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether circles [T,c,3] and [T,d,3] overlap at any time."""
    gap = np.linalg.norm(a[:, :, None, :2] - b[:, None, :, :2], axis=-1)  # T c d
    return bool((gap < a[:, :, None, 2] + b[:, None, :, 2]).any())


def _circles(thing: Thing, track: np.ndarray) -> np.ndarray:
    """[T,c,3] x, y, radius."""
    length, width = thing.size[:2]
    long, narrow = max(length, width), min(length, width)
    count = int(np.ceil(2 * long / narrow))
    at = (np.arange(count) - (count - 1) / 2) * (long / count)  # c
    yaw = track[:, 2] + (np.pi / 2 if width > length else 0.0)
    direction = np.stack([np.cos(yaw), np.sin(yaw)], axis=-1)  # T 2
    xy = track[:, None, :2] + at[:, None] * direction[:, None]  # T c 2
    radius = np.hypot(long / count, narrow) / 2 * 0.96
    return np.concatenate([xy, np.full((*xy.shape[:2], 1), radius)], axis=-1)
