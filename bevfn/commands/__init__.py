"""The functions behind the subcommands of `bevfn`: plain functions of typed arguments, wired up by `bevfn.cli`.

The commands that take an experiment take each of `Experiment`.
"""

import importlib
from types import ModuleType
from typing import Literal

Experiment = Literal["bevfusion", "bevfusion_lidar", "bevdepth", "matrixvt"]


def experiment_module(name: Experiment) -> ModuleType:
    """The experiment's file, with its DEFAULTS and task."""
    return importlib.import_module(f"bevfn.experiments.{name}")
