"""A scene of the synthetic world: roads, what stands and moves on them, the ego vehicle's drive, weather and light.

The rules. The ground is flat (z = 0 of the global frame). A main road with parking strips and sidewalks bends gently;
a side road crosses it. Traffic keeps right; the vehicles of a lane share one speed, so they keep their distance. The
ego vehicle drives straight on, turns left or right at the crossing, or stops before it while the side road has green.
Every scene has all ten detection classes within 50 m of the start (not all need be in sight): a work zone (barriers,
cones, a worker, a construction vehicle) on the right, a trailer, a truck, a bus and riders; the rest is drawn: parked
and moving vehicles, pedestrians on the sidewalks, buildings, trees, lamp posts. What would touch something drawn
earlier is left out.

A scene is a function of (seed, its number, its key frames) only. Global frame: metres, x east, y north, the map's lower
left corner is the origin, yaw counter-clockwise from x.

What there is not: hills, radars, camera images between key frames, returns from the ego vehicle itself, and motion
within an exposure or a turn of the lidar.
"""

from dataclasses import dataclass

import numpy as np

from bevfn.synth import shapes
from bevfn.synth.roads import GRASS, MAP_RESOLUTION, WALK, Path, Road, crossing_roads, ground
from bevfn.synth.shapes import Solids
from bevfn.synth.traffic import EGO_FRONT, EGO_SIZE, Thing, ahead, drive_ego, everything, without_contact

# class: RGB of the bodies an instance draws from
PAINTS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "car": (
        (60, 110, 230),
        (200, 200, 205),
        (40, 42, 48),
        (170, 30, 35),
        (235, 235, 235),
        (40, 90, 70),
        (120, 125, 130),
    ),
    "truck": ((230, 140, 40), (225, 225, 225), (40, 80, 160)),
    "construction_vehicle": ((240, 200, 30), (235, 170, 20)),
    "bus": ((200, 50, 50), (60, 150, 70), (230, 200, 60)),
    "trailer": ((150, 90, 60), (130, 140, 160), (110, 60, 50)),
    "barrier": ((225, 60, 40), (235, 110, 30)),
    "motorcycle": ((40, 160, 170), (30, 30, 34), (160, 30, 120)),
    "bicycle": ((120, 200, 60), (40, 120, 200), (200, 200, 60)),
    "pedestrian": ((170, 70, 220), (60, 90, 180), (190, 60, 60), (70, 140, 80), (210, 190, 120)),
    "traffic_cone": ((250, 90, 20),),
}
SECONDS = ((50, 60, 90), (90, 80, 70), (215, 215, 215), (40, 40, 44), (130, 60, 60), (70, 100, 150))  # RGB
WALLS = ((168, 150, 130), (140, 90, 75), (150, 155, 160), (190, 185, 170), (110, 112, 118))  # RGB

GROUND_CLEARANCE = 0.02  # m from the road to a box, so that returns from the road are not counted in it
TICK = 0.05  # s between two turns of the lidar, and between the knots of a track
BEFORE = 2  # ticks of a track before the first key frame, for the cameras, which expose earlier
TICKS_PER_FRAME = 10  # key frames at 2 Hz
_WORDS = {"straight": "drives straight on", "right": "turns right", "left": "turns left", "wait": "waits at a crossing"}


@dataclass(frozen=True)
class Weather:
    """What light and air do. sun: unit vector towards it; RGB 0..255; haze: 1/m; dropout: lost lidar returns."""

    name: str
    sun: np.ndarray
    light: float
    sky: np.ndarray
    horizon: np.ndarray
    haze: float
    dropout: float


@dataclass(frozen=True)
class World:
    """One scene. G objects, T = BEFORE + ticks + 2 knots of the tracks.

    names, categories, riders (False only for a cycle without one), parked: per object; sizes [G,3] length, width,
    height m; tracks [G,T,3] and ego [T,3] x, y, yaw; solids: all shapes, each in its object's frame (scenery, owner -1,
    in the global one); roads: main, side; map: raster [H,W] uint8 of GRASS .. YELLOW, MAP_RESOLUTION m a pixel, row 0
    in the north; crossing: arc length of the main road where the side road crosses; story: the scene in words.
    """

    names: tuple[str, ...]
    categories: tuple[str, ...]
    riders: tuple[bool, ...]
    parked: tuple[bool, ...]
    sizes: np.ndarray
    tracks: np.ndarray
    ego: np.ndarray
    solids: Solids
    roads: tuple[Road, ...]
    crossing: float
    map: np.ndarray
    weather: Weather
    story: str

    def poses(self, t: float) -> np.ndarray:
        """[G,3] x, y, yaw of the objects, t in s from the first key frame."""
        return _between(self.tracks, t)

    def velocities(self, t: float) -> np.ndarray:
        """[G,2] m/s, global: the slope of the track, over one tick either side."""
        return (_between(self.tracks, t + TICK / 2) - _between(self.tracks, t - TICK / 2))[:, :2] / TICK

    def global_from_ego(self, t: float) -> np.ndarray:
        """[4,4]; the body also rolls and pitches by a few tenths of a degree."""
        x, y, yaw = _between(self.ego, t)
        roll, pitch = 0.004 * np.sin(1.7 * t + 0.3), 0.005 * np.sin(1.1 * t + x)
        result = np.eye(4)
        result[:3, :3] = turn("z", yaw) @ turn("y", pitch) @ turn("x", roll)
        result[:2, 3] = x, y
        return result

    def boxes(self, t: float) -> np.ndarray:
        """[G,7] gravity centre x, y, z, length, width, height, yaw; global frame."""
        pose = self.poses(t)
        z = GROUND_CLEARANCE + self.sizes[:, 2] / 2
        return np.column_stack([pose[:, :2], z, self.sizes, pose[:, 2]])

    def ground_at(self, xy: np.ndarray) -> np.ndarray:
        """Values [n] of the map at xy [n,2] m; GRASS outside it."""
        column, up = np.floor(xy / MAP_RESOLUTION).astype(int).T
        row = len(self.map) - 1 - up
        inside = (row >= 0) & (up >= 0) & (column >= 0) & (column < self.map.shape[1])
        return np.where(inside, self.map[np.where(inside, row, 0), np.where(inside, column, 0)], GRASS)

    def placed(self, t: float) -> Solids:
        """All shapes in the global frame."""
        pose = np.vstack([self.poses(t), np.zeros(3)])  # owner -1 is the last one
        cos, sin, nil = np.cos(pose[:, 2]), np.sin(pose[:, 2]), np.zeros(len(pose))
        rotation = np.stack([cos, -sin, nil, sin, cos, nil, nil, nil, nil + 1], axis=-1).reshape(-1, 3, 3)
        translation = np.column_stack([pose[:, :2], np.append(np.full(len(pose) - 1, GROUND_CLEARANCE), 0.0)])
        return self.solids.moved(rotation[self.solids.owner], translation[self.solids.owner])


def turn(axis: str, angle: float) -> np.ndarray:
    """[3,3] rotation about the axis "x", "y" or "z", radians."""
    cos, sin = np.cos(angle), np.sin(angle)
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    result = np.eye(3)
    result[[i, i, j, j], [i, j, i, j]] = cos, -sin, sin, cos
    return result


def _between(track: np.ndarray, t: float) -> np.ndarray:
    """track [...,T,3] at t s, linear between the knots."""
    knot = np.clip(t / TICK + BEFORE, 0, track.shape[-2] - 1.000001)
    low = int(np.floor(knot + 1e-9))
    share = knot - low
    return track[..., low, :] * (1 - share) + track[..., low + 1, :] * share if share > 1e-9 else track[..., low, :]


def build(seed: int, number: int, frames: int, ticks: int = TICKS_PER_FRAME) -> World:
    """Scene `number` of the world `seed`, long enough for `frames` key frames, every `ticks` TICKs."""
    rng = np.random.default_rng([seed, number])
    times = TICK * np.arange(-BEFORE, (frames - 1) * ticks + 3)  # T
    weather = _weather(rng)
    story = str(rng.choice(["straight", "right", "left", "wait"], p=[0.45, 0.2, 0.15, 0.2]))
    main, side, crossing = crossing_roads(rng, story, times[-1])
    ego, drive = drive_ego(rng, story, main, side, crossing, times)
    own = Thing("car", np.array(EGO_SIZE), ahead(ego, EGO_FRONT - EGO_SIZE[0] / 2), "", "")
    things = without_contact([own, *everything(rng, story, main, side, crossing, drive, times)])[1:]
    scenery = _scenery(rng, main, side, np.array([thing.track[0, :2] for thing in things]))

    every = np.vstack([main.path.points, side.path.points])[:, :2]
    low, high = np.floor(every.min(axis=0) - 40.0), np.ceil(every.max(axis=0) + 40.0)
    shift = np.append(-low, 0.0)  # of x, y, yaw, or of x, y, z
    roads = tuple(Road(Path(r.path.points + shift, r.path.start), r.lanes, r.strips) for r in (main, side))
    painted = [_painted(rng, thing, owner) for owner, thing in enumerate(things)]
    return World(
        names=tuple(thing.name for thing in things),
        categories=tuple(thing.category for thing in things),
        riders=tuple("without" not in thing.shape for thing in things),
        parked=tuple(thing.parked for thing in things),
        sizes=np.array([thing.size for thing in things]),
        tracks=np.array([thing.track for thing in things]) + shift,
        ego=ego + shift,
        solids=shapes.concatenate([*painted, scenery.moved(np.eye(3), shift)]),
        roads=roads,
        crossing=crossing,
        map=ground(
            roads,
            crossing,
            np.zeros(2),
            tuple(np.round((high - low)[::-1] / MAP_RESOLUTION).astype(int)),
            MAP_RESOLUTION,
        ),
        weather=weather,
        story=f"{weather.name}, ego {_WORDS[story]}, {len(things)} objects",
    )


def _painted(rng: np.random.Generator, thing: Thing, owner: int) -> Solids:
    """Its shape in colours drawn from those of its class."""
    paints = PAINTS[thing.name]
    body = np.array(paints[rng.integers(len(paints))]) if thing.paint is None else thing.paint
    body = np.clip(body * rng.uniform(0.85, 1.1), 0, 255)
    return shapes.assemble(thing.shape, thing.size, owner, body, np.array(SECONDS[rng.integers(len(SECONDS))]))


def _weather(rng: np.random.Generator) -> Weather:
    kind = str(rng.choice(["sun", "cloud", "rain", "night"], p=[0.5, 0.25, 0.15, 0.1]))
    height, side = np.radians(rng.uniform(30, 60)), rng.uniform(0, 2 * np.pi)
    sun = np.array([np.cos(height) * np.cos(side), np.cos(height) * np.sin(side), np.sin(height)])
    tint = rng.uniform(0.95, 1.05, 3)
    rows = {  # light, sky, horizon, haze, dropout
        "sun": (1.0, (120, 165, 225), (205, 218, 232), 0.003, 0.01),
        "cloud": (0.85, (165, 172, 182), (205, 207, 210), 0.005, 0.01),
        "rain": (0.65, (135, 140, 146), (165, 168, 172), 0.011, 0.08),
        "night": (0.42, (16, 18, 32), (40, 40, 52), 0.006, 0.01),
    }[kind]
    light, sky, horizon, haze, dropout = rows
    return Weather(kind.capitalize(), sun, light, np.array(sky) * tint, np.array(horizon) * tint, haze, dropout)


def _scenery(rng: np.random.Generator, main: Road, side: Road, taken: np.ndarray) -> Solids:
    """Buildings, trees and lamp posts along both roads; owner -1, in the frame of the roads.

    taken [G,2]: where objects are at the start; posts and trees keep away.
    """
    centre_lines = [(road.path.points[::4, :2], road.half) for road in (main, side)]
    parts = []

    def put(shape: str, size: list[float], pose: np.ndarray, room: float, colour: np.ndarray | None = None) -> None:
        """Unless a point of its footprint is closer than `room` to a kerb, or it is small and something is there."""
        spin = turn("z", pose[2])
        grid = np.stack(np.meshgrid(np.linspace(-0.5, 0.5, 5), np.linspace(-0.5, 0.5, 4)), -1).reshape(-1, 2)
        footprint = pose[:2] + (grid * size[:2]) @ spin[:2, :2].T  # 20 2
        gaps = (np.linalg.norm(footprint[:, None] - line, axis=-1).min() - half for line, half in centre_lines)
        blocked = shape != "building" and np.linalg.norm(taken - pose[:2], axis=-1).min(initial=99.0) < 3.2
        if all(gap > room for gap in gaps) and not blocked:
            body = np.zeros(3) if colour is None else colour
            made = shapes.assemble(shape, np.array(size), -1, body, np.zeros(3), inset=0.0)
            parts.append(made.moved(spin, np.append(pose[:2], 0.0)))

    for road in (main, side):
        for way in (-1, 1):
            s, kerb = road.path.start, way * road.half
            while s < road.path.end:
                size = np.array([rng.uniform(9, 24), rng.uniform(8, 14), rng.uniform(4, 18)])
                colour = np.array(WALLS[rng.integers(len(WALLS))]) * rng.uniform(0.8, 1.1)
                if rng.random() < 0.7:
                    left = kerb + way * (WALK + rng.uniform(1.5, 7.0) + size[1] / 2)
                    put("building", size.tolist(), road.path.at(s + size[0] / 2, left), WALK + 0.8, colour)
                s += size[0] + rng.uniform(0.5, 10.0)
            for s in np.arange(road.path.start, road.path.end, 9.0):
                wide = rng.uniform(2.0, 3.6)
                if rng.random() < 0.45:
                    pose = road.path.at(s + rng.uniform(0, 6), kerb + way * (WALK + 0.7))
                    put("tree", [wide, wide, rng.uniform(4, 8)], pose, 1.2)
            for s in np.arange(road.path.start, road.path.end, 28.0):
                pose = road.path.at(s, kerb + way * 0.35) - [0.0, 0.0, way * np.pi / 2]
                put("pole", [1.2, 0.16, 7.0], pose, -0.3)
    return shapes.concatenate(parts)
