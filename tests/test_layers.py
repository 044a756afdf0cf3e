"""Layers equal torch's modules, forward, gradients and statistics."""

import ge_graphs
import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

from bevfn import tree
from bevfn.distributed import Groups
from bevfn.layers import attention, batch_norm, branch, conv, conv_norm, deform_attn, deform_conv, layer_norm, linear


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def grads(f, *tensors):
    """Gradients of sum(f * fixed weights) for every tensor."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    y = f(*tensors)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), [t.grad for t in tensors]


def test_batch_norm_equals_torch_in_training_and_evaluation(generator):
    module = nn.BatchNorm2d(5, eps=1e-3, momentum=0.01)
    params, state = batch_norm.init(5)
    params = {"weight": torch.randn(5, generator=generator), "bias": torch.randn(5, generator=generator)}
    module.load_state_dict({**params, "running_mean": state["mean"], "running_var": state["var"]}, strict=False)
    x = torch.randn(3, 5, 4, 6, generator=generator) * 3 + 1
    for train in (True, True, False):
        module.train(train)
        ours, ours_grads = grads(
            lambda x, w, b, s=state, t=train: batch_norm.apply(
                {"weight": w, "bias": b}, s, x, train=t, momentum=0.01, eps=1e-3
            )[0],
            x, params["weight"], params["bias"],
        )  # fmt: skip
        module.zero_grad()
        _, state = batch_norm.apply(params, state, x, train=train, momentum=0.01, eps=1e-3)
        theirs, theirs_grads = grads(module, x)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours_grads[0], theirs_grads[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours_grads[1], module.weight.grad, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(state["mean"], module.running_mean)
        torch.testing.assert_close(state["var"], module.running_var)


def test_batch_norm_of_valid_rows_is_batch_norm_of_those_rows_alone(generator):
    params, state = batch_norm.init(4)
    rows, valid = torch.randn(50, 4, generator=generator), torch.arange(50) % 3 == 0
    padded, seen = batch_norm.apply(params, state, rows, train=True, valid=valid)
    alone, seen_alone = batch_norm.apply(params, state, rows[valid], train=True)
    torch.testing.assert_close(padded[valid], alone)
    assert (padded[~valid] == 0).all()
    torch.testing.assert_close(seen, seen_alone)


@pytest.mark.parametrize("closed", [True, False], ids=["closed form", "operator"])
@pytest.mark.parametrize("shape", [(4, 3, 64, 500), (128_000, 3)])
def test_statistics_of_many_equal_numbers_are_as_exact_when_compiled(shape, closed, generator, monkeypatch):
    """As of a depth image, most of which is empty. Inductor's own sum is 5e-5 off; gradients beyond a ReLU then were 3e-2 off."""
    x = torch.relu(torch.randn(*shape, generator=generator) - 1) * 20 + 0.7
    valid = None if len(shape) == 4 else torch.rand(len(x), generator=generator) < 0.7
    if closed:  # as GPUs and steps of several devices compile it
        monkeypatch.setattr(batch_norm, "_by_operator", lambda *_: False)
    step = torch.compile(
        lambda p, s, x, v: batch_norm.apply(p, s, x, train=True, momentum=1.0, valid=v)[1], fullgraph=True
    )
    found = step(*batch_norm.init(3), x, valid)
    counted = (x if valid is None else x[valid]).double()
    axes = (0, 2, 3)[: x.dim() - 1]
    for name, exact in (("mean", counted.mean(axes)), ("var", counted.var(axes))):
        torch.testing.assert_close(found[name].double(), exact, rtol=5e-6, atol=0)


def test_batch_norm_without_valid_rows_stays_finite():
    params, state = batch_norm.init(4)
    y, seen = batch_norm.apply(params, state, torch.randn(6, 4), train=True, valid=torch.zeros(6, dtype=torch.bool))
    assert (y == 0).all() and all(torch.isfinite(v).all() for v in seen.values())


@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (9, 4), (6, 4, 1, 1)])
def test_groups_are_batches_one_after_another(shape, generator):
    """Outputs, gradients and statistics, with any momentum; 3 groups of which each is far from the others."""
    x = torch.randn(shape, generator=generator) * 2 + torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
    weight, bias = torch.randn(4, generator=generator), torch.randn(4, generator=generator)
    start = {"mean": torch.randn(4, generator=generator), "var": torch.rand(4, generator=generator) + 1}
    states = {}

    def grouped(x, weight, bias):
        params = {"weight": weight, "bias": bias}
        y, states["grouped"] = batch_norm.apply(params, start, x, train=Groups(3), momentum=0.3)
        return y

    def in_turn(x, weight, bias):
        outputs, state = [], start
        for part in x.chunk(3):
            y, state = batch_norm.apply({"weight": weight, "bias": bias}, state, part, train=True, momentum=0.3)
            outputs.append(y)
        states["in turn"] = state
        return torch.cat(outputs)

    found, wanted = grads(grouped, x, weight, bias), grads(in_turn, x, weight, bias)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(states["grouped"], states["in turn"], atol=1e-6, rtol=1e-6)
    if len(shape) == 4:
        y = grouped(x.contiguous(memory_format=torch.channels_last), weight, bias)
        torch.testing.assert_close(y, found[0])
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_groups_of_unequal_size_and_of_marked_rows_are_refused():
    params, state = batch_norm.init(4)
    with pytest.raises(ValueError, match="7 rows must be 3 groups of equal size"):
        batch_norm.apply(params, state, torch.randn(7, 4), train=Groups(3))
    with pytest.raises(ValueError, match="without `valid`"):
        batch_norm.apply(params, state, torch.randn(6, 4), train=Groups(3), valid=torch.ones(6, dtype=torch.bool))


def test_a_second_update_by_an_earlier_batch_needs_no_second_run(generator):
    params, start = batch_norm.init(4)
    first, later = torch.randn(8, 4, generator=generator) + 3, torch.randn(8, 4, generator=generator)
    _, after = batch_norm.apply(params, start, first, train=True)
    _, now = batch_norm.apply(params, after, later, train=True)
    _, wanted = batch_norm.apply(params, now, first, train=True)
    torch.testing.assert_close(batch_norm.again(start, after, now), wanted)
    still = {"norm": batch_norm.Held(**now)}
    assert torch.equal(batch_norm.again(still, still, still)["norm"].var, now["var"])


def test_attention_equals_torchs(generator):
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    params = attention.init(32, generator)
    module.load_state_dict(
        {
            "in_proj_weight": params["in_proj"]["weight"], "in_proj_bias": params["in_proj"]["bias"],
            "out_proj.weight": params["out_proj"]["weight"], "out_proj.bias": params["out_proj"]["bias"],
        }
    )  # fmt: skip
    q, k, v = (torch.randn(2, n, 32, generator=generator) for n in (7, 11, 11))
    ours, ours_grads = grads(lambda q, k, v: attention.apply(params, q, k, v, heads=4), q, k, v)
    theirs, theirs_grads = grads(lambda q, k, v: module(q, k, v)[0], q, k, v)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours_grads, theirs_grads, atol=1e-6, rtol=1e-4)


def flushed(x):
    """x as hardware without subnormal numbers hands it on."""
    small = x.dtype == torch.float16 and x.abs() < torch.finfo(torch.float16).smallest_normal
    return torch.where(small, torch.zeros_like(x), x) if isinstance(small, torch.Tensor) else x


class Flushed(torch.utils._python_dispatch.TorchDispatchMode):
    """Every float16 result of every operator flushed to zero below the smallest normal number."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return pytree.tree_map_only(torch.Tensor, flushed, op(*args, **(kwargs or {})))


def many_keys(generator):
    """Attention over as many keys as BEVFusion's heatmap has cells, and its exact result: weights about 3e-5."""
    params = attention.init(32, generator)
    query, key = torch.randn(1, 4, 32, generator=generator), torch.randn(1, 32_400, 32, generator=generator)
    rounded = pytree.tree_map(lambda x: x.half().float(), (params, query, key))
    return params, query.half(), key.half(), attention.apply(*rounded, rounded[2], heads=4)


def test_half_precision_attention_survives_flushing_subnormals(generator):
    params, query, key, exact = many_keys(generator)
    plain = attention.apply(params, query, key, key, heads=4)
    with Flushed():
        y = attention.apply(params, query, key, key, heads=4)
    scale = float(exact.abs().max())
    assert float((plain - exact).abs().max()) < 0.02 * scale
    assert float((y - exact).abs().max()) < 0.02 * scale


def test_half_precision_attention_survives_flushing_subnormals_on_ascend(generator):
    ge_graphs.need_torchair()
    from bevfn.ascend import interpret
    from bevfn.ascend.lower import lower

    params, query, key, exact = many_keys(generator)
    lowered = lower(lambda p, q, k: attention.apply(p, q, k, k, heads=4), (params, query, key))

    def flush(node, results):
        for result in results:
            if isinstance(result, torch.Tensor) and result.dtype == torch.float16:
                result.copy_(flushed(result))

    y = lowered.results(interpret.run(lowered.graph, lowered.arguments(params, query, key), flush))
    assert float((y - exact).abs().max()) < 0.02 * float(exact.abs().max())


def test_half_precision_attention_to_large_equal_values_does_not_overflow(generator):
    """Weights that are divided by their largest would sum to 32,400 times the value."""
    params = attention.init(8, generator)
    params = {**params, "out_proj": {"weight": torch.eye(8), "bias": torch.zeros(8)}}
    params["in_proj"]["weight"][16:] = torch.eye(8)
    key = torch.zeros(1, 32_400, 8, dtype=torch.float16)
    y = attention.apply(params, key[:, :2], key, key + 1000.0, heads=2)
    torch.testing.assert_close(y, torch.full_like(y, 1000.0))


def test_linear_and_layer_norm_equal_torchs(generator):
    params = linear.init(6, 4, bias=True, generator=generator)
    x = torch.randn(2, 3, 6, generator=generator)
    torch.testing.assert_close(linear.apply(params, x), nn.functional.linear(x, params["weight"], params["bias"]))
    torch.testing.assert_close(layer_norm.apply(layer_norm.init(6), x), nn.functional.layer_norm(x, (6,)))


def test_fp16_convolution_on_a_cpu_rounds_operands_and_accumulates_in_float32(generator):
    params = conv.init(8, 8, (3, 3), bias=True, generator=generator)
    x = torch.randn(1, 8, 9, 9, generator=generator).half()
    y = conv.apply(params, x, padding=1)
    exact = nn.functional.conv2d(
        x.double(), params["weight"].half().double(), params["bias"].half().double(), padding=1
    )
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, exact.half(), atol=0, rtol=2e-3)


@pytest.mark.parametrize("transposed", [False, True])
def test_conv_norm_has_the_shape_its_stride_asks_for(transposed, generator):
    params, state = conv_norm.init(3, 5, 2, generator=generator, transposed=transposed)
    x = torch.randn(1, 3, 4, 6)
    if transposed:
        y, new = conv_norm.apply_transposed(params, state, x, train=True, stride=2)
    else:
        y, new = conv_norm.apply(params, state, x, train=True, stride=2, padding=0)
    assert y.shape == ((1, 5, 8, 12) if transposed else (1, 5, 2, 3))
    assert new["norm"]["mean"].shape == (5,) and (y >= 0).all()


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (3, {"groups": 2, "stride": 2}),
        ((1, 3), {}),
        ((3, 5), {"dilation": 2, "groups": 4}),
        (2, {"stride": 2, "padding": 0}),
    ],
)
def test_conv_norm_equals_torchs_modules(kernel, options, relu, generator):
    groups, bias = options.pop("groups", 1), "stride" in options
    params, state = conv_norm.init(8, 12, kernel, generator=generator, groups=groups, bias=bias)
    around = {"padding": "same", **options} if "stride" not in options else {"padding": 1, **options}
    module = nn.Sequential(nn.Conv2d(8, 12, kernel, groups=groups, bias=bias, **around), nn.BatchNorm2d(12))
    module[0].load_state_dict(params["conv"])
    x = torch.randn(2, 8, 10, 12, generator=generator)
    y, new = conv_norm.apply(params, state, x, train=True, relu=relu, **options)
    wanted = module(x)
    torch.testing.assert_close(y, wanted.relu() if relu else wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(new["norm"]["var"], module[1].running_var)


def test_chained_layers_are_applied_one_after_another(generator):
    params, state = tree.unzip([conv_norm.init(4, 4, 3, generator=generator) for _ in range(2)])
    x = torch.randn(1, 4, 8, 8, generator=generator)
    y, new = conv_norm.chain(params, state, x, train=True, strides=(2, 1))
    z, first = conv_norm.apply(params[0], state[0], x, train=True, stride=2)
    z, second = conv_norm.apply(params[1], state[1], z, train=True)
    assert torch.equal(y, z) and tree.diff(new, [first, second]) == []
    with pytest.raises(ValueError, match="zip"):
        conv_norm.chain(params, state, x, train=True, strides=(2,))


def test_a_deformable_convolution_takes_norm_and_relu_like_any_other(generator):
    params, state = conv_norm.with_norm(deform_conv.init(8, 6, 3, groups=2, generator=generator), 6)
    x = torch.randn(2, 8, 5, 7, generator=generator)
    y, offset = deform_conv.apply(params["conv"], x)
    y, new = conv_norm.finish(params, state, y, train=True)
    assert not offset.any()  # it starts as a plain convolution
    plain, _ = conv_norm.apply({**params, "conv": {"weight": params["conv"]["weight"]}}, state, x, train=True)
    torch.testing.assert_close(y, plain, atol=1e-5, rtol=1e-4)
    assert (new["norm"]["mean"] != 0).all()


def test_impossible_convolutions_are_refused(generator):
    with pytest.raises(ValueError, match="3 groups must divide the channels, 8 in and 12 out"):
        conv.init(8, 12, 3, bias=False, generator=generator, groups=3)
    params = conv.init(8, 12, 2, bias=False, generator=generator)
    with pytest.raises(ValueError, match=r"kernel of \(2, 2\): give `padding`"):
        conv.apply(params, torch.randn(1, 8, 4, 4))


def test_branch_predicts_from_its_hidden_layer(generator):
    params, state = branch.init(4, 2, generator=generator, kaiming="fan_out")
    x = torch.randn(2, 4, 5, 6, generator=generator)
    y, new = branch.apply(params, state, x, train=True)
    hidden, seen = conv_norm.apply(params["hidden"], state["hidden"], x, train=True)
    assert y.shape == (2, 2, 5, 6) and torch.equal(y, conv.apply(params["out"], hidden))
    assert tree.diff(new, {"hidden": seen}) == []


def test_initialisation_follows_the_published_modules(generator):
    kaiming = conv.init(64, 128, (3, 3), bias=True, generator=generator, kaiming="fan_out")
    assert kaiming["weight"].std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert (kaiming["bias"] == 0).all()
    fan_in = conv.init(64, 128, (1, 3), bias=False, generator=generator, groups=4, kaiming="fan_in")
    assert fan_in["weight"].std().item() == pytest.approx((2 / (16 * 3)) ** 0.5, rel=0.03)
    xavier = linear.xavier(64, 32, 3, 3, generator=generator)
    assert xavier.abs().max().item() == pytest.approx((6 / (9 * (64 + 32))) ** 0.5, rel=0.01)
    default = conv.init(64, 128, (3, 3), bias=True, generator=generator)
    assert default["weight"].abs().max().item() == pytest.approx((64 * 9) ** -0.5, rel=0.01)


def test_batch_norm_gradient_is_the_derivative_of_its_forward(generator):
    valid = torch.arange(12) % 4 != 1
    x = torch.randn(12, 3, generator=generator, requires_grad=True)
    weight, bias = (torch.randn(3, generator=generator, requires_grad=True) for _ in range(2))

    def f(x, w, b):
        return batch_norm.apply({"weight": w, "bias": b}, batch_norm.init(3)[1], x, train=True, valid=valid)[0]

    _, ours = grads(f, x, weight, bias)
    wide = [t.detach().double() for t in (x, weight, bias)]

    def exact(x, w, b):
        rows = x[valid]
        h = (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt()
        return torch.zeros_like(x).masked_scatter(valid[:, None].expand_as(x), h * w + b)

    _, theirs = grads(exact, *wide)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-4)


def bilinear(image, x, y):
    """image [d H W] at pixel position x, y, zero outside: a sum over all pixels of tent functions."""
    H, W = image.shape[1:]
    rows = (1 - (torch.arange(H) - y).abs()).clamp(min=0)
    columns = (1 - (torch.arange(W) - x).abs()).clamp(min=0)
    return (image * rows[:, None] * columns).sum((1, 2))


def test_deformable_attention_is_the_mean_over_the_images_that_see_a_query(generator):
    B, N, Q, C, P, heads, H, W = 2, 3, 4, 8, 2, 2, 3, 5
    params = deform_attn.init(C, heads=heads, points=P, generator=generator)
    params = tree.map(lambda leaf: torch.randn(leaf.shape, generator=generator) / 2, params)
    query, maps = torch.randn(B, Q, C, generator=generator), torch.randn(B * N, C, H, W, generator=generator)
    reference = torch.rand(B * N, Q, P, 2, generator=generator) * 1.4 - 0.2
    seen = torch.rand(B * N, Q, generator=generator) < 0.5
    seen.view(B, N, Q)[0, :, 0] = False  # a query that no image sees
    ours = deform_attn.apply(params, query, maps, reference, seen, heads=heads)

    value = linear.apply(params["value"], maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    offset = linear.apply(params["offsets"], query).view(B, Q, heads, P, 2)
    weight = linear.apply(params["weights"], query).view(B, Q, heads, P).softmax(-1)
    expected = torch.zeros(B, Q, C)
    for b in range(B):
        for q in range(Q):
            images = [b * N + n for n in range(N) if seen[b * N + n, q]]
            for m in images:
                for h in range(heads):
                    part = slice(h * C // heads, (h + 1) * C // heads)
                    for p in range(P):
                        x, y = reference[m, q, p] * torch.tensor([W, H]) + offset[b, q, h, p] - 0.5
                        read = bilinear(value[m, part], x, y)
                        expected[b, q, part] += weight[b, q, h, p] * read / len(images)
    torch.testing.assert_close(ours, linear.apply(params["out"], expected), atol=1e-5, rtol=1e-5)
    assert torch.equal(ours[0, 0], params["out"]["bias"])


def test_deformable_attention_starts_with_every_head_looking_its_own_way(generator):
    params = deform_attn.init(16, heads=8, points=4, generator=generator)
    offset = params["offsets"]["bias"].view(8, 4, 2)
    expected = torch.tensor([[1.0, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]])
    for p, steps in enumerate((1, 1, 2, 2)):
        torch.testing.assert_close(offset[:, p], steps * expected, atol=1e-5, rtol=0)
    assert not any(params[name]["weight"].any() for name in ("offsets", "weights"))
    assert params["value"]["weight"].abs().max().item() == pytest.approx((6 / 32) ** 0.5, rel=0.02)
    with pytest.raises(ValueError, match="3 heads must divide 16 channels"):
        deform_attn.init(16, heads=3, points=4, generator=generator)
    with pytest.raises(ValueError, match="points 3 must be even"):
        deform_attn.init(16, heads=2, points=3, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_deformable_attention_places_its_samples_in_float32(generator, dtype):
    """Far to the right of a wide map a half-precision place would be off by pixels."""
    C, W = 4, 4096
    params = deform_attn.init(C, heads=2, points=2, generator=generator)
    maps = torch.arange(W).remainder(64).float().expand(1, C, 1, W) / 64
    reference = ((torch.arange(W - 40, W - 36) + 0.5) / W).view(1, 4, 1, 1).expand(1, 4, 2, 2).contiguous()
    reference[..., 1] = 0.5
    args = torch.zeros(1, 4, C), maps, reference, torch.ones(1, 4, dtype=torch.bool)
    exact = deform_attn.apply(params, *args, heads=2)
    half = deform_attn.apply(params, args[0].to(dtype), maps.to(dtype), *args[2:], heads=2)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, atol=2e-2, rtol=2e-2)
