"""The golden cases of BEVNeXt as tests take them: the key frame as a batch, a checkpoint's tensors by name."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from bevfn.data.batch import Batch
from bevfn.files import read_json
from bevfn.parity import bevnext, compare, golden

FOLDERS = [Path(__file__).parents[1].parent / "shared" / "goldens" / f"bevnext_stage{stage}" for stage in (1, 2)]
MISSING = "the golden cases of BEVNeXt (../shared/goldens) are not here"


def key_frame(folder: Path, samples: tuple[int, ...]) -> Batch:
    """Stored samples with their key frame alone."""
    return bevnext.batch(load_file(folder / "inputs.safetensors"), samples, frames=1)


def weight(folder: Path, key: str) -> torch.Tensor:
    """One tensor of the case's checkpoint."""
    manifest = golden.read_manifest(folder)
    return torch.from_numpy(golden.draw(key, manifest["weights"][key], manifest["seed"]))


def stored(folder: Path, name: str, whole: torch.Tensor) -> torch.Tensor:
    """The part of a whole boundary that the case stores under this name."""
    entry = read_json((folder / "stats.json").read_bytes())["tensors"][name]
    assert list(whole.shape) == entry["shape"], name
    return compare.sliced(whole, entry["slice"])
