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
from bevfn.kernels import aoti as kernels
from bevfn.kernels import neighbours
from bevfn.kernels.deform_attn import deform_attn
from bevfn.kernels.deform_conv import deform_conv
from bevfn.kernels.sparse_conv import sparse_conv
from bevfn.kernels.voxel_pool import voxel_pool
from bevfn.kernels.voxelize import voxelize

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"
HOW = {"lower": (0.0, 0.0, 0.0), "size": (1.0, 1.0, 1.0), "grid": (6, 5, 4), "max_points": 3, "max_voxels": 100}
GRID = HOW["grid"]


def encoder(points, valid, first, second):
    """Voxels, a submanifold and a strided convolution, as a sparse encoder has them."""
    features, cells, count, found = voxelize(points, valid, **HOW)
    sites, active = torch.cat([torch.zeros_like(cells[0, :, :1]), cells[0]], 1), count[0] > 0
    table = neighbours.submanifold(sites, active, kernel=(3, 3, 3), grid=GRID, batch=1)
    how = {"kernel": (3, 3, 3), "stride": (2, 2, 2), "padding": (1, 1, 1), "grid": GRID, "capacity": 40, "batch": 1}
    further, further_active, down, inverse, further_found = neighbours.strided(sites, active, **how)
    x = torch.relu(sparse_conv(features[0].to(first.dtype), first, table, table.flip(0)))
    x = torch.relu(sparse_conv(x, second, down, inverse))
    return [x, cells, count, found, table, further, further_active, further_found]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_a_package_has_this_packages_kernels_in_it(dtype, near, tmp_path):
    """What a LiDAR detector is slow without, in a process that has torch alone."""
    drawn = torch.Generator().manual_seed(0)
    points, valid = torch.rand(1, 300, 5, generator=drawn) * 6, torch.rand(1, 300, generator=drawn) < 0.9
    weights = [torch.rand(27, *size, generator=drawn).to(dtype) - 0.5 for size in ((5, 20), (20, 36))]
    graph = flow_of(encoder, points, valid, *weights, table=kernels.table())
    called = {node.target for node in graph.module.graph.nodes} & set(kernels.functions())
    assert len(called) == 4
    run, facts = aoti.write(graph, tmp_path / aoti.FILE)
    made = list(run({name: value.numpy() for name, value in graph.inputs.items()}, False).values())
    for ours, theirs in zip(made, encoder(points, valid, *weights), strict=True):
        apart = np.linalg.norm(ours.astype(np.float64) - theirs.double().numpy())  # inductor may round fewer halves
        assert ours.dtype == theirs.numpy().dtype and apart <= near * theirs.double().norm()
    assert (made[0] > 0).sum() > 100 and 0 < made[-1] <= 40
    assert {"machine", "processor", "instruction_set", "compiler"} <= facts["compiled_for"].keys()
    assert "bevfn" not in aoti.CHILD


def test_a_package_pools_and_attends_by_this_packages_kernels(tmp_path):
    """What a camera's detector is slow without: float32 in an order that is not the memory's, halves, a mask and none."""
    drawn = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 6, 5), (1, 4, 6, 3), (2, 26, 2, 5), (2, 7, 2, 2, 3, 2), (2, 7, 2, 2, 3))
    depth, context, *attended = (torch.rand(shape, generator=drawn) for shape in shapes)
    cell = torch.randint(-1, 9, (1, 5, 4, 6), dtype=torch.int32, generator=drawn)
    mask = torch.rand(2, 7, generator=drawn) < 0.5

    def step(depth, context, cell, value, locations, weights, mask):
        pooled = voxel_pool(depth.permute(0, 3, 1, 2), context, cell, 9)
        sizes = ((4, 5), (2, 3))
        halves = deform_attn(value.half(), locations, weights, sizes=sizes)
        return [pooled, deform_attn(value, locations, weights, mask, sizes=sizes), halves]

    given = (depth, context, cell, *attended, mask)
    graph = flow_of(step, *given, table=kernels.table())
    ours = [str(node.target) for node in graph.module.graph.nodes if str(node.target).startswith("bevfn")]
    assert ours == ["bevfn.voxel_pool.default", "bevfn.deform_attn.default", "bevfn.deform_attn.default"]
    run, _ = aoti.write(graph, tmp_path / aoti.FILE)
    made = run({name: x.numpy() for name, x in graph.inputs.items()}, False).values()
    for found, expected in zip(made, step(*given), strict=True):
        near = 2e-3 if expected.dtype == torch.float16 else 1e-6
        assert found.dtype == expected.numpy().dtype
        assert np.allclose(found, expected.numpy(), rtol=near, atol=near)


def test_a_package_computes_the_other_operators_in_torchs_own(tmp_path):
    """A deformable convolution, compiled: gathers and a product."""
    drawn = torch.Generator().manual_seed(0)
    x, offset, weight = (torch.rand(shape, generator=drawn) for shape in ((1, 4, 5, 6), (1, 18, 3, 4), (2, 4, 3, 3)))

    def step(x, offset, weight):
        return [deform_conv(x, offset, None, weight)]

    graph = flow_of(step, x, offset, weight, table=kernels.table())
    assert not [node for node in graph.module.graph.nodes if str(node.target).startswith("bevfn")]
    run, _ = aoti.write(graph, tmp_path / aoti.FILE)
    (made,) = run({name: value.numpy() for name, value in graph.inputs.items()}, False).values()
    assert np.allclose(made, step(x, offset, weight)[0].numpy(), rtol=1e-5)


def test_a_voxel_outside_the_grid_is_the_callers_error(tmp_path):
    """Of `--input voxels`: the vehicle's program made it, and no table has a place for it."""
    sites, active = torch.tensor([[0, 1, 1, 1], [0, 2, 1, 1]], dtype=torch.int32), torch.ones(2, dtype=torch.bool)

    def step(sites, active):
        return [neighbours.submanifold(sites, active, kernel=(3, 3, 3), grid=GRID, batch=1)]

    run, _ = aoti.write(flow_of(step, sites, active, table=kernels.table()), tmp_path / aoti.FILE)
    given = {"sites": sites.numpy(), "active": active.numpy()}
    (table,) = run(given, False).values()
    assert np.array_equal(table, step(sites, active)[0].numpy())
    given["sites"][1, 1] = GRID[0]
    with pytest.raises(RuntimeError, match="voxel 1 lies outside the grid"):
        run(given, False)


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
