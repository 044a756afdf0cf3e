"""A table of (what, mutation, command): whatever is wrong with a file is one sentence, at once, and leaves nothing behind.

pytest tests/test_fuzz.py -m slow -s      twelve times as many cases, with a line of counts per row
"""

from collections import Counter

import pytest
import small_weights
from fuzz import runs, table, weights, worlds

from bevfn.upstream import checkpoints

ROWS = [*weights.rows(), *runs.rows(), *worlds.rows()]
SLOW = 12


@pytest.fixture(scope="module", autouse=True)
def _small_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(checkpoints.CHECKPOINTS, weights.MODEL, small_weights.shrunk(weights.MODEL))
        yield


def tried(row: table.Row, folder, seeds: range) -> Counter[str]:
    row.make(folder)
    row.command(folder)  # nothing is refused for another reason
    return Counter(table.run(row, folder, seed) for seed in seeds)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_what_is_wrong_is_refused_or_harmless(tmp_path, row):
    counts = tried(row, tmp_path, range(row.cases))
    assert counts["accepted" if row.older else "refused"] > 0, counts


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_what_is_wrong_is_refused_or_harmless_many_times(tmp_path, row):
    print(f"\n{row.what}: {dict(tried(row, tmp_path, range(row.cases, SLOW * row.cases)))}")
