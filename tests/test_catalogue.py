"""The catalogue is what the rooms have: every name in its recipe, its model, its checkpoint's names, and nowhere another."""

import dataclasses
import importlib
import subprocess
import sys
from typing import get_args

import pytest
from helps import helped
from torch._subclasses.fake_tensor import FakeTensorMode

from bevfn import catalogue, cli, recipes, tree, upstream
from bevfn.commands import bench, checkpoint, evaluate, graph
from bevfn.data import source


@pytest.mark.parametrize("experiment", catalogue.EXPERIMENTS)
def test_a_recipe_trains_the_models_that_the_catalogue_says(experiment):
    names = {name for name, model in catalogue.MODELS.items() if model.experiment == experiment}
    recipe = recipes.load(experiment)
    assert recipe.NETWORKS.keys() == names and callable(recipe.task)
    assert recipe.DEFAULTS.keys() == names
    for name, defaults in recipe.DEFAULTS.items():
        assert {"frame", "synthetic"} < defaults.keys() <= set(get_args(source.Kind))
        assert next(iter(defaults)) in ("nuscenes", "t4", "own")  # what it is published on, or for
        assert {config.model for config in defaults.values()} == {name}


@pytest.mark.parametrize("name", catalogue.MODELS)
def test_a_model_is_of_its_family_and_size(name):
    model = catalogue.MODELS[name]
    config = recipes.load(model.experiment).NETWORKS[name]()
    family = importlib.import_module(f"bevfn.models.{model.family}")
    assert isinstance(config, family.Config)
    with FakeTensorMode():
        params, _ = family.init(config, seed=0)
    assert tree.num_elements(params) / 1e6 == pytest.approx(model.parameters, abs=0.05)


def test_checkpoints_are_those_that_can_be_imported():
    assert set(catalogue.CHECKPOINTS) == set(upstream.CHECKPOINTS)


def test_published_figures_are_in_the_recipes_words():
    for model in catalogue.MODELS.values():
        if model.published is not None:
            text = importlib.import_module(f"bevfn.experiments.{model.experiment}").__doc__
            for figure in filter(None, (model.published.mean_ap, model.published.other)):
                assert f"{figure:g}" in text or f".{round(figure * 100)}" in text, figure


@pytest.mark.parametrize(
    ("command", "choices"),
    [
        (graph.graph, catalogue.EXPERIMENTS), (evaluate.evaluate, catalogue.EXPERIMENTS), (evaluate.evaluate, catalogue.MODELS),
        (bench.step, catalogue.MODELS), (bench.startup, catalogue.EXPERIMENTS), (checkpoint.import_, catalogue.CHECKPOINTS),
    ],
)  # fmt: skip
def test_commands_offer_the_catalogues_names(command, choices):
    text = "".join(helped(command).replace("│", "").split())
    assert "{" + ",".join(choices) + "}" in text


def test_the_catalogue_imports_nothing_of_ours_and_no_torch():
    code = (
        "import sys; import bevfn.catalogue; print([m for m in sys.modules if m == 'torch' or m.startswith('bevfn.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['bevfn.catalogue']"


def test_an_unknown_name_is_answered_with_the_known_ones(monkeypatch, capsys):
    for arguments, known in (
        (["graph", "bevfussion"], "`bevfn graph bevfusion`"),
        (["bench", "step", "--model", "bevdepth-3key"], "'bevdepth"),
    ):
        monkeypatch.setattr(sys, "argv", ["bevfn", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        assert end.value.code == 2 and known in said.out + said.err


def test_plain_switches_off_what_only_training_needs():
    for experiment in catalogue.EXPERIMENTS:
        config = recipes.published(experiment)
        changed = {
            f.name for f in dataclasses.fields(config) if getattr(config.plain(), f.name) != getattr(config, f.name)
        }
        assert (
            changed <= {"class_balanced", "augment"}
            and not config.plain().augment
            and not config.plain().class_balanced
        )
