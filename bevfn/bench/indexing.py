"""The ops that make indices, `voxelize`, `neighbours` and `linear_assignment`, at published sizes against their references.

All are plain torch on the same device, but for the reference of the assignment: that is scipy on the host, with the copies.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bevfn.bench import machine, sparse
from bevfn.kernels import linear_assignment as assignment
from bevfn.kernels import neighbours
from bevfn.kernels import voxelize as voxels
from bevfn.kernels.linear_assignment import reference as assignment_reference
from bevfn.kernels.neighbours import reference as neighbours_reference
from bevfn.kernels.voxelize import reference as voxelize_reference

BATCH = 4
MATCHES = ((200, 160), (500, 256))  # queries and boxes: BEVFusion's and AWML's


def measure(
    device: str, points: Tensor, *, matches: tuple[tuple[int, int], ...] = MATCHES, repeats: int = 9
) -> dict[str, dict]:
    """{op: {size: figures}}, milliseconds as of `machine.seconds_on`; points: [P 5] of a scan.

    equal: whether all integers are the reference's; of the assignment total costs are compared.
    """
    made: dict[str, dict] = {"voxelize": {}, "neighbours": {}, "linear_assignment": {}}
    for name, sweeps in sparse.SWEEPS.items():
        moved = sparse.swept(points, sweeps)
        made["voxelize"][name] = _voxelize(device, moved, repeats)
        made["neighbours"][name] = _neighbours(device, sparse.voxels(points, sweeps)[1], repeats)
    for queries, boxes in matches:
        name = f"{BATCH} times {queries} queries, {boxes} boxes"
        made["linear_assignment"][name] = _assignment(device, queries, boxes, repeats)
    return made


def _voxelize(device: str, points: Tensor, repeats: int) -> dict:
    points = points[None].to(device)
    valid = torch.ones(points.shape[:2], dtype=torch.bool, device=device)

    def ours() -> tuple[Tensor, ...]:
        return voxels.voxelize(points, valid, **sparse.VOXELS)

    def reference() -> tuple[Tensor, ...]:
        return voxelize_reference.voxelize(points, valid, *sparse.VOXELS.values())

    (features, *integers), (wanted, *wanted_integers) = ours(), reference()
    return {
        "points": points.shape[1],
        **_against(device, {"": (ours, reference)}, repeats),
        "equal": all(map(torch.equal, integers, wanted_integers)),
        "relative_difference": float((features - wanted).norm() / wanted.norm()),
    }


def _neighbours(device: str, sites: Tensor, repeats: int) -> dict:
    """Both tables of the encoder's first level: of its own sites, and to the next level's."""
    sites = sites.to(device)
    valid = sites[:, 0] >= 0
    kernel, stride, padding = sparse.DOWN[0]
    setting: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": padding, "grid": sparse.GRID, "batch": 1}
    runs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "submanifold_": (
            lambda: neighbours.submanifold(sites, valid, kernel=kernel, grid=sparse.GRID),
            lambda: neighbours_reference.submanifold(sites, valid, list(kernel), list(sparse.GRID)),
        ),
        "strided_": (
            lambda: neighbours.strided(sites, valid, **setting, capacity=len(sites)),
            lambda: neighbours_reference.strided(
                sites, valid, list(kernel), list(stride), list(padding), list(sparse.GRID), len(sites), 1
            ),
        ),
    }
    (one, one_wanted), (many, many_wanted) = ([run() for run in pair] for pair in runs.values())
    return {
        "voxels": len(sites),
        **_against(device, runs, repeats),
        "equal": torch.equal(one, one_wanted) and all(map(torch.equal, many, many_wanted)),
    }


def _assignment(device: str, queries: int, boxes: int, repeats: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(BATCH, queries, boxes, generator=generator).to(device)
    valid = torch.ones(BATCH, boxes, dtype=torch.bool, device=device)

    def ours() -> Tensor:
        return assignment.linear_assignment(cost, valid)

    def reference() -> Tensor:
        return assignment_reference.linear_assignment(cost, valid)

    total, wanted = (float(cost.double().gather(1, found()[:, None]).sum()) for found in (ours, reference))
    return {**_against(device, {"": (ours, reference)}, repeats), "relative_difference": abs(total - wanted) / wanted}


def _against(
    device: str, runs: dict[str, tuple[Callable[[], object], Callable[[], object]]], repeats: int
) -> dict[str, float]:
    """Milliseconds of ours and of the reference, and their ratio, each behind its prefix."""
    made: dict[str, float] = {}
    for prefix, pair in runs.items():
        ours, reference = machine.seconds_on(device, *pair, repeats=repeats)
        made |= {
            f"{prefix}ours_ms": 1e3 * ours,
            f"{prefix}reference_ms": 1e3 * reference,
            f"{prefix}speedup": reference / ours,
        }
    return made
