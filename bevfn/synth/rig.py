"""Where the sensors sit on the ego vehicle, and when they look: nuScenes' numbers, a little different in every scene.

Ego frame: x forward, y left, z up, on the ground below the rear axle. Lidar frame: x right, y forward, z up. Camera
frame: x right, y down, z forward.
"""

from dataclasses import dataclass

import numpy as np
import scipy  # whose rooms are imported when they are entered

CALIBRATED_SIZE = (900, 1600)  # H, W that the focal lengths are for
# name: heading [deg] counter-clockwise from forward, position in ego [m], focal length [px], exposure after lidar [s]
CAMERAS: dict[str, tuple[float, tuple[float, float, float], float, float]] = {
    "CAM_FRONT": (0.0, (1.70, 0.02, 1.51), 1266.0, -0.035),
    "CAM_FRONT_RIGHT": (-56.4, (1.55, -0.49, 1.50), 1261.0, -0.028),
    "CAM_FRONT_LEFT": (55.2, (1.52, 0.49, 1.51), 1273.0, -0.043),
    "CAM_BACK": (180.0, (0.03, 0.00, 1.58), 809.0, -0.010),
    "CAM_BACK_LEFT": (108.6, (1.04, 0.48, 1.59), 1257.0, -0.001),
    "CAM_BACK_RIGHT": (-110.8, (1.01, -0.48, 1.56), 1260.0, -0.020),
}
LIDAR = "LIDAR_TOP"
EGO_FROM_LIDAR = np.array([[0.0, 1.0, 0.0, 0.94], [-1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.84], [0, 0, 0, 1]])


@dataclass(frozen=True)
class Rig:
    """ego_from_sensor: sensor name -> [4,4]; intrinsics: camera name -> [3,3] pixels of image_size (H,W)."""

    ego_from_sensor: dict[str, np.ndarray]
    intrinsics: dict[str, np.ndarray]
    image_size: tuple[int, int]


def mounted(seed: int, number: int, image_size: tuple[int, int]) -> Rig:
    """The calibration of scene `number`: every mount is off by about 0.3 degrees and 5 mm."""
    rng = np.random.default_rng([seed, number, 1])
    ego_from_sensor, intrinsics = {LIDAR: EGO_FROM_LIDAR @ _nudge(rng)}, {}
    down, right = image_size[0] / CALIBRATED_SIZE[0], image_size[1] / CALIBRATED_SIZE[1]
    for name, (heading, position, focal, _) in CAMERAS.items():
        ego_from_sensor[name] = camera_mount(heading, position) @ _nudge(rng)
        focal, x, y = focal * rng.normal(1, 0.003), rng.normal(812, 8), rng.normal(491, 6)
        intrinsics[name] = np.array([[focal * right, 0.0, x * right], [0.0, focal * down, y * down], [0.0, 0.0, 1.0]])
    return Rig(ego_from_sensor, intrinsics, image_size)


def camera_mount(heading_deg: float, position: tuple[float, float, float]) -> np.ndarray:
    """ego_from_camera [4,4] of a level camera."""
    cos, sin = np.cos(np.radians(heading_deg)), np.sin(np.radians(heading_deg))
    result = np.eye(4)
    result[:3, :3] = [[sin, 0.0, cos], [-cos, 0.0, sin], [0.0, -1.0, 0.0]]
    result[:3, 3] = position
    return result


def _nudge(rng: np.random.Generator) -> np.ndarray:
    result = np.eye(4)
    result[:3, :3] = scipy.spatial.transform.Rotation.from_rotvec(rng.normal(0, np.radians(0.3), 3)).as_matrix()
    result[:3, 3] = rng.normal(0, 0.005, 3)
    return result


def quaternion(matrix: np.ndarray) -> list[float]:
    """w x y z of the rotation in a [4,4], as the tables hold it."""
    x, y, z, w = scipy.spatial.transform.Rotation.from_matrix(matrix[:3, :3]).as_quat().tolist()
    return [w, x, y, z] if w >= 0 else [-w, -x, -y, -z]
