"""Where a run's numbers and pictures go besides its own files: a logger is three functions, TensorBoard's is always there
(`board`), Weights & Biases' and MLflow's come with --loggers and the extras of these names.

Where they report to is said to them by their own environment variables (WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME); without, it is the project or experiment `bevfn`. A resumed run goes on with the run that it was there, whose
id is in RUN/loggers.json.
"""

import importlib.util
import io
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from bevfn import choices
from bevfn.files import read_json, to_json, write_atomically

IDS = "loggers.json"


class Logger(Protocol):
    """What a run reports to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step by name, which may be NaN or infinite."""

    def image(self, step: int, name: str, png: bytes) -> None:
        """A picture of a step."""

    def close(self) -> None:
        """No more comes."""


def check(names: tuple[choices.Logger, ...]) -> None:
    """Raises ValueError, one sentence, for a logger whose package is not installed."""
    for name in names:
        if not KINDS[name].is_installed():
            raise ValueError(f"--loggers {name} needs {name}: pip install -e '.[{name}]', or leave it out")


def opened(
    names: tuple[choices.Logger, ...], run_dir: Path, config: Mapping[str, Any], start_step: int
) -> dict[str, Logger]:
    """The loggers by name; with `start_step` those of the run that goes on. Raises ValueError, one sentence, where one is not to be
    had."""
    check(names)
    ids = _ids(run_dir) if start_step else {}  # of a run that came to nothing, nothing goes on
    made: dict[str, Logger] = {}
    for name in names:
        try:
            made[name], ids[name] = KINDS[name].begin(run_dir, config, ids.get(name))
        except Exception as error:  # of a service, its login, its network: nothing of ours
            for logger in made.values():
                logger.close()
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"--loggers {name} does not begin ({what}); leave it out") from error
    if names:
        write_atomically(run_dir / IDS, to_json(ids, indent=1))
    return made


def _ids(run_dir: Path) -> dict[str, str]:
    path = run_dir / IDS
    try:
        found = read_json(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and loggers begin new runs") from None
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


class Wandb:
    """Weights & Biases; steps are a metric of their own, since a resumed run makes some of them again."""

    def __init__(self, run: Any) -> None:
        self._run = run

    @staticmethod
    def is_installed() -> bool:
        """Whether the extra's package is there."""
        return importlib.util.find_spec("wandb") is not None

    @classmethod
    def begin(cls, run_dir: Path, config: Mapping[str, Any], identity: str | None) -> tuple[Logger, str]:
        """A new run, or the one of this id that goes on."""
        import wandb  # of the extra

        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "bevfn"),
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(config),
            id=identity,
            resume=None if identity is None else "allow",
        )
        run.define_metric("*", step_metric="step")
        return cls(run), run.id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See Logger."""
        self._run.log({"step": step, **values})

    def image(self, step: int, name: str, png: bytes) -> None:
        """See Logger."""
        import wandb

        self._run.log({"step": step, name: wandb.Image(Image.open(io.BytesIO(png)))})

    def close(self) -> None:
        """See Logger."""
        self._run.finish()


class MLflow:
    """MLflow, through its client, which keeps no global run."""

    def __init__(self, client: Any, identity: str) -> None:
        self._client, self._run = client, identity

    @staticmethod
    def is_installed() -> bool:
        """Whether the extra's package is there."""
        return importlib.util.find_spec("mlflow") is not None

    @classmethod
    def begin(cls, run_dir: Path, config: Mapping[str, Any], identity: str | None) -> tuple[Logger, str]:
        """A new run, or the one of this id that goes on."""
        from mlflow import MlflowClient  # of the extra

        client = MlflowClient()
        if identity is not None:
            client.update_run(identity, status="RUNNING")
            return cls(client, identity), identity
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "bevfn")
        there = client.get_experiment_by_name(name)
        experiment = there.experiment_id if there is not None else client.create_experiment(name)
        made = client.create_run(experiment, run_name=run_dir.name).info.run_id
        for flag, value in config.items():
            client.log_param(made, flag, to_json(value).decode()[:500])  # more some of its stores refuse
        return cls(client, made), made

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See Logger."""
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(name, value, now, step) for name, value in values.items()])

    def image(self, step: int, name: str, png: bytes) -> None:
        """See Logger: among the run's artifacts."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name.rpartition('/')[2].replace(' ', '_')}_{step:08d}.png"
            path.write_bytes(png)
            self._client.log_artifact(self._run, str(path), "pictures")

    def close(self) -> None:
        """See Logger."""
        self._client.set_terminated(self._run)


KINDS: dict[choices.Logger, type[Wandb] | type[MLflow]] = {"wandb": Wandb, "mlflow": MLflow}
