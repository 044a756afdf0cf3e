"""`bevfn train NAME`: a recipe by its name, or by one of its models', as `python -m bevfn.experiments.NAME` trains it."""

import difflib
from typing import Annotated

from tyro.conf import Positional

from bevfn import catalogue, exits
from bevfn.choices import one_of

NAMES = tuple(dict.fromkeys((*catalogue.EXPERIMENTS, *catalogue.MODELS)))


def train(name: Annotated[Positional[str], one_of(NAMES)], flags: Positional[tuple[str, ...]] = ()) -> None:
    """Trains a recipe, or the model of that name by its recipe; `bevfn train NAME --help` shows its flags.

    The same as `python -m bevfn.experiments.NAME`, which is what torchrun starts on many devices.

    Args:
        name: a recipe, or a model
        flags: the recipe's
    """
    from bevfn import recipes
    from bevfn.training import run

    with exits.one_sentence():
        recipe, given = known(name)
        found = recipes.load(recipe)
    run.cli(found.DEFAULTS, found.task, found.__doc__, arguments=[*given, *flags], prog=f"bevfn train {name}")


def known(name: str) -> tuple[str, list[str]]:
    """(recipe, flags that choose the model) of a name. Raises ValueError for another."""
    if name in catalogue.EXPERIMENTS:
        return name, []
    if name in catalogue.MODELS:
        return catalogue.MODELS[name].experiment, ["--model", name]
    alike = difflib.get_close_matches(name, NAMES, n=1)
    meant = f"did you mean {alike[0]}? It" if alike else "it"
    raise ValueError(f"there is no recipe or model {name}; {meant} is one of {', '.join(NAMES)}")
