"""Detections of key frames as files for people and programs: a results file, one of plain JSON a key frame, pictures, a video.

OUT/results_nusc.json         as nuScenes' devkit reads it: global frame, at most 500 a key frame
OUT/frames/0000_<token>.json  in the key frame's LiDAR frame, those from a score on
OUT/pictures/0000_<token>.png
OUT/video.mp4
"""

import errno
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from bevfn import draw, waiting
from bevfn.data import annotations
from bevfn.data.index import Frame, Index
from bevfn.data.reading import Reading
from bevfn.evaluation import results
from bevfn.evaluation.judge import RESULTS, submission
from bevfn.evaluation.results import Detections
from bevfn.files import NotWritten, to_json, write_atomically
from bevfn.names import file_name

FRAMES, PICTURES, VIDEO = "frames", "pictures", "video.mp4"
CODECS = ("vp09", "mp4v")  # the first plays in browsers; a build of opencv may lack it
FPS = 10.0  # of key frames without times
SLOWEST, FASTEST = 0.5, 60.0


def in_lidar(index: Index, found: Mapping[str, Detections], reading: Reading) -> Iterator[tuple[Frame, Detections]]:
    """Every key frame with its detections, in order, in its LiDAR frame whatever frame the model detects in."""
    for frame in index:
        yield (
            frame,
            results.moved(found[frame.token], annotations.lidar_from_base(frame, reading.base, reading.channels)),
        )


def above(found: Detections, threshold: float) -> Detections:
    """Those of at least such a score, the surest first."""
    order = np.argsort(-found.scores, kind="stable")
    order = order[found.scores[order] >= threshold]
    return Detections(found.boxes[order], found.scores[order], found.labels[order])


def write_results(path: Path, index: Index, found: Mapping[str, Detections], reading: Reading) -> None:
    """nuScenes' results file, of other classes than nuScenes' too; nothing is left out by its distance. Poses must be known."""
    foreign = set(reading.class_names) - set(results.RANGES)
    ranges = dict.fromkeys(reading.class_names, np.inf) if foreign else None
    results.write(path, submission(index, found, reading, ranges), reading.class_names)


def plain(frame: Frame, found: Detections, classes: tuple[str, ...], *, placed: bool) -> dict[str, Any]:
    """A key frame's detections, in its LiDAR frame, as plain data. placed: its place in the world is known."""
    lift = np.array([0.0, 0.0, 0.5])
    return {
        "token": frame.token,
        "scene": frame.scene,
        "timestamp_s": frame.timestamp,
        "lidar": frame.lidar_path,
        "cameras": {channel: camera.path for channel, camera in frame.cameras.items()},
        "frame": "lidar",
        "global_from_lidar": frame.global_from_lidar.tolist() if placed else None,
        "detections": [
            {
                "class": classes[label],
                "score": float(score),
                "centre_m": (box[:3] + lift * box[5]).tolist(),
                "size_m": box[3:6].tolist(),  # length, width, height
                "yaw_rad": float(box[6]),
                "velocity_mps": box[7:9].tolist(),
            }
            for box, score, label in zip(found.boxes, found.scores, found.labels)
        ],
    }


def write(
    out: Path,
    index: Index,
    found: Mapping[str, Detections],
    reading: Reading,
    *,
    placed: bool,
    threshold: float,
    pictures: bool,
    fps: float | None,
) -> int:
    """Writes everything but the recording for the viewer into `out`, and returns how many detections reach the threshold.

    placed: the key frames' places in the world are known. fps: of the video, which has the pictures; None: none is made.
    """
    write_results(out / RESULTS, index, found, reading)
    count, names = 0, list[str]()
    for i, (frame, all_of_it) in enumerate(in_lidar(index, found, reading)):
        shown = above(all_of_it, threshold)
        count += len(shown.scores)
        names.append(f"{i:04d}_{file_name(frame.token)}")
        document = plain(frame, shown, reading.class_names, placed=placed)
        write_atomically(out / FRAMES / f"{names[-1]}.json", to_json(document, indent=1))
    if pictures:
        made = drawn(index, found, reading, threshold)
        with waiting.counted("drawing", len(index), "pictures") as advance:
            kept = _written((out / PICTURES / f"{name}.png" for name in names), made, advance)
            film(out / VIDEO, kept, fps) if fps is not None else list(kept)
    return count


def drawn(index: Index, found: Mapping[str, Detections], reading: Reading, threshold: float) -> Iterator[bytes]:
    """A PNG of every key frame: its cameras, and the view from above as far as the model looks."""
    reach = max(map(abs, (*reading.range[:2], *reading.range[3:5]))) if reading.range is not None else 54.0
    for frame, shown in in_lidar(index, found, reading):
        sample = draw.sample(frame, index.root, reading.class_names)
        yield draw.picture(sample, shown.boxes, shown.scores, shown.labels, score_threshold=threshold, range_m=reach)


def _written(paths: Iterable[Path], pictures: Iterable[bytes], advance: Callable[[int], None]) -> Iterator[bytes]:
    for path, picture in zip(paths, pictures):
        write_atomically(path, picture)
        advance(1)
        yield picture


# --- video ---


def rate(index: Index) -> float:
    """Key frames a second, by their times; FPS where they have none."""
    times = np.diff([frame.timestamp for frame in index])
    steps = times[(times > 1 / FASTEST) & (times < 1 / SLOWEST)]
    return float(1 / np.median(steps)) if len(steps) else FPS


def film(path: Path, pictures: Iterable[bytes], fps: float) -> None:
    """An MP4 of PNGs, each as large as the first (cut, or filled up with white). Raises OSError where none can be encoded, and
    NotWritten where the disk does not take all of it, of which opencv says nothing."""
    writer, size, count = None, (0, 0), 0
    for picture in pictures:
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
        if writer is None:
            size = (pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2)  # codecs halve the colours' resolution
            writer = _encoder(path, fps, size)
        writer.write(np.ascontiguousarray(_fitted(pixels, size)[..., ::-1]))  # opencv has BGR
        count += 1
    if writer is not None:
        writer.release()
    if (there := shown(path)) != count:
        raise NotWritten(errno.EIO, f"{there} of its {count} pictures can be read again", str(path))


def shown(path: Path) -> int:
    """How many pictures of a video can be read."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what it says of a broken file, on standard error; read once
    film, count = cv2.VideoCapture(str(path)), 0
    while film.grab():
        count += 1
    return count


def _encoder(path: Path, fps: float, size: tuple[int, int]) -> cv2.VideoWriter:
    for codec in CODECS:
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, size[::-1])
        if writer.isOpened():
            return writer
    raise OSError(f"opencv can encode no video here ({', '.join(CODECS)}); leave it out (--no-video)")


def _fitted(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    made = np.full((*size, 3), 255, dtype=np.uint8)
    rows, columns = min(size[0], pixels.shape[0]), min(size[1], pixels.shape[1])
    made[:rows, :columns] = pixels[:rows, :columns]
    return made
