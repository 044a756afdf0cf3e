"""What of data of one's own is there, missing or damaged, and what is odd: `bevfn data check` of them."""

import warnings
from pathlib import Path

from bevfn.data import check as checking
from bevfn.data import own, values
from bevfn.data.check import Inspection
from bevfn.data.index import Index, Packed
from bevfn.data.values import Finding, some
from bevfn.names import sentence


def check(
    root: Path,
    version: str | None = None,
    split: str | None = None,
    *,
    training: str | None = None,
    evaluation: str | None = None,
    deep: bool = False,
    workers: int = 0,
) -> Inspection:
    """Looks at the values of every key frame, and at every cloud and image that the splits need.

    version: there is none; split, training, evaluation, deep, workers: see `check.check`. Raises ValueError for a split that is
    not there.
    """
    present = own.splits(root)
    named = [name for name in (split, training, evaluation) if name is not None]
    if missing := [name for name in named if name not in present]:
        raise ValueError(f"{root} has no split {missing[0]!r}; it has {', '.join(present)}.")
    chosen = dict.fromkeys(named) or {name: None for name in present if name != own.ALL} or {own.ALL: None}
    findings, indexes = list[Finding](), dict[str, Index]()
    for name in chosen:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                indexes[name] = own.index(root, name, keep=False)
        except ValueError as error:
            findings.append(Finding(sentence(error).rstrip("."), "training refuses the data set", "refused"))
    packed = {name: index.frames for name, index in indexes.items() if isinstance(index.frames, Packed)}
    parts, problems, affected = checking.files(Path(root), packed, deep, workers)
    facts = [_fact(name, index, present[name]) for name, index in indexes.items()]
    for index in indexes.values():
        told, odd = values.of_frames(
            index, {problem.path for problem in problems}, values.Drops(reach=1e4, velocities=False), deep=deep
        )
        facts += told
        findings += odd
    if own.default_splits(root) is None:
        what = f"there are no splits train and val; its splits are {some(list(present))}"
        findings.append(Finding(what, "it needs --train-split and --eval-split", "note"))
    samples = {name: len(index) for name, index in indexes.items()}
    return Inspection(
        str(root), own.VERSION, samples, affected, tuple(parts), tuple(problems), (), tuple(facts), tuple(findings)
    )


def _fact(name: str, index: Index, scenes: list[str]) -> str:
    kinds = f"classes {some(list(index.class_names))}; cameras {some(list(index.channels)) or 'none'}"
    lacking = [
        what for what, there in (("annotations", index.annotated), ("velocities", index.has("velocity"))) if not there
    ]
    return f"{name}: {len(scenes):,} scenes; {kinds}{f'; no {some(lacking)}' if lacking else ''}"
