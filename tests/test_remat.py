"""Recomputed blocks: the same bits as without, in every backend, in less memory, and never merged with the first run."""

import dataclasses
from functools import partial

import live_bytes
import pytest
import small_cameras
import test_bevdepth
import test_bevfusion
import test_bevnext
import torch
from torch._functorch.compile_utils import fx_graph_cse
from torch.func import grad, hessian, jvp, vmap

from bevfn import catalogue, recipes, rng, tree
from bevfn import compile as compilation
from bevfn.ascend.trace import trace
from bevfn.backbones import resnet
from bevfn.kernels.wait_for import wait_for
from bevfn.layers import batch_norm, conv_norm, linear, remat
from bevfn.models import bevdepth, bevfusion, bevnext
from bevfn.precision import Policy
from bevfn.synth import key_frame
from bevfn.training import optim, tasks, train

aten = torch.ops.aten


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return key_frame.write_frame(tmp_path_factory.mktemp("frame"), image_size=(225, 400))


def awake(params):
    """Blocks whose last batch norm starts with weight 0 would send no gradient into themselves."""
    for name, leaf in tree.flatten(params).items():
        if name.endswith("norm.weight"):
            leaf.copy_(torch.linspace(0.5, 1.5, leaf.numel()))
    return params


def after_steps(family, model, batch, precision, backend="eager", steps=2):
    """{path: leaf} of the train state and the metrics."""
    policy = Policy.of(precision)
    params, state = family.init(model, 0)
    groups = tuple(optim.Group(pattern, frozen=True) for pattern in getattr(model, "frozen", ()))
    optimizer = optim.Config(lr=optim.Schedule(1e-3), groups=groups)
    ts = train.init(awake(params), state, optimizer, precision=policy)
    if policy.scales_loss:
        ts.loss_scale.scale.fill_(64.0)
    torch._dynamo.reset()
    step = train.make_step(partial(family.loss, config=model, policy=policy), optimizer)
    step = compilation.step(step, backend=backend)
    for _ in range(steps):
        ts, metrics = step(ts, batch)
    assert not metrics["skipped"]
    return tree.flatten({"state": ts, "metrics": metrics})


def same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def model_and_batch(name, folder):
    if name == "bevfusion":
        model = test_bevfusion.tiny("lidar-camera")
        return bevfusion, model, test_bevfusion.make_batch(folder, model)
    if name == "bevnext":
        return bevnext, test_bevnext.tiny(3), test_bevnext.batch(3, seed=1)
    return bevdepth, test_bevdepth.tiny(name), small_cameras.make(classes=3, seed=1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["two", "aggregated", "bevfusion", "bevnext"])
def test_a_step_has_the_same_bits_with_and_without(name, precision, folder):
    family, model, batch = model_and_batch(name, folder)
    ours = after_steps(family, remat.switched_on(model), batch, precision)
    same_bits(ours, after_steps(family, model, batch, precision))


@pytest.mark.parametrize(("name", "precision"), [("two", "fp32"), ("bevfusion", "fp16")])
def test_a_compiled_step_has_the_bits_of_the_eager_one_without(name, precision, folder):
    family, model, batch = model_and_batch(name, folder)
    ours = after_steps(family, remat.switched_on(model), batch, precision, "aot_eager", steps=1)
    same_bits(ours, after_steps(family, model, batch, precision, steps=1))


# ------------------------------------------------------------------------------------------------- a network of blocks


BLOCKS = 3


def network(recompute, **changes):
    return resnet.Config(
        channels=8, blocks=(BLOCKS,), strides=(1,), bottleneck=False, pool=False, recompute=recompute, **changes
    )


def network_loss(recompute, policy=Policy(), train=True):  # noqa: B008
    def loss(params, state, batch, key):
        maps, new = resnet.apply(params, state, policy.cast(batch), config=network(recompute), train=train)
        value = maps[-1].float().square().mean()
        return value, (new, {"loss/total": value})

    return loss


def network_step(recompute, precision="fp32", accumulate=1):
    """(train state, step on microbatches)"""
    policy, optimizer = Policy.of(precision), optim.Config(lr=optim.Schedule(1e-3))
    params, state = resnet.init(network(False), torch.Generator().manual_seed(0))
    ts = train.init(awake(params), state, optimizer, precision=policy)
    return ts, train.make_accumulated(network_loss(recompute, policy), optimizer, accumulate=accumulate)


def images(seed=0, size=16):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_microbatches_have_the_same_bits():
    results = []
    for recompute in (True, False):
        ts, step = network_step(recompute, "fp16", accumulate=2)
        results.append(tree.flatten(step(ts, [images(0), images(1)])))
    same_bits(*results)


def traced(recompute):
    ts, step = network_step(recompute)
    return trace(lambda ts, batch: step(ts, [batch]), (ts, images())).module.graph


def count(graph, *targets):
    return sum(node.target in targets for node in graph.nodes)


def test_the_second_run_is_in_the_graph_and_survives_the_search_for_common_subexpressions():
    plain, graph = traced(False), traced(True)
    layers = 1 + 2 * BLOCKS
    assert count(plain, aten.convolution.default) == layers
    assert count(graph, aten.convolution.default) == 2 * layers
    assert count(graph, aten.convolution_backward.default) == count(plain, aten.convolution_backward.default) == layers
    assert count(graph, torch.ops.bevfn.wait_for.default) == 1 + BLOCKS
    assert count(fx_graph_cse(graph), aten.convolution.default) == 2 * layers
    for node in list(graph.nodes):  # which is the barrier's doing
        if node.target is torch.ops.bevfn.wait_for.default:
            node.replace_all_uses_with(node.args[0])
    merged = fx_graph_cse(graph)
    merged.eliminate_dead_code()
    assert count(merged, aten.convolution.default) == layers


def test_nothing_of_a_block_runs_again_before_its_gradient_is_there():
    graph = traced(True)
    first_gradient = next(i for i, n in enumerate(graph.nodes) if n.target is torch.ops.bevfn.wait_for.default)
    before = [node for node in list(graph.nodes)[:first_gradient] if node.target is aten.convolution.default]
    assert len(before) == 1 + 2 * BLOCKS
    cues = [node.args[1] for node in graph.nodes if node.target is torch.ops.bevfn.wait_for.default]
    assert len(set(cues)) == len(cues)


def peak_of_step(differentiate, recompute):
    """Live bytes of the forward and backward pass of a narrow ResNet-50 as the train step makes them."""
    config = resnet.Config(channels=8, recompute=recompute)
    params, state = resnet.init(config, torch.Generator().manual_seed(0))

    def loss(params):
        maps, new = resnet.apply(params, state, images(size=256), config=config, train=True)
        return maps[-1].square().mean(), new

    with torch.no_grad():
        return live_bytes.peak(lambda: differentiate(loss, params))


def by_vjp(loss, params):
    value, pull, _ = torch.func.vjp(loss, params, has_aux=True)
    return pull(torch.ones_like(value), retain_graph=torch.is_grad_enabled())


def by_grad(loss, params):
    return torch.func.grad_and_value(loss, has_aux=True)(params)


def test_an_eager_step_needs_half_the_memory():
    assert peak_of_step(by_vjp, True) < 0.55 * peak_of_step(by_vjp, False)
    assert peak_of_step(by_vjp, False) < 0.55 * peak_of_step(by_grad, False)  # why the train step is not made of it


def test_a_dropout_mask_is_made_again_and_not_kept():
    def loss(recompute):
        def block(params, state, x, key):
            return rng.dropout(linear.apply(params, x).exp(), 0.5, key), state

        def f(params, x, key):
            for site in range(2):
                x, _ = remat.apply(block, params, {}, x, rng.fold(key, site), recompute=recompute)
            return x.square().mean()

        return grad(f, argnums=(0, 1))

    params = linear.init(4, 4, bias=True, generator=torch.Generator().manual_seed(0))
    arguments = (params, torch.randn(64, 4, generator=torch.Generator().manual_seed(1)), rng.key(3))
    same_bits(*(tree.flatten(loss(recompute)(*arguments)) for recompute in (True, False)))
    masks = [count(fx_graph_cse(trace(loss(r), arguments).module.graph), aten.ge.Scalar) for r in (False, True)]
    assert masks == [2, 4]


# ----------------------------------------------------------------------------------------------- derivatives, refusals


def block_of_norm(recompute):
    """x [6 3] float64 and weights -> [6 3], a block with batch norm over rows."""

    def block(params, state, x):
        y, seen = batch_norm.apply(params["norm"], state, linear.apply(params["fc"], x), train=True)
        return {"y": torch.tanh(y) * x, "twice": 2 * y}, seen

    def f(weight, x):
        norm = {"weight": torch.ones(3, dtype=x.dtype), "bias": torch.zeros(3, dtype=x.dtype)}
        state = {"mean": torch.zeros(3), "var": torch.ones(3)}
        made, _ = remat.apply(block, {"norm": norm, "fc": {"weight": weight}}, state, x, recompute=recompute)
        return (made["y"] * torch.arange(3)).sum()  # "twice" has no gradient

    return f


def test_all_derivatives_are_those_without():
    g = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((3, 3), (6, 3)))
    ours, theirs = (block_of_norm(recompute) for recompute in (True, False))
    for way in (
        lambda f: grad(f, argnums=(0, 1))(weight, x),
        lambda f: hessian(f, argnums=(0, 1))(weight, x),
        lambda f: jvp(f, (weight, x), (x[:3], weight.repeat(2, 1))),
        lambda f: vmap(grad(f), (None, 0))(weight, torch.stack([x, x * x])),
    ):
        torch.testing.assert_close(way(ours), way(theirs), rtol=1e-5, atol=1e-6)  # the norm computes in float32
    ours_x = x.clone().requires_grad_()  # by the tape, without torch.func
    ours(weight, ours_x).backward()
    assert torch.equal(ours_x.grad, grad(theirs, argnums=1)(weight, x))


def test_frozen_weights_and_kept_statistics():
    params, state = conv_norm.init(3, 4, 3, generator=torch.Generator().manual_seed(0))

    def run(recompute):
        def loss(norm):
            weights = {"conv": params["conv"], "norm": norm}
            y, new = remat.apply(partial(conv_norm.apply, train=False), weights, state, images(), recompute=recompute)
            return y.square().sum(), new

        return torch.func.grad_and_value(loss, has_aux=True)(params["norm"])

    same_bits(*(tree.flatten(run(recompute)) for recompute in (True, False)))


def test_wait_for_is_the_same_values_and_sends_no_gradient_into_its_cue():
    x, cue = torch.randn(2, 3), torch.randn(4)
    assert torch.equal(wait_for(x, cue), x) and wait_for(x, cue).data_ptr() != x.data_ptr()
    of_x, of_cue = grad(lambda x, cue: wait_for(x, cue).square().sum() + cue.sum(), argnums=(0, 1))(x, cue)
    assert torch.equal(of_x, 2 * x) and torch.equal(of_cue, torch.ones(4))


def test_a_block_that_holds_a_tensor_is_refused():
    held, x = torch.ones(2), torch.ones(2)
    for f in (lambda params, state, x: (x * held, state), partial(lambda p, s, x, h: (x * h, s), h=[held])):
        with pytest.raises(ValueError, match="<lambda> holds tensors, which get no gradient: pass them as inputs"):
            remat.apply(f, {}, {}, x, recompute=True)


@pytest.mark.parametrize("name", catalogue.MODELS)
def test_every_model_has_blocks_to_recompute(name):
    network = recipes.load(catalogue.MODELS[name].experiment).NETWORKS[name]()
    switched = remat.switched_on(network)
    assert switched != network and "recompute=True" in repr(switched) and "recompute=False" not in repr(switched)
    if hasattr(switched, "bev_backbone"):
        assert switched.bev_backbone.recompute


def test_a_network_without_such_blocks_is_refused():
    with pytest.raises(ValueError, match="recomputes no block; leave --checkpoint-activations out"):
        remat.switched_on(tasks.Plan(1, 1, 1))


def test_the_flag_reaches_the_loss_alone():
    config = dataclasses.replace(recipes.defaults("bevdepth")["synthetic"], checkpoint_activations=True)
    data = tasks.Data(None, [], lambda epoch: None, None, None)
    task = tasks.make_task(config, bevdepth, bevdepth.two_key(), data, lambda plan: None)
    assert task.loss.keywords["config"].backbone.recompute and not task.predict.keywords["config"].backbone.recompute


# ------------------------------------------------------------------------------------------------------------- Ascend


def test_the_lowered_graph_runs_blocks_again_behind_their_gradient():
    import ge_graphs

    ge_graphs.need_torchair()
    from bevfn.ascend import interpret
    from bevfn.ascend.lower import lower

    found = []
    for recompute in (True, False):
        ts, step = network_step(recompute, "fp16")
        arguments = (ts, images(size=8))
        lowered = lower(lambda ts, batch, step=step: step(ts, [batch]), arguments)
        waiting = [op for op in lowered.graph.op if op.type == "Identity" and any(":-1" in i for i in op.input)]
        convolutions = sum(op.type == "Conv2D" for op in lowered.graph.op)
        layers = 1 + 2 * BLOCKS
        assert (len(waiting), convolutions) == ((1 + BLOCKS, 2 * layers) if recompute else (0, layers))
        found.append(tree.flatten(lowered.results(interpret.run(lowered.graph, lowered.arguments(*arguments)))))
    same_bits(*found)
