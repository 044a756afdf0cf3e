"""Golden cases: folders with the deterministic checkpoint, inputs and outputs of a published model.

A case's weights are not stored. `manifest.json` names every tensor with its shape, dtype and distribution; the values
follow from the name and the seed alone, so they are the same on any machine.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bevfn.upstream import names


def fill_case(case_dir: Path, *, sizes: names.Sizes = names.PUBLISHED) -> dict[str, Tensor]:
    """{upstream key: tensor} of the case in `case_dir`, in the manifest's order, derived tensors last.

    The manifest's `weights` are drawn, its `derived` computed for a model of the given `sizes`. Raises ValueError if
    the drawn bytes differ from `weights_crc32`, or a derived tensor is unknown or of another shape.
    """
    manifest = read_manifest(case_dir)
    seed, crc, found = manifest.get("seed", 0), 0, {}
    for key, spec in manifest["weights"].items():
        values = draw(key, spec, seed)
        crc = zlib.crc32(values.tobytes(), zlib.crc32(key.encode(), crc))
        found[key] = torch.from_numpy(values)
    expected = manifest.get("weights_crc32", crc)
    if crc != expected:
        raise ValueError(
            f"{case_dir}: the drawn weights have CRC {crc} but manifest.json says {expected}: the manifest was edited, "
            "or this numpy draws other numbers."
        )
    return found | _derived(case_dir, manifest.get("derived") or {}, sizes)


def read_manifest(case_dir: Path) -> dict[str, Any]:
    """The case's manifest.json; raises ValueError if there is none."""
    path = Path(case_dir) / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{case_dir} is not a golden case: it has no manifest.json.")
    return json.loads(path.read_text())


def draw(key: str, spec: Mapping[str, Any], seed: int) -> np.ndarray:
    """One tensor's values: a Philox stream keyed by (CRC-32 of the name, seed), drawn in float64, then cast.

    Source: ../shared/goldens/fill.py, its rule in our own words.
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


def _derived(case_dir: Path, specs: Mapping[str, Any], sizes: names.Sizes) -> dict[str, Tensor]:
    computed = names.derived("bevfusion-lidar-camera", sizes)
    for key, spec in specs.items():
        if key not in computed:
            raise ValueError(f"{case_dir}: no rule for the derived tensor {key}.")
        ours = computed[key]
        if list(ours.shape) != spec["shape"] or str(ours.dtype) != f"torch.{spec['dtype']}":
            raise ValueError(
                f"{case_dir}: {key} is {spec['dtype']} {spec['shape']} in manifest.json but "
                f"{ours.dtype} {list(ours.shape)} for these sizes: pass the case's own Sizes."
            )
    return {key: computed[key] for key in specs}
