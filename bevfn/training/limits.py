"""What numbers the flags can have: one table for every recipe and command, held against a config as soon as it is made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType, NoneType
from typing import Any, get_args, get_origin

from bevfn.names import printable

MOST = 2**31 - 1


@dataclass(frozen=True)
class Limit:
    """Finite numbers from `least` on, or above it (`open`), to `most`, or below it."""

    least: float = -math.inf
    most: float = math.inf
    open: tuple[bool, bool] = (False, False)
    why: str = ""
    """of `most`, for its sentence"""

    def fits(self, value: float) -> bool:
        above = value > self.least if self.open[0] else value >= self.least
        below = value < self.most if self.open[1] else value <= self.most
        return above and below and abs(value) < math.inf  # no NaN is above anything

    def wanted(self, value: float) -> str:
        """What a value must be that does not fit; that it must be an int32 is told of one that is not."""
        least = f"{'above' if self.open[0] else 'at least'} {self.least:g}"
        if self.most == math.inf or (self.most == MOST and not value > MOST):
            return least
        return f"{least} and {'below' if self.open[1] else 'at most'} {self.most:.10g}{self.why}"


SIZE = Limit(1, MOST)
COUNT = Limit(0, MOST)
SEED = Limit(0, 2**32 - 1)  # what numpy's older generator takes
POSITIVE = Limit(0, open=(True, False))
WEIGHT = Limit(0)
SHARE = Limit(0, 1)
WITHIN = Limit(0, 1, open=(True, True))

LIMITS: dict[str, Limit] = {
    **dict.fromkeys(("epochs", "steps", "batch_size", "accumulate", "recipe_batch", "keep", "box_capacity"), SIZE),
    **dict.fromkeys(("point_capacity", "voxel_capacity", "site_capacity"), SIZE),
    **dict.fromkeys(("warm_up", "warmup_steps", "sync_after", "workers", "checkpoint_every", "eval_every"), COUNT),
    **dict.fromkeys(("log_every", "profile"), COUNT),
    **dict.fromkeys(("sweeps", "paste_off", "ema_updates", "eval_last"), COUNT),
    **dict.fromkeys(("lr", "recipe_lr", "clip_norm", "ema_ramp", "class_reach", "range_m", "peak_tflops"), POSITIVE),
    **dict.fromkeys(("headroom", "weight_decay", "image_backbone_lr", "depth_loss"), WEIGHT),
    **dict.fromkeys(("warmup_factor", "start_lr", "final_lr"), SHARE),
    **dict.fromkeys(("lr_turn", "beta1_turn"), WITHIN),
    "milestones": SIZE,
    "mask_ratios": WITHIN,
    "mask_edges": POSITIVE,
    "scan_points": SIZE,
    "voxel_m": POSITIVE,
    "bounds_m": Limit(),
    "ema": Limit(0, 1, open=(False, True)),
    "norm_momentum": Limit(0, 1, open=(True, False)),
    "seed": SEED,
    "stage": Limit(1, 2),
    # of the commands
    **dict.fromkeys(("repeats", "samples", "scenes", "frames", "image_size", "capacities"), SIZE),
    **dict.fromkeys(("threads", "execute", "show"), COUNT),
    **dict.fromkeys(("devices", "buckets"), SIZE),
    **dict.fromkeys(("step_seconds", "disk"), POSITIVE),
    "stalls": SHARE,
    "stall_seconds": WEIGHT,
    "score_threshold": SHARE,
    "fps": Limit(0.01, 1000),
}


def check(flags: Mapping[str, Any], narrower: Mapping[str, Limit] = MappingProxyType({})) -> None:
    """Raises ValueError naming the flag and what it must be, for a number, or one of several, that it cannot mean.

    flags: by the names of their fields; values that are no numbers (None, a path, a yes or no) are not looked at, nor those of
    a flag that is in no table, which is one of a few that are listed.
    narrower: limits in the place of the table's.
    """
    for name, given in flags.items():
        limit = narrower.get(name) or LIMITS.get(name) or Limit()
        for value in given if isinstance(given, tuple) else (given,):
            if type(value) in (int, float) and not limit.fits(value):
                shown = f"{value:g}" if type(value) is float else str(value)[:40]
                raise ValueError(f"--{name.replace('_', '-')} {shown} must be {limit.wanted(value)}")


def check_words(hints: Mapping[str, Any], arguments: list[str]) -> None:
    """Raises ValueError naming the flag and what it must be, for a word of a command line that is no number where one belongs.

    hints: types by the names of the flags' fields; arguments: before they are parsed.
    """
    for place, word in enumerate(arguments):
        flag, _, joined = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        kind, most = _number(hints.get(name))
        if not flag.startswith("--") or kind is None:
            continue
        behind = [joined] if joined else arguments[place + 1 :]
        end = next((i for i, one in enumerate(behind) if one.startswith("--")), len(behind))
        if behind[:1] == ["None"] and NoneType in get_args(hints[name]):
            continue
        for value in behind[: min(end, most or 1)]:  # of as many as one likes the next may be a positional
            if not _reads(kind, value):
                several = most != 1
                what = ("whole number" if kind is int else "number") + "s" * several
                limit = LIMITS.get(name, Limit())
                least = f", {limit.wanted(0)}" if limit.least > -math.inf else ""
                raise ValueError(f"{flag} {printable(value)} must be {'' if several else 'a '}{what}{least}")


def _number(hint: Any) -> tuple[type[int] | type[float] | None, int]:
    """(int or float, how many words it takes, 0: as many as one likes) of a flag's type; None of one that takes no numbers alone."""
    options = get_args(hint) if get_origin(hint) is not tuple and get_args(hint) else (hint,)
    kinds = [option for option in options if option is not NoneType]
    if len(kinds) != 1:
        return None, 1
    if get_origin(kinds[0]) is tuple:
        words = get_args(kinds[0])
        inside = set(words) - {Ellipsis}
        return (inside.pop() if inside in ({int}, {float}) else None), 0 if Ellipsis in words else len(words)
    return (kinds[0] if kinds[0] in (int, float) else None), 1


def _reads(kind: type[int] | type[float], word: str) -> bool:
    try:
        kind(word)
    except ValueError:
        return False
    return True
