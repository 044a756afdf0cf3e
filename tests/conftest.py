"""Before any test module imports torch: what every test process has in common, however busy the machine is."""

import atexit
import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import hypothesis
import pytest

# One thread each: `make test` runs a process per core, and sums are in the same order whatever else the machine does.
os.environ["OMP_NUM_THREADS"] = "1"
# One compiler cache for all processes of this run, those that tests start too, and none of other runs.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="bevfn-tests-inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

import small_root

import bevfn  # noqa: F401  (where torch_npu is installed without CANN, torch can be imported only after it)

hypothesis.settings.register_profile("bevfn", deadline=None)  # no test asserts a time
hypothesis.settings.load_profile("bevfn")


@pytest.fixture
def bare(monkeypatch):
    """Evaluations without pictures and report, which take most of a small run's time: for tests that look at neither."""
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def bare_runs():
    """The same as `bare`, for a whole module's runs while they are made: a context manager."""

    @contextlib.contextmanager
    def context():
        with pytest.MonkeyPatch.context() as patch:
            draw_nothing(patch)
            yield

    return context


def draw_nothing(patch):
    from bevfn.evaluation import page

    patch.setattr(page, "write", lambda *_, **__: None)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A run's folder of the mini LiDAR-only model that the export tests share, see small_exports."""
    import small_exports

    return small_exports.write_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="session")
def frame(tmp_path_factory) -> Path:
    """A key frame with small images, which they share too."""
    import small_exports

    return small_exports.write_frame(tmp_path_factory.mktemp("frame"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A small nuScenes root that nobody changes."""
    return small_root.write(tmp_path_factory.mktemp("data") / "nuscenes")


@pytest.fixture
def root(kept, tmp_path) -> Path:
    """A copy of `kept` to break, without the index that reading it left there."""
    return Path(shutil.copytree(kept, tmp_path / "nuscenes", ignore=shutil.ignore_patterns(".bevfn")))
