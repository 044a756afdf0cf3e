"""What was meant by a word that a command line does not know: one sentence, with the command that works."""

import difflib
import itertools
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
OF_RECIPES = ("eval", "graph")
"""Commands whose first word is a recipe."""
OF_EVAL = {
    **dict.fromkeys(("--resume", "--ckpt", "--weights", "--load-from", "--pretrained", "--model-path"), "--checkpoint"),
    **dict.fromkeys(("--work-dir", "--workdir", "--run-dir", "--output-dir", "--out-dir"), "--out"),
    **dict.fromkeys(("--data", "--dataset", "--dataroot"), "--data-root"),
    **dict.fromkeys(("--num-workers",), "--workers"),
}
"""Flags that other tools have for those of `bevfn eval`."""


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
            raise ValueError(f"there is no flag {flag}; it is {elsewhere[flag]} here")


def recipe(name: str) -> tuple[str, list[str]]:
    """(recipe, flags that choose the model) of a name. Raises ValueError for another."""
    if name in catalogue.EXPERIMENTS:
        return name, []
    if name in catalogue.MODELS:
        return catalogue.MODELS[name].experiment, ["--model", name]
    alike = _alike(name, NAMES)
    meant = f"did you mean {alike[0]}? It" if alike else "it"
    raise ValueError(f"there is no recipe or model {name}; {meant} is one of {', '.join(NAMES)}")


def _check_recipe(command: str, name: str, rest: list[str]) -> None:
    """Raises ValueError, with the command that works, unless that is a recipe: a run's folder, a model or a misspelt one is none."""
    if name in catalogue.EXPERIMENTS:
        return
    if command == "eval" and Path(name).exists():
        of = _recipe_of(Path(name))
        raise ValueError(
            f"eval takes a recipe first: `bevfn eval {of or 'RECIPE'} --checkpoint {name}`"
            + ("" if of else f"; it is one of {', '.join(catalogue.EXPERIMENTS)}")
        )
    if "/" in name:
        from bevfn.training import located

        raise ValueError(f"{command} takes a recipe first, and {name} is not there; {located.near(Path(name))}")
    said = (
        f"{command} takes a recipe, and {name} is a model of one:" if name in NAMES else f"there is no recipe {name};"
    )
    if alike := _alike(name, NAMES):
        meant, flags = recipe(alike[0])
        working = " ".join(["bevfn", command, meant, *flags, *rest])
        raise ValueError(f"{said} `{working}`" if name in NAMES else f"{said} did you mean `{working}`?")
    raise ValueError(f"{said} it is one of {', '.join(catalogue.EXPERIMENTS)}")


def _check_named(rest: list[str]) -> None:
    """Raises ValueError for `bevfn eval --checkpoint RUN`, which names a run and no recipe."""
    named = [following for word, following in itertools.pairwise(rest) if word == "--checkpoint"]
    named += [word.partition("=")[2] for word in rest if word.startswith("--checkpoint=")]
    if named and not {*catalogue.EXPERIMENTS, "-h", "--help"} & set(rest):
        of = (_recipe_of(Path(named[-1])) if Path(named[-1]).exists() else "") or "RECIPE"
        raise ValueError(f"eval takes a recipe first: `bevfn eval {of} {' '.join(rest)}`")


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
