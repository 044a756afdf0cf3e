"""A net of two convolutions with batch norm, dropout and a linear layer: what the train-step tests train."""

import torch
from torch import Tensor

from bevfn import rng, tree
from bevfn.layers import batch_norm, conv, linear
from bevfn.precision import Policy
from bevfn.training import optim, train


def init(seed: int = 0) -> tuple[dict, dict]:
    """(params, state)"""
    generator = torch.Generator().manual_seed(seed)
    first, first_state = batch_norm.init(8)
    second, second_state = batch_norm.init(8)
    params = {
        "stem": {"conv": conv.init(3, 8, (3, 3), bias=False, generator=generator), "norm": first},
        "body": [{"conv": conv.init(8, 8, (3, 3), bias=False, generator=generator), "norm": second}],
        "head": linear.init(8, 4, bias=True, generator=generator),
    }
    return params, {"stem": {"norm": first_state}, "body": [{"norm": second_state}]}


def batch(seed: int = 0) -> dict:
    """Images [4 3 8 8] and targets [4 4]."""
    generator = torch.Generator().manual_seed(100 + seed)
    return {"x": torch.randn(4, 3, 8, 8, generator=generator), "y": torch.randn(4, 4, generator=generator)}


def loss_fn(policy: Policy, gain: float = 1.0, train=True, dropout: float = 0.25):
    """Mean squared error times `gain` in float32; the gradient of the network is in the policy's dtype."""

    def loss(params: dict, state: dict, batch: dict, key: Tensor) -> tuple[Tensor, tuple[dict, dict]]:
        x = policy.cast(batch["x"])
        x = conv.apply(params["stem"]["conv"], x, padding=1)
        x, stem = batch_norm.apply(params["stem"]["norm"], state["stem"]["norm"], x, train=train)
        y = conv.apply(params["body"][0]["conv"], torch.relu(x), padding=1)
        y, body = batch_norm.apply(params["body"][0]["norm"], state["body"][0]["norm"], y, train=train)
        pooled = rng.dropout(torch.relu(x + y).mean((2, 3)), dropout, rng.fold(key, 1))
        error = linear.apply(params["head"], pooled).float() - batch["y"]
        value = (error * error).mean() * gain
        return value, ({"stem": {"norm": stem}, "body": [{"norm": body}]}, {"loss/total": value})

    return loss


def recipe(**changes) -> optim.Config:
    """Schedules that change within five steps, clipping that bites."""
    lr = optim.Schedule(1e-3, (optim.Phase(2, 1e-2), optim.Phase(6, 1e-4)))
    return optim.Config(**{"lr": lr, "beta1": optim.beta1_cycle(2, 6), "clip_norm": 0.5, **changes})


def fresh(name: str, *, ema: optim.Ema | None = None, gain: float = 1.0, **changes):
    """(train state, pure step) at precision `name`."""
    policy, config = Policy.of(name), recipe(**changes)
    params, state = init()
    step = train.make_step(loss_fn(policy, gain), config, ema=ema)
    return train.init(params, state, config, precision=policy, ema=ema, seed=7), step


def copy(value):
    return tree.map(torch.clone, value)
