"""A golden case folder, read."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """`manifest.json`, `stats.json`, `inputs.safetensors`, `outputs.safetensors` of a folder."""

    folder: Path
    manifest: dict
    stats: dict
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def noise(self, name: str) -> float:
        """Measured relative L2 noise floor of a boundary, 0 if the case has none."""
        return float(self.stats.get(f"noise/{name}", 0.0))

    def slicing(self, name: str) -> str | None:
        """How the stored boundary was sampled."""
        return self.stats.get(name, {}).get("slicing")

    def names(self, prefix: str) -> list[str]:
        """Stored outputs under a prefix, without it."""
        return [k[len(prefix) :] for k in self.outputs if k.startswith(prefix)]


def read(folder: Path) -> Case:
    """Reads a case.

    Raises:
        ValueError: a file is missing or damaged; the sentence names it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a golden case such as ../shared/goldens/bevfusion_lidar")
    return Case(
        folder,
        *(_json(folder / name) for name in ("manifest.json", "stats.json")),
        *(_tensors(folder / name) for name in ("inputs.safetensors", "outputs.safetensors")),
    )


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing; a golden case has manifest.json, stats.json, inputs and outputs"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy the case again") from None


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing; a golden case has manifest.json, stats.json, inputs and outputs"
        ) from None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); copy the case again") from None
