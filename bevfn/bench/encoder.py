"""The sparse LiDAR encoder's convolutions on a GPU against spconv's CUDA build and the GPU's GEMM rate.

Same voxels, channels and weights, eager, taking turns in one run. "ms" is time of the GPU's clock alone, "wall_ms" of the
host's, launches included (`machine.seconds_on`, `machine.best_seconds`). What is timed:
    tables: neighbour tables of all levels and how their rows are grouped for both directions
    forward: with the tables; forward, tables given: without
    backward: features' and weights' gradients, whose tables the forward pass made
    train: forward, then backward
spconv makes a strided convolution's tables each time, so nothing of it is without tables but its backward pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bevfn.bench import machine, sparse
from bevfn.kernels.sparse_conv import Tiles, sparse_conv, tiles

CLOUDS = {
    "one sweep": (1, 160_000),
    "ten sweeps": (10, 160_000),
    "120 k voxels": (20, 120_000),
}  # sweeps, voxels at most
SLOPE = 2**-6  # of every output: what all voxels add to a weight's gradient stays within float16

Table = tuple[Tensor, Tensor, Tiles]


class Chain(NamedTuple):
    """One of those that are compared: its passes, and what they have to agree in."""

    forward: Callable[[], tuple[Tensor, Tensor]]
    """(features [W 128], sites [W 4]) of the last level"""
    leaves: list[Tensor]
    """The input's features and the 21 weights"""
    alike: Callable[[list[Tensor]], list[Tensor]]
    """Gradients of leaves, the weights' as [K C_in C_out]"""


def measure(device: str, points: Tensor, gemm_gflops: dict[str, float], *, repeats: int = 9) -> dict:
    """{cloud: figures} of `figures_of`; points: [P 5] of a scan; gemm_gflops: of every dtype that is measured, by its name."""
    made = {}
    for name, (sweeps, most) in CLOUDS.items():
        features, sites = sparse.voxels(points, sweeps)
        made[name] = figures_of(device, features[:most], sites[:most], gemm_gflops, repeats=repeats)
    return made


def figures_of(
    device: str, features: Tensor, sites: Tensor, gemm_gflops: dict[str, float], *, repeats: int = 9
) -> dict:
    """Of one cloud: features [V 5], sites [V 4] int32 (b, x, y, z)."""
    features = (features / features.abs().amax(0).clamp(min=1e-6)).to(device)  # metres and intensities, for float16
    sites = sites.to(device)
    capacities = sparse.exact_capacities(sites)
    layers = sparse.encoder_layers(sparse.tables(sites, capacities)[0])
    gflop = sum(layer.flops for layer in layers) / 1e9
    figures: dict[str, Any] = {"voxels": len(sites), "gflop": gflop}
    for name, peak in gemm_gflops.items():
        x = features.to(getattr(torch, name))
        figures[name] = machine.tried(partial(_of_dtype, device, x, sites, capacities, layers, repeats))
        if "ours" in figures[name]:
            ms = figures[name]["ours"]["ms"]
            figures[name]["ours"]["share_of_gemm_peak"] = {
                "forward, tables given": gflop / (1e-3 * ms["forward, tables given"]) / peak,
                "backward": 2 * gflop / (1e-3 * ms["backward"]) / peak,
            }
    return figures


def _of_dtype(
    device: str, x: Tensor, sites: Tensor, capacities: tuple[int, ...], layers: list[sparse.Layer], repeats: int
) -> dict[str, dict[str, Any]]:
    """{"ours", "spconv"}: times of both in the dtype of x, and how they compare."""
    ours = _ours(x, sites, capacities, layers)
    runs = {"ours": {**_passes(ours), **_parts(ours, sites, capacities)}}
    theirs, said = _spconv(x, sites, layers)
    if theirs is None:
        return {**_times(device, runs, repeats), "spconv": said}
    found = _times(device, {**runs, "spconv": _passes(theirs)}, repeats)
    found["spconv"] |= {**said, **_speedups(found), **_differences(ours, theirs)}
    return found


def spconv_for_cuda() -> tuple[Any, str]:
    """(spconv.pytorch, its version), or (None, why there is none for CUDA, one sentence)."""
    remedy = "pip install -e '.[bench-cuda]'"
    try:
        import spconv
        import spconv.pytorch
        from spconv.cppconstants import CPU_ONLY_BUILD
    except (ImportError, OSError, RuntimeError) as missing:  # OSError: one of CUDA's libraries does not load
        return None, f"spconv is not installed ({missing}): {remedy}"
    if CPU_ONLY_BUILD:  # its backward pass asks for a CUDA stream even on a CPU
        return None, f"spconv {spconv.__version__} is its build for CPUs: pip uninstall spconv, then {remedy}"
    return spconv.pytorch, f"spconv {spconv.__version__}"


def _tables(sites: Tensor, capacities: tuple[int, ...]) -> tuple[list[Table], Tensor]:
    made, out_sites = sparse.tables(sites, capacities)
    return [(table, inverse, tiles(table, inverse)) for table, inverse in made], out_sites


def _through(x: Tensor, weights: list[Tensor], made: list[Table]) -> Tensor:
    """All convolutions, each with its ReLU."""
    for i, weight in enumerate(weights):
        x = torch.relu(sparse_conv(x, weight, *made[sparse.TABLE_OF[i]]))
    return x


def _ours(features: Tensor, sites: Tensor, capacities: tuple[int, ...], layers: list[sparse.Layer]) -> Chain:
    weights = [layer.weight.detach().to(features).requires_grad_() for layer in layers]
    x = features.detach().requires_grad_()

    def forward() -> tuple[Tensor, Tensor]:
        made, out_sites = _tables(sites, capacities)
        return _through(x, weights, made), out_sites

    return Chain(forward, [x, *weights], lambda gradients: gradients)


def _parts(ours: Chain, sites: Tensor, capacities: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """What can be timed of ours alone."""
    x, *weights = ours.leaves
    made, _ = _tables(sites, capacities)
    return {
        "tables": lambda: _tables(sites, capacities),
        "forward, tables given": _without_gradient(lambda: _through(x, weights, made)),
    }


def _theirs(peer: Any, features: Tensor, sites: Tensor, layers: list[sparse.Layer]) -> Chain:
    modules = [module.to(features) for module in sparse.spconv_modules(peer, layers)]
    x = features.detach().requires_grad_()

    def forward() -> tuple[Tensor, Tensor]:
        y = peer.SparseConvTensor(x, sites, list(sparse.GRID), 1)
        for module in modules:
            module.train(torch.is_grad_enabled())  # makes the tables of the backward pass too
            y = module(y)
            y = y.replace_feature(torch.relu(y.features))
        return y.features, y.indices

    def alike(gradients: list[Tensor]) -> list[Tensor]:
        first, *rest = gradients
        return [first, *(g.flatten(1, 3).permute(1, 2, 0) for g in rest)]

    return Chain(forward, [x, *(module.weight for module in modules)], alike)


def _without_gradient(run: Callable[[], object]) -> Callable[[], object]:
    def within() -> object:
        with torch.no_grad():
            return run()

    return within


def _spconv(features: Tensor, sites: Tensor, layers: list[sparse.Layer]) -> tuple[Chain | None, dict[str, str]]:
    """spconv's chain and its name; None and why there is none, also if it fails on this GPU."""
    peer, said = spconv_for_cuda()
    if peer is None:
        return None, {"omitted": said}
    chain = _theirs(peer, features, sites, layers)
    failed = machine.tried(lambda: {name: run() for name, run in _passes(chain).items()}).get("failed")
    return (chain, {"peer": said}) if failed is None else (None, {"omitted": f"{said} failed: {failed}"})


def _passes(chain: Chain) -> dict[str, Callable[[], object]]:
    """What is timed of a chain."""
    y, _ = chain.forward()
    slope = torch.full_like(y, SLOPE)
    return {
        "forward": _without_gradient(chain.forward),
        "backward": lambda: torch.autograd.grad(y, chain.leaves, slope, retain_graph=True),
        "train": lambda: torch.autograd.grad(chain.forward()[0], chain.leaves, slope),
    }


def _times(device: str, runs: dict[str, dict[str, Callable[[], object]]], repeats: int) -> dict[str, dict[str, Any]]:
    """{whose: {clock: {what: milliseconds}}}"""
    flat = [run for whose in runs.values() for run in whose.values()]
    seconds = {
        "ms": iter(machine.seconds_on(device, *flat, repeats=repeats)),
        "wall_ms": iter([machine.best_seconds(run, repeats=repeats) for run in flat]),
    }
    return {
        whose: {clock: {what: 1e3 * next(found) for what in passes} for clock, found in seconds.items()}
        for whose, passes in runs.items()
    }


def _speedups(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    ours, theirs = found["ours"], found["spconv"]
    return {
        f"speedup of {clock}": {what: ms / ours[clock][what] for what, ms in theirs[clock].items()}
        for clock in ("ms", "wall_ms")
    }


def _differences(ours: Chain, theirs: Chain) -> dict[str, float]:
    """Relative, of the result and of the worst gradient; infinite where the sites are not the same."""
    (y, at), (z, at_peer) = ours.forward(), theirs.forward()
    order, order_peer = sparse.order(at), sparse.order(at_peer)
    if not torch.equal(at[order], at_peer[order_peer]):
        return {"relative_difference": float("inf"), "worst_relative_gradient_difference": float("inf")}
    gradients = [
        chain.alike(list(torch.autograd.grad(out, chain.leaves, torch.full_like(out, SLOPE))))
        for chain, out in ((ours, y), (theirs, z))
    ]
    return {
        "relative_difference": _difference(y[order], z[order_peer]),
        "worst_relative_gradient_difference": max(map(_difference, *gradients)),
    }


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())
