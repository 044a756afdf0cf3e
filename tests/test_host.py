"""Worker processes: Ctrl-C, which a terminal sends to all of them, is the command's alone to answer."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bevfn import host

COMMAND = """
import sys, time
from bevfn import exits, host

def jobs():
    for i in range(4):
        yield (0.01,) if i < 2 else (600.0,)
    print("waiting", flush=True)

if __name__ == "__main__":
    with exits.one_sentence():
        print("started", flush=True)
        for _ in host.unordered(time.sleep, jobs(), 2):
            print("done", flush=True)
"""


@pytest.mark.parametrize("after, presses", [("waiting", 1), ("waiting", 2), ("started", 2), ("done", 1)])
def test_ctrl_c_ends_workers_at_once_in_one_sentence(tmp_path, after, presses):
    """While workers still import, in the middle of jobs of ten minutes, and again while they are ended."""
    (tmp_path / "command.py").write_text(COMMAND)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "command.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    while process.stdout.readline().strip() != after:
        assert process.poll() is None
    for _ in range(presses):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.2)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    said = "bevfn: stopped by Ctrl-C; what was written before is whole\n"
    assert error == said or (presses > 1 and error == "")  # the second may come before it is said
    with pytest.raises(ProcessLookupError):  # nobody is left of the group
        for _ in range(50):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_results_come_as_they_are_done_and_an_exception_ends_the_workers():
    assert sorted(host.unordered(pow, ((2, i) for i in range(9)), 2)) == [2**i for i in range(9)]
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        list(host.unordered(_slow_or_wrong, [(0,), (600,)], 2))
    assert time.monotonic() - began < 300


def _slow_or_wrong(seconds: float) -> float:
    time.sleep(seconds)
    return 1 / seconds
