"""What the stock-op lowering of the operators costs on Ascend, against ideals: sparse encoder, view transform, deformables.

    python -m bevfn.bench.ascend        # Markdown, as in docs/ascend.md; needs torch_npu's converters, no device

Stock: the operators' GE graphs at published size, one sample, read by `ascend.report`: FLOPs of matrix
products; bytes of all operands and results, once per node, before GE fuses nodes. Ideal: multiplications of real
neighbour pairs only; operands and results of the whole operator, once. Pairs per output row are those of a nuScenes
sweep: the published input has ten, is denser, and so is nearer to the ideal.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bevfn.ascend import report
from bevfn.ascend.lower import lower
from bevfn.backbones import sparse_encoder
from bevfn.bench import sparse
from bevfn.kernels import ascend as kernels
from bevfn.kernels import neighbours
from bevfn.kernels.deform_attn import reference as reference_deform_attn
from bevfn.kernels.deform_conv import reference as reference_deform_conv
from bevfn.kernels.sparse_conv import reference

VOXELS = 120_000  # of a training sample
IMAGES, DEPTHS, ROWS, COLUMNS, CHANNELS, CELLS = 6, 118, 32, 88, 80, 360 * 360


@dataclass(frozen=True)
class Cost:
    gflop: float
    gigabytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.gflop + other.gflop, self.gigabytes + other.gigabytes)


NOTHING = Cost(0.0, 0.0)
BY_OFFSET = "forward, a product per offset"  # not how it is done


def lowered(operator: Callable, *operands: Tensor | int | list | None, ops: kernels.Ops = "stock") -> Cost:
    """Of the operator's GE graph for operands of these shapes; their values do not matter."""
    tensors = [x for x in operands if isinstance(x, Tensor)]

    def step(*given: Tensor) -> Tensor:
        rest = iter(given)
        return operator(*[next(rest) if isinstance(x, Tensor) else x for x in operands])

    made = report.report(str(operator), lower(step, tuple(tensors), ops=ops))
    if not made.complete:
        raise ValueError(f"the figures of {operator} are not complete: {made.missing or made.unknown}")
    products = made.families.get("matrix products", report.Family())
    return Cost(products.gflop, sum(family.gigabytes for family in made.families.values()))


def ideal(multiplications: float, *values: Tensor) -> Cost:
    """Two FLOPs each; `values` are read or written once."""
    return Cost(2e-9 * multiplications, 1e-9 * sum(x.numel() * x.element_size() for x in values))


@dataclass(frozen=True)
class Convolution:
    """A layer of the published encoder: inputs [V C_in], outputs [W C_out]; real pairs per output row."""

    part: str
    offsets: int
    inputs: int
    outputs: int
    channels_in: int
    channels_out: int
    pairs: float

    def costs(self, dtype: torch.dtype) -> dict[str, tuple[Cost, Cost]]:
        """{direction: (lowered, ideal)}."""
        x = torch.empty(self.inputs, self.channels_in, dtype=dtype)
        y = torch.empty(self.outputs, self.channels_out, dtype=dtype)
        weight = torch.empty(self.offsets, self.channels_in, self.channels_out, dtype=dtype)
        table = torch.empty(self.offsets, self.outputs, dtype=torch.int32)
        inverse = torch.empty(self.offsets, self.inputs, dtype=torch.int32)
        products = self.pairs * self.outputs * self.channels_in * self.channels_out
        conv, weight_grad = torch.ops.bevfn.sparse_conv, torch.ops.bevfn.sparse_conv_weight_grad
        back = weight.transpose(1, 2).contiguous()
        best = ideal(products, x, weight, table, y)
        return {
            "forward": (lowered(conv, x, weight, table), best),
            "input gradient": (lowered(conv, y, back, inverse), ideal(products, y, weight, inverse, x)),
            "weight gradient": (lowered(weight_grad, x, y, table), ideal(products, x, y, table, weight)),
            BY_OFFSET: (lowered(reference.sparse_conv, x, weight, table), best),
        }


def encoder() -> Iterator[Convolution]:
    """The 21 convolutions at the published capacities, pairs per row from one scan."""
    _, sites = sparse.voxels(sparse.scan()[0])
    layers = sparse.encoder_layers(sparse.tables(sites, sparse.exact_capacities(sites))[0])
    capacities = (VOXELS, *sparse_encoder.Config().capacities)
    for layer in layers:
        level = 0 if layer.name == "conv_input" else int(layer.name[-1])
        outputs = capacities[level + 1] if layer.name.startswith("down") else capacities[level]
        pairs = float((layer.table >= 0).sum()) / layer.table.shape[1]
        K, channels_in, channels_out = layer.weight.shape
        yield Convolution(layer.name, K, capacities[level], outputs, channels_in, channels_out, pairs)


def tables() -> Iterator[tuple[str, Cost, Cost]]:
    """(name, lowered, ideal) of the neighbour tables of each level; the ideal writes tables and reads sites."""
    grid, sites = sparse.GRID, torch.empty(VOXELS, 4, dtype=torch.int32)
    for level, ((kernel, stride, padding), capacity) in enumerate(zip(sparse.DOWN, sparse_encoder.Config().capacities)):
        valid, rows = torch.empty(len(sites), dtype=torch.bool), len(sites)
        table = torch.empty(27, rows, dtype=torch.int32)
        made = lowered(torch.ops.bevfn.submanifold_neighbours, sites, valid, [3, 3, 3], list(grid), 1)
        yield f"submanifold {level}", made, ideal(0, sites, table)
        K = kernel[0] * kernel[1] * kernel[2]
        out, down, inverse = (torch.empty(*s, dtype=torch.int32) for s in ((capacity, 4), (K, capacity), (K, rows)))
        operands = (sites, valid, list(kernel), list(stride), list(padding), list(grid), capacity, 1)
        yield (
            f"strided {level}",
            lowered(torch.ops.bevfn.strided_neighbours, *operands),
            ideal(0, sites, out, down, inverse),
        )
        sites, grid = out, neighbours.out_grid(grid, kernel, stride, padding)


def view_transform() -> dict[str, tuple[Cost, Cost]]:
    """Pooling of one sample's six cameras, float32; every frustum point counts."""
    depth, context = torch.empty(IMAGES, DEPTHS, ROWS, COLUMNS), torch.empty(IMAGES, ROWS, COLUMNS, CHANNELS)
    cell, grad = torch.empty(depth.shape, dtype=torch.int32), torch.empty(CELLS, CHANNELS)
    pool, backward = torch.ops.bevfn.voxel_pool, torch.ops.bevfn.voxel_pool_backward
    products = depth.numel() * CHANNELS
    best = ideal(products, depth, context, cell, grad)
    return {
        "forward": (lowered(pool, depth, context, cell, CELLS), best),
        "forward, BEVPoolV3": (lowered(pool, depth, context, cell, CELLS, ops="drivingsdk"), best),
        "backward": (
            lowered(backward, grad, depth, context, cell),
            ideal(2 * products, grad, depth, context, cell, depth, context),
        ),
    }


def deformable() -> dict[str, tuple[Cost, Cost]]:
    """BEVDepth's deformable convolution on one sample's six images, float32; every sample lies inside its image."""
    x, offset = torch.empty(IMAGES, 512, 16, 44), torch.empty(IMAGES, 18, 16, 44)
    weight, step = torch.empty(512, 128, 3, 3), (1, 1, 1)
    samples = 9 * x.numel()
    products = samples * weight.shape[1]  # as many outputs as inputs
    conv, backward = torch.ops.bevfn.deform_conv, torch.ops.bevfn.deform_conv_backward
    by_gather = reference_deform_conv.forward
    operands = (x, offset, None, weight, *step)
    once = ideal(products + 4 * samples, x, offset, weight, x)
    twice = ideal(2 * products + 12 * samples, x, x, offset, weight, x, offset, weight)
    return {
        "forward": (lowered(conv, *operands), once),
        "forward, a gather per corner": (lowered(by_gather, *operands), once),
        "backward": (lowered(backward, x, *operands), twice),
    }


def attention() -> dict[str, tuple[Cost, Cost]]:
    """BEVNeXt's deformable attention on one sample's six images, 80 channels, float32; every sample lies in its image."""
    queries, heads, points, d, sizes = 128 * 128, 8, 8, 10, [ROWS, COLUMNS]
    value, out = torch.empty(IMAGES, ROWS * COLUMNS, heads, d), torch.empty(IMAGES, queries, heads * d)
    weights, mask = torch.empty(IMAGES, queries, heads, 1, points), torch.empty(IMAGES, queries, dtype=torch.bool)
    operands = (value, torch.empty(*weights.shape, 2), weights, mask)
    attn, backward = torch.ops.bevfn.deform_attn, torch.ops.bevfn.deform_attn_backward
    samples = weights.numel() * d
    once = ideal(4 * samples, *operands, out)
    twice = ideal(8 * samples, *operands, out, *operands[:3])
    return {
        "forward": (lowered(attn, *operands, sizes), once),
        "forward, a gather per corner": (lowered(reference_deform_attn.forward, *operands, sizes), once),
        "backward": (lowered(backward, out, *operands, sizes), twice),
    }


def markdown(rows: dict[str, tuple[Cost, Cost]]) -> str:
    """One line per row: GFLOP and GB, stock against ideal."""
    lines = ["| | GFLOP stock | ideal | ratio | GB stock | ideal | ratio |", "|---|---|---|---|---|---|---|"]
    for name, (ours, best) in rows.items():
        flops = f"{ours.gflop / best.gflop:.1f}" if best.gflop and ours.gflop else "-"
        lines.append(
            f"| {name} | {ours.gflop:.1f} | {best.gflop:.1f} | {flops} | {ours.gigabytes:.2f} | {best.gigabytes:.3f} | "
            f"{ours.gigabytes / best.gigabytes:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    by_part: dict[str, tuple[Cost, Cost]] = {}
    by_direction: dict[str, tuple[Cost, Cost]] = {}
    for layer in encoder():
        for direction, costs in layer.costs(torch.float16).items():
            _add(by_direction, f"all, {direction}", costs)
            if direction != BY_OFFSET:
                _add(by_part, layer.part, costs)
    print(f"Convolutions, float16, forward and both gradients:\n\n{markdown({**by_part, **by_direction})}\n")
    print(f"Neighbour tables:\n\n{markdown({name: (ours, best) for name, ours, best in tables()})}\n")
    print(f"View transform, float32:\n\n{markdown(view_transform())}\n")
    print(f"Deformable convolution, float32:\n\n{markdown(deformable())}\n")
    print(f"Deformable attention, float32:\n\n{markdown(attention())}")


def _add(rows: dict[str, tuple[Cost, Cost]], key: str, costs: tuple[Cost, Cost]) -> None:
    ours, best = rows.get(key, (NOTHING, NOTHING))
    rows[key] = ours + costs[0], best + costs[1]


if __name__ == "__main__":
    main()
