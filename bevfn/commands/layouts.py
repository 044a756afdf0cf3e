"""What `bevfn checkpoint import|export|show` do: published checkpoints in, published layout out, every key accounted for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor

from bevfn import catalogue, detector, tree, upstream
from bevfn.names import lines, printable
from bevfn.training import checkpoint as checkpoint_files
from bevfn.training import located
from bevfn.upstream import checkpoints, recognise


def import_(source: Path, output: Path, *, model: str, every_key: bool) -> None:
    """As `commands.checkpoint.import_`."""
    if Path(output).suffix != ".safetensors":
        raise ValueError(f"output {output}: the name must end in .safetensors.")
    try:
        params, state, report = upstream.import_state(upstream.read_state_dict(source), model)
    except upstream.Refused as refusal:
        print(lines(refusal.report.text(every_key=every_key)))
        raise ValueError(f"{source}: {refusal}") from refusal
    except ValueError as error:
        raise ValueError(str(error) if str(source) in str(error) else f"{source}: {error}") from error
    upstream.write_imported(output, params, state, report, source=Path(source).name)
    print(lines(report.text(every_key=every_key)))
    print(f"wrote {output}")


def export(
    source: Path,
    output: Path,
    *,
    sparse: Literal["as-imported", "spconv2", "mmcv"],
    naming: Literal["as-imported", "mmdet", "net"],
    averages: bool,
) -> None:
    """As `commands.checkpoint.export`."""
    if Path(output).suffix not in (".pth", ".safetensors"):
        raise ValueError(f"output {output}: the name must end in .pth or .safetensors.")
    place = located.whole(Path(source))
    if place.is_dir():
        layout, found = _of_run(place, sparse, naming, averages)
    else:
        layout, found = _as_imported(place, sparse, naming)
    upstream.write_state_dict(output, found.tensors, sparse=found.sparse)
    kernels = f", sparse kernels {found.sparse}" if checkpoints.has_sparse_kernels(layout) else ""
    print(f"wrote {output}: {len(found.tensors)} tensors of {layout}{kernels}{found.note}")
    if found.flags:
        named = ", ".join(f"{name}={value!r}" for name, value in found.flags.items())
        print(f"as the run had it bevfn reads it by bevfn.load({str(output)!r}, {named})")


@dataclass(frozen=True)
class _Exported:
    tensors: dict[str, Tensor]
    sparse: recognise.SparseLayout
    note: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """of `detector.load`, without which it would be read as the published model"""


def _as_imported(file: Path, sparse: str, naming: str) -> tuple[str, _Exported]:
    """(published layout, its state dict) of an imported file."""
    read = upstream.read_imported(file)
    layout = read.sparse if sparse == "as-imported" else cast(recognise.SparseLayout, sparse)
    called = read.naming if naming == "as-imported" else checkpoints.naming(read.model, naming)
    made = (read.params, read.state, read.model, read.carried)
    return read.model, _Exported(upstream.export_state(*made, sparse=layout, naming=called, prefix=read.prefix), layout)


def _of_run(place: Path, sparse: str, naming: str, averages: bool) -> tuple[str, _Exported]:
    """(published layout, its state dict) of a training checkpoint. Raises ValueError where upstream has no such model."""
    model = detector.load(place, averages=averages)
    layout = catalogue.MODELS[model.config.model].layout
    if layout is None:
        raise ValueError(
            f"{place} is a {model.config.model}, of which no published layout holds all; those that do are of "
            f"{', '.join(catalogue.LAYOUTS.values())}"
        )
    kernels = cast(recognise.SparseLayout, "spconv2" if sparse == "as-imported" else sparse)
    tensors = upstream.export_state(
        *(model.params, model.state, layout, {}),
        config=model.task.network,
        sparse=kernels,
        naming=checkpoints.naming(layout, None if naming == "as-imported" else naming),
        prefix=upstream.CHECKPOINTS[layout].prefix,
    )
    note = f"\n{place}, {'averaged' if averages and checkpoint_files.averaged(place) else 'trained'} weights"
    if model.config.scale != "published":
        note += f"; of {model.config.scale} size, which upstream's published configuration does not load"
    other = {} if catalogue.LAYOUTS[layout] == model.config.model else {"model": model.config.model}
    return layout, _Exported(tensors, kernels, note, other | detector.flags_of(model))


def show(source: Path, *, every_key: bool) -> None:
    """As `commands.checkpoint.show`."""
    source = Path(source)
    check_file(source)
    try:
        read = upstream.read_imported(source)
    except upstream.NotImported:
        tensors = upstream.read_state_dict(source)
        looks = recognise.recognise(tensors)
        print(f"{source}: {looks.what}" + (f", import it with --model {looks.model}" if looks.model else ""))
        print(_table(tensors, every_key, depth=1))
        return
    print(f"{source}: {read.model}, imported from {printable(read.source)}")
    tensors = {f"params.{path}": leaf for path, leaf in tree.flatten(read.params).items()}
    tensors |= {f"state.{path}": leaf for path, leaf in tree.flatten(read.state).items()}
    print(_table(tensors, every_key, depth=3))
    if read.carried:
        print(f"  and {len(read.carried)} upstream tensors kept for export")


def check_file(source: Path) -> None:
    """Raises ValueError for a folder, such as a training run's checkpoint."""
    if Path(source).is_dir():
        raise ValueError(
            f"{source} is a folder, and this command is of published files and of files that `bevfn checkpoint import` wrote; "
            "a run's checkpoint is taken as it is by `bevfn eval`, `bevfn predict`, `bevfn checkpoint export` and --pretrained"
        )


def _table(tensors: dict[str, Tensor], every_key: bool, *, depth: int) -> str:
    """One line per tensor, or per group of names with the same first `depth` parts."""
    if every_key:
        return "\n".join(f"  {printable(name)}  {tree.describe(leaf)}" for name, leaf in tensors.items())
    groups: dict[str, list[int]] = {}
    for name, leaf in tensors.items():
        groups.setdefault(printable(".".join(name.split(".")[:depth])), []).append(leaf.numel())
    width = max(map(len, groups))
    return "\n".join(f"  {name:<{width}}  {len(n):4d} tensors  {sum(n):12,d} numbers" for name, n in groups.items())
