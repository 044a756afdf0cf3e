"""`bevfn train NAME`: a recipe by its name, or by one of its models', as `python -m bevfn.experiments.NAME` trains it."""

from typing import Annotated

from tyro.conf import Positional

from bevfn import exits
from bevfn.choices import one_of
from bevfn.commands import meant


def train(name: Annotated[Positional[str], one_of(meant.NAMES)], flags: Positional[tuple[str, ...]] = ()) -> None:
    """Trains a recipe, or the model of that name by its recipe; `bevfn train NAME --help` shows its flags.

    The same as `python -m bevfn.experiments.NAME`, which is what torchrun starts on many devices.

    Args:
        name: a recipe, or a model
        flags: the recipe's
    """
    with exits.one_sentence():  # Ctrl-C while torch is imported, too
        from bevfn import recipes
        from bevfn.training import run

        recipe, given = meant.recipe(name)
        found = recipes.load(recipe)
    run.cli(found.DEFAULTS, found.task, found.__doc__, arguments=[*given, *flags], prog=f"bevfn train {name}")
