"""BEVFusion's sparse encoder as nodes of TIER IV's plugins, written one by one: voxels, of which there are as many as there are.

The number of voxels and of sites is no constant of a TensorRT engine, so this part is not traced. Of sites that several
convolutions share there is one pair node (8 for the published encoder; AWML writes 21). Batch norms are in the filters and the
bias, which a runtime that fuses adds itself, with the ReLU; else Add and Relu follow.

Source: `backbones.sparse_encoder`; node and values of attributes: `plugins`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor

from bevfn.backbones import sparse_encoder
from bevfn.export import plugins
from bevfn.export.runtimes import Runtime
from bevfn.kernels import neighbours
from bevfn.layers import fourier_features

FLOAT, HALF, INT32, INT64 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT32, ir.DataType.INT64
VOXELS = "voxels_num"
Axes = tuple[int, int, int]
Dims = tuple[int | str, ...]


@dataclass(frozen=True)
class Nodes:
    """Nodes at the end of a graph, every value with its dtype and shape."""

    tape: Tape

    def __call__(
        self,
        operator: str,
        *inputs: ir.Value,
        like: tuple[ir.DataType, Dims],
        name: str | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """The one result, of dtype and shape `like`, of a stock operator."""
        return self.tape.op(operator, inputs, attributes or None, output=value(name, *like))

    def constant(self, numbers: Any, dtype: np.dtype | type, name: str) -> ir.Value:
        """An initializer."""
        return self.tape.initializer(ir.tensor(np.ascontiguousarray(numbers, dtype)), name=name)

    def integers(self, *numbers: int, name: str) -> ir.Value:
        return self.constant(numbers, np.int64, name)

    def reshaped(self, x: ir.Value, shape: Dims, name: str, like: Dims | None = None) -> ir.Value:
        """x as `name` [shape], or [like] where a number of that is -1."""
        assert x.dtype is not None
        numbers = self.integers(*(int(number) for number in shape), name=f"{name}.shape")
        return self("Reshape", x, numbers, like=(x.dtype, shape if like is None else like), name=name)


def value(name: str | None, dtype: ir.DataType, shape: Dims) -> ir.Value:
    """A tensor of a graph."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def dims(x: ir.Value) -> Dims:
    """The shape of a value; names of dimensions that are not fixed."""
    assert x.shape is not None
    return tuple(d if isinstance(d, int) else str(d.value) for d in x.shape)


@dataclass(frozen=True)
class Table:
    """Results of a pair node that convolutions read, and how many sites come out."""

    sites: ir.Value
    parts: tuple[ir.Value, ...]
    rows: str
    submanifold: bool


def inputs(most: int, columns: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(voxels, coors, counts) of `write`; most: points of a voxel; columns: of a point."""
    return (
        value("voxels", FLOAT, (VOXELS, most, columns)),
        value("coors", INT32, (VOXELS, 3)),
        value("num_points_per_voxel", INT32, (VOXELS,)),
    )


def write(
    to: Nodes,
    voxels: ir.Value,
    coors: ir.Value,
    counts: ir.Value,
    params: dict,
    state: dict,
    *,
    config: sparse_encoder.Config,
    fourier: fourier_features.Config | None,
    grid: Axes,
    runtime: Runtime,
    half: bool,
) -> ir.Value:
    """Writes the encoder.

    Args:
        voxels: [voxels_num P F] float32, points in the columns that the model reads; rows beyond a voxel's points are 0.
        coors: [voxels_num 3] int32 cells (z, y, x).
        counts: [voxels_num] int32, points of a voxel.
        params, state: of the sparse encoder, float32.
        fourier: what the encoder reads of the voxels' means; None: they themselves.
        grid: cells (X, Y, Z) of the encoder, see `sparse_encoder.apply`.
        half: features, filters and biases in float16.

    Returns the BEV map [1 C*Z X Y], "lidar.bev". Values inside have the boundaries' names: "lidar.conv_input.features" ...
    """
    layers = _Layers(to, config.norm_eps, runtime, half)
    x = _means(to, voxels, counts, fourier)
    x = to("Cast", x, like=(HALF, dims(x)), to=HALF) if half else x
    table = layers.table(_sites(to, coors), VOXELS, grid, _SAME, "lidar.conv_input")
    x = layers.conv(x, params["conv_input"], state["conv_input"], table, "lidar.conv_input")
    for level, (stage, old) in enumerate(zip(params["stages"], state["stages"])):
        at = f"lidar.stages.{level}"
        ends = "down" not in stage
        for i, (block, seen) in enumerate(zip(stage["blocks"], old["blocks"])):
            last = f"{at}.features" if ends and i + 1 == len(stage["blocks"]) else None
            x = layers.block(x, block, seen, table, f"{at}.blocks.{i}", last)
        if not ends:
            rows, way = f"sites_{level + 1}", {**_HALVED, "padding": config.paddings[level]}
            down = layers.table(table.sites, rows, grid, way, at)
            x = layers.conv(x, stage["down"], old["down"], down, at)
            grid = neighbours.out_grid(grid, **way)
            table = layers.table(down.sites, rows, grid, _SAME, f"{at}.next")
    down = layers.table(table.sites, "sites_out", grid, sparse_encoder.OUT, "lidar.conv_out")
    x = layers.conv(x, params["conv_out"], state["conv_out"], down, "lidar.conv_out")
    return _bev(to, x, down.sites, neighbours.out_grid(grid, **sparse_encoder.OUT))


_SAME: dict = {"kernel": sparse_encoder.KERNEL, "stride": (1, 1, 1), "padding": (1, 1, 1)}
_HALVED: dict = {"kernel": sparse_encoder.KERNEL, "stride": (2, 2, 2)}


@dataclass(frozen=True)
class _Layers:
    to: Nodes
    eps: float
    runtime: Runtime
    half: bool

    def table(self, sites: ir.Value, rows: str, grid: Axes, way: dict, at: str) -> Table:
        """A pair node over sites [V 4] in `grid`, of which `rows` come out; submanifold if its stride is 1."""
        submanifold = way["stride"] == (1, 1, 1)
        attributes = plugins.pair_attributes(self.runtime, grid=grid, **way, submanifold=submanifold)
        shapes: dict[str, Dims] = {
            "coords": (rows, 4),
            "pairs": (math.prod(way["kernel"]), rows),
            "mask": (rows, 1),
            "order": (rows,),
            "count": (),
        }
        made = [value(f"{at}.{part}", INT32, shape) for part, shape in shapes.items()]
        self.to.tape.op_multi_out(
            plugins.PAIRS, [sites], attributes, outputs=made, domain=plugins.DOMAIN, name=f"{at}.{plugins.PAIRS}"
        )
        return Table(sites if submanifold else made[0], tuple(made[1:4]), rows, submanifold)

    def conv(self, x: ir.Value, params: dict, state: dict, table: Table, at: str) -> ir.Value:
        """relu(norm(conv(x))) as `layers.sparse_conv.apply`."""
        return self._folded(x, params["conv"], params["norm"], state["norm"], table, at, True, f"{at}.features")

    def block(self, x: ir.Value, params: dict, state: dict, table: Table, at: str, name: str | None) -> ir.Value:
        """relu(norm(conv(relu(norm(conv(x))))) + x)."""
        y = self._folded(x, params["conv1"], params["norm1"], state["norm1"], table, f"{at}.conv1", True)
        y = self._folded(y, params["conv2"], params["norm2"], state["norm2"], table, f"{at}.conv2", False)
        like = (self._dtype, dims(y))
        return self.to("Relu", self.to("Add", y, x, like=like), like=like, name=name)

    def _folded(
        self,
        x: ir.Value,
        weight: dict,
        norm: dict,
        seen: dict,
        table: Table,
        at: str,
        relu: bool,
        name: str | None = None,
    ) -> ir.Value:
        scale = norm["weight"].double() * torch.rsqrt(seen["var"].double() + self.eps)  # C_out
        shift = norm["bias"].double() - seen["mean"].double() * scale
        filters = (weight["weight"].double() * scale).permute(4, 0, 1, 2, 3)  # C_out kx ky kz C_in
        bias = self._constant(shift, f"{at}.bias")
        given = [x, self._constant(filters, f"{at}.filters"), *table.parts]
        like = (self._dtype, (table.rows, len(scale)))
        fuses = self.runtime.fuses
        attributes = plugins.gemm_attributes(self.runtime, submanifold=table.submanifold, relu=relu)
        y = self.to.tape.op(
            plugins.GEMM,
            [*given, bias] if fuses else given,
            attributes,
            domain=plugins.DOMAIN,
            output=value(name if fuses else None, *like),
            name=f"{at}.{plugins.GEMM}",
        )
        if fuses:
            return y
        y = self.to("Add", y, bias, like=like, name=None if relu else name)
        return self.to("Relu", y, like=like, name=name) if relu else y

    @property
    def _dtype(self) -> ir.DataType:
        return HALF if self.half else FLOAT

    def _constant(self, numbers: Tensor, name: str) -> ir.Value:
        return self.to.constant(numbers.numpy(), np.float16 if self.half else np.float32, name)


def _means(to: Nodes, voxels: ir.Value, counts: ir.Value, fourier: fourier_features.Config | None) -> ir.Value:
    """Means of the voxels' points [voxels_num F] float32, or their Fourier features, see `layers.fourier_features`."""
    n, _, F = dims(voxels)
    assert isinstance(F, int)
    axis = to.integers(1, name="voxels.axis")
    total = to("ReduceSum", voxels, axis, like=(FLOAT, (n, F)), keepdims=0)
    count = to("Unsqueeze", to("Cast", counts, like=(FLOAT, (n,)), to=FLOAT), axis, like=(FLOAT, (n, 1)))
    x = to("Div", total, count, like=(FLOAT, (n, F)), name="voxels.features")
    if fourier is None:
        return x
    K = fourier.frequencies
    lower, upper = (np.asarray(bound, np.float32) for bound in (fourier.lower, fourier.upper))
    x = to("Sub", x, to.constant(lower, np.float32, "fourier.lower"), like=(FLOAT, (n, F)))
    x = to("Div", x, to.constant(upper - lower, np.float32, "fourier.span"), like=(FLOAT, (n, F)))
    x = to("Mul", x, to.constant(math.pi, np.float32, "fourier.turn"), like=(FLOAT, (n, F)))
    x = to("Unsqueeze", x, to.integers(2, name="fourier.axis"), like=(FLOAT, (n, F, 1)))
    x = to("Mul", x, to.constant(2.0 ** np.arange(K), np.float32, "fourier.frequencies"), like=(FLOAT, (n, F, K)))
    x = to.reshaped(x, (-1, F * K), "fourier.angles", (n, F * K))
    waves = [to(name, x, like=(FLOAT, (n, F * K))) for name in ("Cos", "Sin")]
    return to("Concat", *waves, like=(FLOAT, (n, 2 * F * K)), axis=1)


def _sites(to: Nodes, coors: ir.Value) -> ir.Value:
    """Cells (z, y, x) -> sites (0, x, y, z), int32."""
    n = dims(coors)[0]
    turned = to("Gather", coors, to.integers(2, 1, 0, name="sites.axes"), like=(INT32, (n, 3)), axis=1)
    one = to("Gather", coors, to.integers(0, name="sites.one"), like=(INT32, (n, 1)), axis=1)
    zero = to("Sub", one, one, like=(INT32, (n, 1)))
    return to("Concat", zero, turned, like=(INT32, (n, 4)), axis=1, name="lidar.conv_input.sites")


def _bev(to: Nodes, x: ir.Value, sites: ir.Value, grid: Axes) -> ir.Value:
    """Rows at distinct sites -> the dense map, as `sparse_encoder.to_bev`."""
    X, Y, Z = grid
    rows, C = dims(x)
    assert isinstance(C, int) and x.dtype is not None
    zero = ir.tensor(np.zeros(1, x.dtype.numpy()))
    shape = to.integers(X, Y, Z, C, name="lidar.bev.size")
    empty = to("ConstantOfShape", shape, like=(x.dtype, (X, Y, Z, C)), value=zero)
    cells = to("Gather", sites, to.integers(1, 2, 3, name="lidar.bev.axes"), like=(INT32, (rows, 3)), axis=1)
    cells = to("Cast", cells, like=(INT64, (rows, 3)), to=INT64)
    dense = to("ScatterND", empty, cells, x, like=(x.dtype, (X, Y, Z, C)))
    dense = to("Transpose", dense, like=(x.dtype, (C, Z, X, Y)), perm=[3, 2, 0, 1])
    return to.reshaped(dense, (1, C * Z, X, Y), "lidar.bev")
