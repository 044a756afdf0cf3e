"""What a run reports to besides its own files: TensorBoard gets all of it; what is not installed is one sentence; what fails is left
out."""

import io
import json
import math
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from bevfn import draw
from bevfn.files import to_json
from bevfn.metrics import read_metrics
from bevfn.training import loggers
from bevfn.training.reporter import WORST, Reporter

CONFIG = {"lr": 1e-3, "model": "bevfusion-lidar", "pretrained": ["a"], "steps": None}


def picture(folder: Path) -> Path:
    path = folder / "worst.png"
    path.write_bytes(draw.png(Figure(figsize=(2, 1)), dpi=40))
    return path


def run(folder: Path, steps, others=(), start_step: int = 0) -> str:
    """A short run with an evaluation at its end; what its console got."""
    console = Console(file=io.StringIO(), width=200)
    folder.mkdir(exist_ok=True)
    how = {"console": console, "config": CONFIG, "others": others, "start_step": start_step}
    with Reporter(folder, 20, **how) as reporter:
        for step in steps:
            reporter.log(step, {"loss": 1.0 / step, "overflow/points": 0, "grad_norm": math.inf}, seconds=0.5)
        reporter.evaluated(steps[-1], {"NDS": 0.25, "mAP": 0.5, "AP/car": 0.75}, picture(folder))
    return console.file.getvalue()


def test_tensorboard_gets_scores_the_worst_key_frames_picture_and_the_config(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, [1, 2])
    run(tmp_path, [2, 3], start_step=1)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scores = {
        name: [(event.step, event.value) for event in events.Scalars(f"eval/{name}")] for name in ("NDS", "AP/car")
    }
    assert scores == {"NDS": [(3, 0.25)], "AP/car": [(3, 0.75)]}  # that of step 2 came again
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    (image,) = events.Images(WORST)
    assert (image.width, image.height, image.step) == (80, 40, 3) and image.encoded_image_string.startswith(b"\x89PNG")
    told = events.Tensors("config")[-1].tensor_proto.string_val[0].decode()
    assert "| lr | `0.001` |" in told and '| model | `"bevfusion-lidar"` |' in told and "| steps | `null` |" in told


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_one_sentence(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ValueError, match=rf"--loggers {name} needs {name}: pip install -e '\.\[{name}\]', or leave it out"
    ):
        loggers.check((name,))


class Away:
    """A service that is not there."""

    def scalars(self, step, values):
        raise ConnectionError("no route to host")

    def close(self):
        raise AssertionError("it is left out")


def test_a_service_that_fails_is_left_out_and_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "opened", lambda *_: {"mlflow": Away()})
    told = run(tmp_path, [1, 2, 3], others=("mlflow",))
    assert told.count("warning: mlflow is left out from here on (ConnectionError: no route to host).") == 1
    assert len(read_metrics(tmp_path)) == 3


def test_a_service_that_does_not_begin_is_one_sentence(tmp_path, monkeypatch):
    class Refused:
        @classmethod
        def begin(cls, *_):
            raise RuntimeError("no login")

    class Other:
        closed = 0

        @classmethod
        def begin(cls, *_):
            return cls(), "7"

        def close(self):
            Other.closed += 1

    monkeypatch.setattr(loggers, "check", lambda names: None)
    monkeypatch.setitem(loggers.KINDS, "wandb", Refused)
    monkeypatch.setitem(loggers.KINDS, "mlflow", Other)
    with pytest.raises(ValueError, match=r"--loggers wandb does not begin \(RuntimeError: no login\); leave it out"):
        loggers.opened(("mlflow", "wandb"), tmp_path, CONFIG, 0)
    assert Other.closed == 1 and not (tmp_path / loggers.IDS).exists()
    (tmp_path / loggers.IDS).write_text("{")
    with pytest.raises(ValueError, match=r"loggers.json is damaged \(.*\); delete it"):
        loggers.opened(("mlflow",), tmp_path, CONFIG, 5)


def test_wandb_gets_the_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert "left out" not in run(tmp_path / "run", [1, 2], others=("wandb",))
    (identity,) = json.loads((tmp_path / "run" / loggers.IDS).read_text()).values()
    (folder,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity}")
    assert (folder / f"run-{identity}.wandb").stat().st_size > 500
    assert [path.suffix for path in (folder / "files").rglob("*worst*")] == [".png"]
    assert "left out" not in run(tmp_path / "run", [2, 3], others=("wandb",), start_step=1)
    assert json.loads((tmp_path / "run" / loggers.IDS).read_text()) == {"wandb": identity}


def test_mlflow_gets_the_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert "left out" not in run(tmp_path / "run", [1, 2], others=("mlflow",))
    assert "left out" not in run(tmp_path / "run", [2, 3], others=("mlflow",), start_step=1)
    (identity,) = json.loads((tmp_path / "run" / loggers.IDS).read_text()).values()
    client = mlflow.MlflowClient()
    stored = client.get_run(identity)
    assert stored.info.status == "FINISHED" and stored.info.run_name == "run"
    assert stored.data.params == {name: to_json(value).decode() for name, value in CONFIG.items()}
    assert stored.data.metrics["eval/AP/car"] == 0.75
    assert {metric.step for metric in client.get_metric_history(identity, "loss")} == {1, 2, 3}
    assert len(client.list_artifacts(identity, "pictures")) == 2
