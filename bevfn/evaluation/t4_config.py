"""What the T4 metric evaluates, with every peculiarity of the evaluators as a switch, and their versions as Configs.

Sources, by their definition: tier4/autoware_perception_evaluation at 9d8c977 (the commit that AWML installs) and 96b7182
(1.3.6); AWML 7a6ec07, T4MetricV2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from bevfn.evaluation import box_values

Mode = Literal["center_distance_bev", "center_distance", "plane_distance", "iou_2d", "iou_3d"]
MODES: tuple[Mode, ...] = get_args(Mode)
Policy = Literal["DEFAULT", "ALLOW_ANY", "ALLOW_UNKNOWN", "ALLOW_SAME_GROUP"]
Absent = Literal["zero_if_detected", "skipped", "zero"]
Thresholds = tuple[float, ...] | tuple[tuple[float, ...], ...]

LABELS = ("car", "truck", "bus", "bicycle", "pedestrian")
AWML_MATCHING: Mapping[Mode, Thresholds] = {
    "center_distance_bev": (0.5, 1.0, 2.0, 4.0),
    "plane_distance": (2.0, 4.0),
}
AWML_BANDS = ((0.0, 50.0), (50.0, 90.0), (90.0, 121.0), (0.0, 121.0))
UNKNOWN, HAZARD = "unknown", "hazard"
GROUPS = (frozenset({"car", "truck", "bus"}), frozenset({"bicycle", "motorbike", "pedestrian", "animal"}))


@dataclass(frozen=True)
class Config:
    """What is evaluated, and every peculiarity of the evaluator as a switch. Defaults: the numbers that AWML publishes."""

    labels: tuple[str, ...] = LABELS
    """Targets, in the order of the report; boxes of others do not count."""
    matching: Mapping[Mode, Thresholds] = field(default_factory=lambda: AWML_MATCHING)
    """Thresholds of every mode in m, or 0..1 for IoU. A flat row is for all labels, unless `row_per_label` reads it
    otherwise; rows of rows give entry i of each to label i."""
    bands: tuple[tuple[float, float], ...] = AWML_BANDS
    """(min, max) [m] of x-y distance from the ego vehicle; each is an evaluation of its own."""
    max_xy: tuple[float, float] | None = None
    """If given, |x| and |y| [m] must be smaller, and distance is not asked for."""
    reach: Mapping[str, float] = field(default_factory=dict)
    """Distance [m] below which boxes of a label count, for labels whose region of interest is smaller than the bands."""
    min_points: tuple[int, ...] = ()
    """LiDAR points from which an annotation counts, one number per label; (): 0 for all."""
    confidence: float | None = None
    """Detections must have a higher score; None: all count."""
    policy: Policy = "DEFAULT"
    """Which labels may be a pair. DEFAULT: the same; ALLOW_ANY: all; ALLOW_UNKNOWN: the same, or the detection is
    unknown; ALLOW_SAME_GROUP: also two of GROUPS. The latter two need "unknown" among the labels."""
    class_agnostic_false_positives: bool = False
    """Under DEFAULT, unmatched detections take what is left whatever its label: false alarms of that label, not theirs."""
    inclusive_lower_range: bool = True
    """Whether a box at exactly the band's min counts: of 9d8c977 yes, of 1.3.6 no."""
    unsigned_yaw: bool = True
    """In frame base_link the evaluator reads a heading without its sign, so yaw and -yaw are the same to APH, and
    published mAPH carries that. False: as in frame map, the true difference."""
    handed_over: Literal["centre_wlh", "bottom_lwh"] = "bottom_lwh"
    """How boxes reach the evaluator. centre_wlh: as it expects them. bottom_lwh: as AWML hands them over, half a height
    too low and lying across their heading; BEV centre distance and `bands` do not see it, all other modes do."""
    pairing: box_values.Pairing = "indexed"
    """Corners that plane distance compares: of 9d8c977 "indexed", of 1.3.6 "aligned"."""
    hazard_is_unknown: bool = False
    """Whether a detection "hazard" may match what "unknown" may: of 1.3.6 yes."""
    row_per_label: bool = True
    """Whether a flat row with exactly as many entries as labels is read as one threshold for each label."""
    drop_nan: bool = True
    """AWML drops every box with a NaN anywhere, velocity included, and every NaN score. False: velocity is not looked at."""
    single_precision: bool = True
    """AWML rounds boxes and scores to float32 before anything else."""
    envelope: bool = True
    """Precision made non-increasing before it is averaged; nuScenes does not."""
    absent: Absent = "zero_if_detected"
    """AP of a label that nothing annotated has: 0 if it is detected, else left out of the means; "skipped": always left
    out; "zero": always 0, as nuScenes."""

    def __post_init__(self) -> None:
        if len(set(self.labels)) != len(self.labels) or not self.labels:
            raise ValueError(f"labels {self.labels} must be different names, one at least")
        if self.min_points and len(self.min_points) != len(self.labels):
            raise ValueError(f"min_points {self.min_points} must have one number for each of {', '.join(self.labels)}")
        if self.policy in ("ALLOW_UNKNOWN", "ALLOW_SAME_GROUP") and UNKNOWN not in self.labels:
            raise ValueError(f"policy {self.policy} needs {UNKNOWN!r} among the labels {', '.join(self.labels)}")
        if wrong := set(self.reach) - set(self.labels):
            raise ValueError(f"reach names {sorted(wrong)[0]!r}, which is none of the labels {', '.join(self.labels)}")
        for low, high in self.bands:
            if not 0 <= low < high:
                raise ValueError(f"band {low:g}-{high:g} must go from 0 m or more to more")
        for mode in self.matching:
            if mode not in MODES:
                raise ValueError(f"matching mode {mode!r} is none of {', '.join(MODES)}")
            self.thresholds(mode)

    def thresholds(self, mode: Mode) -> tuple[tuple[float, ...], ...]:
        """Of every label, rising. Raises ValueError for rows that do not fit the labels, or numbers that are none."""
        given, count = self.matching[mode], len(self.labels)
        rows = [row if isinstance(row, tuple) else (row,) for row in given]
        if self.row_per_label and len(given) == count and all(len(row) == 1 for row in rows):
            rows = [tuple(row[0] for row in rows)]
        rows = [row * count if len(row) == 1 else row for row in rows]
        good = bool(rows) and all(len(row) == count for row in rows)
        if not good or not all(math.isfinite(value) and value >= 0 for row in rows for value in row):
            raise ValueError(f"thresholds {given} of {mode} must be numbers, or rows of one for each of {count} labels")
        return tuple(tuple(sorted(set(column))) for column in zip(*rows))


# Versions of autoware's metric whose scores ours are tested against, by the names of those scores.
AWML_V2 = Config()
PE_9D8C977 = replace(AWML_V2, handed_over="centre_wlh", drop_nan=False, single_precision=False)
PE_1_3_6 = replace(PE_9D8C977, inclusive_lower_range=False, pairing="aligned", hazard_is_unknown=True)
VERSIONS: dict[str, Config] = {
    "awml_t4metric_v2": AWML_V2,
    "pe_9d8c977": PE_9D8C977,
    "pe_1.3.6": PE_1_3_6,
    "pe_1.3.6_map_frame": replace(PE_1_3_6, unsigned_yaw=False),
    "pe_1.3.6_bottom_lwh": replace(PE_1_3_6, handed_over="bottom_lwh"),
}
