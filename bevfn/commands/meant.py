"""What was meant by a word that a command line does not know: one sentence, with the command that works."""

import difflib
import itertools
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from bevfn import catalogue

NAMES = tuple(dict.fromkeys((*catalogue.EXPERIMENTS, *catalogue.MODELS)))
ELSEWHERE = {
    **dict.fromkeys(("evaluate", "evaluation", "test", "validate", "val", "score"), "eval"),
    **dict.fromkeys(("infer", "inference", "detect", "demo"), "predict"),
    **dict.fromkeys(("fit", "finetune", "resume"), "train"),
    **dict.fromkeys(("visualize", "visualise", "vis", "show", "browse"), "view"),
    **dict.fromkeys(("import", "convert"), "checkpoint import"),
    **dict.fromkeys(("create", "create_data", "create-data", "prepare"), "data prepare"),
    **dict.fromkeys(("synth", "world"), "data synth"),
    "check": "data check",
    "onnx": "export",
    "lower": "graph",
    "diff": "compare",
    "benchmark": "bench",
}
"""Words that other tools have for our commands."""
CONFIG = ".py"  # of mmdetection3d
OF_RECIPES = ("eval", "graph")
"""Commands whose first word is a recipe."""
OF_EVAL = {
    **dict.fromkeys(
        ("--resume", "--ckpt", "--weights", "--load-from", "--pretrained", "--model-path"), "it is --checkpoint here"
    ),
    **dict.fromkeys(("--work-dir", "--workdir", "--run-dir", "--output-dir", "--out-dir"), "it is --out here"),
    **dict.fromkeys(("--data", "--dataset", "--dataroot"), "it is --data-root here"),
    "--num-workers": "it is --workers here",
    "--eval": "scores are always computed, by --metric nuscenes or t4, so leave it out",
    **dict.fromkeys(("--show", "--show-dir"), "pictures are always written, into --out, so leave it out"),
}
"""Flags that other tools have for those of `bevfn eval`."""
JSON = {"--json-file": "it is --json here"}
WITH_JSON = ("parity", "graph", "bench", "ascend", "data check")
"""Commands that have --json."""


def check(arguments: list[str], groups: Mapping[str, Collection[str]], commands: Collection[str]) -> None:
    """Raises ValueError for a command line whose command, or whose recipe, is none; groups: their subcommands."""
    typed, rest = "".join(arguments[:1]), arguments[1:]
    if not typed or typed.startswith("-"):
        return
    if typed not in commands:
        raise _unknown("bevfn", typed, commands)
    first = "".join(rest[:1])
    if typed in groups and first and not first.startswith("-") and first not in groups[typed]:
        raise _unknown(f"bevfn {typed}", first, groups[typed])
    if typed in OF_RECIPES and first and not first.startswith("-"):
        _check_recipe(typed, first, rest[1:])
    if typed == "eval":
        check_flags(rest, OF_EVAL)
        _check_named(rest)
        _check_flagged(rest)
    if typed in WITH_JSON or f"{typed} {first}" in WITH_JSON:
        check_flags(rest, JSON)


def _unknown(prog: str, typed: str, known: Collection[str]) -> ValueError:
    elsewhere = ELSEWHERE | {name: f"train {name}" for name in NAMES} if prog == "bevfn" else {}
    meant = elsewhere.get(typed) or "".join(_alike(typed, known))
    asked = f"did you mean `{prog} {meant}`? There are" if meant else "there are"
    return ValueError(f"there is no command `{prog} {typed}`; {asked} {', '.join(known)}")


def check_flags(arguments: Iterable[str], elsewhere: Mapping[str, str]) -> None:
    """Raises ValueError for another tool's flag."""
    for word in arguments:
        flag = word.partition("=")[0].replace("_", "-")
        if flag in elsewhere:
            raise ValueError(f"there is no flag {flag}; {elsewhere[flag]}")


def recipe(name: str) -> tuple[str, list[str]]:
    """(recipe, flags that choose the model) of a name. Raises ValueError for another."""
    if name in catalogue.EXPERIMENTS:
        return name, []
    if name in catalogue.MODELS:
        return catalogue.MODELS[name].experiment, ["--model", name]
    if name.endswith(CONFIG):
        raise ValueError(_no_file(name, "train"))
    alike = _alike(name, NAMES)
    meant = f"did you mean {alike[0]}? It" if alike else "it"
    raise ValueError(f"there is no recipe or model {name}; {meant} is one of {', '.join(NAMES)}")


def _check_recipe(command: str, name: str, rest: list[str]) -> None:
    """Raises ValueError, with the command that works, unless that is a recipe: a run's folder, a model or a misspelt one is none."""
    if name in catalogue.EXPERIMENTS:
        return
    if name.endswith(CONFIG):
        raise ValueError(_no_file(name, command))
    if command == "eval" and Path(name).exists():
        of = _recipe_of(Path(name))
        raise ValueError(
            f"eval takes a recipe first: `{shlex.join(['bevfn', 'eval', of or 'RECIPE', '--checkpoint', name])}`"
            + ("" if of else f"; it is one of {', '.join(catalogue.EXPERIMENTS)}")
        )
    if "/" in name:
        from bevfn.training import located

        raise ValueError(
            f"{command} takes a recipe first, and {name} is not there; {located.near(Path(name), weights=True)}"
        )
    said = (
        f"{command} takes a recipe, and {name} is a model of one:" if name in NAMES else f"there is no recipe {name};"
    )
    if alike := _alike(name, NAMES):
        meant, flags = recipe(alike[0])
        working = shlex.join(["bevfn", command, meant, *flags, *rest])
        raise ValueError(f"{said} `{working}`" if name in NAMES else f"{said} did you mean `{working}`?")
    raise ValueError(f"{said} it is one of {', '.join(catalogue.EXPERIMENTS)}")


def _check_named(rest: list[str]) -> None:
    """Raises ValueError for `bevfn eval --checkpoint RUN`, which names a run and no recipe."""
    named = [following for word, following in itertools.pairwise(rest) if word == "--checkpoint"]
    named += [word.partition("=")[2] for word in rest if word.startswith("--checkpoint=")]
    if named and not {*catalogue.EXPERIMENTS, "-h", "--help"} & set(rest):
        of = (_recipe_of(Path(named[-1])) if Path(named[-1]).exists() else "") or "RECIPE"
        raise ValueError(f"eval takes a recipe first: `{shlex.join(['bevfn', 'eval', of, *rest])}`")


def _check_flagged(rest: list[str]) -> None:
    """Raises ValueError for `bevfn eval RECIPE RUN`, whose checkpoint has no flag before it."""
    named = any(word.partition("=")[0] == "--checkpoint" for word in rest)
    if len(rest) > 1 and not rest[1].startswith("-") and not named:
        working = shlex.join(["bevfn", "eval", rest[0], "--checkpoint", *rest[1:]])
        raise ValueError(f"eval takes the checkpoint by its flag: `{working}`")


def _no_file(name: str, command: str) -> str:
    """What to say of mmdetection3d's config in the place of a recipe: the one whose name its file's begins with, or resembles."""
    stem = Path(name).stem
    begins = [known for known in NAMES if stem.replace("-", "_").startswith(known.replace("-", "_"))]
    alike = (
        max(begins, key=len) if begins else "".join(_alike(stem, NAMES))
    )  # of equals a recipe, which NAMES begins with
    ask = f"it is one of {', '.join(catalogue.EXPERIMENTS)}"
    if alike:
        meant, flags = recipe(alike)
        ask = f"did you mean `{' '.join(['bevfn', command, meant, *flags])}`?"
    return f"{command} takes a recipe by its name, not a file such as {name}; {ask}"


def _recipe_of(place: Path) -> str:
    """The recipe of the run that a path lies in; empty where there is none, as of a file."""
    from bevfn.training import run_folder  # and torch, which a right command line need not wait for

    for folder in (place, *place.parents[:3]):
        file = folder / run_folder.CONFIG_FILE
        if file.is_file():
            return _of_model(run_folder.read_config(file).get("model"))
    return ""


def _of_model(model: Any) -> str:
    return catalogue.MODELS[model].experiment if isinstance(model, str) and model in catalogue.MODELS else ""


def _alike(typed: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(typed, tuple(known), n=1)
