"""What an installed bevfn is made of: every source file once, and types that tools can see."""

import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import assert_type

import bevfn
from bevfn.kernels.voxelize import voxelize

REPO = Path(__file__).parent.parent
# What a front end such as pip calls; here without the isolated environment, which would be fetched from an index.
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def _build(kind: str, source: Path, out: Path) -> Path:
    subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)], cwd=source, check=True, capture_output=True, text=True
    )
    (made,) = [path for path in out.iterdir() if path.suffix in (".whl", ".gz")]
    return made


def _clone(folder: Path) -> Path:
    """The committed and the changed files, links as links, without build outputs."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, check=True, capture_output=True, text=True).stdout
    archive = folder / "source.tar"
    with tarfile.open(archive, "w") as tar:
        for name in filter(None, listed.split("\0")):
            if (REPO / name).exists():
                tar.add(REPO / name, arcname=name)
    source = folder / "source"
    with tarfile.open(archive) as tar:
        tar.extractall(source, filter="tar")
    return source


def test_a_wheel_made_from_the_source_archive_holds_every_file_once(tmp_path: Path) -> None:
    source = _clone(tmp_path)
    expected = Counter(path.relative_to(source).as_posix() for path in (source / "bevfn").rglob("*") if path.is_file())
    for room in ("kernels", "experiments"):  # top-level folders that are imported from within bevfn
        assert (source / "bevfn" / room).is_symlink()
        ours = [path for path in (source / room).rglob("*") if path.is_file() and "results" not in path.parts]
        expected.update(f"bevfn/{path.relative_to(source).as_posix()}" for path in ours)

    sdist = _build("build_sdist", source, tmp_path / "sdist")
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    wheel = _build("build_wheel", tmp_path / "unpacked" / f"bevfn-{bevfn.__version__}", tmp_path / "wheel")
    held = Counter(name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("bevfn-"))

    assert wheel.name == f"bevfn-{bevfn.__version__}-py3-none-any.whl"
    assert "bevfn/py.typed" in held
    assert held == expected


def test_the_types_of_the_linked_folders_are_seen() -> None:
    """`make lint` checks this file too: were `voxelize` Any to mypy, `assert_type` would be an error there."""
    points, valid = torch.zeros(1, 4, 5), torch.ones(1, 4, dtype=torch.bool)
    features, *_ = assert_type(
        voxelize(
            points,
            valid,
            lower=(0.0, 0.0, 0.0),
            size=(1.0, 1.0, 1.0),
            grid=(4, 4, 4),
            max_points=4,
            max_voxels=2,
        ),
        tuple[Tensor, Tensor, Tensor, Tensor],
    )
    assert features.shape == (1, 2, 5)
