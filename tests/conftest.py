"""Before any test module imports torch: what every test process has in common, however busy the machine is."""

import atexit
import os
import shutil
import subprocess
import tempfile

import pytest

# One thread each: `make test` runs a process per core, and sums are in the same order whatever else the machine does.
os.environ["OMP_NUM_THREADS"] = "1"
# One compiler cache for all processes of this run, those that tests start too, and none of other runs.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="bevfn-tests-inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

import bevfn  # noqa: F401  (where torch_npu is installed without CANN, torch can be imported only after it)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
