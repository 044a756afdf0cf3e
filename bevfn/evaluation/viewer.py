"""Detections as a recording of the rerun viewer (https://rerun.io, extra `viewer`): points, boxes, cameras, in time.

`rerun FILE.rrd` shows it.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from matplotlib.colors import to_rgb

from bevfn import draw
from bevfn.data import points
from bevfn.data.index import Camera, Frame, Index, inverse
from bevfn.data.reading import Reading
from bevfn.evaluation.predicted import above, in_lidar
from bevfn.evaluation.results import Detections
from bevfn.files import writing

WORLD = "world"
LIDAR = f"{WORLD}/lidar"


def check() -> None:
    """Raises ValueError, one sentence, where rerun's package is not installed."""
    if importlib.util.find_spec("rerun") is None:
        raise ValueError(
            "a recording for the rerun viewer needs rerun-sdk: pip install -e '.[viewer]', or leave out --rrd"
        )


def write(path: Path, index: Index, found: Mapping[str, Detections], reading: Reading, *, threshold: float) -> None:
    """Writes all key frames to a .rrd, those of a score from `threshold` on. Raises ValueError as `check`, and NotWritten."""
    check()
    import rerun as rr  # of the extra

    recording = rr.new_recording("bevfn", recording_id=uuid4())  # by default all of a process have one
    made = recording.binary_stream()  # its own file sink logs that a disk is full, and goes on
    classes = [(i, name, _colour(i)) for i, name in enumerate(reading.class_names)]
    recording.log(WORLD, rr.AnnotationContext(classes), static=True)
    recording.log(WORLD, rr.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
    with writing(path), open(path, "wb") as file:
        for number, (frame, detections) in enumerate(in_lidar(index, found, reading)):
            recording.set_time_sequence("key frame", number)
            if frame.timestamp > 0:
                recording.set_time_seconds("time", frame.timestamp)
            _frame(rr, recording, frame, index.root, above(detections, threshold), reading.class_names)
            file.write(made.read())
        recording.disconnect()
        file.write(made.read())  # the end


def _frame(rr: Any, recording: Any, frame: Frame, root: Path, found: Detections, classes: tuple[str, ...]) -> None:
    """One key frame; boxes are in the LiDAR's frame, which has its place in the world."""
    place = frame.global_from_lidar
    recording.log(LIDAR, rr.Transform3D(translation=place[:3, 3], mat3x3=place[:3, :3]))
    if frame.lidar_path:
        cloud, _ = points.scan(frame, root)
        recording.log(f"{LIDAR}/points", rr.Points3D(cloud[:, :3], radii=0.03))
    half = found.boxes[:, 3:6] / 2
    centres = found.boxes[:, :3] + [0.0, 0.0, 1.0] * half[:, 2:]
    turns = np.zeros((len(half), 4))  # x y z w
    turns[:, 2], turns[:, 3] = np.sin(found.boxes[:, 6] / 2), np.cos(found.boxes[:, 6] / 2)
    recording.log(
        f"{LIDAR}/detections",
        rr.Boxes3D(
            centers=centres,
            half_sizes=half,
            quaternions=[rr.Quaternion(xyzw=turn) for turn in turns],
            class_ids=found.labels,
            labels=[f"{classes[label]} {score:.2f}" for label, score in zip(found.labels, found.scores)],
            show_labels=False,
        ),
    )
    velocity = np.concatenate([found.boxes[:, 7:9], np.zeros((len(half), 1))], axis=1)
    recording.log(f"{LIDAR}/velocities", rr.Arrows3D(origins=centres, vectors=velocity, class_ids=found.labels))
    for channel, camera in frame.cameras.items():
        _camera(rr, recording, f"{LIDAR}/{channel}", camera, root)


def _camera(rr: Any, recording: Any, entity: str, camera: Camera, root: Path) -> None:
    """Where a camera stood, and its image if the file is there."""
    pose = inverse(camera.camera_from_lidar)
    recording.log(entity, rr.Transform3D(translation=pose[:3, 3], mat3x3=pose[:3, :3]))
    if (root / camera.path).is_file():
        recording.log(entity, rr.Pinhole(image_from_camera=camera.intrinsics))
        recording.log(entity, rr.EncodedImage(path=root / camera.path))


def _colour(label: int) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in to_rgb(draw.COLOURS[label % len(draw.COLOURS)]))
    return red, green, blue
