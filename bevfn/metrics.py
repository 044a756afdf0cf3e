"""What a step's metrics are called, and the file of a run folder that keeps them, which training writes and reports read."""

from collections.abc import Mapping
from pathlib import Path

from bevfn.files import read_json

METRICS_FILE = "metrics.jsonl"
# Metrics whose names begin so count what is wrong: `overflow/` did not fit a fixed capacity, `bad/` is broken, `empty/` has
# nothing to learn from, `missing/` is not in the data. 0 is what one hopes for; a run warns of everything else.
COUNTERS = ("overflow/", "bad/", "empty/", "missing/")
OF_LABELS = ("empty/boxes", "overflow/boxes")  # of what is learned: where nothing is, they say nothing
# What a counter that is not zero means to the user; the longest matching beginning of its name counts.
_MEANINGS = {
    "overflow/": "did not fit a fixed capacity and were dropped; raise that capacity, or accept the loss",
    "overflow/points": "points did not fit and were dropped; raise --point-capacity, or accept the loss",
    "overflow/boxes": "annotated boxes did not fit and were dropped; raise --box-capacity",
    "overflow/voxels_l0": "voxels did not fit, as published, and were dropped with their points; --voxel-capacity keeps more",
    "overflow/voxels": "sites of the sparse encoder did not fit and were dropped; raise --site-capacity of that level",
    "bad/": "items of the data are broken and were dropped; check the files",
    "bad/samples": "samples are damaged and others took their place; check the files that are named",
    "bad/points": "points have numbers that are not finite or cannot be, and were dropped; check the point files",
    "bad/intensities": "samples have intensities of 0..1, where published weights know 0..255; scale them or begin from scratch",
    "bad/targets": "boxes have sizes that are not above 0, or numbers that are not finite, and taught nothing; check the data",
    "empty/": "samples have nothing to learn from; check the range and the data",
    "empty/points": "samples have no point in range; check the point files and point_cloud_range",
    "empty/boxes": "samples have no annotated box in range and teach background only",
    "empty/redrawn": "samples had no annotated box in range, as published others were drawn in their place",
    "empty/depth": "images have no LiDAR point and teach no depth; check the calibration if there are many",
    "missing/": "items are not in the data; check it with `bevfn data check`",
    "missing/key_frames": "key frames of the split lack files and were left out, so these scores are not the split's",
    "missing/frames": "earlier key frames do not exist, as at a scene's start, and one that does (the current one, or the scene's "
    "first) stands for each",
}
# Counts over the whole batch, which are added up over replicas and microbatches; of all other metrics the mean is taken.
SUMMED = (*COUNTERS, "num_pos")


def meaning(counter: str) -> str:
    """The sentence that follows a counter's number: what it counts, and what to do about it."""
    return _MEANINGS[max((key for key in _MEANINGS if counter.startswith(key)), key=len)]


def warnings(counts: Mapping[str, float]) -> list[str]:
    """One sentence for each counter that is not zero."""
    found = {name: count for name, count in counts.items() if name.startswith(COUNTERS) and count}
    return [f"{name}: {count:,.0f} {meaning(name)}" for name, count in found.items()]


def added(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """Sums by name; what one has not is 0 there."""
    return {name: a.get(name, 0) + b.get(name, 0) for name in {**a, **b}}


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The steps of a run folder in order; every value a float.

    Where a resumed run begins again at a step, its lines replace those that the run before had written from that step
    on. A last line that a killed run did not finish is left out. Raises ValueError, naming file and line, for another
    that is no record.
    """
    path = Path(run_dir) / METRICS_FILE
    text = path.read_bytes()
    records: list[dict[str, float]] = []
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            record = {name: float(value) for name, value in read_json(line).items()}
            while records and records[-1]["step"] >= record["step"]:
                records.pop()
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError):
            raise ValueError(f"{path}, line {number} is damaged; delete that line") from None
        records.append(record)
    return records
