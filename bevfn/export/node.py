"""What autoware's node reads of a model beside its graph, and what it makes of the graph's outputs.

Three files of parameters: those of the model (`ml_package_*.param.yaml`, all of which the node needs), the node's own, with
upstream's values where they are no matter of the model (thresholds, suppression: yours to choose), and those of its remapper of
classes, which is told to change none. A fourth, of its diagnostics, is a file of the node's package.

Source: autoware_universe perception/autoware_bevfusion: src/bevfusion_node.cpp at 0bbbdec (names of parameters; older nodes read
`image_feature_dim` and `score_threshold`), schema/ml_package_bevfusion.schema.json at 051e692, config/ at 0bbbdec and 080dd9f,
lib/postprocess/postprocess_kernel.cu at 035837c (boxes); lib/detection_class_remapper.cpp at 1d4859f and
launch/bevfusion.launch.xml at 7eebd11 (the third file, and where the node looks for all of them); lib/ros_utils.cpp at 8e45118 (names of classes: ours in capitals).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bevfn.data.batch import Batch
from bevfn.detector import Detector
from bevfn.export.runtimes import ROOM
from bevfn.files import to_json
from bevfn.models import bevfusion

MODEL_FILE, NODE_FILE = "ml_package_bevfusion.param.yaml", "bevfusion.param.yaml"
REMAPPER_FILE = "detection_class_remapper.param.yaml"
LABELS = 8  # of autoware's ObjectClassification: unknown, car, truck, bus, trailer, motorcycle, bicycle, pedestrian
COLUMNS = {(0, 1, 2, 3, 4): True, (0, 1, 2, 4): False}
"""{features of a point: whether the node gives the intensity}, see generateSweepPoints_kernel"""
UPRIGHT = ("PEDESTRIAN", "TRAFFIC_CONE")  # have no front: any length of (sine, cosine) will do
SCORE = 0.1
NO_CAMERAS: dict[str, Any] = {
    **{axis: [0.0, 0.0, 0.0] for axis in ("d_bound", "x_bound", "y_bound", "z_bound")},
    **dict.fromkeys(("num_cameras", "raw_image_height", "raw_image_width"), 0),
    **dict.fromkeys(("img_aug_scale_x", "img_aug_scale_y"), 0.0),
    **dict.fromkeys(("roi_height", "roi_width", "features_height", "features_width"), 0),
    **dict.fromkeys(("num_depth_features", "image_feature_channel"), 0),
}


def of_model(detector: Detector, picture: tuple[int, int] | None, batch: Batch) -> dict[str, Any]:
    """Parameters of a model; picture: rows and columns of the cameras' own images, of which `batch` has some, if it reads any.

    Raises ValueError, one sentence, for a model that reads other features of points than the node gives.
    """
    network = detector.task.network
    grid, head = network.voxels, network.head
    if network.lidar.features not in COLUMNS:
        raise ValueError(
            f"{detector.config.model} reads columns {network.lidar.features} of points; autoware's node gives x, y, z, "
            "intensity if it shall, and time lag"
        )
    most = min(grid.max_voxels[1], ROOM)
    return {
        "class_names": [name.upper() for name in detector.classes],
        "voxels_num": [1, max(most // 2, 1), most],
        "point_cloud_range": [float(bound) for bound in (*grid.lower, *grid.upper)],
        "voxel_size": [float(side) for side in grid.size],
        "num_proposals": head.queries,
        "out_size_factor": head.stride,
        "max_points_per_voxel": grid.max_points,
        "use_intensity": COLUMNS[network.lidar.features],
        **(NO_CAMERAS if network.camera is None else _cameras(network.camera, picture, batch)),
    }


def _cameras(config: bevfusion.Camera, picture: tuple[int, int] | None, batch: Batch) -> dict[str, Any]:
    """Parameters of the cameras. Raises ValueError, one sentence, where they are not all alike, as the node has them."""
    assert batch.image_aug is not None
    if picture is None:
        raise ValueError("autoware's node takes images of one size; the cameras of this key frame have several")
    grid = config.view.grid
    x, y = batch.image_aug[0, 0, 0].diagonal()[:2].tolist()
    (raw_rows, raw_columns), (rows, columns), (H, W) = picture, grid.image_size, grid.feature_size
    bounds = {f"{axis}_bound": list(bound) for axis, bound in zip("dxyz", (grid.depth_m, grid.x_m, grid.y_m, grid.z_m))}
    return bounds | {
        **{"num_cameras": batch.image_aug.shape[2], "raw_image_height": raw_rows, "raw_image_width": raw_columns},
        **{"img_aug_scale_x": x, "img_aug_scale_y": y, "roi_height": rows, "roi_width": columns},
        **{"features_height": H, "features_width": W},
        **{"num_depth_features": grid.depth_bins, "image_feature_channel": config.neck.channels_out},
    }


def of_node(detector: Detector, model: Mapping[str, Any], file: str, images: str) -> dict[str, Any]:
    """Parameters of the node for a graph in `file`, and for the cameras' features one in `images`; without that it reads none."""
    names, points = model["class_names"], detector.reading.points
    cameras = model["num_cameras"] > 0
    assert points is not None
    return {
        "max_camera_lidar_delay": 0.12 if cameras else 0.0,
        "plugins_path": "$(find-pkg-share autoware_tensorrt_plugins)/plugins/libautoware_tensorrt_plugins.so",
        "trt_precision": detector.config.precision,
        "cloud_capacity": 2_000_000,
        **_paths("", file),
        **_paths("image_backbone_", images if cameras else ""),
        "image_backbone_trt_precision": detector.config.precision if cameras else "",
        "densification_num_past_frames": points.sweeps,
        "densification_world_frame_id": "map",
        "run_image_undistortion": cameras,
        "circle_nms_dist_threshold": 0.5,
        "iou_nms_search_distance_2d": 10.0,
        "iou_nms_threshold": 0.1,
        "yaw_norm_thresholds": [0.0 if name in UPRIGHT else 0.3 for name in names],
        "score_threshold": SCORE,
        "model_params": {
            "detection_score_thresholds": {
                "distance_bin_upper_limits": [farthest_m(model["point_cloud_range"])],
                "min_confidence_scores": {name: [SCORE] for name in names},
            }
        },
    }


def farthest_m(range_m: Sequence[float]) -> float:
    """To the farthest corner of a range (lower x, y, z, upper x, y, z), in whole metres: the node drops every box beyond."""
    lower, upper = np.abs(range_m[:2]), np.abs(range_m[3:5])
    return float(np.ceil(np.hypot(*np.maximum(lower, upper))))


def of_remapper() -> dict[str, list]:
    """Parameters of what gives a label to objects of an area [m2] that have another, row by row from label to label: to none."""
    return {
        "allow_remapping_by_area_matrix": [0] * LABELS**2,
        "min_area_matrix": [0.0] * LABELS**2,
        "max_area_matrix": [0.0] * LABELS**2,
    }


def _paths(of: str, file: str) -> dict[str, str]:
    """Of a graph and its engine; both empty without a file."""
    path = f"$(var model_path)/{file}" if file else ""
    return {f"{of}onnx_path": path, f"{of}engine_path": path.replace(".onnx", ".engine")}


def to_yaml(parameters: Mapping[str, Any]) -> bytes:
    """A file of ROS parameters, each in a line; values in JSON, which YAML has inside."""
    lines = [f"    {name}: {to_json(given).decode()}" for name, given in parameters.items()]
    return "\n".join(["/**:", "  ros__parameters:", *lines, ""]).encode()


def detections(outputs: Mapping[str, np.ndarray], model: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the node makes of "bbox_pred" [10 Q], "score" and "label_pred" [Q] before its thresholds and suppression.

    In the form of a detector's: "boxes" [1 Q 9] (x, y, z of the BOTTOM centre, length, width, height, yaw, vx, vy), "scores",
    "labels", "valid" [1 Q], all of them valid.
    """
    p = outputs["bbox_pred"].astype(np.float32)
    lower, size = model["point_cloud_range"][:2], model["voxel_size"][:2]
    x, y = (p[axis] * model["out_size_factor"] * size[axis] + lower[axis] for axis in range(2))
    length, width, height = np.exp(p[3:6])
    boxes = np.stack([x, y, p[2] - height / 2, length, width, height, np.arctan2(p[6], p[7]), p[8], p[9]], axis=-1)
    scores, labels = outputs["score"], outputs["label_pred"]
    return {
        "boxes": boxes[None].astype(np.float32),
        "scores": scores[None],
        "labels": labels[None],
        "valid": np.ones_like(scores, bool)[None],
    }
