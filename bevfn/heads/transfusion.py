"""TransFusion head (Bai et al. 2022, arXiv 2203.11496, sections 3.2-3.4) as BEVFusion uses it: queries at the peaks of
a class heatmap, one decoder layer over all BEV cells, and a small prediction head per quantity.

Targets and losses are in `transfusion_loss.py`. BEV maps are [B C X Y]: rows = x, columns = y.
Source: mmdetection3d projects/BEVFusion/bevfusion/transfusion_head.py, transformer.py, utils.py (behaviour only).
"""

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bevfn import rng, tree
from bevfn.distributed import Train
from bevfn.layers import attention, batch_norm, branch, conv, conv_norm, layer_norm, linear, remat

OUTPUTS = {"center": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}  # numbers per query, besides the class logits


@dataclass(frozen=True)
class Matching:
    """Weights of the matching cost between queries and boxes."""

    classification: float = 0.15
    center: float = 0.25
    iou: float = 0.25


@dataclass(frozen=True)
class Config:
    channels_in: int = 512
    channels: int = 128
    classes: int = 10
    queries: int = 200
    layers: int = 1
    """decoder layers, each with its own prediction heads and losses"""
    heads: int = 8
    ffn_channels: int = 256
    head_channels: int = 64
    dropout: float = 0.1
    """of both attentions' weights and outputs and of the FFN"""
    whole_attention: int = attention.WHOLE
    """weights of an attention, of all samples and heads, above which they are computed in pieces; see `layers.attention`"""
    recompute: bool = False
    """every decoder layer once more for the gradient, see `layers.remat`"""
    lower: tuple[float, float] = (-54.0, -54.0)
    """x, y of the map's corner, metres"""
    voxel: tuple[float, float] = (0.075, 0.075)
    """metres per voxel in x and y"""
    stride: int = 8
    """voxels per BEV cell"""
    cells: tuple[int, int] = (180, 180)
    """BEV cells in x and y"""
    small_classes: tuple[int, ...] = (8, 9)
    """pedestrian and traffic cone: every cell is its own local maximum (no 3x3 suppression)"""
    heatmap_bias: float | None = None
    """initial bias of the heatmap; None is torch's default, which upstream trains from: its -2.19 is never applied"""
    gaussian_overlap: float = 0.1
    min_radius: int = 2
    code_weights: tuple[float, ...] = (1.0,) * 8 + (0.2, 0.2)
    bbox_weight: float = 0.25
    matching: Matching = field(default_factory=Matching)
    post_center_range: tuple[float, ...] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)
    """decoded bottom centres outside (x, y, z lower, upper; metres) are dropped"""


def init(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    """(params, state) as trained from scratch upstream: decoder matrices Xavier uniform, the rest layer defaults."""
    C = config.channels
    hidden = conv_norm.init(C, C, 3, generator=generator, kaiming="fan_out")  # drawn first
    made: dict = {
        "shared": conv.init(config.channels_in, C, 3, bias=True, generator=generator),
        "heatmap": {"hidden": hidden, "out": conv.init(C, config.classes, 3, bias=True, generator=generator)},
        "class_encoding": linear.init(config.classes, C, bias=True, generator=generator),
        "decoder": [_init_decoder(config, generator) for _ in range(config.layers)],
        "predict": [_init_predict(config, generator) for _ in range(config.layers)],
    }
    params, state = tree.unzip(made)
    if config.heatmap_bias is not None:
        params["heatmap"]["out"]["bias"].fill_(config.heatmap_bias)
    return params, state


def _init_decoder(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    C = config.channels

    def dense(c_in: int, c_out: int) -> dict:
        weights = linear.init(c_in, c_out, bias=True, generator=generator)
        bound = (6.0 / (c_in + c_out)) ** 0.5
        return {**weights, "weight": weights["weight"].uniform_(-bound, bound, generator=generator)}

    def position() -> dict:
        return {"fc1": dense(2, C), "norm": batch_norm.init(C), "fc2": dense(C, C)}

    places = {"self_position": position(), "cross_position": position()}  # drawn first
    return tree.unzip(
        {
            "self_attn": attention.init(C, generator),
            "cross_attn": attention.init(C, generator),
            "ffn": {"fc1": dense(C, config.ffn_channels), "fc2": dense(config.ffn_channels, C)},
            "norms": [layer_norm.init(C) for _ in range(3)],
            **places,
        }
    )


def _init_predict(config: Config, generator: torch.Generator) -> tuple[dict, dict]:
    C, made = config.head_channels, {}
    std = (2.0 / C) ** 0.5  # mmcv ConvModule: fan out
    for name, width in {**OUTPUTS, "heatmap": config.classes}.items():
        hidden = linear.init(config.channels, C, bias=False, generator=generator, std=std)
        made[name] = {
            "hidden": conv_norm.with_norm(hidden, C),
            "out": linear.init(C, width, bias=True, generator=generator),
        }
    return tree.unzip(made)


def apply(
    params: dict, state: dict, x: Tensor, *, config: Config, train: Train, key: Tensor | None = None
) -> tuple[dict, dict]:
    """BEV features to query predictions.

    Args:
        x: [B C_in X Y] in the compute dtype.
        key: randomness of the dropout; None switches it off.

    Returns:
        outputs, all float32 but the features: "shared" [B C X Y], "dense_heatmap" logits [B K X Y],
        "query_index" [B Q] (cell = row * Y + column), "query_labels" [B Q], "query_score" [B Q], "query_pos" [B Q 2]
        (cells), "query_feat_in", "self_attn", "cross_attn", "decoder_out" [B Q C], and "pred": one dict per decoder
        layer of [B Q n]: center (cells), height (m, gravity centre), dim (log m), rot (sin, cos), vel (m/s), heatmap
        (logits), query_heatmap_score; and the new state.
    """
    B, (X, Y) = x.shape[0], config.cells
    if x.shape[2:] != config.cells:
        raise ValueError(f"BEV map is {tuple(x.shape[2:])} cells, the head's config.cells is {config.cells}")
    shared = conv.apply(params["shared"], x)  # B C X Y
    # Upstream forces the dense heatmap to float32 under autocast.
    dense, heatmap_state = branch.apply(params["heatmap"], state["heatmap"], shared.float(), train=train)  # B K X Y
    query = select_queries(dense.detach(), config)
    cells = shared.permute(0, 2, 3, 1).reshape(B, X * Y, -1)  # B S C
    row = torch.arange(B, device=x.device)[:, None] * (X * Y) + query["index"]  # B Q
    feature = cells.reshape(B * X * Y, -1).index_select(0, row.flatten()).view(B, config.queries, -1)
    one_hot = (query["labels"][..., None] == torch.arange(config.classes, device=x.device)).to(feature.dtype)
    feature = feature + linear.apply(params["class_encoding"], one_hot)
    outputs: dict = {
        "shared": shared,
        "dense_heatmap": dense,
        "query_index": query["index"],
        "query_labels": query["labels"],
        "query_score": query["score"],
        "query_pos": query["position"],
        "query_feat_in": feature,
    }
    decoded, decoder_state, predict_state = _decode(params, state, feature, cells, query, config, train, key)
    return outputs | decoded, {"heatmap": heatmap_state, "decoder": decoder_state, "predict": predict_state}


def _decode(
    params: dict,
    state: dict,
    feature: Tensor,
    cells: Tensor,
    query: dict[str, Tensor],
    config: Config,
    train: Train,
    key: Tensor | None,
) -> tuple[dict, list, list]:
    """The decoder's layers, each starting where the one before it ended: (outputs, two states); feature [B Q C], cells [B S C]."""
    outputs: dict = {"pred": []}
    everywhere = cell_centres(config, cells.device).expand(len(cells), -1, -1)  # B S 2
    position = query["position"]
    decoder_state, predict_state = [], []
    for layer in range(config.layers):
        site = None if key is None else rng.fold(key, layer)
        decoded, seen = remat.apply(
            partial(_decode_layer, config=config, train=train),
            *(params["decoder"][layer], state["decoder"][layer]),
            *(feature, cells, position, everywhere, site),
            recompute=config.recompute,
        )
        outputs.update(decoded)
        feature = decoded["decoder_out"]
        pred, pred_seen = _predict(params["predict"][layer], state["predict"][layer], feature, train=train)
        pred["center"] = pred["center"] + position
        pred["query_heatmap_score"] = query["class_scores"]
        outputs["pred"].append(pred)
        position = pred["center"].detach()
        decoder_state.append(seen)
        predict_state.append(pred_seen)
    return outputs, decoder_state, predict_state


def cell_centres(config: Config, device: torch.device) -> Tensor:
    """[1 X*Y 2] centres of all cells (x row + 0.5, y column + 0.5), in cells, row-major."""
    X, Y = config.cells
    rows = torch.arange(X, device=device)[:, None].expand(X, Y)
    columns = torch.arange(Y, device=device)[None, :].expand(X, Y)
    return torch.stack([rows, columns], dim=-1).reshape(1, X * Y, 2).float() + 0.5


def select_queries(logits: Tensor, config: Config) -> dict[str, Tensor]:
    """The strongest local maxima of the class heatmap; no gradient.

    A cell counts where it is the maximum of its 3x3 neighbourhood; the border never does, except for `small_classes`,
    where every cell counts. Equal scores have no defined order.

    Args:
        logits: [B K X Y].
    Returns:
        "index" [B Q] cell, "labels" [B Q], "score" [B Q], "position" [B Q 2] cells, "class_scores" [B Q K].
    """
    B, K, X, Y = logits.shape
    h = torch.sigmoid(logits.float())
    local_max = F.pad(F.max_pool2d(h, 3, stride=1), (1, 1, 1, 1))
    classes = torch.arange(K, device=h.device).view(1, K, 1, 1)
    keep = h == local_max
    for small in config.small_classes:
        keep = keep | (classes == small)
    h = torch.where(keep, h, torch.zeros_like(h)).reshape(B, K, X * Y)
    score, flat = torch.topk(h.reshape(B, -1), config.queries)  # B Q
    flat = flat.to(torch.int32)  # Ascend's AI Core divides int32, not int64
    labels = flat // (X * Y)
    cell = flat - labels * (X * Y)
    row = cell // Y
    index, column = cell.long(), cell - row * Y
    class_scores = torch.gather(h, 2, index[:, None, :].expand(-1, K, -1)).transpose(1, 2)  # B Q K
    position = torch.stack([row, column], dim=-1).float() + 0.5
    return {"index": index, "labels": labels.long(), "score": score, "position": position, "class_scores": class_scores}


def _decode_layer(
    params: dict,
    state: dict,
    query: Tensor,
    cells: Tensor,
    position: Tensor,
    everywhere: Tensor,
    key: Tensor | None,
    *,
    config: Config,
    train: Train,
) -> tuple[dict, dict]:
    """One post-norm decoder layer; query [B Q C], cells [B S C], positions [B Q 2] and [B S 2] in cells."""

    def drop(x: Tensor, site: int) -> Tensor:
        return rng.dropout(x, config.dropout, None if key is None else rng.fold(key, site))

    def attend(name: str, q: Tensor, kv: Tensor, site: int) -> Tensor:
        random = None if key is None else rng.fold(key, site)
        return attention.apply(
            params[name],
            *(q, kv, kv),
            heads=config.heads,
            dropout=config.dropout,
            random=random,
            whole=config.whole_attention,
        )

    at_query, self_state = _encode_position(params["self_position"], state["self_position"], position, train=train)
    at_cells, cross_state = _encode_position(params["cross_position"], state["cross_position"], everywhere, train=train)
    at_query, at_cells = at_query.to(query.dtype), at_cells.to(query.dtype)
    # Unlike DETR's, both attentions' values carry the position too; the cross attention's queries carry the *self*
    # encoding (goldens bevfusion_lidar, "BEV backbone, neck, head").
    outputs = {}
    placed = query + at_query
    outputs["self_attn"] = query + drop(attend("self_attn", placed, placed, 0), 1)
    query = layer_norm.apply(params["norms"][0], outputs["self_attn"])
    outputs["cross_attn"] = query + drop(attend("cross_attn", query + at_query, cells + at_cells, 2), 3)
    query = layer_norm.apply(params["norms"][1], outputs["cross_attn"])
    inner = drop(torch.relu(linear.apply(params["ffn"]["fc1"], query)), 4)
    query = query + drop(linear.apply(params["ffn"]["fc2"], inner), 5)
    outputs["decoder_out"] = layer_norm.apply(params["norms"][2], query)
    return outputs, {"self_position": self_state, "cross_position": cross_state}


def looked_at(params: dict, state: dict, outputs: dict, *, config: Config) -> Tensor:
    """Where each query of the last decoder layer looks: the weights [B heads Q X Y] of its attention over the BEV cells.

    outputs: of `apply` with these parameters in evaluation. Float32; of every head and query they sum to 1.
    """
    shared, layer = outputs["shared"], params["decoder"][-1]
    cells = shared.flatten(2).transpose(1, 2)  # B S C
    places = outputs["query_pos"] if config.layers == 1 else outputs["pred"][-2]["center"]  # before this layer
    everywhere = cell_centres(config, cells.device).expand(len(cells), -1, -1)
    norms = state["decoder"][-1]
    at_query, _ = _encode_position(layer["self_position"], norms["self_position"], places, train=False)
    at_cells, _ = _encode_position(layer["cross_position"], norms["cross_position"], everywhere, train=False)
    query = layer_norm.apply(layer["norms"][0], outputs["self_attn"])
    placed = query + at_query.to(query.dtype), cells + at_cells.to(cells.dtype)
    weights = attention.weights(layer["cross_attn"], *placed, heads=config.heads)
    return weights.unflatten(-1, config.cells)


def _encode_position(params: dict, state: dict, position: Tensor, *, train: Train) -> tuple[Tensor, dict]:
    """[B S 2] cells -> [B S C], float32: positions reach 180, where half precision resolves an eighth of a cell."""
    x = linear.apply(params["fc1"], position)
    x, norm = batch_norm.apply(params["norm"], state["norm"], x.flatten(0, 1), train=train, relu=True)
    x = linear.apply(params["fc2"], x)
    return x.view(*position.shape[:2], -1), {"norm": norm}


def _predict(params: dict, state: dict, query: Tensor, *, train: Train) -> tuple[dict, dict]:
    """query [B Q C] -> {name: [B Q n] float32}, new state."""
    pred, new = {}, {}
    for name, head in params.items():
        x = linear.apply(head["hidden"]["conv"], query)
        # statistics over all queries of the batch
        rows, seen = conv_norm.finish(head["hidden"], state[name]["hidden"], x.flatten(0, 1), train=train)
        pred[name] = linear.apply(head["out"], rows.view_as(x)).float()
        new[name] = {"hidden": seen}
    return pred, new


def decode_boxes(pred: dict[str, Tensor], config: Config) -> Tensor:
    """Raw predictions -> boxes [B Q 9] (x, y, z bottom centre, dx, dy, dz m, yaw rad, vx, vy m/s), lidar frame."""
    center = [pred["center"][..., axis] * config.stride * config.voxel[axis] + config.lower[axis] for axis in range(2)]
    size = pred["dim"].exp()  # B Q 3
    bottom = pred["height"][..., 0] - size[..., 2] * 0.5
    yaw = torch.atan2(pred["rot"][..., 0], pred["rot"][..., 1])  # sine first
    return torch.cat([torch.stack([*center, bottom], -1), size, yaw[..., None], pred["vel"]], dim=-1)


def decode(outputs: dict, config: Config) -> dict[str, Tensor]:
    """The last layer's detections; no NMS, as published.

    Returns:
        "boxes" [B Q 9], "scores" [B Q], "labels" [B Q] int64, "valid" [B Q] bool (inside `post_center_range`), in
        query order, not sorted by score.
    """
    pred = outputs["pred"][-1]
    own = outputs["query_labels"][..., None] == torch.arange(config.classes, device=pred["heatmap"].device)  # B Q K
    score, labels = (torch.sigmoid(pred["heatmap"]) * pred["query_heatmap_score"] * own).max(dim=-1)
    boxes = decode_boxes(pred, config)
    lower, upper = (boxes.new_tensor(config.post_center_range[i : i + 3]) for i in (0, 3))
    inside = ((boxes[..., :3] >= lower) & (boxes[..., :3] <= upper)).sum(-1) == 3
    return {"boxes": boxes, "scores": score, "labels": labels, "valid": inside}
