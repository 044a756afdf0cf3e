"""`bevfn checkpoint import|export|show`: published checkpoints in, published layout out, every key accounted for. Their flags; the
work is `layouts`', which imports what help need not wait for."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from bevfn import catalogue
from bevfn.choices import one_of

Checkpoint = Annotated[str, one_of(catalogue.CHECKPOINTS)]


def import_(source: Positional[Path], output: Positional[Path], *, model: Checkpoint, every_key: bool = False) -> None:
    """Reads a published checkpoint and writes it as one .safetensors file under our names.

    Args:
        source: .pth (read without unpickling) or .safetensors, both with upstream's key names.
        output: the .safetensors file to write; nothing is written unless every key is accounted for.
        model: what the checkpoint holds.
        every_key: also list where each key went.
    """
    from bevfn.commands import layouts

    layouts.import_(source, output, model=model, every_key=every_key)


def export(
    source: Positional[Path],
    output: Positional[Path],
    *,
    sparse: Literal["as-imported", "spconv2", "mmcv"] = "as-imported",
    naming: Literal["as-imported", "mmdet", "net"] = "as-imported",
    averages: bool = True,
) -> None:
    """Writes a checkpoint in upstream's layout: an imported one bit for bit what was imported, and one that was trained here.

    Args:
        source: a .safetensors file of `bevfn checkpoint import`, or a run's folder (its best), RUN/best or a step's folder.
        output: .pth (as mmengine stores a model) or .safetensors.
        sparse: layout of the sparse kernels: [out kx ky kz in] (spconv2, of a run the default) or [kx ky kz in out] (mmcv).
        naming: of AWML's models with cameras: net (since December 2025, of a run the default) or mmdet (before).
        averages: a run's averaged weights, if it has any; no: those that it trained.
    """
    from bevfn.commands import layouts

    layouts.export(source, output, sparse=sparse, naming=naming, averages=averages)


def show(source: Positional[Path], *, every_key: bool = False) -> None:
    """Says what a checkpoint file holds: an imported one by our names, a published one by upstream's.

    Args:
        source: .safetensors or .pth.
        every_key: list every tensor with its type and shape, else totals per part of the model.
    """
    from bevfn.commands import layouts

    layouts.show(source, every_key=every_key)
