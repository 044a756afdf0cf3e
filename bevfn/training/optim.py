"""AdamW on one flat float32 vector, schedules, global-norm clipping and EMA, all functions of tensors.

The optimizer works on the concatenation of all trainable leaves instead of leaf by leaf: a detector has 560 of them and
19 graph nodes each would be most of the step's graph (measured: see `train.py`). `Layout` says which leaf lies where.
"""

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bevfn import tree


@dataclass(frozen=True)
class Phase:
    """A half cosine that ends, at step `end`, at `target` (reached one step after the phase's last)."""

    end: int
    target: float


@dataclass(frozen=True)
class Schedule:
    """A value per step (0-based): half cosines one after the other, then constant; times a linear warm-up, and times
    `drop` from every step in `drops` on.

    Numerically mmengine's chained schedulers: in a phase [begin, end) the value at step s is
    target + (first - target) (1 + cos(pi (s - begin) / (end - begin))) / 2, `first` being the value of the last step
    before the phase, and after the last phase the value of its last step stays; `target` itself is never used.
    """

    start: float
    phases: tuple[Phase, ...] = ()
    warmup_steps: int = 0  # the factor rises linearly and is 1 from step warmup_steps - 1 on
    warmup_factor: float = 1 / 3  # of step 0
    warmup_every: int = 1  # steps in which the warm-up's factor stays: it counts stairs of that many instead of steps
    drops: tuple[int, ...] = ()  # MultiStepLR's milestones, in steps
    drop: float = 0.1

    def __post_init__(self) -> None:
        ends = [0, *(phase.end for phase in self.phases)]
        if any(b <= a for a, b in itertools.pairwise(ends)):
            raise ValueError(f"Schedule.phases must end at increasing steps above 0, got {ends[1:]}; shorten the cycle")

    def at(self, step: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[] of a float dtype for the int64 [] tensor `step`."""
        value = torch.full_like(step, self.start, dtype=dtype)
        begin, first = 0, self.start
        for phase in self.phases:
            length = phase.end - begin
            left = (phase.end - step).clamp(1, length).to(dtype) / length  # 1 to 1 / length
            # (1 + cos(pi (1 - left))) / 2 as sin(pi left / 2)^2, and a sum instead of a difference: both keep their relative
            # precision towards zero.
            angle = left * (math.pi / 2)
            inside = first * torch.sin(angle) ** 2 + phase.target * torch.cos(angle) ** 2
            value = torch.where(step >= begin, inside, value)
            first = phase.target + (first - phase.target) * math.sin(math.pi / 2 / length) ** 2
            begin = phase.end
        if self.warmup_steps > 1:
            stair = step if self.warmup_every == 1 else step // self.warmup_every
            done = (stair.to(dtype) / (self.warmup_steps - 1)).clamp(max=1.0)
            value = value * (self.warmup_factor + (1 - self.warmup_factor) * done)
        for begin in self.drops:
            value = torch.where(step >= begin, value * self.drop, value)
        return value

    def complement(self) -> "Schedule":
        """1 - this, without the rounding of float32 near 1."""
        return replace(self, start=1 - self.start, phases=tuple(Phase(p.end, 1 - p.target) for p in self.phases))


def beta1_cycle(turn: int, total: int, *, base: float = 0.9, published: bool = True) -> Schedule:
    """beta1 of BEVFusion's recipes: down until step `turn`, up until step `total`.

    The published configs give 0.85 / 0.95 and 1 as mmengine's `eta_min`, meaning the ratios of the original one-cycle
    schedule; mmengine reads absolute values, so beta1 goes 0.9 -> 0.8947 -> 1.0. `published=False` is what was meant:
    0.9 -> 0.805 -> 0.9. Source: mmengine's CosineAnnealingMomentum, and mmdetection3d 1.4.0's projects/BEVFusion/configs.
    """
    scale = 1.0 if published else base
    return Schedule(base, (Phase(turn, 0.85 / 0.95 * scale), Phase(total, scale)))


@dataclass(frozen=True)
class Group:
    """Multipliers for the leaves whose dotted path matches `pattern` (`*` is any text: "camera.*", "*.norm*.bias")."""

    pattern: str
    lr: float = 1.0
    weight_decay: float = 1.0
    frozen: bool = False  # no gradient, no decay, not in the norm; its batch norms keep and use their statistics


@dataclass(frozen=True)
class Ema:
    """Exponential moving average of parameters and statistics with decay(n) = decay (1 - exp(-n / ramp_steps)).

    n counts updates, the first one is first_update + 1; every step counts, skipped ones too.
    """

    decay: float = 0.999
    ramp_steps: float = 2000.0
    first_update: int = 0

    def keep(self, step: Tensor) -> Tensor:
        """float32 [], the part of the old average that step `step` (int64 [], 0-based) keeps."""
        updates = (step + (self.first_update + 1)).float()
        return self.decay * -torch.expm1(-updates / self.ramp_steps)


@dataclass(frozen=True)
class Config:
    """AdamW (Loshchilov & Hutter 2019) as torch.optim.AdamW computes it, after clipping the global L2 norm."""

    lr: Schedule
    beta1: Schedule = Schedule(0.9)
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = 35.0
    groups: tuple[Group, ...] = ()  # the first that matches a path holds


@tree.register
@dataclass
class State:
    """Moments of the flat vector of trainable parameters."""

    m: Tensor  # float32 [n]
    v: Tensor  # float32 [n]
    count: Tensor  # int64 [], updates made: a skipped step is none


@dataclass(frozen=True)
class Segment:
    """Elements [begin, end) of the flat vector, which share their multipliers."""

    begin: int
    end: int
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Layout:
    """Which leaf lies where in the flat vector: `names` in order, leaves of equal multipliers side by side."""

    names: tuple[str, ...]
    segments: tuple[Segment, ...]


def layout(config: Config, params: dict) -> Layout:
    """The layout of the trainable leaves.

    Raises ValueError if a pattern matches nothing, or if nothing is left to train.
    """
    flat = tree.flatten(params)
    unused = {group.pattern for group in config.groups}
    members: dict[tuple[float, float], list[str]] = {}
    for name in flat:
        group = next((g for g in config.groups if _matches(name, g.pattern)), Group("*"))
        unused.discard(group.pattern)
        if not group.frozen:
            members.setdefault((group.lr, group.weight_decay), []).append(name)
    if unused:
        raise ValueError(f"optimizer group pattern {sorted(unused)[0]!r} matches no parameter that an earlier one left")
    if not members:
        raise ValueError("every parameter is frozen: nothing to train; drop a frozen group")
    names, segments, begin = [], [], 0
    for (lr, weight_decay), group_names in members.items():
        end = begin + sum(flat[name].numel() for name in group_names)
        segments.append(Segment(begin, end, lr, weight_decay))
        names += group_names
        begin = end
    return Layout(tuple(names), tuple(segments))


def init(config: Config, params: dict) -> State:
    """Zero moments for the trainable leaves of `params`."""
    leaves = select(params, layout(config, params))
    size = sum(leaf.numel() for leaf in leaves)
    device = leaves[0].device
    zero = torch.zeros(size, device=device)
    return State(zero, zero.clone(), torch.zeros((), dtype=torch.int64, device=device))


def select(params: dict, layout: Layout) -> list[Tensor]:
    """The trainable leaves in the layout's order."""
    flat = tree.flatten(params)
    return [flat[name] for name in layout.names]


def insert(params: dict, layout: Layout, leaves: list[Tensor]) -> dict:
    """`params` with its trainable leaves replaced by `leaves`."""
    return tree.unflatten({**tree.flatten(params), **dict(zip(layout.names, leaves))}, params)


def join(leaves: list[Tensor]) -> Tensor:
    """float32 [n]: all elements of all leaves."""
    return torch.cat([leaf.float().reshape(-1) for leaf in leaves])


def split(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of `vector` [n] shaped as the leaves that were joined to it."""
    pieces = torch.split(vector, [leaf.numel() for leaf in like])
    return [piece.view(leaf.shape) for piece, leaf in zip(pieces, like)]


def named(vector: Tensor, layout: Layout, params: dict) -> dict[str, Tensor]:
    """{dotted path: view of `vector`}: a moment or gradient by its parameter's name."""
    return dict(zip(layout.names, split(vector, select(params, layout))))


def clip(grad: Tensor, max_norm: float | None) -> tuple[Tensor, Tensor]:
    """(grad [n] scaled to a norm of at most max_norm, its L2 norm [] before). Source: torch clip_grad_norm_."""
    norm = (grad * grad).sum().sqrt()
    if max_norm is None:
        return grad, norm
    return grad * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm


def update(
    config: Config, layout: Layout, state: State, param: Tensor, grad: Tensor, step: Tensor, finite: Tensor
) -> tuple[Tensor, State]:
    """One AdamW step on flat vectors; where `finite` (bool []) is false everything stays as it was.

        m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2;  t = count + 1
        p -= lr (wd p + (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))

    b1 is the schedule's value of this step also in b1^t, as in mmengine and torch. Under the published schedule b1
    comes within 1e-10 of 1, so 1 - b1 is what is computed, and 1 - b1^t = -expm1(t log1p(-(1 - b1))). b1 = 1 itself
    would divide by zero (in torch: lr / 0, infinite parameters); a schedule never arrives at its target, and a
    constant one of 1 is refused.

    param, grad: float32 [n]. step: int64 [] for the schedules. Returns (param [n], state).
    """
    if config.beta1.start >= 1.0 or not 0.0 <= config.beta2 < 1.0:
        raise ValueError(
            f"beta1 {config.beta1.start} and beta2 {config.beta2} must be below 1: AdamW divides by 1 - b^t"
        )
    count = state.count + 1
    fresh = config.beta1.complement().at(step)  # 1 - b1
    unbias1 = -torch.expm1(count * torch.log1p(-fresh))
    unbias2 = -torch.expm1(count * math.log(config.beta2)) if config.beta2 > 0 else torch.ones_like(unbias1)
    m = state.m + fresh * (grad - state.m)
    v = config.beta2 * state.v + (1 - config.beta2) * grad * grad
    direction = m / unbias1 / (v.sqrt() / unbias2.sqrt() + config.eps)
    lr = config.lr.at(step)
    moved = []
    for s in layout.segments:
        old = param[s.begin : s.end]
        decay = config.weight_decay * s.weight_decay
        moved.append(old - lr * s.lr * (decay * old + direction[s.begin : s.end]))
    new = State(m, v, count)
    kept = tree.map(lambda after, before: torch.where(finite, after, before), new, state)
    return torch.where(finite, torch.cat(moved) if len(moved) > 1 else moved[0], param), kept


def _matches(name: str, pattern: str) -> bool:
    """Shell-like match with `*` only, in operations that Dynamo traces (fnmatch builds a regular expression)."""
    first, *rest = pattern.split("*")
    if not rest:
        return name == pattern
    if not name.startswith(first):
        return False
    position = len(first)
    for part in rest[:-1]:
        position = name.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return len(name) - position >= len(rest[-1]) and name.endswith(rest[-1])
