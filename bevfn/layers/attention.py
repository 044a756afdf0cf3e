"""Multi-head attention, written out (Vaswani et al. 2017): the fused function has no Ascend converter on CPU traces."""

from functools import partial

import torch
from torch import Tensor

from bevfn import rng
from bevfn.layers import linear, remat

WHOLE = 2**28
"""weights (of all samples and heads) that are computed at once: 1 GiB in float32"""


def init(channels: int, generator: torch.Generator) -> dict:
    """{"in_proj": {weight [3C C], bias}, "out_proj": {weight [C C], bias}}, matrices Xavier uniform, biases 0."""
    return {
        "in_proj": {
            "weight": linear.xavier(3 * channels, channels, generator=generator),
            "bias": torch.zeros(3 * channels),
        },
        "out_proj": {"weight": linear.xavier(channels, channels, generator=generator), "bias": torch.zeros(channels)},
    }


def apply(
    params: dict,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    dropout: float = 0.0,
    random: Tensor | None = None,
    whole: int = WHOLE,
) -> Tensor:
    """query [B Q C], key and value [B S C] -> [B Q C].

    Softmax and its product with the values in float32. `dropout` acts on the attention weights when a `random` key is given.
    More than `whole` weights B*h*Q*S are made, and made again for the gradient, in pieces of at most half as many, or of one
    head of one sample: the same numbers, dropout included.
    """
    q, k, v = _projected(params, (query, key, value), heads)  # B*h Q d, B*h S d
    matrices, rows, columns = q.shape[0], q.shape[1], k.shape[1]
    if matrices * rows * columns <= whole:
        y, _ = _attend({}, {}, q, k, v, random, dropout=dropout)
    else:
        piece = max(1, whole // 2 // (rows * columns))
        differentiated = any(x.requires_grad for x in (q, k, v))  # to an evaluation, Dynamo reads this
        pieces = []
        for i, operands in enumerate(zip(*(x.split(piece) for x in (q, k, v)))):
            attend = partial(_attend, dropout=dropout, first=i * piece)
            pieces.append(remat.apply(attend, {}, {}, *operands, random, recompute=differentiated)[0])
        y = torch.cat(pieces)
    return linear.apply(params["out_proj"], _join(y, heads))


def weights(params: dict, query: Tensor, key: Tensor, *, heads: int) -> Tensor:
    """What `apply` weights its values by: query [B Q C], key [B S C] -> [B heads Q S] float32, whose sums over S are 1."""
    q, k = _projected(params, (query, key), heads)
    logits = torch.bmm(q, k.transpose(1, 2)).float()  # B*h Q S
    return torch.softmax(logits, dim=-1).unflatten(0, (len(query), heads))


def _projected(params: dict, operands: tuple[Tensor, ...], heads: int) -> list[Tensor]:
    """Scaled queries, keys and, where they are given, values [B S C], each as [B*heads S C/heads]."""
    C = operands[0].shape[-1]
    matrices, biases = params["in_proj"]["weight"].split(C), params["in_proj"]["bias"].split(C)
    q, *others = (
        _split(linear.apply({"weight": w, "bias": b}, x), heads) for w, b, x in zip(matrices, biases, operands)
    )
    return [q * (q.shape[-1] ** -0.5), *others]


def _attend(
    params: dict,
    state: dict,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    random: Tensor | None,
    *,
    dropout: float,
    first: int = 0,
) -> tuple[Tensor, dict]:
    """q [M Q d], scaled, k and v [M S d] -> ([M Q d], {}); `first`: of these M matrices among all, for the dropout."""
    logits = torch.bmm(q, k.transpose(1, 2))  # M Q S
    weights = torch.softmax(logits.float(), dim=-1)
    # 1 but for rounding: torch's softmax on a CPU adds 166,464 numbers up one by one, with an error of 5e-5 (measured).
    total = weights.detach().sum(-1, keepdim=True)  # M Q 1
    attention = rng.dropout(weights, dropout, random, first_row=first * q.shape[1])
    # Of 32,400 weights that sum to 1 most are subnormal in float16, which NPUs and TensorRT flush to zero: they, and the
    # sum, stay float32. A power of two or the row's maximum as a factor would trade that for sums beyond 65504.
    return (torch.bmm(attention, v.float()) / total).to(v.dtype), state


def _split(x: Tensor, heads: int) -> Tensor:
    """[B S C] -> [B*heads S C/heads]."""
    B, S, C = x.shape
    return x.view(B, S, heads, C // heads).transpose(1, 2).reshape(B * heads, S, C // heads)


def _join(x: Tensor, heads: int) -> Tensor:
    """[B*heads S d] -> [B S heads*d]."""
    Bh, S, d = x.shape
    return x.view(Bh // heads, heads, S, d).transpose(1, 2).reshape(Bh // heads, S, heads * d)
