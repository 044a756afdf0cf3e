"""The golden cases of the T4 metric in ../shared, as frames and configs of ours."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from bevfn.evaluation.t4_config import VERSIONS, Config
from bevfn.evaluation.t4_matching import Boxes, Frame

FOLDER = Path(__file__).parents[2] / "shared" / "t4dataset" / "metrics"
CASES = sorted(FOLDER.rglob("*.json"))
ABSENT = "the golden cases ../shared/t4dataset/metrics are not here"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def frames(case: dict) -> list[Frame]:
    """A case's frames, their boxes in the order that it lists them."""
    return [
        Frame(
            Boxes(*chosen(case["gt"], number), num_points=numbers(case["gt"], "num_points", number)),
            Boxes(*chosen(case["pred"], number), scores=numbers(case["pred"], "score", number)),
        )
        for number in range(case["num_frames"])
    ]


def chosen(side: dict, number: int) -> tuple[np.ndarray, tuple[str, ...]]:
    of_frame = [i for i, frame in enumerate(side["frame"]) if frame == number]
    rows = [[math.nan if value is None else value for value in side["box"][i]] for i in of_frame]
    return np.array(rows, dtype=np.float64).reshape(-1, 9), tuple(side["label"][i] for i in of_frame)


def numbers(side: dict, name: str, number: int) -> np.ndarray:
    values = [value for value, frame in zip(side[name], side["frame"]) if frame == number]
    return np.array([math.nan if value is None else value for value in values])


def config(case: dict, version: str) -> Config:
    """The version's switches with the case's settings, which AWML's adapter does not look at."""
    if version.startswith("awml"):
        return VERSIONS[version]
    given = case["config"]
    return replace(
        VERSIONS[version],
        labels=tuple(given["labels"]),
        matching={mode: tuple(map(_row, thresholds)) for mode, thresholds in given["matching"].items()},
        bands=tuple(map(tuple, given["bands"])),
        max_xy=(given["max_x"], given["max_y"]) if "max_x" in given else None,
        min_points=tuple(given["min_point_numbers"]),
        confidence=given["confidence_threshold"],
        policy=given["matching_label_policy"],
        class_agnostic_false_positives=given["matching_class_agnostic_fps"],
    )


def _row(threshold):
    return tuple(threshold) if isinstance(threshold, list) else threshold
