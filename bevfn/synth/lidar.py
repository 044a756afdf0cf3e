"""A turn of a 32-beam lidar (Velodyne HDL-32E): a ray per beam and firing against convex solids and the ground.

A turn is taken at one instant: the points need no correction for the motion within it, as nuScenes' are corrected.
"""

import numpy as np

from bevfn.synth.shapes import Solids

BEAMS = np.radians(np.linspace(-30.67, 10.67, 32))  # elevations; ring 0 looks down
AZIMUTHS = 1084  # firings a turn: 32 * 1084 = 34,688 rays as a nuScenes key frame
MAX_RANGE = 100.0  # m
RANGE_NOISE = 0.008  # m, standard deviation along the ray; at most 3 of them


def rays(azimuths: int) -> np.ndarray:
    """Unit directions [A,32,3] float32 in the order of firing: clockwise, the first at azimuth pi from the x axis."""
    azimuth = np.pi - 2 * np.pi * np.arange(azimuths)[:, None] / azimuths  # A 1
    flat = np.cos(BEAMS)
    direction = [flat * np.cos(azimuth), flat * np.sin(azimuth), np.broadcast_to(np.sin(BEAMS), (azimuths, 32))]
    return np.stack(direction, axis=-1).astype(np.float32)


def cast(solids: Solids, directions: np.ndarray, plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First hits of rays [A,32,3] from the origin: (distance [A,32] m float32, inf where none; solid [A,32] or -1).

    solids are in the lidar frame, those with brightness 0 are paint and not met; plane [4]: the ground there, n·x = d.
    """
    azimuths = len(directions)
    planes = solids.planes.astype(np.float32)
    hit = np.full(directions.shape[:2], -1, dtype=np.int32)
    with np.errstate(divide="ignore", invalid="ignore"):
        down = directions @ plane[:3].astype(np.float32)  # A 32
        reach = np.where(down < 0, np.float32(plane[3]) / down, np.float32(np.inf))
        for part, first, count, low, high in zip(*_windows(solids, azimuths)):
            first = first % azimuths
            last = first + count
            whole = last <= azimuths
            for columns in [slice(first, last)] if whole else [slice(first, azimuths), slice(0, last - azimuths)]:
                rays_of_it = columns, slice(low, high)
                _meet(planes[part], part, directions[rays_of_it], reach[rays_of_it], hit[rays_of_it])
    return reach, hit


def _meet(planes: np.ndarray, part: int, directions: np.ndarray, reach: np.ndarray, hit: np.ndarray) -> None:
    """Updates reach and hit [a,r] of the rays [a,r,3] that meet the solid with planes [6,4] first.

    A ray enters after it has crossed every face that looks at the origin, and leaves through the first of the others.
    """
    slope = planes[:, :3] @ directions.reshape(-1, 3).T  # 6 a*r
    away = planes[:, 3] < 0  # the origin is outside these faces
    if not away.any():
        return
    t = planes[:, 3:] / slope
    enter = np.where(slope[away] < 0, t[away], np.inf).max(axis=0)
    leave = np.where(slope[~away] > 0, t[~away], np.inf).min(axis=0)
    better = ((enter < leave) & (enter < reach.ravel())).reshape(reach.shape)
    np.copyto(reach, enter.reshape(reach.shape), where=better)
    np.copyto(hit, part, where=better)


def _windows(solids: Solids, azimuths: int) -> tuple[np.ndarray, ...]:
    """Of each solid in range: number, first column, columns, first and last ring + 1 of the rays that can meet it."""
    xy = solids.corners[..., :2]  # S 8 2
    centre = xy.mean(axis=1)
    distance = np.linalg.norm(centre, axis=-1)
    radius = np.linalg.norm(xy - centre[:, None], axis=-1).max(axis=1)
    bearing = np.arctan2(centre[:, 1], centre[:, 0])
    around = np.arctan2(xy[..., 1], xy[..., 0]) - bearing[:, None]
    around = (around + np.pi) % (2 * np.pi) - np.pi  # S 8, relative to the centre: no wrap unless we stand inside
    inside = distance <= radius * 1.001
    near = np.where(inside, 0.3, distance - radius)
    z = solids.corners[..., 2]
    top, bottom = z.max(axis=1), z.min(axis=1)
    high = np.arctan2(top, np.where(top > 0, near, distance + radius))
    low = np.arctan2(bottom, np.where(bottom < 0, near, distance + radius))
    step = 2 * np.pi / azimuths
    start = np.ceil((np.pi - bearing - np.where(inside, np.pi, around.max(axis=1))) / step).astype(int)
    end = np.floor((np.pi - bearing - np.where(inside, -np.pi, around.min(axis=1))) / step).astype(int)
    first_ring, last_ring = np.searchsorted(BEAMS, low), np.searchsorted(BEAMS, high)
    count = np.minimum(end - start + 1, azimuths)
    met = (distance - radius < MAX_RANGE) & (count > 0) & (last_ring > first_ring) & (solids.brightness > 0)
    use = np.flatnonzero(met)
    use = use[np.argsort(distance[use], kind="stable")]
    return use, start[use], count[use], first_ring[use], last_ring[use]


def points(
    directions: np.ndarray, reach: np.ndarray, brightness: np.ndarray, dropout: float, rng: np.random.Generator
) -> np.ndarray:
    """[P,5] float32 x, y, z, intensity 0..255, ring, in firing order; noise, lost returns and none beyond MAX_RANGE.

    directions [A,32,3], reach [A,32] m, brightness [A,32]. Far and dark surfaces are lost more often.
    """
    noise = np.clip(rng.standard_normal(reach.shape, dtype=np.float32), -3, 3) * RANGE_NOISE
    luck = rng.random(reach.shape, dtype=np.float32)
    flicker = rng.random(reach.shape, dtype=np.float32)
    lost = dropout + 0.6 * (np.minimum(reach, MAX_RANGE) / MAX_RANGE) ** 3 * 8.0 / (8.0 + brightness)
    seen = (reach < MAX_RANGE) & (luck > lost)
    xyz = directions[seen] * (reach + noise)[seen, None]
    intensity = np.clip(np.round(brightness * (0.7 + 0.6 * flicker)), 0, 255)[seen]
    ring = np.broadcast_to(np.arange(32), reach.shape)[seen]
    return np.column_stack([xyz, intensity, ring]).astype("<f4")
