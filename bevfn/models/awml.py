"""TIER IV's BEVFusion (AWML, projects/BEVFusion): configurations of `bevfusion`, for T4 datasets and nuScenes.

On T4 data the range is 122.4 m to every side of the rear axle, z -3 to 5 m, and five classes are detected. The online models
have voxels of 0.17 m, L-offline those of nuScenes. What differs from mmdetection3d's BEVFusion beside sizes: LiDAR-only
models read Fourier features, the fuser is 5 x 5, the depth net is wider and without biases, one class is not suppressed, and the
camera-only model has no layers between its view transform and its head.

Source: AWML commit 7a6ec07 (behaviour); its configs in projects/BEVFusion.
"""

from dataclasses import replace

from bevfn.backbones import sparse_encoder
from bevfn.heads import transfusion
from bevfn.layers import fourier_features
from bevfn.models import bevfusion
from bevfn.views import camera_grid, lift_splat

CLASSES = ("car", "truck", "bus", "bicycle", "pedestrian")
"""in the order of the labels"""
LOWER, UPPER = (-122.4, -122.4, -3.0), (122.4, 122.4, 5.0)
_POINT_RANGE = ((*LOWER, 0.0, 0.0), (*UPPER, 255.0, 0.2))  # x, y, z (m), intensity, time lag (s)
# Of 160,000 voxels, the published limit, as many sites as the golden frame (two sweeps of 32 beams) has of its own, by level
# (cases awml_bevfusion_cl: 16,457 voxels, 21,847 sites after the first stride, then 13,474, 6,004 and 4,515; l_offline: 25,840,
# 42,756, 29,839, 14,214, 11,633). Sites grow at the edges of what is occupied: a denser cloud has fewer per voxel.
_SITES = (212_500, 131_000, 58_500, 44_000)
_SITES_OFFLINE = (265_000, 185_000, 88_500, 72_500)


def lidar(*, intensity: bool = False) -> bevfusion.Config:
    """BEVFusion-L since 2.7: `base` reads x, y, z and the time lag, j6gen2_base and jpntaxi_base (`intensity`) the intensity
    too; the encoder gets as many frequencies of each as there are features."""
    features = bevfusion.POINT_FEATURES if intensity else (0, 1, 2, 4)
    lower, upper = (tuple(bound[i] for i in features) for bound in _POINT_RANGE)
    waves = fourier_features.Config(lower, upper, frequencies=len(features))
    encoder = sparse_encoder.Config(channels_in=waves.channels, capacities=_SITES)
    return replace(_model(), lidar=bevfusion.Lidar(encoder, features, waves))


def lidar_offline() -> bevfusion.Config:
    """BEVFusion-L-offline: voxels of 0.075 m, 408 x 408 BEV cells, point features as they are."""
    return replace(_model(voxel=0.075), lidar=bevfusion.Lidar(sparse_encoder.Config(capacities=_SITES_OFFLINE)))


def camera_lidar(*, fuser_kernel: int = 5) -> bevfusion.Config:
    """BEVFusion-CL, with the fuser as its config means it: 5 x 5, stride 1, padding 2. (Released weights up to 2.0 are 3 x 3.)"""
    encoder = sparse_encoder.Config(capacities=_SITES)
    return replace(_model(), lidar=bevfusion.Lidar(encoder), camera=_camera(), fuser_kernel=fuser_kernel)


def camera() -> bevfusion.Config:
    """BEVFusion-C: the depth net sees LiDAR points, the head reads the view transform's map."""
    model, cameras = _model(), _camera()
    head = replace(model.head, channels_in=cameras.view.channels_out)
    return replace(model, lidar=None, camera=cameras, fuser_kernel=None, backbone=None, neck=None, head=head)


def nuscenes_lidar() -> bevfusion.Config:
    """BEVFusion-L on nuScenes: mmdetection3d's, config and published weights."""
    return bevfusion.lidar_only()


def _model(voxel: float = 0.17) -> bevfusion.Config:
    """The BEV layers and the head over the T4 range, behind a LiDAR; voxel: its side, m."""
    cells = round((UPPER[0] - LOWER[0]) / voxel) // 8
    head = transfusion.Config(
        classes=len(CLASSES),
        queries=500,
        lower=LOWER[:2],
        voxel=(voxel, voxel),
        cells=(cells, cells),
        small_classes=(CLASSES.index("pedestrian"),),
        post_center_range=(-200.0, -200.0, -10.0, 200.0, 200.0, 10.0),
    )
    voxels = bevfusion.Voxels(lower=LOWER, upper=UPPER, size=(voxel, voxel, 0.2))
    return bevfusion.Config(voxels=voxels, camera=None, head=head)


def _camera() -> bevfusion.Camera:
    span = (LOWER[0], UPPER[0], 0.68)
    grid = camera_grid.Config(
        image_size=(384, 768),
        stride=8,
        depth_m=(1.0, 130.0, 1.0),
        x_m=span,
        y_m=span,
        z_m=(-10.0, 10.0, 20.0),
        rows="x",
    )
    return bevfusion.Camera(view=lift_splat.Config(grid=grid, bias=False, wide_depth_net=True))
