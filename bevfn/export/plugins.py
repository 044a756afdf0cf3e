"""The nodes of TIER IV's plugins in ONNX: their schema, what each version of them takes, and what they compute, in Python.

    GetIndicePairsImplicitGemm(indices [V 4] int32 (b, x, y, z)) ->
        out_indices [W 4], pair_fwd [K W] (input row under kernel offset k, or -1), pair_mask_fwd [W 1] (bit k: there is one),
        mask_argsort_fwd [W] (the order in which the rows are computed), num_act_out [] (W); all int32
    ImplicitGemm(features [V C_in], filters [C_out kx ky kz C_in], pair_fwd, mask, argsort, bias [C_out]) -> [W C_out]
    QuickCumsumCuda(x [P C] float32, geom_feats [P 4] int32 (x, y, z, b), interval_lengths, interval_starts [n] int32) ->
        [B Z X Y C], the sums of n intervals of rows at the cells of their last rows, 0 elsewhere

TensorRT finds a plugin by the node's name, with version "1" and namespace "" (onnx-tensorrt 96e7811, onnxOpImporters.cpp,
FallbackPluginImporter), and hands it the attributes that it asks for. What runs here is bevfn's own meaning of the tables
(`kernels.neighbours`, `kernels.sparse_conv`): rows come in ascending order, where the plugins leave it open.

Source: autoware_universe perception/autoware_tensorrt_plugins, see `runtimes`; AWML projects/SparseConvolution at 7a6ec07 (the
values of attributes).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx.defs import OpSchema
from onnx.reference.op_run import OpRun
from torch import Tensor

from bevfn.export.runtimes import ROOM, Runtime
from bevfn.kernels import neighbours, sparse_conv

DOMAIN, VERSION = "autoware", 1
PAIRS, GEMM, POOL = "GetIndicePairsImplicitGemm", "ImplicitGemm", "QuickCumsumCuda"
MASKED = 1  # spconv's ConvAlgo.MaskImplicitGemm
RELU = 1  # tv::gemm::Activation

_INTS = {"dilation", "ksize", "out_padding", "padding", "spatial_shape", "stride"}
_FLOATS = {"act_alpha", "act_beta", "output_add_scale", "output_scale"}


def pair_attributes(
    runtime: Runtime,
    *,
    grid: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    submanifold: bool,
) -> dict[str, Any]:
    """Attributes of a pair node over cells (X, Y, Z) of inputs; `is_train` as AWML writes it, the plugin does not read it."""
    made = {
        "algo": MASKED,
        "batch_size": 1,
        "dilation": [1, 1, 1],
        "is_train": int(not submanifold),
        "ksize": list(kernel),
        "out_padding": [0, 0, 0],
        "padding": list(padding),
        "spatial_shape": list(grid),
        "stride": list(stride),
        "subm": int(submanifold),
        "transpose": 0,
    }
    return made | ({"do_sort": 0} if runtime.sorts else {})


def gemm_attributes(runtime: Runtime, *, submanifold: bool, relu: bool) -> dict[str, Any]:
    """Attributes of a convolution; relu: in it, which only a runtime that fuses can."""
    made: dict[str, Any] = {"act_alpha": 0.0, "act_beta": 0.0, "is_subm": int(submanifold), "is_train": 0}
    made |= {"output_add_scale": 0.0, "output_scale": 1.0}
    return made | ({"act_type": RELU if relu else 0} if runtime.fuses else {})


def pool_attributes(cells: tuple[int, int]) -> dict[str, Any]:
    """Attributes of a pooling node into a map of X, Y cells; "height" is the plugin's word for X."""
    return {"batch_size": 1, "dimension": 1, "height": cells[0], "width": cells[1]}


def check(model: onnx.ModelProto, runtime: Runtime) -> None:
    """Raises ValueError, one sentence, for a plugin node whose attributes or inputs this runtime's plugins do not take."""
    example = {"grid": (1, 1, 1), "kernel": (1, 1, 1), "stride": (1, 1, 1), "padding": (0, 0, 0)}
    wanted = {
        PAIRS: (pair_attributes(runtime, **example, submanifold=True), 1),
        GEMM: (gemm_attributes(runtime, submanifold=True, relu=False), 6 if runtime.fuses else 5),
        POOL: (pool_attributes((1, 1)), 4),
    }
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        attributes, inputs = wanted.get(node.op_type, ({}, -1))
        has = {attribute.name for attribute in node.attribute}
        if has != set(attributes) or len(node.input) != inputs:
            raise ValueError(
                f"the plugins take no {node.op_type} of {len(node.input)} inputs with attributes {', '.join(sorted(has))}"
            )


# ------------------------------------------------------------------------------------------------------------- schema


def register() -> None:
    """Makes ONNX's checker know the nodes; what only newer plugins take is optional."""
    if onnx.defs.has(PAIRS, VERSION, DOMAIN):
        return
    optional = OpSchema.FormalParameterOption.Optional
    integers, floats = ("I", ["tensor(int32)"], ""), ("T", ["tensor(float)", "tensor(float16)"], "")

    def values(kind: str, *names: str) -> list:
        return [OpSchema.FormalParameter(name, kind) for name in names]

    pair = OpSchema(
        PAIRS,
        DOMAIN,
        VERSION,
        inputs=values("I", "indices"),
        outputs=values("I", "out_indices", "pair_fwd", "pair_mask_fwd", "mask_argsort_fwd", "num_act_out"),
        type_constraints=[integers],
        attributes=_attributes(*_INTS, "algo", "batch_size", "is_train", "subm", "transpose", optional=("do_sort",)),
    )
    bias = OpSchema.FormalParameter("bias", "T", param_option=optional)
    gemm = OpSchema(
        GEMM,
        DOMAIN,
        VERSION,
        inputs=[*values("T", "features", "filters"), *values("I", "pair_fwd", "mask", "argsort"), bias],
        outputs=values("T", "out_features"),
        type_constraints=[integers, floats],
        attributes=_attributes(*_FLOATS, "is_subm", "is_train", optional=("act_type",)),
    )
    pool = OpSchema(
        POOL,
        DOMAIN,
        VERSION,
        inputs=[*values("T", "x"), *values("I", "geom_feats", "interval_lengths", "interval_starts")],
        outputs=values("T", "out"),
        type_constraints=[integers, ("T", ["tensor(float)"], "")],
        attributes=_attributes(*pool_attributes((1, 1)), optional=()),
    )
    for schema in (pair, gemm, pool):
        onnx.defs.register_schema(schema)


def _attributes(*names: str, optional: Sequence[str]) -> list:
    kinds = OpSchema.AttrType
    return [
        OpSchema.Attribute(
            name,
            kinds.INTS if name in _INTS else kinds.FLOAT if name in _FLOATS else kinds.INT,
            required=name not in optional,
        )
        for name in (*names, *optional)
    ]


# ------------------------------------------------------------------------------------------------------------ meaning


def pairs(indices: Tensor, attributes: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The five results of a pair node. Raises ValueError, one sentence, beyond the plugins' room."""
    kernel, grid = attributes["ksize"], attributes["spatial_shape"]
    there = torch.ones(len(indices), dtype=torch.bool)
    if attributes["subm"]:
        sites, table = indices, neighbours.submanifold(indices, there, kernel=kernel, grid=grid)
    else:
        way = {"kernel": kernel, "stride": attributes["stride"], "padding": attributes["padding"]}
        sites, used, table, _, found = neighbours.strided(indices, there, **way, grid=grid, capacity=ROOM, batch=1)
        if found > ROOM:
            raise ValueError(
                f"{int(found)} sites of a level are beyond the {ROOM} that autoware's plugins have room for"
            )
        sites, table = sites[used], table[:, used]
    bits = 1 << torch.arange(len(table))
    mask = ((table >= 0) * bits[:, None]).sum(0).to(torch.int32)
    order = torch.arange(len(mask)) if attributes.get("do_sort") == 0 else torch.argsort(mask)
    return sites, table, mask[:, None], order.to(torch.int32), torch.tensor(len(sites), dtype=torch.int32)


def gemm(x: Tensor, filters: Tensor, table: Tensor, bias: Tensor | None, *, relu: bool) -> Tensor:
    """A convolution with sums, bias and ReLU in float32, rounded once, as spconv's kernels."""
    weight = filters.permute(1, 2, 3, 4, 0).reshape(-1, filters.shape[4], filters.shape[0])  # K C_in C_out
    inverse = torch.zeros(len(table), len(x), dtype=torch.int32)  # of the gradient alone
    y = sparse_conv.sparse_conv(x.float(), weight.float(), table, inverse)
    y = y if bias is None else y + bias.float()
    return (torch.relu(y) if relu else y).to(x.dtype)


def pool(x: np.ndarray, cells: np.ndarray, lengths: np.ndarray, starts: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Sums of intervals of rows x [P C] at their cells [P 4]: [*shape C], shape being batches, Z, X, Y."""
    made = np.zeros((*shape, x.shape[1]), x.dtype)
    at, y, z, b = cells[starts + lengths - 1].T
    whole = np.array_equal(starts, np.cumsum(lengths) - lengths)  # which reduceat takes for granted
    if not whole or lengths.sum() != len(x):
        raise ValueError("the intervals are not all rows in their order")
    if len(starts):
        made[b, z, at, y] = np.add.reduceat(x, starts, axis=0)
    return made


class GetIndicePairsImplicitGemm(OpRun):
    op_domain = DOMAIN

    def _run(self, indices: np.ndarray, **attributes: Any) -> tuple[np.ndarray, ...]:
        return tuple(value.numpy() for value in pairs(_tensor(indices), attributes))


class ImplicitGemm(OpRun):
    op_domain = DOMAIN

    def _run(
        self,
        features: np.ndarray,
        filters: np.ndarray,
        table: np.ndarray,
        mask: np.ndarray,
        order: np.ndarray,
        bias: np.ndarray | None = None,
        **attributes: Any,
    ) -> tuple[np.ndarray]:
        added = None if bias is None else _tensor(bias)
        y = gemm(_tensor(features), _tensor(filters), _tensor(table), added, relu=attributes.get("act_type") == RELU)
        return (y.numpy(),)


class QuickCumsumCuda(OpRun):
    op_domain = DOMAIN

    def _run(
        self, x: np.ndarray, cells: np.ndarray, lengths: np.ndarray, starts: np.ndarray, **attributes: int
    ) -> tuple[np.ndarray]:
        shape = [attributes[name] for name in ("batch_size", "dimension", "height", "width")]
        return (pool(x, cells, lengths, starts, shape),)


MEANINGS = (GetIndicePairsImplicitGemm, ImplicitGemm, QuickCumsumCuda)
"""for `onnx.reference.ReferenceEvaluator(new_ops=...)`"""


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))  # a copy, which is writable
