"""A key frame's points and those of earlier sweeps, moved into the key frame's LiDAR frame, with their time lag.

Source: mmdetection3d LoadPointsFromMultiSweeps (fact sheet bevfusion_lidar_cam, part B; docs/recipes.md); its oddities are
switches here.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from bevfn.data import points
from bevfn.data.index import Frame, Sweep

Choice = Literal["newest", "random"]
CLOSE_M = 1.0


def aggregate(frame: Frame, root: Path, **options: Any) -> tuple[np.ndarray, int]:
    """`scans` with these options as one array: (points [P,5] float32, number of NaN points that were dropped)."""
    clouds, bad = scans(frame, root, **options)
    return np.concatenate(clouds), bad


def scans(
    frame: Frame,
    root: Path,
    *,
    count: int = 9,
    choice: Choice = "newest",
    pool: int = 10,
    pad_empty: bool = True,
    published: bool = False,
    generator: np.random.Generator | None = None,
) -> tuple[list[np.ndarray], int]:
    """([points [P,5] float32: x, y, z [m, key frame's lidar], intensity, time lag [s]] by scan, number of NaN points).

    NaN points are dropped. The key frame comes first, then the sweeps as they were chosen. A sweep loses its points with
    |x| < 1 m and |y| < 1 m in its own frame (the vehicle); the key frame keeps them, as upstream. Where fewer than
    `count` sweeps exist (a scene's start) these few are used.

    count: sweeps besides the key frame.
    choice: which ones if there are more: the newest, or random ones in random order, without replacement. Upstream
        draws at random when testing as well, because its test pipeline leaves `test_mode` out.
    pool: of how many, the newest ones, random ones are drawn.
    pad_empty: without any sweep, append `count` copies of the key frame less its close points, as upstream, so that the
        first frame of a scene is about as dense as the others; nothing is padded if there is at least one sweep.
    published: move sweeps as upstream does, see `motion`.
    generator: needed for a random choice.

    Raises ValueError naming the file if one is missing, truncated or empty.
    """
    key, bad = points.scan(frame, root)
    key[:, 4] = 0.0  # the file has the ring there
    clouds = [key]
    if not frame.sweeps and pad_empty:
        clouds += [_without_close(key)] * count
    for sweep in _choose(frame.sweeps[: max(pool, count)], count, choice, generator):
        cloud, dropped = points.read(Path(root) / sweep.path, frame.columns)
        cloud = _without_close(cloud)
        turn, shift = motion(sweep, published)
        cloud[:, :3] = cloud[:, :3] @ turn.T + shift
        cloud[:, 4] = sweep.lag
        clouds.append(cloud)
        bad += dropped
    return clouds, bad


def motion(sweep: Sweep, published: bool) -> tuple[np.ndarray, np.ndarray]:
    """(turn [3,3], shift [3] m), float64: a sweep's point p comes to turn @ p + shift of the key frame's lidar.

    published: with the turn R and the shift T of sweep to key frame, upstream stores the inverse (Rᵀ, -RᵀT) and takes
    p @ Rᵀ - (-RᵀT) for its inverse, which is R p + RᵀT instead of R p + T: off by (Rᵀ - 1) T, 0.6 m for a sweep of
    0.5 s ago at 8 m/s and 0.3 rad/s. The published weights were trained and scored with it. Source: mmdetection3d
    v1.4.0 loading.py 442-445 (its issue 3054; the repair in its PR 3007 is not merged).
    """
    turn, shift = sweep.lidar_from_sweep[:3, :3], sweep.lidar_from_sweep[:3, 3]
    return turn, turn.T @ shift if published else shift


def _choose(
    sweeps: tuple[Sweep, ...], count: int, choice: Choice, generator: np.random.Generator | None
) -> list[Sweep]:
    if len(sweeps) <= count or choice == "newest":
        return list(sweeps[:count])
    if generator is None:
        raise ValueError("a random choice of sweeps needs a generator; give one or choose the newest.")
    return [sweeps[i] for i in generator.choice(len(sweeps), count, replace=False)]


def _without_close(cloud: np.ndarray) -> np.ndarray:
    """A copy of the points [P,5] that do not lie within CLOSE_M of the sensor in both x and y."""
    return cloud[(np.abs(cloud[:, 0]) >= CLOSE_M) | (np.abs(cloud[:, 1]) >= CLOSE_M)]
