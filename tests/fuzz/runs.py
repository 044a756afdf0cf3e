"""Run folders: what `--resume`, `bevfn eval` and --pretrained read of them."""

import json
from pathlib import Path
from random import Random
from types import SimpleNamespace

import torch
from safetensors.torch import load, save

from bevfn import catalogue, detector, recipes, tree
from bevfn.evaluation.score import METRICS
from bevfn.files import checksum, write_atomically
from bevfn.metrics import read_metrics
from bevfn.training import checkpoint, command_line, pretrained, run, run_folder
from fuzz import mutate
from fuzz.table import Row

STEPS = (1, 2, 3)
EXPERIMENT = "bevfusion_lidar"
FACTS = {"processes": 1, "accumulate": 1, "total_steps": 3, "data": "00ff", "code": "0f"}


def rows() -> list[Row]:
    newest = "run/checkpoints/step_00000003"
    leaves = (run_folder.LOCK_FILE,)
    return [
        Row("a run's meta.json", _run, f"{newest}/meta.json", mutate.as_json, _resume, 16, leaves, older=True),
        Row("a run's meta.json, sealed again", _run, f"{newest}/meta.json", _sealed, _resume, 16, leaves, older=True),
        Row("a run's tensors", _run, f"{newest}/train_state.safetensors", mutate.raw, _resume, 16, leaves, older=True),
        Row("a run's tensors, sealed again", _run, f"{newest}/train_state.safetensors", _odd, _resume_odd, 16, leaves),
        Row("a run's best.json", _run, "run/checkpoints/best.json", mutate.as_json, _resume, 16, leaves),
        Row("a run's metrics.jsonl", _run, "run/metrics.jsonl", mutate.as_lines, _resume, 16, leaves),
        Row("a run's config.json", _run, "run/config.json", mutate.as_json, _resume, 16, leaves),
        Row("a run's summary.json", _run, "run/summary.json", mutate.raw, _resume, 16, leaves),
        Row("a run's config.json, evaluated", _run, "run/config.json", mutate.as_json, _evaluate, 16, leaves),
        Row("a run's checkpoint, evaluated", _run, f"{newest}/*", mutate.raw, _weights, 16, leaves),
    ]


def _config() -> command_line.Config:
    return recipes.defaults(EXPERIMENT)["nuscenes"]


def _state(step: int) -> dict:
    """As a train state: the step, parameters, statistics."""
    generator = torch.Generator().manual_seed(step)
    norm = {"mean": torch.randn(8, generator=generator), "var": torch.rand(8, generator=generator)}
    params = {"conv": torch.randn(8, 4, generator=generator), "head": [{"bias": torch.randn(4, generator=generator)}]}
    return {"step": torch.tensor(step), "params": params, "state": {"norm": norm}}


def _run(folder: Path) -> None:
    folder = folder / "run"
    with run_folder.open(folder, command_line.flags(_config())):
        lines = []
        for step in STEPS:
            meta = {"step": step, run_folder.FACTS: FACTS}
            checkpoint.save_step(folder / "checkpoints" / run_folder.step_name(step), _state(step), meta)
            lines.append(
                {"step": step, "seconds": 0.5, "loss/total": 3.0 / step, "grad_norm": "inf" if step == 1 else 2.5}
            )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        checkpoint.keep_best(folder / "checkpoints", run_folder.step_name(2), 0.5)
        write_atomically(folder / "evaluations" / run_folder.step_name(3) / METRICS, b"{}")
        summary = {"first_loss": 3.0, "last_loss": 1.0, "steps": 3, "scores": {"NDS": 0.5}, "samples_per_second": None}
        (folder / "summary.json").write_text(json.dumps(summary))


# ---------------------------------------------------------------------------------------------------------- mutations


def _sealed(content: bytes, draw: Random) -> bytes:
    """meta.json with another value and the seal that belongs to it: what a bug would write, not a disk."""
    meta = json.loads(content)
    del meta["seal"]
    meta = mutate.value(meta, draw)
    try:
        seal = checkpoint._seal(json.loads(mutate.written(meta)))
    except (ValueError, UnicodeEncodeError):
        seal = 0
    return mutate.written(meta | {"seal": seal})


def _odd(content: bytes, draw: Random) -> bytes:
    tensors = load(content)
    name = draw.choice(list(tensors))
    changed = draw.choice(
        (
            lambda x: x * float("nan"),
            lambda x: -x.abs() - 1,
            lambda x: x > 0,
            lambda x: x.double(),
            lambda x: x[None],
            None,
        )
    )
    if changed is None:
        tensors[draw.choice(("x", f"{name}.0", "params"))] = tensors.pop(name)
    else:
        tensors[name] = changed(tensors[name])
    return save(tensors)


# ----------------------------------------------------------------------------------------------------------- commands


def _resume(folder: Path) -> None:
    """What --resume does before its first step."""
    folder = folder / "run"
    said: list[str] = []
    with run_folder.open(folder, command_line.flags(_config()), resume=True, facts=FACTS, say=said.append) as latest:
        assert latest is not None
    state, _ = checkpoint.load_step(latest, _state(0))
    newest = folder / "checkpoints" / run_folder.step_name(STEPS[-1])
    if latest != newest and not any(
        newest.name in sentence for sentence in said
    ):  # or it says itself, sealed, that it is older
        assert checkpoint.read_meta(newest)["checkpoint"].get("serial", 0) <= STEPS[-2]
    same = _state(int(state["step"]))
    assert tree.diff(state, same) == [] and all(map(torch.equal, tree.leaves(state), tree.leaves(same)))
    assert latest.name == run_folder.step_name(int(state["step"])), latest
    best = checkpoint.best(folder / "checkpoints")
    assert best is None or best.name in map(run_folder.step_name, STEPS)
    for record in read_metrics(folder):
        assert all(type(value) is float for value in record.values()) and "step" in record
    paths, plan = SimpleNamespace(run_dir=folder), SimpleNamespace(total_steps=STEPS[-1])
    summary = run.finished(SimpleNamespace(config=paths, plan=plan, leads=True), latest)
    assert summary is None or summary["steps"] == STEPS[-1]


def _resume_odd(folder: Path) -> None:
    """The same of tensors whose CRC is right; those that are no train state are another run's."""
    made = folder / "run" / "checkpoints" / run_folder.step_name(STEPS[-1])
    meta = json.loads((made / checkpoint.META).read_text())
    size, crc = checksum(made / checkpoint.TENSORS)
    changed = {name: value for name, value in meta.items() if name != "seal"}
    changed["checkpoint"] |= {"bytes": size, "crc32": crc}
    right = (made / checkpoint.META).read_bytes()
    (made / checkpoint.META).write_text(json.dumps(changed | {"seal": checkpoint._seal(changed)}))
    try:
        params, state = pretrained.read_weights(made)
    finally:
        (made / checkpoint.META).write_bytes(right)
    for name, leaf in tree.flatten({"params": params, "state": state}).items():
        assert leaf.is_floating_point() and torch.isfinite(leaf).all(), name
        assert not name.endswith(".var") or (leaf >= 0).all(), name


def _evaluate(folder: Path) -> None:
    """What `bevfn eval` takes from config.json: every field of its type."""
    made = folder / "run" / "checkpoints" / run_folder.step_name(STEPS[-1])
    config = detector.run_config(EXPERIMENT, made, None, None)
    right = _config()
    for name, value in vars(config).items():
        assert isinstance(value, type(getattr(right, name))) or getattr(right, name) is None or value is None, name
    assert config.model in catalogue.MODELS or config.model not in recipes.load(EXPERIMENT).NETWORKS


def _weights(folder: Path) -> None:
    params, state = pretrained.read_weights(folder / "run" / "checkpoints" / run_folder.step_name(STEPS[-1]))
    same = _state(STEPS[-1])
    for found, right in ((params, same["params"]), (state, same["state"])):
        assert tree.diff(found, right) == []
        assert all(torch.equal(leaf, tree.flatten(right)[name]) for name, leaf in tree.flatten(found).items())
