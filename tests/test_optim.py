"""AdamW, clipping and schedules against torch and mmengine's recursions; groups, EMA and refusals."""

import math

import pytest
import torch
import torch._dynamo.testing

from bevfn import tree
from bevfn.training import optim

SHAPES = {"a": (7, 3), "b": (5,), "c": (2, 3, 2)}


def random_tree(seed: int, scale: float = 1.0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def value(schedule: optim.Schedule, step: int) -> float:
    return float(schedule.at(torch.tensor(step)))


def run(config: optim.Config, params: dict, gradients: list[dict]) -> dict:
    """`params` after one update per tree of gradients."""
    layout, state = optim.layout(config, params), optim.init(config, params)
    for step, gradient in enumerate(gradients):
        leaves = optim.select(params, layout)
        grad, _ = optim.clip(optim.join(optim.select(gradient, layout)), config.clip_norm)
        vector, state = optim.update(
            config, layout, state, optim.join(leaves), grad, torch.tensor(step), torch.tensor(True)
        )
        params = optim.insert(params, layout, optim.split(vector, leaves))
    return params


def run_torch(config: optim.Config, params: dict, gradients: list[dict], multipliers: dict | None = None) -> dict:
    """The same through torch.optim.AdamW and clip_grad_norm_, the schedule's values set as mmengine sets them."""
    multipliers = multipliers or {}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    groups = [{"params": [leaf], "scale": multipliers.get(name, (1, 1))} for name, leaf in leaves.items()]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, config.beta2), eps=config.eps, foreach=False)
    for step, gradient in enumerate(gradients):
        for name, leaf in leaves.items():
            leaf.grad = gradient[name].clone()
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(leaves.values()), config.clip_norm)
        for group in reference.param_groups:
            group["lr"] = value(config.lr, step) * group["scale"][0]
            group["weight_decay"] = config.weight_decay * group["scale"][1]
            group["betas"] = (value(config.beta1, step), config.beta2)
        reference.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


@pytest.mark.parametrize("clip_norm", [None, 0.5, 35.0])
def test_twenty_steps_equal_torch_adamw_with_clipping_and_changing_lr_and_beta1(clip_norm):
    config = optim.Config(
        lr=optim.Schedule(1e-3, (optim.Phase(8, 1e-2), optim.Phase(20, 1e-7))),
        beta1=optim.Schedule(0.9, (optim.Phase(8, 0.85), optim.Phase(20, 0.95))), weight_decay=0.1, clip_norm=clip_norm,
    )  # fmt: skip
    params, gradients = random_tree(0), [random_tree(s + 1, scale=1.0 + s % 3) for s in range(20)]
    ours, theirs = run(config, params, gradients), run_torch(config, params, gradients)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)
        assert not torch.allclose(ours[name], params[name], atol=1e-3)


def test_groups_multiply_lr_and_decay_and_frozen_leaves_stay_and_do_not_count_in_the_norm():
    config = optim.Config(
        lr=optim.Schedule(1e-2), weight_decay=0.1, clip_norm=1.0,
        groups=(optim.Group("b", lr=0.75), optim.Group("c*", weight_decay=0.0), optim.Group("a", frozen=True)),
    )  # fmt: skip
    params, gradients = random_tree(0), [random_tree(s + 1) for s in range(5)]
    ours = run(config, params, gradients)
    rest = {name: params[name] for name in ("b", "c")}
    theirs = run_torch(config, rest, [{n: g[n] for n in rest} for g in gradients], {"b": (0.75, 1), "c": (1, 0)})
    assert torch.equal(ours["a"], params["a"])
    for name in rest:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


def test_named_gives_views_of_a_moment_by_parameter_path():
    config = optim.Config(optim.Schedule(1e-3), groups=(optim.Group("a", lr=2.0),))
    params = random_tree(0)
    layout, state = optim.layout(config, params), optim.init(config, params)
    views = optim.named(state.m, layout, params)
    assert {name: view.shape for name, view in views.items()} == {name: params[name].shape for name in params}
    state.m.fill_(3.0)
    assert all((view == 3).all() for view in views.values())


def test_a_step_that_is_not_finite_changes_nothing():
    config, params = optim.Config(optim.Schedule(1e-3)), random_tree(0)
    layout, state = optim.layout(config, params), optim.init(config, params)
    vector = optim.join(optim.select(params, layout))
    bad = torch.full_like(vector, float("nan"))
    after, moments = optim.update(config, layout, state, vector, bad, torch.tensor(4), torch.tensor(False))
    assert torch.equal(after, vector)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(moments), tree.leaves(state)))


def chained_cosine(values: list[float], target: float, length: int) -> list[float]:
    """mmengine's CosineAnnealingParamScheduler: each value from the one before. Source: mmengine _get_value."""
    current = values[-1]
    out = [current]
    for k in range(1, length):
        ratio = (1 + math.cos(math.pi * k / length)) / (1 + math.cos(math.pi * (k - 1) / length))
        current = ratio * (current - target) + target
        out.append(current)
    return out


def test_cyclic_cosine_equals_mmengines_chained_phases():
    schedule = optim.Schedule(1e-4, (optim.Phase(40, 1e-3), optim.Phase(100, 1e-8)))
    first = chained_cosine([1e-4], 1e-3, 40)
    expected = first + chained_cosine([first[-1]], 1e-8, 60)
    assert [value(schedule, s) for s in range(100)] == pytest.approx(expected, rel=2e-6)
    assert value(schedule, 100) == value(schedule, 5000) == value(schedule, 99)  # mmengine stops there


def test_warmup_times_cosine_equals_mmengines_two_schedulers():
    peak, steps, warmup, start = 2e-4, 400, 50, 1 / 3
    schedule = optim.Schedule(peak, (optim.Phase(steps, peak * 1e-4),), warmup_steps=warmup)
    current, expected = peak * start, [peak * start]
    for k in range(1, steps):
        if k < warmup:  # LinearLR
            current *= 1 + (1 - start) / ((warmup - 1) * start + (k - 1) * (1 - start))
        ratio = (1 + math.cos(math.pi * k / steps)) / (1 + math.cos(math.pi * (k - 1) / steps))
        current = ratio * (current - peak * 1e-4) + peak * 1e-4
        expected.append(current)
    # mmengine multiplies the warmed-up value also by the floor of the cosine: 1e-4 of the lr, hence the tolerance.
    assert [value(schedule, s) for s in range(steps)] == pytest.approx(expected, rel=2e-5)


def test_beta1_cycle_as_published_and_as_meant():
    published, meant = optim.beta1_cycle(40, 100), optim.beta1_cycle(40, 100, published=False)
    assert value(published, 0) == pytest.approx(0.9)
    assert value(published, 40) == pytest.approx(0.85 / 0.95, abs=1e-4) and 0.9999 < value(published, 99) < 1
    assert value(meant, 40) == pytest.approx(0.9 * 0.85 / 0.95, abs=2e-3) and value(meant, 99) == pytest.approx(
        0.9, abs=1e-3
    )


def test_update_is_exact_where_float32_beta1_is_one():
    # The last step of the published schedule at full length: 1 - beta1 = 1.2e-10, and float32(beta1) is 1.
    total = 77_000
    beta1 = optim.beta1_cycle(30_800, total)
    config = optim.Config(optim.Schedule(1e-3), beta1=beta1, weight_decay=0.0, clip_norm=None)
    params = random_tree(0)
    layout, state = optim.layout(config, params), optim.init(config, params)
    vector, grad = optim.join(optim.select(params, layout)), optim.join(optim.select(random_tree(1), layout))
    state = optim.State(grad * 0.1, grad * grad * 0.5, torch.tensor(total - 1))
    after, _ = optim.update(config, layout, state, vector, grad, torch.tensor(total - 1), torch.tensor(True))
    fresh = (1 - 0.85 / 0.95) * math.sin(math.pi / 2 / (total - 30_800)) ** 2
    assert value(beta1, total - 1) == 1.0 and 0 < fresh < 2e-10
    m = (state.m + fresh * (grad - state.m)).double()
    v = (0.999 * state.v + 0.001 * grad * grad).double()
    unbias1, unbias2 = -math.expm1(total * math.log1p(-fresh)), 1 - 0.999**total
    expected = -1e-3 * m / unbias1 / (v.sqrt() / unbias2**0.5 + 1e-8)
    torch.testing.assert_close((after - vector).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_schedule_is_one_graph_for_every_step():
    schedule = optim.Schedule(1e-4, (optim.Phase(5, 1e-3), optim.Phase(9, 1e-8)), warmup_steps=3)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(schedule.at, fullgraph=True, backend=counter)
    assert all(torch.equal(compiled(torch.tensor(s)), schedule.at(torch.tensor(s))) for s in range(12))
    assert counter.frame_count == 1


def test_ema_keeps_what_its_recipe_says():
    assert float(optim.Ema(0.999, 2000.0, 10560).keep(torch.tensor(0))) == pytest.approx(
        0.999 * (1 - math.exp(-10561 / 2000))
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.Schedule(1.0, (optim.Phase(5, 0.1), optim.Phase(5, 0.2))), r"increasing steps above 0, got \[5, 5\]"),
        (lambda: optim.layout(optim.Config(optim.Schedule(1.0), groups=(optim.Group("d.*"),)), random_tree(0)), r"'d\.\*' matches no parameter"),
        (lambda: optim.layout(optim.Config(optim.Schedule(1.0), groups=(optim.Group("*", frozen=True),)), random_tree(0)), "nothing to train"),
        (lambda: run(optim.Config(optim.Schedule(1.0), beta1=optim.Schedule(1.0)), random_tree(0), [random_tree(1)]), r"beta1 1\.0 .* must be below 1"),
    ],
)  # fmt: skip
def test_impossible_recipes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("camera.*", "camera.neck.weight", True), ("camera.*", "lidar.camera.weight", False), ("*", "x", True),
        ("*.norm*.bias", "head.norms.0.bias", True), ("*.norm*.bias", "head.norms.0.weight", False),
        ("a*a", "a", False), ("a*b*b", "ab", False), ("a*b*b", "abb", True), ("x", "x", True), ("x", "xy", False),
    ],
)  # fmt: skip
def test_patterns_match_like_a_shell(pattern, name, matches):
    assert optim._matches(name, pattern) == matches
