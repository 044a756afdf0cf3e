"""What an installed bevfn is made of: every source file once, and types that tools can see."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path
from typing import assert_type

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from torch import Tensor

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


# The first release without a known advisory that a bound could let in: what is told of those before it.
ADVISORIES = {
    "torch": ("2.10", "CVE-2025-32434 (< 2.6) and CVE-2026-24747 (< 2.10): torch.load(weights_only=True) runs code"),
    "pillow": (
        "13.0",
        "GHSA-8g5g-8vmr-9782, GHSA-5x8w-8jj5-q52h: the JPEG decoder writes beyond its buffer; and all before",
    ),
    "numpy": ("1.22.2", "CVE-2021-41495, CVE-2021-41496, CVE-2021-34141"),
    "opencv-python-headless": ("4.8.1.78", "GHSA-jh2j-j4j9-crg3: its libwebp has CVE-2023-4863"),
    "scipy": ("1.10", "CVE-2023-25399"),
    "setuptools": ("78.1.1", "CVE-2025-47273"),
    "pyarrow": ("23.0.1", "CVE-2026-25087 (15.0.0 to 23.0.0)"),
    "protobuf": ("6.33.5", "CVE-2025-4565, CVE-2026-0994"),
}


def test_no_release_with_a_known_advisory_is_asked_for_or_installed() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    asked = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    asked += [line for extra in project["project"]["optional-dependencies"].values() for line in extra]
    named = set()
    for requirement in map(Requirement, asked):
        if requirement.name in ADVISORIES:
            first, what = ADVISORIES[requirement.name]
            named.add(requirement.name)
            lowest = min(Version(part.version) for part in requirement.specifier if part.operator in (">=", "=="))
            assert lowest >= Version(first), f"{requirement}: {what}"
            if requirement.name != "pyarrow":  # of an extra
                assert Version(importlib.metadata.version(requirement.name)) >= Version(first), what
    assert named == set(ADVISORIES)


TORCH_FIRST = """
import sys
sys.prefix = {prefix!r}  # of an environment whose packages are `site`, made by `make`
sys.path[:] = [p for p in sys.path if "site-packages" not in p] + [{site!r}, {source!r}]
import torch
assert "torch_npu" not in sys.modules
import bevfn
from bevfn.ascend import torchair
print(torchair.find(), torchair.load().__name__)
"""


def test_torch_is_imported_first_where_make_put_the_converters(tmp_path: Path) -> None:
    """Every notebook begins so. Links stand for an environment in which torch_npu lies where `make npu` puts it."""
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or spec.origin is None:
        pytest.skip("needs torch_npu: make npu")
    installed = Path(torch.__file__).parents[1], Path(spec.origin).parents[1]
    site, npu = tmp_path / "site", tmp_path / "npu"
    for folder, of in ((site, installed[0]), (npu, installed[1])):
        folder.mkdir()
        for entry in of.iterdir():
            if entry.name.startswith("torch_npu") == (folder == npu) and entry.suffix != ".pth":
                (folder / entry.name).symlink_to(entry)
    script = TORCH_FIRST.format(prefix=str(tmp_path), site=str(site), source=str(REPO))
    environment = {k: v for k, v in os.environ.items() if k not in ("TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTHONPATH")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, [str(npu / "torch_npu"), "torchair"]), done.stderr


def test_make_takes_the_torch_npu_of_the_extra() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert f'"{project["optional-dependencies"]["npu"][0]}"' in (REPO / "Makefile").read_text()


def test_opencv_decodes_nothing() -> None:
    """CVE-2025-53644, in its JPEG decoder, is mended in 4.12, which wants numpy 2, which nuscenes-devkit does not."""
    for path in (REPO / "bevfn").rglob("*.py"):
        assert "imdecode" not in path.read_text() and "imread" not in path.read_text(), path


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


def test_what_names_a_version_names_the_packages() -> None:
    citation, changes = (REPO / "CITATION.cff").read_text(), (REPO / "CHANGELOG.md").read_text()
    assert f"\nversion: {bevfn.__version__}\n" in citation
    assert f"## {bevfn.__version__}" in changes
    assert ("date-released" in citation) != (f"## {bevfn.__version__}, not released" in changes)
    asked = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]
    (torch_,) = [line for line in asked if Requirement(line).name == "torch"]
    assert f" {torch_} " in (REPO / "Dockerfile").read_text()
