"""The train step: equal to a plain torch training loop, skipping, EMA, purity, accumulation, naming what is not finite."""

import math

import numpy as np
import pytest
import small_net
import torch
from graph_counts import graph_counts
from torch import nn

from bevfn import compile as compilation
from bevfn import rng, tree
from bevfn.precision import LossScale, Policy
from bevfn.training import optim, train


def plain_loss(module: nn.ModuleDict, data: dict, key: torch.Tensor) -> torch.Tensor:
    """small_net's loss through torch.nn modules."""
    x = module["norm1"](module["conv1"](data["x"]))
    y = module["norm2"](module["conv2"](torch.relu(x)))
    pooled = rng.dropout(torch.relu(x + y).mean((2, 3)), 0.25, rng.fold(key, 1))
    return ((module["head"](pooled) - data["y"]) ** 2).mean()


def plain_module(params: dict) -> nn.ModuleDict:
    module = nn.ModuleDict(
        {
            "conv1": nn.Conv2d(3, 8, 3, padding=1, bias=False), "norm1": nn.BatchNorm2d(8),
            "conv2": nn.Conv2d(8, 8, 3, padding=1, bias=False), "norm2": nn.BatchNorm2d(8), "head": nn.Linear(8, 4),
        }
    )  # fmt: skip
    module["conv1"].load_state_dict(params["stem"]["conv"])
    module["conv2"].load_state_dict(params["body"][0]["conv"])
    module["head"].load_state_dict(params["head"])
    return module


def test_five_steps_equal_a_torch_module_with_adamw_clipping_and_schedules():
    config = small_net.recipe()
    ts, step = small_net.fresh("fp32")
    module = plain_module(ts.params)
    reference = torch.optim.AdamW(module.parameters(), weight_decay=0.01, foreach=False)
    for i in range(5):
        data = small_net.batch(i)
        loss = plain_loss(module, data, rng.fold(rng.key(7), i))
        reference.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        lr, beta1 = (float(s.at(torch.tensor(i))) for s in (config.lr, config.beta1))
        for group in reference.param_groups:
            group.update(lr=lr, betas=(beta1, 0.999))
        reference.step()
        ts, metrics = step(ts, data)
        assert float(metrics["loss/total"]) == pytest.approx(loss.item(), rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-5) and float(norm) > 0.5
        assert float(metrics["lr"]) == pytest.approx(lr) and float(metrics["beta1"]) == pytest.approx(beta1)
    pairs = {
        "conv1.weight": ts.params["stem"]["conv"]["weight"], "norm1.weight": ts.params["stem"]["norm"]["weight"],
        "conv2.weight": ts.params["body"][0]["conv"]["weight"], "head.bias": ts.params["head"]["bias"],
        "norm1.running_var": ts.state["stem"]["norm"]["var"], "norm2.running_mean": ts.state["body"][0]["norm"]["mean"],
    }  # fmt: skip
    for name, ours in pairs.items():
        # 1e-5: Adam divides by sqrt(v), so rounding of small gradients is worth up to lr 1e-2 x 1e-3 after five steps.
        torch.testing.assert_close(ours, module.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_step_is_pure_and_repeats_bit_for_bit():
    ts, step = small_net.fresh("fp16", ema=optim.Ema())
    before = small_net.copy(ts)
    first, second = step(ts, small_net.batch()), step(ts, small_net.batch())
    for a, b in zip(tree.leaves(ts), tree.leaves(before)):
        assert torch.equal(a, b)
    for a, b in zip(tree.leaves(first), tree.leaves(second)):
        assert torch.equal(a, b)


def test_init_copies_nothing_twice_and_shares_nothing():
    ts, _ = small_net.fresh("fp16", ema=optim.Ema())
    pointers = [leaf.untyped_storage().data_ptr() for leaf in tree.leaves(ts)]
    assert len(set(pointers)) == len(pointers)


def test_dropout_differs_from_step_to_step_and_with_the_seed():
    ts, step = small_net.fresh("fp32", lr=optim.Schedule(0.0))
    later = tree.map(torch.clone, ts)
    later.step += 1
    other = tree.map(torch.clone, ts)
    other.key = rng.key(8)
    losses = {float(step(t, small_net.batch())[1]["loss/total"]) for t in (ts, later, other)}
    assert len(losses) == 3


def test_overflow_in_fp16_skips_the_update_halves_the_scale_and_advances_the_clock():
    ts, step = small_net.fresh("fp16")
    ts, _ = step(ts, small_net.batch())
    ts.loss_scale = LossScale(torch.tensor(2.0**60), torch.tensor(5))
    after, metrics = step(ts, small_net.batch(1))
    assert float(metrics["skipped"]) == 1 and float(metrics["loss_scale"]) == 2.0**60
    assert float(after.loss_scale.scale) == 2.0**59 and int(after.loss_scale.good_steps) == 0
    assert int(after.step) == 2 and int(after.optimizer.count) == int(ts.optimizer.count) == 1
    for name in ("params", "optimizer"):
        assert all(torch.equal(a, b) for a, b in zip(*(tree.leaves(getattr(t, name)) for t in (after, ts))))
    # As upstream, statistics follow a forward that was fine.
    assert not torch.equal(after.state["stem"]["norm"]["mean"], ts.state["stem"]["norm"]["mean"])


def test_scale_recovers_from_a_start_far_too_high_and_training_goes_on():
    ts, step = small_net.fresh("fp16")
    ts.loss_scale = LossScale(torch.tensor(2.0**36), torch.tensor(0))
    skipped = []
    for i in range(40):
        ts, metrics = step(ts, small_net.batch(i % 2))
        skipped.append(float(metrics["skipped"]))
    assert skipped[0] == 1 and not any(skipped[-5:])
    assert int(ts.optimizer.count) == skipped.count(0.0) and int(ts.step) == 40


def test_loss_scaling_changes_nothing_but_rounding():
    plain, step = small_net.fresh("fp32")
    scaled = tree.map(torch.clone, plain)
    scaled.loss_scale = LossScale(torch.tensor(1024.0), torch.tensor(0))
    for i in range(3):
        plain, _ = step(plain, small_net.batch(i))
        scaled, _ = step(scaled, small_net.batch(i))
    for a, b in zip(tree.leaves(plain.params), tree.leaves(scaled.params)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_gradients_point_where_fp32_gradients_do(precision):
    moments = {}
    for name in ("fp32", precision):
        ts, step = small_net.fresh(name)
        ts, metrics = step(ts, small_net.batch())
        assert float(metrics["skipped"]) == 0
        moments[name] = ts.optimizer.m
    assert float(torch.cosine_similarity(*moments.values(), dim=0)) > 0.999


def test_a_batch_with_nan_is_reported_and_leaves_parameters_and_statistics_finite():
    ts, step = small_net.fresh("fp32")
    data = small_net.batch()
    data["x"][2, 1, 0, 0] = float("nan")
    after, metrics = step(ts, data)
    assert float(metrics["skipped"]) == 1
    assert train.first_nonfinite({"params": after.params, "state": after.state}) is None
    assert train.first_nonfinite(data) == "x"


def hiding(params, state, batch, key):
    """A loss that is NaN where a target is, and whose gradient is not: that of |x| is sign(x), and sign(NaN) is 0."""
    value, (new, _) = small_net.loss_fn(Policy(), dropout=0.0)(params, state, {**batch, "y": torch.zeros(1)}, key)
    box = (params["head"]["bias"] - batch["y"]).abs().mean()
    total = value + box
    return total, (new, {"loss/total": total.detach(), "loss/box": box.detach(), "loss/net": value.detach()})


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_whose_loss_alone_is_not_finite_is_skipped(precision):
    policy, config, data = Policy.of(precision), small_net.recipe(), small_net.batch()
    ts = train.init(*small_net.init(), config, precision=policy)
    step = train.make_step(hiding, config)
    assert float(step(ts, data)[1]["skipped"]) == 0
    data["y"][2, 1] = float("nan")
    after, metrics = step(ts, data)
    assert torch.isfinite(metrics["grad_norm"]) and not torch.isfinite(metrics["loss/box"])
    assert float(metrics["skipped"]) == 1
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(ts.params), tree.leaves(after.params)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bad_losses_names_sample_and_terms(accumulate):
    config, parts = small_net.recipe(), halves(small_net.batch())[:accumulate]
    ts = train.init(*small_net.init(), config, precision=Policy())
    step = train.make_accumulated(hiding, config, accumulate=accumulate)
    parts[-1]["y"][1, 2] = float("inf")
    ts, metrics = step(ts, parts)
    assert train.read([metrics])[0]["skipped"] == 1
    expected = train.BadLoss(microbatch=accumulate - 1, sample=1, terms=("loss/total", "loss/box"))
    assert train.bad_losses(hiding, small_net.recipe(), ts, parts) == [expected]
    assert train.bad_losses(hiding, small_net.recipe(), ts, halves(small_net.batch(1))) == []


def test_first_nonfinite_names_the_first_bad_path_and_ignores_integers():
    value = {
        "a": torch.arange(3),
        "b": [torch.ones(2), torch.tensor([1.0, float("inf")])],
        "c": torch.tensor(float("nan")),
    }
    assert train.first_nonfinite(value) == "b.1"
    assert train.first_nonfinite({"a": torch.ones(1)}) is None


def test_ema_averages_parameters_and_statistics():
    ema = optim.Ema(decay=0.9, ramp_steps=1.0, first_update=50)  # 0.9 from the first step on
    ts, step = small_net.fresh("fp32", ema=ema)
    expected = small_net.copy(ts.ema)
    for i in range(4):
        ts, _ = step(ts, small_net.batch(i))
        expected = tree.map(
            lambda mean, new: 0.9 * mean + 0.1 * new, expected, {"params": ts.params, "state": ts.state}
        )
    assert tree.diff(expected, ts.ema) == []
    for a, b in zip(tree.leaves(expected), tree.leaves(ts.ema)):
        torch.testing.assert_close(a, b)


def test_frozen_parameters_stay_bit_for_bit():
    groups = (optim.Group("stem.*", frozen=True),)
    ts, step = small_net.fresh("fp32", groups=groups)
    after, _ = step(ts, small_net.batch())
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(ts.params["stem"]), tree.leaves(after.params["stem"])))
    assert not torch.equal(ts.params["head"]["weight"], after.params["head"]["weight"])
    assert ts.optimizer.m.numel() == tree.num_elements(ts.params) - tree.num_elements(ts.params["stem"])


def test_metrics_are_scalars_on_the_device():
    ts, step = small_net.fresh("fp16")
    metrics = step(ts, small_net.batch())[1]
    assert {"loss/total", "grad_norm", "lr", "beta1", "skipped", "loss_scale"} <= set(metrics)
    assert all(isinstance(m, torch.Tensor) and m.dim() == 0 and not m.requires_grad for m in metrics.values())


def test_only_fp16_carries_a_loss_scale():
    for name in ("fp32", "fp16", "bf16"):
        params, state = small_net.init()
        ts = train.init(params, state, small_net.recipe(), precision=Policy.of(name), seed=0)
        assert (ts.loss_scale is not None) == (name == "fp16")


def test_metrics_are_packed_in_order_and_read_as_they_were():
    """Of any dtype, from 0-d tensors; several steps at once, whose names may differ."""
    metrics = {"loss/total": torch.tensor(2.5, dtype=torch.float16), "overflow/points": torch.tensor(2**24 - 1)}
    bad = {"loss/total": torch.tensor(float("nan")), "skipped": torch.tensor(True)}
    first, second = train.read([train.pack(metrics), train.pack(bad)])
    assert first == {"loss/total": 2.5, "overflow/points": 2**24 - 1} and list(first) == list(metrics)
    assert math.isnan(second["loss/total"]) and second["skipped"] == 1
    assert train.read([]) == []


# ------------------------------------------------------------------------------------------------------- accumulation


def halves(batch: dict) -> list[dict]:
    return [{name: value[part] for name, value in batch.items()} for part in (slice(0, 2), slice(2, 4))]


def accumulating(accumulate: int, precision: str = "fp32", backend: str | None = None, **changes):
    """(train state, step on a list of microbatches) of the small net without dropout."""
    policy, config = Policy.of(precision), small_net.recipe(**changes)
    step = train.make_accumulated(
        small_net.loss_fn(policy, dropout=0.0), config, accumulate=accumulate,
        compiled=lambda step: step if backend is None else compilation.step(step, backend=backend),
    )  # fmt: skip
    return train.init(*small_net.init(), config, precision=policy, seed=7), step


def test_an_accumulated_step_has_the_mean_gradient_statistics_and_metrics_of_its_microbatches():
    ts, step = accumulating(2, clip_norm=None)
    _, alone = accumulating(1, clip_norm=None)
    after, metrics = step(ts, halves(small_net.batch()))
    parts = [alone(ts, [half]) for half in halves(small_net.batch())]
    mean = tree.map(lambda a, b: (a + b) / 2, *(part.optimizer.m for part, _ in parts))  # m of step 0: (1 - beta1) g
    torch.testing.assert_close(after.optimizer.m, mean)
    torch.testing.assert_close(after.state, tree.map(lambda a, b: (a + b) / 2, *(part.state for part, _ in parts)))
    (loss, *losses) = (made["loss/total"] for made in train.read([metrics, *(m for _, m in parts)]))
    assert loss == pytest.approx(np.mean(losses))
    assert int(after.step) == int(after.optimizer.count) == 1


def test_one_microbatch_is_the_plain_step_bit_for_bit():
    ts, plain = small_net.fresh("fp16")
    step = train.make_accumulated(small_net.loss_fn(Policy.of("fp16")), small_net.recipe(), accumulate=1)
    (theirs, metrics), ours = plain(ts, small_net.batch()), step(ts, [small_net.batch()])
    for a, b in zip(tree.leaves((theirs, train.pack(metrics))), tree.leaves(ours), strict=True):
        assert torch.equal(a, b)


def test_microbatches_have_their_own_dropout():
    policy = Policy()
    step = train.make_accumulated(small_net.loss_fn(policy), small_net.recipe(), accumulate=2)
    ts, plain = small_net.fresh("fp32")
    half = halves(small_net.batch())[0]
    twice, once = step(ts, [half, half])[1], plain(ts, half)[1]
    assert train.read([twice])[0]["loss/total"] != float(once["loss/total"])


def test_accumulation_under_a_compiler_is_two_graphs_reused_and_donates_the_state():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours, step = accumulating(2, "fp16", backend="aot_eager")
    theirs, eager = accumulating(2, "fp16")
    pointers = [leaf.data_ptr() for leaf in tree.leaves(ours)]
    for i in range(3):
        after, metrics = step(ours, halves(small_net.batch(i)))
        theirs, expected = eager(theirs, halves(small_net.batch(i)))
        assert after is ours
        got, wanted = train.read([metrics, expected])
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    assert graph_counts() == {"graphs": 2, "breaks": 0}
    assert [leaf.data_ptr() for leaf in tree.leaves(ours)] == pointers
    for a, b in zip(tree.leaves(ours), tree.leaves(theirs)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_batch_norms_of_a_frozen_part_use_and_keep_their_statistics(accumulate, backend):
    groups = (optim.Group("stem.*", frozen=True), optim.Group("body.0.norm.bias", frozen=True))
    ts, step = accumulating(accumulate, backend=backend, groups=groups)
    ts.state["stem"]["norm"]["mean"] += torch.linspace(-1, 1, 8) / 3  # numbers that sums of three round
    before, parts = small_net.copy(ts), [small_net.batch(i) for i in range(accumulate)]
    after, metrics = step(ts, parts)
    stem, body = (after.state[part] for part in ("stem", "body"))
    assert all(torch.equal(stem["norm"][k], before.state["stem"]["norm"][k]) for k in ("mean", "var"))
    assert not torch.equal(body[0]["norm"]["mean"], before.state["body"][0]["norm"]["mean"])  # its weight is trained

    shifted = small_net.copy(before)
    shifted.state["stem"]["norm"]["mean"] += 1.0
    _, other = accumulating(accumulate, groups=groups)[1](shifted, parts)
    ours, theirs = train.read([metrics, other])
    assert theirs["loss/total"] != pytest.approx(ours["loss/total"], rel=1e-3)  # it normalises by them


def test_a_bad_microbatch_skips_the_whole_step():
    ts, step = accumulating(2)
    parts = halves(small_net.batch())
    parts[0]["x"][0, 0, 0, 0] = float("nan")
    after, metrics = step(ts, parts)
    assert train.read([metrics])[0]["skipped"] == 1 and int(after.step) == 1
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(ts.params), tree.leaves(after.params)))
    assert train.first_nonfinite(after.state) is None


def test_another_number_of_microbatches_is_refused():
    ts, step = accumulating(2)
    with pytest.raises(ValueError, match="got 1 microbatches, it accumulates 2"):
        step(ts, [small_net.batch()])
    with pytest.raises(ValueError, match="accumulate 0 must be at least 1"):
        accumulating(0)


# ------------------------------------------------------------------------------------------------- naming what is bad


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bad_gradient_names_the_field_of_a_bad_batch(accumulate):
    ts, step = accumulating(accumulate, backend="eager")
    parts = halves(small_net.batch())[-accumulate:]
    parts[-1]["y"][1, 2] = float("inf")
    ts, metrics = step(ts, parts)
    assert train.read([metrics])[0]["skipped"] == 1
    found = train.bad_gradient(small_net.loss_fn(Policy(), dropout=0.0), small_net.recipe(), ts, parts)
    assert found == ("batch.y" if accumulate == 1 else "batch.1.y")


def test_bad_gradient_names_the_parameter_nearest_to_the_loss():
    def loss(params, state, batch, key):
        value, aux = small_net.loss_fn(Policy())(params, state, batch, key)
        # Its own derivative at 0 is infinite; the loss is not.
        return value + params["body"][0]["norm"]["bias"].abs().sum().sqrt(), aux

    config = small_net.recipe()
    ts = train.init(*small_net.init(), config, precision=Policy())
    ts, metrics = train.make_step(loss, config)(ts, small_net.batch())
    assert float(metrics["skipped"]) == 1 and torch.isfinite(metrics["loss/total"])
    found = train.bad_gradient(loss, config, ts, [small_net.batch()])
    assert found == "the gradient of body.0.norm.bias"


def test_bad_gradient_counts_the_parameters_before_it_and_names_bad_parameters_and_finds_nothing_in_a_good_step():
    def loss(params, state, batch, key):
        value, aux = small_net.loss_fn(Policy())(params, state, batch, key)
        return value * float("nan"), aux

    config = small_net.recipe()
    ts, step = small_net.fresh("fp32")
    ts, _ = step(ts, small_net.batch())
    assert train.bad_gradient(small_net.loss_fn(Policy()), config, ts, [small_net.batch()]) is None
    found = train.bad_gradient(loss, config, ts, [small_net.batch()])
    assert found == "the gradient of head.bias (and of 7 other parameters)"
    ts.params["head"]["weight"][0, 0] = float("nan")
    assert train.bad_gradient(loss, config, ts, [small_net.batch()]) == "params.head.weight"
