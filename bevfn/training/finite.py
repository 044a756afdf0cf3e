"""A loss, a gradient or a parameter that is not finite ends a run, with the step, the samples and what is NaN or infinite."""

import math
from functools import partial

from bevfn import distributed
from bevfn.data.batch import Batch
from bevfn.precision import LOWEST_SCALE
from bevfn.training import train
from bevfn.training.tasks import Run, say

PATIENCE = 5  # steps of fp16 that are skipped in a row before it is asked why


def check_step(
    run: Run,
    train_state: train.TrainState,
    values: dict,
    tokens: list[list[str]],
    done: int,
    skipped: int,
    batches: list[Batch] | None,
) -> int:
    """Steps that were skipped in a row, this one included; `skipped` were before it.

    tokens: of this process' samples, by microbatch. batches: its microbatches, if `train_state` is as the step returned
    it; None if others were made since, so that it cannot be repeated.

    Stops a run that cannot learn so: at once in fp32 and bf16, where nothing explains a loss or a gradient that is not
    finite; in fp16, whose scale may be too high, after PATIENCE steps in a row if the loss itself is not finite, or the
    scale cannot fall. Raises ValueError naming the step, the samples, and the terms of the loss or the first bad tensor,
    in all processes.
    """
    if not values["skipped"]:
        return 0
    scaled, skipped = run.config.precision == "fp16", skipped + 1
    bad_terms = [name for name, value in values.items() if name.startswith(train.LOSS) and not math.isfinite(value)]
    together = [token for part in tokens for token in part]
    if scaled and skipped % PATIENCE:
        tell_of_fp16(run, values, done, bad_terms, together)
        return skipped
    lowest = scaled and values["loss_scale"] <= LOWEST_SCALE
    if scaled and not bad_terms and not lowest:
        return skipped
    samples = distributed.gather(together, run.replicas)
    if batches is None:
        what = f"the loss is not finite, {', '.join(bad_terms)}" if bad_terms else "the gradients are not finite"
        what += f" (with --log-every 1 the run says of which {'sample' if bad_terms else 'tensor'})"
    else:
        what = _cause(run, train_state, tokens, batches, bad_terms)
    raise ValueError(
        f"step {done}: {what}; samples {', '.join(token for part in samples for token in part)}; lower --lr, or look at "
        "these samples"
    )


def _cause(
    run: Run, train_state: train.TrainState, tokens: list[list[str]], batches: list[Batch], bad_terms: list[str]
) -> str:
    """What is not finite in the step that was just made, found by repeating it."""
    loss, optimizer = partial(run.task.loss, train=True), run.task.optimizer(run.plan)
    if bad_terms:
        alone = [
            f"sample {tokens[bad.microbatch][bad.sample]}: {', '.join(bad.terms)}"
            for bad in train.bad_losses(loss, optimizer, train_state, batches)
        ]
        alone = [line for part in distributed.gather(alone, run.replicas) for line in part]
        what = f"the loss is not finite, {'; '.join(alone) or ', '.join(bad_terms)}"
        first = train.first_nonfinite({"batch": batches[0] if len(batches) == 1 else batches})
        return what + (f", first {first}" if first else "")
    bad = train.bad_gradient(loss, optimizer, train_state, batches, run.replicas)
    return f"the gradients are not finite, first {bad or 'in another process'}"


def check_state(train_state: train.TrainState, done: int) -> None:
    """Raises ValueError naming the first leaf that is not finite: losses and gradients are looked at before a step's update,
    and of the last one nothing else would look at what it made."""
    if bad := train.first_nonfinite(train_state):
        raise ValueError(
            f"step {done}: its update made {bad} NaN or infinite, so that it is neither saved nor evaluated; lower --lr, and go "
            "on from an older checkpoint with --resume --force"
        )


def tell_of_fp16(run: Run, values: dict, done: int, bad_terms: list[str], tokens: list[str]) -> None:
    """Says what a skipped step of fp16 may mean, where it is more than a loss scale that was too high."""
    if bad_terms:
        samples = ", ".join(token for part in distributed.gather(tokens, run.replicas) for token in part)
        say(run, f"warning: step {done} is skipped: {', '.join(bad_terms)} not finite, with samples {samples}")
    if LOWEST_SCALE < values["loss_scale"] <= 2 * LOWEST_SCALE:
        say(
            run,
            f"warning: step {done}: the loss scale has fallen to its lowest, {LOWEST_SCALE:g}; lower --lr, or take bf16",
        )
