"""Policies, and loss scaling against torch's own GradScaler."""

import pytest
import torch

from bevfn import precision, tree
from bevfn.precision import LossScale, Policy


def test_policy_casts_only_floating_point_and_only_fp16_scales_the_loss():
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        policy = Policy.of(name)
        assert (
            policy.cast(torch.ones(1)).dtype == dtype
            and policy.cast(torch.ones(1, dtype=torch.int64)).dtype == torch.int64
        )
        assert policy.scales_loss == (name == "fp16")


def test_unknown_precision_is_refused_by_name():
    with pytest.raises(ValueError, match="precision 'fp8' is unknown; choose one of fp32, fp16, bf16"):
        Policy.of("fp8")


def test_loss_scale_follows_torch_through_growth_and_overflow():
    scale, good = torch.full((1,), 65536.0), torch.zeros(1, dtype=torch.int32)
    ours = precision.init_loss_scale()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        overflow = torch.rand(1, generator=generator) < 0.1
        torch._amp_update_scale_(scale, good, overflow.float(), 2.0, 0.5, 5)
        ours = precision.update_loss_scale(ours, ~overflow[0], interval=5)
        assert float(ours.scale) == float(scale) and int(ours.good_steps) == int(good)


def test_loss_scale_defaults_are_those_of_grad_scaler():
    theirs = torch.amp.GradScaler("cpu")
    ours = precision.init_loss_scale()
    assert float(ours.scale) == theirs._init_scale
    almost = LossScale(ours.scale, torch.tensor(theirs.get_growth_interval() - 2))
    almost = precision.update_loss_scale(almost, torch.tensor(True))
    assert float(almost.scale) == 65536
    assert float(precision.update_loss_scale(almost, torch.tensor(True)).scale) == 65536 * theirs.get_growth_factor()
    assert float(precision.update_loss_scale(almost, torch.tensor(False)).scale) == 65536 * theirs.get_backoff_factor()


def test_loss_scale_never_grows_to_infinity():
    huge = LossScale(torch.tensor(3e38), torch.tensor(1999))
    assert float(precision.update_loss_scale(huge, torch.tensor(True)).scale) == pytest.approx(3e38)


def test_loss_scale_never_falls_below_one():
    state = precision.init_loss_scale()
    for _ in range(300):  # without a lower end: 2^-284, which float32 rounds to 0
        state = precision.update_loss_scale(state, torch.tensor(False))
    assert float(state.scale) == precision.LOWEST_SCALE == 1.0
    assert (
        float(precision.update_loss_scale(LossScale(state.scale, torch.tensor(1999)), torch.tensor(True)).scale) == 2.0
    )


def test_loss_scale_update_is_one_graph():
    compiled = torch.compile(precision.update_loss_scale, fullgraph=True, backend="aot_eager")
    for finite in (True, False):
        a, b = (f(precision.init_loss_scale(), torch.tensor(finite)) for f in (compiled, precision.update_loss_scale))
        assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b)))
