"""`bevfn bench scale`: formulas against numbers by hand, and what a simulation may never do."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bevfn import cli
from bevfn.bench import scale
from bevfn.bench.scale import FABRICS, Input

A2 = FABRICS["a2"]
QUICK = Input(np.array([1e-6]), workers=1, prefetch=2)


def test_a_ring_and_two_levels_by_hand():
    size = 159.3e6  # bytes; docs/distributed.md has the same sums with two all-reduces
    assert scale.ring(size, 1, A2) == scale.hierarchical(size, 1, A2) == 0
    assert scale.ring(size, 8, A2) == pytest.approx(2 * 7 / 8 * size / 19.4e9 + 14 * 20e-6)
    assert scale.hierarchical(size, 8, A2) == pytest.approx(2 * size / 8 / 19.4e9 + 2 * 20e-6)
    assert scale.hierarchical(size, 16, A2) == pytest.approx(
        scale.hierarchical(size, 8, A2) + size / 8 / 22.6e9 + 2 * 20e-6
    )


@settings(max_examples=50)
@given(st.floats(1e5, 1e10), st.integers(1, 64), st.integers(1, 300), st.floats(1e-4, 10.0))
def test_buckets_hide_all_but_the_last_or_what_the_network_cannot_take(size, buckets, devices, backward):
    whole = scale.exposed(size, 1, devices, A2, backward)
    each, some = scale.hierarchical(size / buckets, devices, A2), scale.exposed(size, buckets, devices, A2, backward)
    assert whole == pytest.approx(scale.hierarchical(size, devices, A2))
    # Either the network keeps up and the last part is left, or it is always busy from the first part on.
    busy = backward / buckets + buckets * each - backward
    assert some == pytest.approx(max(each, busy), abs=1e-9)


def simulated(devices, compute, reading=QUICK, **options):
    made = {"batch_size": 1, "communication": 0.0, "steps": 400, "seed": 0} | options
    return scale.simulate(devices, np.asarray(compute), reading, **made)


def test_equal_steps_take_their_seconds_and_the_communication():
    found = simulated(8, [0.5], communication=0.1)
    assert found["step_seconds"] == pytest.approx(0.6) and found["waited_for_input_seconds"] == 0


def test_a_step_is_as_slow_as_its_slowest_device():
    rare = [1.0] * 99 + [2.0]
    alone, many = simulated(1, rare, steps=4000), simulated(64, rare, steps=4000)
    assert alone["step_seconds"] == pytest.approx(1.01, abs=0.01)
    assert many["step_seconds"] == pytest.approx(2 - 0.99**64, abs=0.03)
    assert many["step_seconds"] == pytest.approx(many["slowest_compute_seconds"], rel=0.01)


def test_input_stalls_a_step_where_the_workers_are_too_slow_and_only_there():
    slow = Input(np.array([0.3]), workers=2, prefetch=2)  # 6.7 samples/s
    assert simulated(4, [1.0], slow, batch_size=4)["waited_for_input_seconds"] == 0
    starved = simulated(4, [0.1], slow, batch_size=4)
    assert starved["step_seconds"] == pytest.approx(4 * 0.3 / 2, rel=0.02)
    assert starved["waited_for_input_seconds"] == pytest.approx(0.6 - 0.1, rel=0.02)


def test_what_was_read_ahead_carries_over_a_short_stall():
    ahead = Input(np.array([0.01]), workers=4, prefetch=2, stalls=0.02, stall_seconds=0.5)
    assert simulated(8, [1.0], ahead)["waited_for_input_seconds"] == 0
    hardly = Input(np.array([0.01]), workers=1, prefetch=1, stalls=0.02, stall_seconds=3.0)
    assert simulated(8, [1.0], hardly)["waited_for_input_seconds"] > 0.1


def test_the_spread_is_of_a_runs_steps_without_what_they_waited(tmp_path):
    rows = [{"step": i, "seconds": 9.0 if i < 10 else 1.0 + (i % 2), "seconds/waited": float(i % 2)} for i in range(60)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert scale.steps_of(tmp_path).tolist() == [1.0] * 50
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl has 0 steps after the first 10.*longer run"):
        scale.steps_of(tmp_path)


def run(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["bevfn", "bench", "scale", *flags])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_command_prints_a_table_and_refuses_what_cannot_be(capsys, monkeypatch):
    assert not run(monkeypatch, "--samples", "1", "--devices", "1", "8", "--steps", "20", "--model", "bevfusion-lidar")
    table, _, figures = capsys.readouterr().out.partition("{")
    assert "efficiency" in table
    figures = json.loads("{" + figures)["figures"]
    assert figures["1 devices"]["efficiency"] == 1 > figures["8 devices"]["efficiency"] > 0.99
    assert run(monkeypatch, "--devices", "0") == 2
    assert "--devices 0 must be at least 1" in capsys.readouterr().err
