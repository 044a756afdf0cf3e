"""Multi-head attention, written out (Vaswani et al. 2017): the fused function has no Ascend converter on CPU traces."""

import torch
from torch import Tensor

from bevfn import rng
from bevfn.layers import linear


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
) -> Tensor:
    """query [B Q C], key and value [B S C] -> [B Q C].

    Softmax and its product with the values in float32. `dropout` acts on the attention weights when a `random` key is given.
    """
    C = query.shape[-1]
    weights = params["in_proj"]["weight"].split(C)
    biases = params["in_proj"]["bias"].split(C)
    q, k, v = (
        _split(linear.apply({"weight": w, "bias": b}, x), heads)
        for w, b, x in zip(weights, biases, (query, key, value))
    )  # B*h Q d, B*h S d
    logits = torch.bmm(q * (q.shape[-1] ** -0.5), k.transpose(1, 2))  # B*h Q S
    attention = rng.dropout(torch.softmax(logits.float(), dim=-1), dropout, random)
    # Of 32,400 weights that sum to 1 most are subnormal in float16, which NPUs and TensorRT flush to zero: they, and the
    # sum, stay float32. A power of two or the row's maximum as a factor would trade that for sums beyond 65504.
    y = torch.bmm(attention, v.float()).to(v.dtype)  # B*h Q d
    return linear.apply(params["out_proj"], _join(y, heads))


def _split(x: Tensor, heads: int) -> Tensor:
    """[B S C] -> [B*heads S C/heads]."""
    B, S, C = x.shape
    return x.view(B, S, heads, C // heads).transpose(1, 2).reshape(B * heads, S, C // heads)


def _join(x: Tensor, heads: int) -> Tensor:
    """[B*heads S d] -> [B S heads*d]."""
    Bh, S, d = x.shape
    return x.view(Bh // heads, heads, S, d).transpose(1, 2).reshape(Bh // heads, S, heads * d)
