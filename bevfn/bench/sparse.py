"""The sparse LiDAR encoder's convolutions against spconv, against plain torch, and against the machine's GEMM rate.

One thread each, same voxels, channels and weights, taking turns in one run, the best of several repetitions. Times are
CPU time of the process, which on an idle machine is wall time, and does not count waiting for a busy machine's cores.
Of one sweep, and of ten, which have several times the voxels and more neighbours each.
`measure()` runs everything in a child process with OMP_NUM_THREADS=1 (spconv's CPU build brings an OpenMP runtime of
its own, and its results are wrong with more than one thread).
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from bevfn.data import infos
from bevfn.data import points as clouds
from bevfn.files import read_json, to_json
from bevfn.kernels import neighbours
from bevfn.kernels.sparse_conv import sparse_conv
from bevfn.kernels.voxelize import voxelize
from bevfn.synth import key_frame

GOLDEN = Path(__file__).parents[2].parent / "shared" / "goldens" / "bevfusion_lidar" / "inputs.safetensors"
GRID = (1440, 1440, 41)
SWEEPS = {"one sweep": 1, "ten sweeps": 10}
SWEEP_METRES = 0.05  # from one to the next: 1 m/s
VOXELS: dict[str, Any] = {  # of `voxelize`, in the order of its operator
    "lower": (-54.0, -54.0, -5.0),
    "size": (0.075, 0.075, 0.2),
    "grid": (1440, 1440, 40),
    "max_points": 10,
    "max_voxels": 160_000,
}
CHANNELS = (16, 32, 64, 128)  # of the four levels; 5 point columns come in
DOWN = (  # kernel, stride, padding after each level: BEVFusion's encoder at 0.075 m
    ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2), (1, 1, 0)),
    ((1, 1, 3), (1, 1, 2), (0, 0, 0)),
)


@dataclass(frozen=True)
class Layer:
    """One of the 21 convolutions: weight [K C_in C_out], table [K W] and inverse [K V] as `sparse_conv` takes them."""

    name: str
    weight: Tensor
    table: Tensor
    inverse: Tensor

    @property
    def flops(self) -> int:
        """Multiplications and additions of the real pairs."""
        return 2 * int((self.table >= 0).sum()) * self.weight.shape[1] * self.weight.shape[2]


def scan(frame: Path | None = None, golden: Path = GOLDEN) -> tuple[Tensor, str]:
    """(points [P 5], where they come from): a key frame's folder, else `golden`, else a generated scan."""
    if frame is not None:
        index = infos.read(frame / "frame.json")
        return torch.from_numpy(clouds.scan(index[0], index.root)[0]), str(frame)
    if golden.exists():
        return load_file(golden)["points"], "nuScenes (goldens/bevfusion_lidar)"
    rng = np.random.default_rng(
        0
    )  # surfaces, as a real scan: how many neighbours a voxel has is what the figures depend on
    points, _ = key_frame.scan(key_frame.place(rng), rng)
    return torch.from_numpy(points), "generated (synth.key_frame)"


def swept(points: Tensor, sweeps: int) -> Tensor:
    """The scan [P 5], and behind it what stands for the sweeps before: itself, moved back as by a car that drives straight on."""
    shift = torch.zeros(5)
    shift[1] = -SWEEP_METRES
    return torch.cat([points + k * shift for k in range(sweeps)])


def voxels(points: Tensor, sweeps: int = 1) -> tuple[Tensor, Tensor]:
    """(features [V 5], sites [V 4] int32 (b, x, y, z)) of a scan and of the sweeps before it, see `swept`."""
    points = swept(points, sweeps)
    features, cells, count, _ = voxelize(points[None], torch.ones(1, len(points), dtype=torch.bool), **VOXELS)
    V = int((count[0] > 0).sum())
    return features[0, :V].contiguous(), torch.cat([torch.zeros(V, 1, dtype=torch.int32), cells[0, :V]], 1)


def tables(sites: Tensor, capacities: tuple[int, ...]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """([(table, inverse) of submanifold and strided convolution per level], output sites)."""
    made, grid, valid = [], GRID, sites[:, 0] >= 0
    for (kernel, stride, padding), capacity in zip(DOWN, capacities):
        table = neighbours.submanifold(sites, valid, kernel=(3, 3, 3), grid=grid)
        made.append((table, table.flip(0)))
        sites, valid, table, inverse, _ = neighbours.strided(
            sites, valid, kernel=kernel, stride=stride, padding=padding, grid=grid, capacity=capacity, batch=1
        )
        made.append((table, inverse))
        grid = neighbours.out_grid(grid, kernel, stride, padding)
    return made, sites


def exact_capacities(sites: Tensor) -> tuple[int, ...]:
    """Active sites of every level, so that no row is padding."""
    grid, numbers = GRID, []
    for kernel, stride, padding in DOWN:
        *_, found = neighbours.strided(
            sites, sites[:, 0] >= 0, kernel=kernel, stride=stride, padding=padding, grid=grid, capacity=1, batch=1
        )
        numbers.append(int(found))
        sites = neighbours.strided(
            sites,
            sites[:, 0] >= 0,
            kernel=kernel,
            stride=stride,
            padding=padding,
            grid=grid,
            capacity=int(found),
            batch=1,
        )[0]
        grid = neighbours.out_grid(grid, kernel, stride, padding)
    return tuple(numbers)


def encoder_layers(made: list[tuple[Tensor, Tensor]]) -> list[Layer]:
    """The 21 convolutions with random weights that keep the features' size."""
    generator = torch.Generator().manual_seed(0)

    def layer(name: str, channels_in: int, channels_out: int, table: Tensor, inverse: Tensor) -> Layer:
        inputs = channels_in * float((table >= 0).sum()) / table.shape[1]  # terms per output
        weight = torch.randn(table.shape[0], channels_in, channels_out, generator=generator) * (2 / inputs) ** 0.5
        return Layer(name, weight, table, inverse)

    layers = [layer("conv_input", 5, 16, *made[0])]
    for i, channels in enumerate(CHANNELS):
        layers += [layer(f"level{i}", channels, channels, *made[2 * i]) for _ in range(4)]
        layers.append(layer(f"down{i}", channels, CHANNELS[min(i + 1, 3)], *made[2 * i + 1]))
    return layers


def encoder_forward_vs_spconv(features: Tensor, sites: Tensor, repeats: int = 7) -> dict:
    """Forward of all 21 convolutions with ReLU, neighbour tables included, here and in spconv's CPU build."""
    if os.environ.get("OMP_NUM_THREADS") != "1":
        return {"omitted": "spconv's CPU build is wrong with several threads: set OMP_NUM_THREADS=1 or call measure()"}
    try:
        import spconv
        import spconv.pytorch as peer
    except ImportError as missing:
        return {"omitted": f"spconv is not installed ({missing}): pip install -e '.[bench]'"}
    capacities = exact_capacities(sites)
    layers = encoder_layers(tables(sites, capacities)[0])
    modules = spconv_modules(peer, layers)

    def ours() -> tuple[Tensor, Tensor]:
        made, out_sites = tables(sites, capacities)
        x = features
        for i, layer in enumerate(layers):
            table, inverse = made[TABLE_OF[i]]
            x = torch.relu(sparse_conv(x, layer.weight, table, inverse))
        return x, out_sites

    def theirs() -> tuple[Tensor, Tensor]:
        x = peer.SparseConvTensor(features, sites, list(GRID), 1)
        for module in modules:
            x = module(x)
            x = x.replace_feature(torch.relu(x.features))
        return x.features, x.indices

    with torch.no_grad(), one_thread():
        (y, at), (z, at_peer) = ours(), theirs()
        same_sites = torch.equal(at[order(at)], at_peer[order(at_peer)])
        error = float((y[order(at)] - z[order(at_peer)]).norm() / z.norm()) if same_sites else float("inf")
        table_s, our_s, peer_s = best_of(repeats, lambda: tables(sites, capacities), ours, theirs)
        ideal_s = sum(layer.flops for layer in layers) / _gemm_peak(repeats)
    return {
        "peer": f"spconv {spconv.__version__} CPU",
        "ours_ms": 1e3 * our_s,
        "ours_tables_ms": 1e3 * table_s,
        "peer_ms": 1e3 * peer_s,
        "speedup": peer_s / our_s,
        "relative_difference": error,
        # The real pairs' multiplications at the machine's GEMM rate and nothing else: what float32 cannot beat.
        "pairs_at_gemm_peak_ms": 1e3 * ideal_s,
        "speedup_at_gemm_peak": peer_s / ideal_s,
    }


def encoder_backward_vs_torch(features: Tensor, sites: Tensor, repeats: int = 5) -> dict:
    """Forward and backward (features and weights) of all 21 convolutions, here and as gather, matmul, index_add."""
    layers = encoder_layers(tables(sites, exact_capacities(sites))[0])
    pairs = [[_pairs(row) for row in layer.table] for layer in layers]  # the peer gets its pairs for free
    weights = [layer.weight.requires_grad_() for layer in layers]
    features = features.detach().requires_grad_()
    leaves = [features, *weights]

    def ours() -> tuple[Tensor, ...]:
        x = features
        for layer, weight in zip(layers, weights):
            x = torch.relu(sparse_conv(x, weight, layer.table, layer.inverse))
        return torch.autograd.grad(x.sum(), leaves)

    def theirs() -> tuple[Tensor, ...]:
        x = features
        for layer, weight, pairs_of_layer in zip(layers, weights, pairs):
            y = x.new_zeros(layer.table.shape[1], weight.shape[2])
            for w, (reads, writes) in zip(weight.unbind(0), pairs_of_layer):
                y.index_add_(0, writes, x.index_select(0, reads) @ w)
            x = torch.relu(y)
        return torch.autograd.grad(x.sum(), leaves)

    with one_thread():
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(ours(), theirs()))
        our_s, peer_s = best_of(repeats, ours, theirs)
    return {
        "peer": f"torch {torch.__version__} index_select, mm, index_add_ and its autograd",
        "ours_ms": 1e3 * our_s,
        "peer_ms": 1e3 * peer_s,
        "speedup": peer_s / our_s,
        "worst_relative_gradient_difference": error,  # ReLUs that change sign within rounding: 1e-3 in the golden too
    }


def gemm_share(sites: Tensor, repeats: int = 5) -> dict:
    """GFLOP/s over the real pairs of the forward and both gradients, and their share of torch.mm at 2048^3."""
    layers = encoder_layers(tables(sites, exact_capacities(sites))[0])
    seconds = {"forward": 0.0, "input_gradient": 0.0, "weight_gradient": 0.0}
    by_layer = {}
    with one_thread():
        peak = _gemm_peak(repeats) / 1e9
        for layer in layers:
            if layer.name not in by_layer:  # equal layers take equal time
                by_layer[layer.name] = dict(zip(seconds, best_of(repeats, *_three_products(layer))))
            for kind in seconds:
                seconds[kind] += by_layer[layer.name][kind]
    flops = {layer.name: layer.flops for layer in layers}
    gflop = sum(flops[layer.name] for layer in layers) / 1e9
    return {
        "gemm_peak_gflops": peak,
        "gflop": gflop,
        "gflops": {kind: gflop / s for kind, s in seconds.items()},
        "share": {kind: gflop / s / peak for kind, s in seconds.items()},
        "share_by_layer": {
            name: {kind: flops[name] / s / 1e9 / peak for kind, s in kinds.items()} for name, kinds in by_layer.items()
        },
    }


def measure(frame: Path | None = None) -> dict:
    """All figures of this file, from one child process with OMP_NUM_THREADS=1; frame: as of `scan`."""
    child = subprocess.run(
        [sys.executable, "-m", "bevfn.bench.sparse", *([] if frame is None else [str(frame)])],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if child.returncode != 0:
        raise RuntimeError(f"`python -m bevfn.bench.sparse` failed: {child.stderr.strip()[-1000:]}")
    return read_json(child.stdout.encode())


def figures_of(frame: Path | None) -> dict:
    """For one sweep and for ten, in this process."""
    points, source = scan(frame)
    figures: dict[str, Any] = {"scan": source}
    for name, sweeps in SWEEPS.items():
        features, sites = voxels(points, sweeps)
        figures[name] = {
            "voxels": len(sites),
            "encoder_forward_vs_spconv": encoder_forward_vs_spconv(features, sites),
            "encoder_backward_vs_torch": encoder_backward_vs_torch(features, sites),
            "gemm_share": gemm_share(sites),
        }
    return figures


def best_of(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Shortest CPU time [s] of each function; they take turns, so that whatever slows the machine slows all of them."""
    best = [float("inf")] * len(functions)
    for repeat in range(-1, repeats):  # the first round warms up
        for i, function in enumerate(functions):
            start = time.process_time()
            function()
            elapsed = time.process_time() - start
            if repeat >= 0:
                best[i] = min(best[i], elapsed)
    return best


TABLE_OF = [0, *(t for i in range(4) for t in (2 * i, 2 * i, 2 * i, 2 * i, 2 * i + 1))]  # of the 21 layers


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within: torch and our kernels use one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _gemm_peak(repeats: int) -> float:
    """FLOP/s of torch.mm at 2048^3."""
    square = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    return 2 * 2048**3 / best_of(repeats, lambda: square @ square)[0]


def order(sites: Tensor) -> Tensor:
    b, x, y, z = sites.long().unbind(1)
    return torch.argsort(((b * GRID[0] + x) * GRID[1] + y) * GRID[2] + z)


def _pairs(row: Tensor) -> tuple[Tensor, Tensor]:
    writes = torch.nonzero(row >= 0)[:, 0]
    return row[writes].long(), writes


def _three_products(layer: Layer) -> list[Callable[[], Tensor]]:
    x = torch.randn(layer.inverse.shape[1], layer.weight.shape[1])
    grad = torch.randn(layer.table.shape[1], layer.weight.shape[2])
    inverse = layer.inverse.contiguous()
    return [
        lambda: torch.ops.bevfn.sparse_conv(x, layer.weight, layer.table),
        lambda: torch.ops.bevfn.sparse_conv(grad, layer.weight.transpose(1, 2), inverse),
        lambda: torch.ops.bevfn.sparse_conv_weight_grad(x, grad, layer.table),
    ]


def spconv_modules(peer: Any, layers: list[Layer]) -> list:
    """spconv's layers with our weights; its kernels are [C_out kx ky kz C_in]."""
    modules = []
    for layer in layers:
        channels_in, channels_out = layer.weight.shape[1:]
        level = layer.name[-1] if layer.name[-1].isdigit() else "0"
        if layer.name.startswith("down"):
            kernel, stride, padding = DOWN[int(level)]
            module = peer.SparseConv3d(
                channels_in, channels_out, kernel, stride, padding, bias=False, indice_key=layer.name
            )
        else:
            kernel = (3, 3, 3)
            module = peer.SubMConv3d(channels_in, channels_out, kernel, bias=False, indice_key=f"level{level}")
        weight = layer.weight.permute(2, 0, 1).reshape(channels_out, *kernel, channels_in)
        module.weight.data.copy_(weight)
        modules.append(module.eval())
    return modules


if __name__ == "__main__":
    print(to_json(figures_of(Path(sys.argv[1]) if sys.argv[1:] else None), indent=1).decode())
