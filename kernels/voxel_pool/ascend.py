"""`voxel_pool` for Ascend: the outer product, added by index; its gradient gathers and multiplies per pixel.

`stock`: depth x context is stored (630 MB per nuScenes sample), since no stock type adds what it multiplies; the sum by
index is atomic float32 addition. Sorted cells and a running sum would need no atomics, and cancel in float32. Images are
pooled a few at a time (`kernels.parts`). With `Intervals` rows of the product are gathered side by side and summed, and only the
intervals' sums are added by index: of BEVFusion's 8 M rows 1 M.
`drivingsdk`: BEVPoolV3 multiplies and adds in one pass, forward only: its gradient type has no shape inference.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bevfn.kernels.parts import joined, parts

SPREAD = 64  # rows that take what goes nowhere, so that it is not added to a single address
_library = torch.library.Library("bevfn", "FRAGMENT")
_library.define(
    "bev_pool_v3(Tensor depth, Tensor feat, Tensor ranks_depth, Tensor ranks_feat, Tensor ranks_bev, int rows) -> Tensor"
)


def forward(depth: Tensor, context: Tensor, cell: Tensor, num_cells: int) -> Tensor:
    """depth [M D H W], context [M H W C], cell [M D H W] int32 -> [num_cells C], dtype of depth."""
    C, rows = context.shape[-1], _rows(cell, num_cells)
    sums = _wide(context).new_zeros(num_cells + depth.shape[-1], C)
    for weights, features, row in parts(_stored(depth, context), depth, context, rows):
        product = _wide(weights)[..., None] * _wide(features)[:, None]  # m D H W C
        sums = sums.index_add(0, row.reshape(-1), product.reshape(-1, C))
    return sums[:num_cells].to(depth.dtype)


def forward_by_intervals(
    depth: Tensor, context: Tensor, cell: Tensor, num_cells: int, points: Tensor, cells: Tensor
) -> Tensor:
    """As `forward` of finite numbers: points [B G P] and cells [B G] int32, see `intervals.Intervals`. A sample at a time, for the
    memory's sake."""
    (B, G, P), C = points.shape, context.shape[-1]
    nobody = _wide(depth).new_zeros(len(depth), 1, *depth.shape[2:])
    weights = torch.cat([_wide(depth), nobody], 1).unflatten(0, (B, -1))  # B N D+1 H W
    features = _wide(context).unflatten(0, (B, -1))  # B N H W C
    found = []
    for of, features_of, points_of in zip(weights, features, points):
        product = of[..., None] * features_of[:, None]  # N D+1 H W C
        rows = product.reshape(-1, C).index_select(0, points_of.reshape(-1))
        found.append(rows.reshape(G, P, C).sum(1))
    sample = torch.arange(B, dtype=torch.int32, device=cell.device)[:, None]
    spread = torch.arange(G, dtype=torch.int32, device=cell.device) % SPREAD
    row = torch.where(cells < 0, num_cells + spread, cells + sample * (num_cells // B))  # B G
    sums = found[0].new_zeros(num_cells + SPREAD, C).index_add(0, row.reshape(-1), torch.cat(found))
    return sums[:num_cells].to(depth.dtype)


def backward(grad: Tensor, depth: Tensor, context: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """grad [num_cells C] -> gradients of depth [M D H W] and context [M H W C].

    Per pixel [D C] rows of `grad` times context, and depth times the rows: as batched products they are read twice and
    nothing is written between; as products and sums of vectors they would be written twice more.
    """
    num_cells, C = grad.shape
    padded = torch.cat([_wide(grad), _wide(grad).new_zeros(1, C)])
    few = parts(_stored(depth, context), depth, context, cell)
    found = [_backward(padded, weights, features, place, num_cells) for weights, features, place in few]
    grad_depth, grad_context = map(joined, zip(*found))
    return grad_depth, grad_context


def _backward(padded: Tensor, depth: Tensor, context: Tensor, cell: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """`backward` of a few images; padded: the gradient's rows and one of zeros, for points outside."""
    (M, D, H, W), C = depth.shape, context.shape[-1]
    outside = (cell < 0) | (cell >= num_cells)
    index = torch.where(outside, torch.full_like(cell, num_cells), cell).permute(0, 2, 3, 1)  # M H W D
    rows = padded.index_select(0, index.reshape(-1)).reshape(M * H * W, D, C)
    weights = _wide(depth).permute(0, 2, 3, 1).reshape(M * H * W, 1, D)
    grad_depth = torch.bmm(rows, _wide(context).reshape(M * H * W, C, 1)).reshape(M, H, W, D).permute(0, 3, 1, 2)
    grad_context = torch.bmm(weights, rows).reshape(M, H, W, C)
    return grad_depth.to(depth.dtype).contiguous(), grad_context.to(context.dtype)


def forward_drivingsdk(depth: Tensor, context: Tensor, cell: Tensor, num_cells: int) -> Tensor:
    """As `forward`, by BEVPoolV3 where it can (float32, C a multiple of 8 up to 360)."""
    M, D, H, W = depth.shape
    C = context.shape[-1]
    if C % 8 or C > 360 or depth.dtype == torch.float64:
        return forward(depth, context, cell, num_cells)
    pixel = torch.arange(M * H * W, dtype=torch.int32, device=depth.device).reshape(M, 1, H, W)
    image = torch.div(pixel, H * W, rounding_mode="floor")
    bin = torch.arange(D, dtype=torch.int32, device=depth.device)[:, None, None]
    place = (image * (D - 1) + bin) * (H * W) + pixel  # M D H W, of a point in depth
    ranks = (place, pixel.expand(M, D, H, W), _rows(cell, num_cells))
    out = torch.ops.bevfn.bev_pool_v3(
        _wide(depth), _wide(context), *(rank.reshape(-1) for rank in ranks), num_cells + W
    )
    return out[:num_cells].to(depth.dtype)


def _without_intervals(
    depth: Tensor, context: Tensor, cell: Tensor, num_cells: int, points: Tensor, cells: Tensor
) -> Tensor:
    return forward_drivingsdk(depth, context, cell, num_cells)


def _stored(depth: Tensor, context: Tensor) -> int:
    """Bytes of one image's product [D H W C]."""
    return depth.shape[1:].numel() * context.shape[-1] * _wide(depth).element_size()


def _rows(cell: Tensor, num_cells: int) -> Tensor:
    """Row of the sums [M D H W]; points outside are spread over W further ones, not added to a single address."""
    column = torch.arange(cell.shape[-1], dtype=torch.int32, device=cell.device)
    return torch.where((cell < 0) | (cell >= num_cells), num_cells + column, cell)


def _wide(x: Tensor) -> Tensor:
    """The dtype that sums are kept in."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------------------------------------------------------------ DrivingSDK's BEVPoolV3


def bev_pool_v3(
    depth: Tensor, feat: Tensor, ranks_depth: Tensor, ranks_feat: Tensor, ranks_bev: Tensor, rows: int
) -> Tensor:
    """What the GE type means when its output starts from zeros: out[ranks_bev] += depth[ranks_depth] * feat[ranks_feat].

    depth [M D H W], feat [M H W C], ranks int32 [R]: place of a point in depth, its pixel, its output row -> [rows C].
    """
    C = feat.shape[-1]
    product = depth.reshape(-1)[ranks_depth.long(), None] * feat.reshape(-1, C)[ranks_feat.long()]
    return product.new_zeros(rows, C).index_add_(0, ranks_bev.long(), product)


@torch.library.register_fake("bevfn::bev_pool_v3", lib=_library)
def _fake(depth: Tensor, feat: Tensor, ranks_depth: Tensor, ranks_feat: Tensor, ranks_bev: Tensor, rows: int) -> Tensor:
    return feat.new_empty(rows, feat.shape[-1])


_library.impl("bev_pool_v3", bev_pool_v3, "CompositeExplicitAutograd")


def register() -> None:
    """The converter to BEVPoolV3."""
    import torchair
    from torchair._ge_concrete_graph import ge_apis as ge

    attr = torchair.ge.attr

    @torchair.register_fx_node_ge_converter(torch.ops.bevfn.bev_pool_v3.default)
    def convert(
        depth: Any, feat: Any, ranks_depth: Any, ranks_feat: Any, ranks_bev: Any, rows: int, meta_outputs: Any = None
    ) -> Any:
        channels = meta_outputs.size[1]
        sizes = {"b": 1, "d": 1, "h": 1, "w": rows, "c": channels}  # the kernel knows rows; these make the shape
        one_sample = {"depth": ge.Unsqueeze(depth, axes=[0]), "feat": ge.Unsqueeze(feat, axes=[0])}
        ranks = {"ranks_depth": ranks_depth, "ranks_feat": ranks_feat, "ranks_bev": ranks_bev}
        out = torchair.ge.custom_op(
            "BEVPoolV3",
            inputs={**one_sample, **ranks},
            attrs={"with_depth": attr.Bool(True), **{name: attr.Int(size) for name, size in sizes.items()}},
            outputs=["out"],
        )
        return ge.Reshape(out, [rows, channels])


def _meaning(
    depth: Tensor,
    feat: Tensor,
    ranks_depth: Tensor,
    ranks_feat: Tensor,
    ranks_bev: Tensor,
    *,
    with_depth: bool,
    b: int,
    d: int,
    h: int,
    w: int,
    c: int,
) -> Tensor:
    ranks = (ranks_depth, ranks_feat, ranks_bev)
    if not with_depth or feat.shape[-1] != c or any(x.dtype != torch.int32 for x in ranks):
        raise ValueError("BEVPoolV3: only with depth, int32 ranks, and c channels")
    return bev_pool_v3(depth[0], feat[0], *ranks, b * d * h * w).reshape(b, d, h, w, c)


MEANINGS: dict[str, Any] = {"BEVPoolV3": _meaning}
_COMMON: dict[Any, Callable[..., Any]] = {torch.ops.bevfn.voxel_pool_backward.default: backward}
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.bevfn.voxel_pool.default: forward,
    torch.ops.bevfn.voxel_pool_intervals.default: forward_by_intervals,
    **_COMMON,
}
DRIVINGSDK: dict[Any, Callable[..., Any]] = {
    torch.ops.bevfn.voxel_pool.default: forward_drivingsdk,
    torch.ops.bevfn.voxel_pool_intervals.default: _without_intervals,
    **_COMMON,
}
