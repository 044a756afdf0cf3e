"""mAP and mAPH as autoware's perception evaluation computes them, which AWML reports for T4 data sets.

Pure functions: `evaluate(frames, config)` filters each side by range, matches greedily in falling order of score, and
averages precision over thresholds and labels. `docs/t4_metrics.md` lists every switch, and what differs from nuScenes.

Sources, by their definition: tier4/autoware_perception_evaluation at 9d8c977 (the commit that AWML installs) and 96b7182
(1.3.6); AWML 7a6ec07, T4MetricV2.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bevfn.evaluation.average_precision import Best, Ranked, average_precision, best_f1, curve
from bevfn.evaluation.t4_config import AWML_V2, Config, Mode
from bevfn.evaluation.t4_matching import Frame, Prepared, Rule, concatenate, entries, in_band, joined, limit_of, prepare


@dataclass(frozen=True)
class At:
    """One label at one threshold."""

    threshold: float
    """m, or IoU."""
    ap: float
    """0..1; NaN if the label does not count (`Config.absent`)."""
    aph: float
    """The same, with true positives counting by their heading."""
    num_pred: int
    """Entries of the result list: pairs and false alarms."""
    num_tp: int
    heading_weighted_tp: float
    best: Best
    """Where F1 is highest; of AP."""


@dataclass(frozen=True)
class Label:
    """One label: means over its thresholds, NaN left out."""

    name: str
    num_gt: int
    ap: float
    aph: float
    at: tuple[At, ...]


@dataclass(frozen=True)
class Score:
    """One mode in one band: means over the labels, NaN left out; NaN if nothing is left."""

    mean_ap: float
    mean_aph: float
    labels: tuple[Label, ...]


Evaluation = dict[str, dict[str, Score]]
"""{band: {mode: Score}}, a band named by `band_name`."""


def band_name(band: tuple[float, float]) -> str:
    """ "0-121"."""
    return f"{band[0]:g}-{band[1]:g}"


def evaluate(frames: Iterable[Frame], config: Config = AWML_V2) -> Evaluation:
    """Every mode in every band; frames are looked at once, and not kept. Raises ValueError for detections without scores."""
    prepared = [prepare(frame, config) for frame in frames]
    return {
        band_name(band): {mode: _score(prepared, config, band, mode) for mode in config.matching}
        for band in config.bands
    }


def _score(frames: Sequence[Prepared], config: Config, band: tuple[float, float], mode: Mode) -> Score:
    """One mode in one band."""
    inside = [
        (in_band(one.annotated.places, config, band), in_band(one.detected.places, config, band)) for one in frames
    ]
    seen = joined([one.annotated.labels[there] for one, (there, _) in zip(frames, inside)], np.int64)
    num_gt = np.bincount(seen, minlength=len(config.labels)).tolist()
    thresholds, at = config.thresholds(mode), [list[At]() for _ in config.labels]
    for threshold in sorted({value for row in thresholds for value in row}):
        # the last one: unknown as no target, which has no threshold of its own
        owners = np.array([*(threshold in row for row in thresholds), False])
        rule = Rule(mode, limit_of(mode, threshold), owners, config)
        listed = concatenate([entries(one, where, rule) for one, where in zip(frames, inside)])
        for i in range(len(config.labels)):
            ranked = listed.of(i)
            # policies that are blind to labels leave false alarms at thresholds of other labels too, which then count
            if owners[i] or len(ranked.scores):
                at[i].append(_at(threshold, ranked, num_gt[i], config))
    labels = tuple(
        Label(name, count, _mean([one.ap for one in mine]), _mean([one.aph for one in mine]), tuple(mine))
        for name, count, mine in zip(config.labels, num_gt, at)
    )
    return Score(_mean([label.ap for label in labels]), _mean([label.aph for label in labels]), labels)


def _at(threshold: float, ranked: Ranked, num_gt: int, config: Config) -> At:
    """One label at one threshold."""
    plain = curve(Ranked(ranked.scores, ranked.found.astype(np.float64), ranked.found), num_gt)
    ap, aph = (
        average_precision(precision, recall, envelope=config.envelope)
        for precision, recall, _ in (plain, curve(ranked, num_gt))
    )
    if num_gt == 0 and (config.absent == "skipped" or (config.absent == "zero_if_detected" and not len(ranked.scores))):
        ap = aph = math.nan
    num_tp, weighted = int(ranked.found.sum()), float(ranked.weights.sum())
    return At(threshold, ap, aph, len(ranked.scores), num_tp, weighted, best_f1(*plain))


def _mean(values: list[float]) -> float:
    """Without NaN; NaN if nothing is left."""
    kept = [value for value in values if not math.isnan(value)]
    return float(np.mean(kept)) if kept else math.nan
