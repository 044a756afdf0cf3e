"""A small parity case that bevfn makes of itself: another device, compiler, machine or version against eager torch here.

The mini network with the weights of seed 0 on one made key frame. The folder has the batch and what eager torch made of it;
the weights are drawn again, which gives the same numbers everywhere (rng.py). It says nothing about published implementations.
"""

import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from bevfn import __version__, recipes, tree
from bevfn import compile as compilation
from bevfn.files import check_new_folder, new_folder, to_json
from bevfn.parity import compare, golden
from bevfn.synth import key_frame
from bevfn.training import assembly, tasks, train

OWN = "bevfn"
"""key of a manifest that a case of ours has"""
KEPT = 4096  # elements of a boundary at most


def make(folder: Path, model: str) -> None:
    """Writes a case to a folder that is not there yet. Raises ValueError of a model that names no boundaries."""
    check_new_folder(folder, "CASE_DIR")
    with new_folder(folder) as made:
        run, batch = _on_frame(model, "cpu", "eager")
        values = {f"eval/{name}": x for name, x in evaluated(run, batch).items()}
        values |= {f"train/{name}": x for name, x in trained(run, batch).items()}
        outputs = {name: _kept(x) for name, x in values.items()}
        torch_version = torch.__version__
        manifest = {OWN: {"model": model, "version": __version__, "torch": torch_version}}
        manifest["upstream"] = {
            "repo": f"bevfn {__version__} itself, eager torch {torch_version} on a CPU: no published implementation"
        }
        files = {"inputs": tree.flatten(batch), "outputs": outputs}
        for name, tensors in files.items():
            plain = {path: x.contiguous() for path, x in tensors.items()}
            (made / f"{name}.safetensors").write_bytes(safetensors.torch.save(plain))
        (made / "manifest.json").write_bytes(to_json(manifest, indent=1))
        (made / "stats.json").write_bytes(to_json({}))


def replay(
    case: golden.Case, table: compare.Table, *, only: str | None, device: str, backend: compilation.Backend
) -> None:
    """Adds a line for every boundary of the evaluation, and one for every number of a train step."""
    print(f"{'boundary':<44} {'error':>10} {'tolerance':>10}")
    run, like = _on_frame(case.manifest[OWN]["model"], device, backend)
    batch = tree.unflatten(case.inputs, like).to(device)
    if only != "train":
        _lines(case, table, "eval", evaluated(run, batch))
    if only != "eval":
        _lines(case, table, "train", trained(run, batch))


def evaluated(run: tasks.Run, batch: Any) -> dict[str, Tensor]:
    """Every boundary of the forward pass by its path."""
    if run.task.apply is None:
        raise ValueError(f"{run.config.model} is a pretraining, which has no boundaries to compare; choose a detector")
    params, state = assembly.initial(run)
    with torch.no_grad():
        return tree.flatten(compilation.function(run.task.apply, backend=run.config.backend)(params, state, batch)[0])


def trained(run: tasks.Run, batch: Any) -> dict[str, Tensor]:
    """Losses and gradient norm of a train step, the whole gradient as the optimizer's first moment has it, and the statistics
    of batch norms after it."""
    before = assembly.initial_state(run)
    step = compilation.step(assembly.pure_step(run), backend=run.config.backend)
    after, metrics = step(before, batch)
    assert isinstance(after, train.TrainState)
    found = {f"loss/{name}": torch.as_tensor(value).detach().reshape(1) for name, value in metrics.items()}
    found["gradient"] = after.optimizer.m
    return found | {f"statistics/{name}": x for name, x in tree.flatten(after.state).items()}


def _on_frame(model: str, device: str, backend: compilation.Backend) -> tuple[tasks.Run, Any]:
    """(the recipe on a made key frame, a batch of it)."""
    with tempfile.TemporaryDirectory(prefix="bevfn-frame-") as folder:
        root = key_frame.write_frame(Path(folder))
        flags = {"precision": "fp32", "scale": "mini", "batch_size": 1}
        run = recipes.on_frame(model, root, device=device, backend=backend, **flags)
        return run, assembly.example(run)


def _kept(x: Tensor) -> Tensor:
    """Evenly spaced elements."""
    flat = x.detach().cpu().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // KEPT))].clone()


def _lines(case: golden.Case, table: compare.Table, phase: str, made: dict[str, Tensor]) -> None:
    for name in case.names(f"{phase}/"):
        stored, ours = case.outputs[f"{phase}/{name}"], made.get(name)
        if ours is None or _kept(ours).shape != stored.shape:
            table.add(f"{phase}/{name}", float("inf"), 0.0, "is not there, or has another shape")
        elif not stored.is_floating_point():
            compare.differing(table, f"{phase}/{name}", _kept(ours), stored, "whole numbers")
        else:
            table.add(f"{phase}/{name}", _error(_kept(ours), stored), _tolerance(phase, name))


def _error(ours: Tensor, stored: Tensor) -> float:
    """Relative L2 where both are finite; infinities and NaN have to lie in the same places."""
    known = stored.isfinite()
    if not torch.equal(ours.isfinite(), known):
        return float("inf")
    return (
        compare.relative_l2(ours[known], stored[known]) if bool(stored[known].any()) else float(ours[known].abs().sum())
    )


def _tolerance(phase: str, name: str) -> float:
    if phase == "eval":
        return compare.EVAL_TOLERANCE
    return compare.GRADIENT_SLICE_TOLERANCE if name == "gradient" else compare.TRAIN_TOLERANCE
