"""Golden cases: folders with the deterministic checkpoint, inputs and outputs of a published model.

A case's weights are not stored. `manifest.json` names every tensor with its shape, dtype and distribution; the values
follow from the name and the seed alone, so they are the same on any machine.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bevfn.files import read_json
from bevfn.upstream import checkpoints, recognise

ROUNDING = 1e-6  # share of the whole gradient's norm below which a float32 step knows no parameter's


@dataclass(frozen=True)
class Gradients:
    """What a case says about the gradient of the total loss, by upstream key."""

    norms: dict[str, float | None]
    """L2, of a float64 step where there was one; None: frozen"""
    zero: frozenset[str] = frozenset()
    """zero in exact arithmetic, rounding in practice"""
    total: float | None = None
    """norm of the whole, where the case says what part of it zero gradients may have"""
    floor: float = 0.0
    """norms are compared relative to this at least: smaller ones are rounding, where the case says so"""


@dataclass(frozen=True)
class Case:
    """A folder's `stats.json`, `inputs.safetensors` and `outputs.safetensors` with what `manifest.json` says.

    The published cases write their statistics in four forms; `read` and the methods know all.
    """

    folder: Path
    manifest: dict
    stats: dict
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @property
    def origin(self) -> str:
        """What was run to make the case: repository, commit and config or class, as far as the manifest says."""
        upstream = self.manifest.get("upstream", {})
        told = [str(upstream[name]) for name in ("repo", "commit", "config", "class") if upstream.get(name)]
        return ", ".join(told) or "its manifest does not say what"

    def noise(self, phase: str, name: str) -> float:
        """Measured relative L2 noise floor of a boundary, 0 if the case has none."""
        measured = self.stats.get("noise", {})
        # With the same voxel indices where the case tells them apart: a moved point is counted, not compared.
        for key in (f"{phase}_f32_vs_f64_same_voxel_indices", f"{phase}_f32_vs_f64"):
            if key in measured:
                return float(measured[key].get(name, 0.0))
        if f"noise_{phase}" in measured:
            return float(measured[f"noise_{phase}"].get(f"{phase}/{name}", 0.0))
        return float(self.stats.get(f"noise/{name}", 0.0))

    @property
    def measured_training(self) -> bool:
        """Whether the case has any noise floor of a training step."""
        measured = self.stats.get("noise", {})
        kinds = ("train_f32_vs_f64", "train_f32_vs_f64_same_voxel_indices", "train_loss_rel", "noise_train")
        own = ("noise/train_loss", "noise/train_grad", "train/grad_norm_float64", "grad_norm_float64")
        return any(kind in measured for kind in kinds) or any(self.stats.get(name) for name in own)

    def loss_noise(self, name: str) -> float:
        """Measured relative noise floor of a loss term."""
        measured = self.stats.get("noise/train_loss") or self.stats.get("noise", {}).get("train_loss_rel", {})
        if not measured:
            return self.noise("train", f"loss/{name}")
        return float(measured.get(name, measured.get(f"{name}_loss", 0.0)))

    def gradient_noise(self, key: str) -> float:
        """Measured relative L2 noise floor of a parameter's gradient."""
        return float(self.stats.get("noise/train_grad", {}).get(key, 0.0))

    def gradients(self) -> Gradients:
        """The stored norms, those of a float64 step where there was one."""
        if "grad_norm" in self.stats:
            norms = self.stats["grad_norm"] | (self.stats.get("grad_norm_float64") or {})
            zero = frozenset(self.stats.get("noise", {}).get("true_zero_gradients", ()))
            return Gradients(norms, zero, self.stats["grad_norm_total"])
        norms = self.stats.get("train/grad_norm_float64") or self.stats["train/grad_norm"]
        floor = ROUNDING * self.stats.get("train/total_grad_norm", 0.0)
        return Gradients(norms, frozenset(self.stats.get("noise/train_grad_exactly_zero", ())), floor=floor)

    def slicing(self, name: str) -> str | None:
        """How the stored boundary was sampled; a second set of inputs ("aug/") as its evaluation twin."""
        twin = name.replace("aug/", "eval/", 1) if name.startswith("aug/") else name
        if found := self.stats.get("slices", {}).get(name) or self.stats.get("tensors", {}).get(name, {}).get("slice"):
            return found
        return next((s for n in (name, twin) if (s := self.stats.get(n, {}).get("slicing"))), None)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the whole boundary upstream, whose leading axes may be split or joined otherwise than ours."""
        shape = self.stats.get(name, {}).get("shape") or self.stats.get("tensors", {}).get(name, {}).get("shape")
        return None if shape is None else tuple(shape)

    def names(self, prefix: str) -> list[str]:
        """Stored outputs under a prefix, without it."""
        return [k[len(prefix) :] for k in self.outputs if k.startswith(prefix)]


def read(folder: Path) -> Case:
    """Reads a case; raises ValueError that names a file which is missing or damaged."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; give a golden case: a folder with manifest.json, stats.json and tensors, made by running the "
            "published implementation (no part of a clone: docs/parity.md)"
        )
    manifest, stats = (_json(folder / name) for name in ("manifest.json", "stats.json"))
    inputs, outputs = (_tensors(folder / name) for name in ("inputs.safetensors", "outputs.safetensors"))
    return Case(folder, manifest, _named_by_phase(stats, outputs) if "eval" in stats else stats, inputs, outputs)


def _named_by_phase(stats: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """AWML's statistics, which lie below their phase and leave the sampling to be told by the sizes, as other cases write them.

    Of every axis each s-th is stored, from the first: s is the smallest with which so many are.
    """
    made: dict[str, Any] = {"train/grad_norm": stats["train"]["grad_norm"]}
    for phase, boundaries in (("eval", stats["eval"]), ("train", stats["train"]["boundaries"])):
        for name, about in boundaries.items():
            stored = outputs.get(f"{phase}/{name}")
            made[f"{phase}/{name}"] = dict(about)
            if stored is not None:
                shape = about["shape"][len(about["shape"]) - stored.dim() :]
                steps = [-(-size // kept) for size, kept in zip(shape, stored.shape)]
                slicing = "[" + ", ".join(f"::{step}" for step in steps) + "]"
                made[f"{phase}/{name}"] |= {"shape": shape, "slicing": slicing}
    # With the depth image of the other run where there is one: pixels that differ are counted, not compared.
    kinds = ("noise_floor_f32_vs_f64_same_depth_image", "noise_floor_f32_vs_f64")
    floors = next(stats[kind] for kind in kinds if kind in stats)
    return made | {f"noise/{name}": floor for name, floor in floors.items()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The case's manifest.json; raises ValueError if there is none."""
    return _json(Path(folder) / "manifest.json")


def _json(path: Path) -> dict:
    _check_there(path)
    try:
        return read_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy the case again") from None


def _tensors(path: Path) -> dict[str, Tensor]:
    _check_there(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy the case again") from None


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing; a golden case has manifest.json, stats.json, inputs and outputs")


# ------------------------------------------------------------------------------------------------------ checkpoint


def source(manifest: Mapping[str, Any]) -> recognise.Recognised:
    """What a case's checkpoint is, told as any foreign checkpoint: by its keys and shapes, without drawing it."""
    specs = manifest["weights"] | (manifest.get("derived") or {})
    return recognise.recognise({key: torch.empty(spec["shape"], device="meta") for key, spec in specs.items()})


def fill_case(folder: Path, *, config: Any = None) -> dict[str, Tensor]:
    """{upstream key: tensor} of the case in `folder`, in the manifest's order, derived tensors last.

    The manifest's `weights` are drawn, its `derived` computed for the model's `config` (the published one if None).
    Raises ValueError if the drawn bytes differ from `weights_crc32`, or a derived tensor is unknown or of another shape.
    """
    manifest = read_manifest(folder)
    seed, crc, found = manifest.get("seed", 0), 0, {}
    for key, spec in manifest["weights"].items():
        values = draw(key, spec, seed)
        crc = zlib.crc32(values.tobytes(), zlib.crc32(key.encode(), crc))
        found[key] = torch.from_numpy(values)
    expected = manifest.get("weights_crc32", crc)
    if crc != expected:
        raise ValueError(
            f"{folder}: the drawn weights have CRC {crc} but manifest.json says {expected}: the manifest was edited, "
            "or this numpy draws other numbers."
        )
    looks, specs = source(manifest), manifest.get("derived") or {}
    computed = checkpoints.buffers(looks.model, config=config) if specs and looks.model else {}
    for key, spec in specs.items():
        ours = computed.get(key.removeprefix(looks.prefix))
        if ours is None:
            raise ValueError(f"{folder}: no rule for the derived tensor {key}.")
        if list(ours.shape) != spec["shape"] or str(ours.dtype) != f"torch.{spec['dtype']}":
            raise ValueError(
                f"{folder}: {key} is {spec['dtype']} {spec['shape']} in manifest.json but "
                f"{ours.dtype} {list(ours.shape)} for this configuration: pass the case's own config."
            )
        found[key] = ours
    return found


def draw(key: str, spec: Mapping[str, Any], seed: int) -> np.ndarray:
    """One tensor's values: a Philox stream keyed by (CRC-32 of the name, seed), drawn in float64, then cast.

    The rule by which upstream's models were filled for the golden cases, in our own words.
    """
    stream = np.random.Generator(np.random.Philox(key=[zlib.crc32(key.encode()), seed]))
    shape = tuple(spec["shape"])
    match spec["kind"]:
        case "normal":
            values = spec["mean"] + spec["std"] * stream.standard_normal(shape)
        case "uniform":
            values = stream.uniform(spec["low"], spec["high"], shape)
        case "constant":
            values = np.full(shape, spec["value"], np.float64)
        case kind:
            raise ValueError(f"manifest.json: {key} has the unknown kind {kind!r} (normal, uniform or constant).")
    return np.ascontiguousarray(np.asarray(values).astype(spec["dtype"])).reshape(shape)  # keeps a scalar a scalar
