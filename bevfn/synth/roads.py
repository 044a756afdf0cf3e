"""Roads: curves, two roads that cross, and the ground they make as a raster.

Arc length s runs along a centre line, offsets count to the left, metres; traffic keeps right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

STEP = 0.5  # m between the points of a path
LANE, STRIP, WALK = 3.5, 2.9, 3.0  # m: lane, parking strip, sidewalk
STOP = 4.6  # m from the kerb of the side road to the stop line
MAP_RESOLUTION = 0.1  # m a pixel, what the devkit expects of masks
TURNED = np.array([0.0, 0.0, np.pi])  # of x, y, yaw
# values of the ground's raster, and of each: RGB, lidar intensity
GRASS, SIDEWALK, ASPHALT, WHITE, YELLOW = range(5)
GROUND_RGB = np.array([(96, 112, 72), (150, 148, 142), (84, 84, 88), (214, 214, 210), (206, 176, 70)], dtype=np.float64)
GROUND_INTENSITY = np.array([12, 18, 7, 60, 45], dtype=np.float64)


@dataclass(frozen=True)
class Path:
    """A curve: points [n,3] (x, y, yaw unwrapped) every STEP m, the first at arc length `start`."""

    points: np.ndarray
    start: float

    @property
    def end(self) -> float:
        """Arc length of the last point, m."""
        return self.start + STEP * (len(self.points) - 1)

    def at(self, s: np.ndarray | float, left: float = 0.0) -> np.ndarray:
        """[...,3] x, y, yaw at arc length s, moved `left` m to the left."""
        knots = self.start + STEP * np.arange(len(self.points))
        x, y, yaw = (np.interp(s, knots, column) for column in self.points.T)
        return np.stack([x - left * np.sin(yaw), y + left * np.cos(yaw), yaw], axis=-1)

    def aside(self, left: float) -> "Path":
        """The curve moved to the left; arc lengths stay those of this one."""
        return Path(self.at(self.start + STEP * np.arange(len(self.points)), left), self.start)

    def back(self) -> "Path":
        """The curve driven the other way: arc length s becomes -s."""
        return Path(self.points[::-1] + TURNED, -self.end)


@dataclass(frozen=True)
class Road:
    """Centre line, lanes per direction, and whether there are parking strips."""

    path: Path
    lanes: int
    strips: bool

    @property
    def half(self) -> float:
        """m from the centre line to the kerb."""
        return LANE * self.lanes + STRIP * self.strips


def crossing_roads(rng: np.random.Generator, story: str, duration: float) -> tuple[Road, Road, float]:
    """Main road (the ego vehicle starts at arc length 0 of it), side road, and where they cross."""
    crossing = float(rng.uniform(46, 60) if story in ("right", "left") else rng.uniform(44, 75))
    s = np.arange(-150.0, 170.0 + 13.0 * duration, STEP)
    bend = np.zeros_like(s)
    for low, high in ((-90.0, crossing - 32.0), (crossing + 32.0, crossing + 110.0)):
        angle = rng.choice([0.0, 1.0]) * rng.uniform(-0.9, 0.9)
        inside = (s > low) & (s < high)
        bend[inside] = angle / (high - low) * (1 - np.cos(2 * np.pi * (s[inside] - low) / (high - low)))
    yaw = rng.uniform(-np.pi, np.pi) + np.cumsum(bend) * STEP
    xy = np.cumsum(np.stack([np.cos(yaw), np.sin(yaw)], axis=-1), axis=0) * STEP
    main = Road(Path(np.column_stack([xy, yaw]), float(s[0])), int(rng.integers(1, 3)), True)
    x, y, heading = main.path.at(crossing)
    heading += -np.pi / 2 + rng.uniform(-0.15, 0.15)
    s = np.arange(-130.0, 130.0 + STEP, STEP)
    line = np.column_stack([x + s * np.cos(heading), y + s * np.sin(heading), np.full_like(s, heading)])
    return main, Road(Path(line, float(s[0])), 1, False), crossing


def joined(a: np.ndarray, b: np.ndarray, start: float) -> Path:
    """The points a [n,3], a smooth turn (cubic Hermite), and b [m,3], resampled; a's first point is at `start`."""
    p, q = a[-1], b[0]
    reach = 1.1 * np.hypot(*(q - p)[:2])
    u = np.linspace(0, 1, 60)[1:-1, None]
    tangents = [reach * np.array([np.cos(v[2]), np.sin(v[2])]) for v in (p, q)]
    leaving = (2 * u**3 - 3 * u**2 + 1) * p[:2] + (u**3 - 2 * u**2 + u) * tangents[0]
    turn_xy = leaving + (3 * u**2 - 2 * u**3) * q[:2] + (u**3 - u**2) * tangents[1]
    xy = np.vstack([a[:, :2], turn_xy, b[:, :2]])
    length = np.append(0.0, np.cumsum(np.hypot(*np.diff(xy, axis=0).T)))
    s = np.arange(0.0, length[-1], STEP)
    xy = np.column_stack([np.interp(s, length, xy[:, i]) for i in (0, 1)])
    slope = np.gradient(xy, axis=0)
    return Path(np.column_stack([xy, np.unwrap(np.arctan2(slope[:, 1], slope[:, 0]))]), start)


def ground(
    roads: Sequence[Road], crossing: float, corner: np.ndarray, size: tuple[int, int], resolution: float
) -> np.ndarray:
    """Raster [H,W] uint8 of GRASS .. YELLOW with the lower left corner at `corner` m; row 0 is the north."""
    canvas = np.full(size, GRASS, dtype=np.uint8)

    def pixels(xy: np.ndarray) -> np.ndarray:
        column = (xy[:, 0] - corner[0]) / resolution - 0.5
        row = size[0] - 0.5 - (xy[:, 1] - corner[1]) / resolution
        return np.round(np.stack([column, row], axis=-1) * 16).astype(np.int32)

    def line(points: np.ndarray, width: float, value: int) -> None:
        if len(points) == 2:  # a dash or a stripe: with square ends
            across = 0.5 * width * np.array([-np.sin(points[0, 2]), np.cos(points[0, 2])])
            loop = np.vstack([points[:, :2] + across, points[::-1, :2] - across])
            cv2.fillConvexPoly(canvas, pixels(loop), [value], cv2.LINE_8, 4)
        else:
            thickness = max(1, round(width / resolution))
            cv2.polylines(canvas, [pixels(points)], False, [value], thickness, cv2.LINE_8, 4)

    for value, extra in ((SIDEWALK, WALK), (ASPHALT, 0.0)):
        for road in roads:
            line(road.path.points, 2 * (road.half + extra), value)
    main, side = roads
    for road, cut, other in ((main, crossing, side), (side, 0.0, main)):
        _markings(line, road, cut, other.half)
    return canvas


def _markings(line: Callable[[np.ndarray, float, int], None], road: Road, cut: float, room: float) -> None:
    """Lane lines outside the crossing at arc length `cut` of a road of half width `room`; crosswalks and stop lines."""
    path, kerb = road.path, LANE * road.lanes
    for low, high in ((path.start, cut - room - STOP), (cut + room + STOP, path.end)):
        s = np.arange(low, high, STEP)
        edges = (-kerb, kerb) if road.strips else ()
        for left, value in ((0.2, YELLOW), (-0.2, YELLOW), *((edge, WHITE) for edge in edges)):
            line(path.at(s, left), 0.12, value)
        for left in LANE * np.array([k for k in range(1 - road.lanes, road.lanes) if k]):
            for dash in np.arange(low, high - 3, 9.0):
                line(path.at(np.array([dash, dash + 3.0]), left), 0.15, WHITE)
    for way in (-1, 1):
        near = cut + way * (room + 1.0)
        for left in np.arange(-road.half + 0.4, road.half, 0.9):
            line(path.at(np.array([near, near + way * 2.6]), left), 0.45, WHITE)
        stop = path.at(cut + way * (room + STOP + np.array([-0.4, 0.0])), way * (kerb + 0.2) / 2)
        line(stop, kerb - 0.2, WHITE)
