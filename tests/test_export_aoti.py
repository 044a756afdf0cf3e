"""`bevfn export --to aoti`: a package that torch alone runs, in a process without bevfn."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from small_exports import export, flow_of, refused

from bevfn.export import aoti, build, manifest
from bevfn.kernels import ascend as kernels
from bevfn.kernels.voxelize import voxelize

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"
HOW = {"lower": (0.0, 0.0, 0.0), "size": (1.0, 1.0, 1.0), "grid": (4, 3, 4), "max_points": 3, "max_voxels": 30}


def test_a_package_computes_this_packages_operators_without_it(tmp_path):
    """Voxels of points and a sum by index: sorts, gathers and scatters, compiled, in a process that has torch alone."""
    drawn = torch.Generator().manual_seed(0)
    points, valid = torch.rand(1, 300, 5, generator=drawn) * 4, torch.rand(1, 300, generator=drawn) < 0.9

    def step(points, valid):
        features, coords, count, found = voxelize(points, valid, **HOW)
        return [features @ torch.ones(5, 2), coords, count, found]

    run, facts = aoti.write(flow_of(step, points, valid, table=kernels.table()), tmp_path / aoti.FILE)
    made = run({"points": points.numpy(), "points_valid": valid.numpy()}, False)
    for ours, theirs in zip(made.values(), step(points, valid), strict=True):
        assert np.allclose(ours, theirs.numpy(), rtol=1e-6) and ours.dtype == theirs.numpy().dtype
    assert {"machine", "processor", "instruction_set", "compiler"} <= facts["compiled_for"].keys()
    assert "bevfn" not in aoti.CHILD


def test_a_package_computes_in_halves(tmp_path):
    """What a detector in half precision has: convolution, matrix product and a softmax in float32 between."""
    drawn = torch.Generator().manual_seed(0)
    kernel, weight = (torch.rand(shape, generator=drawn).half() - 0.5 for shape in ((8, 4, 3, 3), (6, 8)))

    def step(x):
        y = torch.relu(torch.nn.functional.conv2d(x.half(), kernel, padding=1))
        shares = y.float().flatten(2).softmax(-1).half()
        return [y, (weight @ shares[0]).float()]

    x = torch.rand(1, 4, 10, 12, generator=drawn)
    run, _ = aoti.write(flow_of(step, x, table=kernels.table()), tmp_path / aoti.FILE)
    for ours, theirs in zip(run({"x": x.numpy()}, False).values(), step(x), strict=True):
        assert ours.dtype == theirs.numpy().dtype and np.allclose(ours, theirs.numpy(), atol=1e-2)


def test_a_package_that_does_not_run_is_one_sentence(tmp_path):
    (tmp_path / aoti.FILE).write_bytes(b"no package")
    with pytest.raises(RuntimeError, match=r"model\.pt2 does not run \(\d+\): "):
        aoti.run(tmp_path / aoti.FILE, {"a": np.ones(3, np.float32)})


def test_without_a_compiler_nothing_is_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: None)
    says = "an AOTInductor package is compiled as C++ here: bevfn's CPU kernels need a C++17 compiler"
    refused(monkeypatch, capsys, says, tmp_path / "none.pth", "--out", tmp_path / "out", "--to", "aoti")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept(monkeypatch, capsys, tmp_path):
    (tmp_path / "mine").touch()
    refused(monkeypatch, capsys, "exists and is not empty", tmp_path / "none.pth", "--out", tmp_path, "--to", "aoti")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.fixture(scope="module")
def exported(trained, frame, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "server"
    with pytest.MonkeyPatch.context() as patch:
        assert export(patch, trained, "--out", out, "--data", frame, "--to", "aoti") == 0
    return out


@pytest.mark.slow
def test_the_detector_is_a_package(exported):
    said = json.loads((exported / manifest.NAME).read_text())
    assert said["verified"]["failed"] == "" and said["verified"]["boxes"]["found"] == 100
    assert said["file"]["compiled_for"]["instruction_set"] and said["file"]["name"] == aoti.FILE
    assert sorted(path.name for path in exported.iterdir()) == ["example.npz", "manifest.json", "model.pt2"]


@pytest.mark.slow
def test_the_detector_in_half_precision_is_a_package(trained, frame, monkeypatch, tmp_path):
    out = tmp_path / "out"
    how = ("--to", "aoti", "--precision", "fp16")
    assert export(monkeypatch, trained, "--out", out, "--data", frame, *how) == 0
    said = json.loads((out / manifest.NAME).read_text())
    assert said["verified"]["failed"] == "" and said["verified"]["boxes"]["found"] >= 95
    assert said["precision"] == "fp16" and said["inputs"][0]["dtype"] == "float32"


@pytest.mark.slow
def test_the_samples_of_the_page_run_the_package(exported, monkeypatch, capsys, tmp_path):
    """docs/deploy.md: Python in this process; C++ compiled against torch's own headers and libraries."""
    text = PAGE.read_text()
    monkeypatch.chdir(exported.parent)
    example = np.load(exported / build.EXAMPLE)
    (sample,) = [
        block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "aoti_load_package" in block
    ]
    names: dict = {}
    exec(compile(sample, "docs/deploy.md", "exec"), names)
    assert np.allclose(names["found"]["boxes"].numpy(), example["boxes"], atol=1e-4)

    (sample,) = re.findall(r"```cpp\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "main.cpp").write_text(sample)
    home = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    command = ["g++", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", str(tmp_path / "main.cpp")]
    command += [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
    command += [f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([*command, "-o", str(tmp_path / "main")], check=True)
    for name in ("points", "points_valid"):
        example[name].tofile(exported.parent / f"{name}.bin")
    done = subprocess.run([str(tmp_path / "main")], capture_output=True, text=True, check=True, cwd=exported.parent)
    assert done.stdout.startswith(f"{example['valid'].sum()} detections, "), done.stdout
