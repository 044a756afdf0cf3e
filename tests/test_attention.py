"""Attention in pieces is attention at once, dropout included, and no piece's weights outlive it."""

import math

import ge_graphs
import live_bytes
import pytest
import torch
from torch._functorch.compile_utils import fx_graph_cse

from bevfn import compile as compilation
from bevfn import rng, tree
from bevfn.ascend.trace import trace
from bevfn.layers import attention

BATCH, HEADS, QUERIES, KEYS, CHANNELS = 2, 4, 6, 50, 16
MATRIX = QUERIES * KEYS  # weights of one head of one sample


def operands(batch=BATCH, queries=QUERIES, keys=KEYS, channels=CHANNELS):
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(batch, n, channels, generator=g) for n in (queries, keys))
    return attention.init(channels, g), query, key, rng.key(1)


def gradients(whole, heads=HEADS, dropout=0.3):
    """(params, query, key, random key) -> result and gradients."""

    def f(params, query, key, random):
        def attend(params, query, key):
            value = key + 1.0
            return attention.apply(
                params, query, key, value, heads=heads, dropout=dropout, random=random, whole=whole
            )  # fmt: skip

        y, pull = torch.func.vjp(attend, params, query, key)
        slopes = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
        return {"y": y, "slopes": pull(slopes, retain_graph=torch.is_grad_enabled())}

    return f


# Two heads of the eight matrices, three (the last piece is smaller), one though it is more than asked for.
@pytest.mark.parametrize("whole", [4 * MATRIX, 6 * MATRIX, 1])
def test_pieces_are_the_whole(whole):
    ours, theirs = (tree.flatten(gradients(w)(*operands())) for w in (whole, attention.WHOLE))
    for name, leaf in theirs.items():
        torch.testing.assert_close(ours[name], leaf, atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_dropout_is_the_same_draw_and_does_something():
    params, query, key, random = operands()
    apply = lambda random, whole: attention.apply(  # noqa: E731
        params, query, key, key, heads=HEADS, dropout=0.3, random=random, whole=whole
    )
    assert not torch.allclose(apply(random, 1), apply(None, 1))
    assert torch.allclose(apply(random, 1), apply(random, attention.WHOLE), atol=1e-6)
    assert not torch.allclose(apply(random, 1), apply(rng.key(2), 1))


def test_a_piece_of_a_draw_has_its_numbers():
    drawn = rng.uniform(rng.key(5), (4, 3, 7))
    assert torch.equal(rng.uniform(rng.key(5), (2, 3, 7), first_row=6), drawn[2:])


def test_an_eager_step_holds_one_piece_at_a_time():
    """Of 8 matrices; each has its logits, weights, mask and the gradients of them."""
    arguments = operands(queries=64, keys=1024)
    size = 64 * 1024
    with torch.no_grad():
        whole, pieces = (live_bytes.peak(lambda w=w: gradients(w)(*arguments)) for w in (8 * size, 2 * size))
    assert pieces < whole / 4


def test_the_published_sizes_of_awml_are_never_whole():
    """500 queries over 408 x 408 cells: of the step's graph, which is also Ascend's, no tensor has two heads' weights."""
    arguments = (500, 408 * 408, 128)
    with torch.device("meta"):
        params, query, key, random = operands(1, *arguments)
    graph = trace(gradients(attention.WHOLE, heads=8), (params, query, key, random)).module.graph
    most = max(
        math.prod(node.meta["val"].shape) for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)
    )
    assert most == arguments[0] * arguments[1]
    merged = fx_graph_cse(graph)  # what compilers do: the pieces of the gradient are made again, not kept
    softmax = torch.ops.aten._softmax.default
    assert sum(node.target is softmax for node in merged.nodes) == 16


def test_a_compiled_evaluation_in_pieces_is_the_eager_one():
    def f(params, query, key, _):
        return attention.apply(params, query, key, key, heads=HEADS, whole=2 * MATRIX)

    torch._dynamo.reset()
    compiled = compilation.function(f, backend="aot_eager")
    torch.testing.assert_close(compiled(*operands()), f(*operands()), atol=1e-6, rtol=1e-5)


def test_a_lowered_step_in_pieces_is_the_eager_one():
    ge_graphs.need_torchair()
    from bevfn.ascend import interpret
    from bevfn.ascend.lower import lower

    f, arguments = gradients(2 * MATRIX), operands()
    lowered = lower(f, arguments)
    ours = tree.flatten(lowered.results(interpret.run(lowered.graph, lowered.arguments(*arguments))))
    for name, leaf in tree.flatten(f(*arguments)).items():
        torch.testing.assert_close(ours[name], leaf, atol=1e-5, rtol=1e-5)


def test_weights_are_what_the_values_are_weighted_by():
    params, query, key, _ = operands()
    found = attention.weights(params, query, key, heads=HEADS)
    assert found.shape == (BATCH, HEADS, QUERIES, KEYS)
    torch.testing.assert_close(found.sum(-1), torch.ones(BATCH, HEADS, QUERIES))
    value = key + 1.0
    matrix, bias = params["in_proj"]["weight"][-CHANNELS:], params["in_proj"]["bias"][-CHANNELS:]
    values = (value @ matrix.T + bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # B h S d
    joined = (found @ values).transpose(1, 2).flatten(2)
    y = joined @ params["out_proj"]["weight"].T + params["out_proj"]["bias"]
    torch.testing.assert_close(y, attention.apply(params, query, key, value, heads=HEADS))
