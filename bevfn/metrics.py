"""What a step's metrics are called, and the file of a run folder that keeps them, which training writes and reports read."""

import json
from pathlib import Path

METRICS_FILE = "metrics.jsonl"
# Metrics whose names begin so count what is wrong: `overflow/` did not fit a fixed capacity, `bad/` is broken, `empty/` has
# nothing to learn from, `missing/` is not in the data. 0 is what one hopes for; a run warns of everything else.
COUNTERS = ("overflow/", "bad/", "empty/", "missing/")
# Counts over the whole batch, which are added up over replicas and microbatches; of all other metrics the mean is taken.
SUMMED = (*COUNTERS, "num_pos")


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The steps of a run folder in order; every value a float.

    Where a resumed run begins again at a step, its lines replace those that the run before had written from that step
    on. A last line that a killed run did not finish is left out.
    """
    text = (Path(run_dir) / METRICS_FILE).read_text()
    records: list[dict[str, float]] = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        record = {name: float(value) for name, value in json.loads(line).items()}
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
        records.append(record)
    return records
