"""Swin: windows against masked attention written out, patch merging, drop path, precision, tracing."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

from bevfn import rng
from bevfn.backbones import swin

CONFIG = swin.Config(channels=8, depths=(2, 2), heads=(2, 4), window=4, out_stages=(0, 1))


def attention_params(width: int, heads: int, window: int, dtype: torch.dtype = torch.float64) -> dict:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) / width**0.5

    return {
        "qkv": {"weight": normal(3 * width, width), "bias": normal(3 * width)},
        "bias_table": normal((2 * window - 1) ** 2, heads),
        "proj": {"weight": normal(width, width), "bias": normal(width)},
    }


def attention_over_all_pairs(params: dict, x: Tensor, heads: int, window: int, shift: int) -> Tensor:
    """One image [H W C]: a token of the padded map attends to those of its window that were in its part of the map."""
    H, W, C = x.shape
    rows, columns = -(-H // window) * window, -(-W // window) * window
    padded = torch.zeros(rows, columns, C, dtype=x.dtype).index_put(
        tuple(torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")), x
    )
    tokens = padded.reshape(-1, C)
    i, j = (g.reshape(-1) for g in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    i_new, j_new = (i - shift) % rows, (j - shift) % columns  # place after the roll
    group = torch.stack([i_new // window, j_new // window, (i < shift).long(), (j < shift).long()], -1)
    together = (group[:, None] == group[None]).all(-1)
    qkv = F.linear(tokens, params["qkv"]["weight"], params["qkv"]["bias"])
    q, k, v = qkv.view(-1, 3, heads, C // heads).unbind(1)
    down, across = (p % window for p in (i_new, j_new))
    index = (down[:, None] - down + window - 1) * (2 * window - 1) + across[:, None] - across + window - 1
    bias = params["bias_table"][index.clamp(0, len(params["bias_table"]) - 1)].permute(2, 0, 1)
    logits = torch.einsum("qac,kac->aqk", q, k) * (C // heads) ** -0.5 + bias
    weight = logits.masked_fill(~together, float("-inf")).softmax(-1)
    y = torch.einsum("aqk,kac->qac", weight, v).reshape(rows, columns, C)[:H, :W]
    return F.linear(y, params["proj"]["weight"], params["proj"]["bias"])


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(8, 8), (6, 11), (3, 5), (4, 9), (1, 5), (2, 1)])
def test_window_attention_is_masked_attention_over_all_pairs_with_its_gradients(size, shift):
    params = attention_params(8, heads=2, window=4)
    x = torch.randn(2, *size, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    probe = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def ours(params, x):
        return (probe * swin.window_attention(params, x, heads=2, window=4, shift=shift)).sum()

    def naive(params, x):
        y = torch.stack([attention_over_all_pairs(params, image, 2, 4, shift) for image in x])
        return (probe * y).sum()

    (g1, y1), (g2, y2) = (torch.func.grad_and_value(f, argnums=(0, 1))(params, x) for f in (ours, naive))
    # 1e-6: the shift mask leaves exp(-100) where the reference has zero, and the scale of the queries is float32.
    assert abs(y1 - y2) < 1e-6 * abs(y2) + 1e-9
    for a, b in zip(pytree.tree_leaves(g1), pytree.tree_leaves(g2)):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_window_attention_gradients_agree_with_finite_differences():
    params = pytree.tree_map(lambda p: p.requires_grad_(True), attention_params(4, heads=2, window=2))
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    leaves, spec = pytree.tree_flatten(params)

    def f(x, *leaves):
        return swin.window_attention(pytree.tree_unflatten(leaves, spec), x, heads=2, window=2, shift=1)

    assert torch.autograd.gradcheck(f, (x, *leaves))


def test_merging_patches_orders_channels_as_unfold():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 8, 5, generator=generator)
    norm = {"weight": torch.rand(20, generator=generator), "bias": torch.rand(20, generator=generator)}
    weight = torch.randn(10, 20, generator=generator)
    columns = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)  # M L 4C
    expected = F.layer_norm(columns, (20,), norm["weight"], norm["bias"]) @ weight.t()
    found = swin.merge_patches({"norm": norm, "reduction": {"weight": weight}}, x.flatten(1, 2), (6, 8))
    assert torch.allclose(found, expected, atol=1e-5)


def test_position_bias_follows_the_published_index():
    bias = swin.position_bias(torch.arange(169.0)[:, None], 7)
    for q, k in ((0, 0), (0, 48), (48, 0), (10, 31), (7, 1)):
        assert float(bias[0, q, k]) == 13 * (q // 7 - k // 7 + 6) + (q % 7 - k % 7 + 6)


def test_outputs_are_channels_last_maps_of_the_stages():
    params, state = swin.init(CONFIG, torch.Generator().manual_seed(0))
    assert state == {}
    images = torch.rand(2, 40, 48, 3).permute(0, 3, 1, 2)
    outputs = swin.apply(params, images, config=CONFIG, train=False)
    assert [tuple(y.shape) for y in outputs] == [(2, 8, 10, 12), (2, 16, 5, 6)]
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in outputs)


def test_each_image_is_seen_alone():
    params, _ = swin.init(CONFIG, torch.Generator().manual_seed(0))
    images = torch.rand(3, 3, 40, 48)
    together = swin.apply(params, images, config=CONFIG, train=False)
    alone = swin.apply(params, images[1:2], config=CONFIG, train=False)
    assert all(torch.allclose(a[1:2], b, atol=1e-5) for a, b in zip(together, alone))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float32(dtype):
    params, _ = swin.init(swin.MINI, torch.Generator().manual_seed(0))
    images = torch.rand(1, 3, 64, 64)
    wide = swin.apply(params, images, config=swin.MINI, train=False)
    half = swin.apply(params, images.to(dtype), config=swin.MINI, train=False)
    for a, b in zip(half, wide):
        assert a.dtype == dtype
        assert (a.float() - b).norm() < 0.03 * b.norm()  # measured: 0.001 fp16, 0.007 bf16


def test_drop_path_needs_training_and_a_key():
    params, _ = swin.init(CONFIG, torch.Generator().manual_seed(0))
    images = torch.rand(4, 3, 32, 32)

    def run(train: bool, key: Tensor | None) -> Tensor:
        return swin.apply(params, images, config=CONFIG, train=train, key=key)[-1]

    plain = run(False, None)
    assert torch.equal(run(True, None), plain) and torch.equal(run(False, rng.key(1)), plain)
    assert torch.equal(run(True, rng.key(1)), run(True, rng.key(1)))
    assert not torch.equal(run(True, rng.key(1)), run(True, rng.key(2)))


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_drop_path_drops_each_branch_per_image_and_keeps_its_expectation(branch):
    params, _ = swin.init(CONFIG, torch.Generator().manual_seed(0))
    last = params["stages"][0]["blocks"][1]
    silent = last["mlp"]["fc2"] if branch == "attention" else last["attn"]["proj"]
    silent["weight"].zero_()
    block = {"size": (4, 4), "heads": 2, "window": 4, "shift": 2}
    x = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(1)).expand(256, -1, -1)
    branch_only = swin._block(last, x, rate=0.0, noise=None, **block) - x
    found = swin._block(last, x, rate=0.5, noise=rng.uniform(rng.key(3), (2, 256)), **block) - x
    scale = (found * branch_only).sum((1, 2)) / (branch_only**2).sum((1, 2))  # 0 (dropped) or 2 (kept)
    assert torch.allclose(scale, (scale > 1).float() * 2, atol=1e-4)
    assert abs(float(scale.mean()) - 1.0) < 0.2  # 256 images: standard deviation 0.06


def test_the_train_step_traces_as_one_graph_and_agrees_with_eager():
    config = swin.Config(channels=8, depths=(2,), heads=(2,), window=4, out_stages=(0,))
    params, _ = swin.init(config, torch.Generator().manual_seed(0))
    images = torch.rand(2, 3, 24, 24)

    def step(params, images, key):
        return torch.func.grad_and_value(
            lambda p: sum(y.square().mean() for y in swin.apply(p, images, config=config, train=True, key=key))
        )(params)

    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")(params, images, rng.key(0))
    eager = step(params, images, rng.key(0))
    for a, b in zip(pytree.tree_leaves(compiled), pytree.tree_leaves(eager), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_wrong_sizes_are_refused_with_the_remedy():
    params, _ = swin.init(CONFIG, torch.Generator())
    with pytest.raises(ValueError, match=r"30x32 pixels: choose .* multiples of 8"):
        swin.apply(params, torch.rand(1, 3, 30, 32), config=CONFIG, train=False)
    with pytest.raises(ValueError, match=r"heads\[1\] = 5 does not divide the 16 channels"):
        swin.Config(channels=8, depths=(1, 1), heads=(2, 5), out_stages=(0,))
    with pytest.raises(ValueError, match=r"out_stages \(3,\) must lie in 0\.\.1"):
        swin.Config(channels=8, depths=(1, 1), heads=(2, 4), out_stages=(3,))
