"""Key frames that a report's page holds to be browsed: the worst, the best and some drawn at random, with all that the page draws of
them: boxes, points, small camera pictures and their calibration.

The page's size is bounded by them: 3 times `frames` key frames of at most POINTS points (6 bytes each), DETECTIONS detections (about
70 bytes) and a JPEG of WIDTH pixels (10 to 25 kB) of each camera: of 18 key frames with six cameras 2 to 4 MB, whatever the split.
"""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from bevfn import draw
from bevfn.data import image
from bevfn.data.batch import Sample, needed
from bevfn.data.index import Frame, Index
from bevfn.evaluation import results
from bevfn.evaluation.frame_quality import Counted, Matched, Ranking
from bevfn.names import printable

POINTS, DETECTIONS, WIDTH, QUALITY = 5000, 120, 400, 70
NOT_COUNTED = -2.0  # in the place of the score that found an annotated box; -1: none did
COLUMNS = ("class", "x", "y", "z", "length", "width", "height", "yaw", "vx", "vy")


def chosen(ranking: Ranking, count: int) -> list[tuple[str, Counted]]:
    """(why, key frame): up to `count` worst, the worst first, as many best, and as many of the others, the same at every call."""
    best, worst = ranking.ends(count)
    others = ranking.frames[len(best) : len(ranking.frames) - len(worst)]
    drawn = np.random.default_rng(0).permutation(len(others))[:count]
    picked = [(f"worst {i}", one) for i, one in enumerate(reversed(worst), start=1)]
    picked += [(f"best {i}", one) for i, one in enumerate(best, start=1)]
    return picked + [(f"random {i}", others[k]) for i, k in enumerate(drawn, start=1)]


def of(
    index: Index,
    document: Mapping[str, Any],
    matched: Mapping[str, Matched],
    ranking: Ranking,
    names: tuple[str, ...],
    count: int,
) -> list[dict[str, Any]]:
    """Plain data of the `chosen` key frames of a results document. names: the classes. Raises ValueError for a point file or an image
    that cannot be read; where an image is not there, there are no cameras."""
    return [
        {"why": why, "f1": one.f1, "annotated": one.annotated, "found": one.found}
        | {"false_alarms": one.predicted - one.found}
        | _frame(index, index[index.position(one.token)], document, matched[one.token], names)
        for why, one in chosen(ranking, count)
    ]


def _frame(
    index: Index, frame: Frame, document: Mapping[str, Any], m: Matched, names: tuple[str, ...]
) -> dict[str, Any]:
    sample = draw.sample(frame, index.root, names)
    order = m.order[:DETECTIONS]
    entries = document["results"].get(frame.token, [])
    found = results.to_lidar([entries[i] for i in order], frame, names)
    by = np.full(len(frame.names), NOT_COUNTED)
    by[m.annotated] = -1.0
    by[m.annotated[m.takes[m.takes >= 0]]] = m.scores[m.takes >= 0]
    known = [i for i, name in enumerate(frame.names) if name in names]
    boxes, labels = np.nan_to_num(frame.boxes[known]), [names.index(frame.names[i]) for i in known]
    boxes[:, 2] -= boxes[:, 5] / 2
    rights = m.takes[: len(order)] >= 0
    return {
        "token": printable(frame.token),
        "scene": printable(frame.scene),
        "points": _points(needed(sample.points, "points")),
        "detected": [
            [*row, round(float(score), 4), int(right)]
            for row, score, right in zip(_rows(found.labels, found.boxes), found.scores, rights)
        ],
        "known": [[*row, round(float(score), 4)] for row, score in zip(_rows(labels, boxes), by[known])],
        "cameras": [_camera(sample, n) for n in draw.in_order(sample.camera_names)],
    }


def _rows(labels: Any, boxes: np.ndarray) -> list[list[float]]:
    """Boxes [n,9] of the bottom centre in the order of COLUMNS, of the gravity centre, to the centimetre."""
    centred = boxes + [0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0] * boxes[:, 5:6]
    return [[int(label), *row] for label, row in zip(labels, centred.round(2).tolist())]


def _points(cloud: np.ndarray) -> str:
    """At most POINTS of the points [P,3+], x, y, z as base64 of little-endian int16 in centimetres."""
    kept = cloud[np.linspace(0, len(cloud) - 1, min(POINTS, len(cloud))).astype(np.int64), :3]
    return base64.b64encode((kept * 100).clip(-32767, 32767).round().astype("<i2").tobytes()).decode()


def _camera(sample: Sample, n: int) -> dict[str, Any]:
    """A camera's small picture, and what takes a point of the LiDAR's frame to its pixels (times depth): 3 4, row by row."""
    pixels = image.decode(sample.image_paths[n])
    height, width = pixels.shape[:2]
    size = (min(WIDTH, width), max(1, round(min(WIDTH, width) * height / width)))
    scale = np.array([[size[0] / width], [size[1] / height], [1.0]])
    matrix = scale * needed(sample.image_from_base, "image_from_base")[0, n, :3].astype(np.float64)
    encoded = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BOX).save(encoded, "JPEG", quality=QUALITY)
    return {
        "name": printable(sample.camera_names[n]),
        "image": f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}",
        "size": list(size),
        "matrix": [float(f"{value:.6g}") for value in matrix.ravel()],
    }
