"""What a step's metrics are called, and the file of a run folder that keeps them, which training writes and reports read."""

from pathlib import Path

from bevfn.files import read_json

METRICS_FILE = "metrics.jsonl"
# Metrics whose names begin so count what is wrong: `overflow/` did not fit a fixed capacity, `bad/` is broken, `empty/` has
# nothing to learn from, `missing/` is not in the data. 0 is what one hopes for; a run warns of everything else.
COUNTERS = ("overflow/", "bad/", "empty/", "missing/")
# Counts over the whole batch, which are added up over replicas and microbatches; of all other metrics the mean is taken.
SUMMED = (*COUNTERS, "num_pos")


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
