"""Published checkpoints, in torch's two forms and as safetensors, and what `bevfn checkpoint import` writes."""

import io
import json
import struct
import zipfile
from pathlib import Path
from random import Random

import safetensors.torch
import torch
from small_weights import small, upstream_state

from bevfn import tree, upstream
from bevfn.commands import checkpoint
from bevfn.training import pretrained
from bevfn.upstream import storage
from fuzz import mutate
from fuzz.table import Row

MODEL = "bevfusion-lidar"
ODD = (
    lambda x: x * float("nan"), lambda x: x / 0, lambda x: -x.abs() - 1, lambda x: x > 0, lambda x: x.to(torch.int32),
    lambda x: x.to(torch.complex64), lambda x: x.double() * 1e300, lambda x: x.half(), lambda x: x.to(torch.bfloat16),
    lambda x: x[..., :0], lambda x: x[None], lambda x: x.reshape(-1), lambda x: x.flatten()[:1].sum(), lambda x: x.expand(7, *x.shape),
)  # fmt: skip


def rows() -> list[Row]:
    return [
        Row("a .pth, any byte", _zip, "a.pth", mutate.raw, _import_same, 20),
        Row("a .pth, its records", _zip, "a.pth", _records, _import, 20),
        Row("a .pth before torch 1.6, its head", _old, "a.pth", mutate.early, _import, 20),
        Row("a published safetensors, its head", _published, "a.safetensors", mutate.early, _import, 20),
        Row("a published safetensors, its header's values", _published, "a.safetensors", _header, _import, 20),
        Row("a .pth with odd tensors", _zip, "a.pth", _odd, _import, 20),
        Row("an imported file, its head", _imported, "a.safetensors", mutate.early, _read, 20),
        Row("an imported file, its metadata", _imported, "a.safetensors", _metadata, _export, 20),
    ]


def _zip(folder: Path) -> None:
    torch.save({"meta": {"epoch": 20}, "state_dict": upstream_state(MODEL)}, folder / "a.pth")


def _old(folder: Path) -> None:
    torch.save({"state_dict": upstream_state(MODEL)}, folder / "a.pth", _use_new_zipfile_serialization=False)


def _published(folder: Path) -> None:
    upstream.write_state_dict(folder / "a.safetensors", upstream_state(MODEL), sparse="spconv2")


def _imported(folder: Path) -> None:
    params, state, report = upstream.import_state(upstream_state(MODEL), MODEL)
    upstream.write_imported(folder / "a.safetensors", params, state, report, source="a.pth")


# ---------------------------------------------------------------------------------------------------------- mutations


def _records(content: bytes, draw: Random) -> bytes:
    """The zip made again around one record that is wrong, so that its CRC is right."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        names = old.namelist()
        pickled = next(name for name in names if name.endswith("data.pkl"))
        wrong = pickled if draw.randrange(4) else draw.choice(names)
        for name in names:
            new.writestr(name, mutate.raw(old.read(name), draw) if name == wrong else old.read(name))
    return made.getvalue()


def _odd(content: bytes, draw: Random) -> bytes:
    saved = torch.load(io.BytesIO(content), weights_only=True)
    state = saved["state_dict"]
    key, made = draw.choice(list(state)), io.BytesIO()
    match draw.randrange(5):
        case 0:
            state[draw.choice(("x", "", "a\nb", key + ".", "bbox_head." + key))] = state.pop(key)
        case 1:
            state[key] = draw.choice((None, 3, "x", [state[key]], {"a": state[key]}))
        case _:
            state[key] = draw.choice(ODD)(state[key])
    torch.save(saved, made)
    return made.getvalue()


def _header(content: bytes, draw: Random) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = mutate.written(mutate.value(json.loads(content[8 : 8 + size]), draw))
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def _metadata(content: bytes, draw: Random) -> bytes:
    """Other metadata or names of leaves, with the checksum that belongs to them."""
    tensors = safetensors.torch.load(content)
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    del metadata["crc32"]
    name = draw.choice([*metadata] * 5 + list(tensors))
    if name in metadata:
        del metadata[name]
        if draw.randrange(3):
            metadata[name] = draw.choice(
                ("", "x", "mmcv", "original", "swin-nuimages", "a\nb\x1b[31m", "../x", "nan", "\u0661")
            )
    else:
        other = draw.choice(
            ("x", "params", "params.", "params.0", "upstream.x", f"{name}.0", "params." + "0." * 3000 + "0")
        )
        tensors[other] = tensors.pop(name)
    return safetensors.torch.save(tensors, metadata | {"crc32": storage._checksum(tensors, metadata)})


# ----------------------------------------------------------------------------------------------------------- commands


def _import(folder: Path, *, same: bool = False) -> None:
    (source,) = folder.iterdir()
    out = folder / "out.safetensors"
    checkpoint.import_(source, out, model=MODEL)
    read = upstream.read_imported(out)
    out.unlink()
    wanted = dict(zip(("params", "state"), upstream.import_state(upstream_state(MODEL), MODEL)[:2]))
    found = {"params": read.params, "state": read.state}
    assert tree.diff(found, wanted) == []
    for name, leaf in tree.flatten(found).items():
        assert torch.isfinite(leaf).all() and not (name.endswith(".var") and (leaf < 0).any()), name
    if same:
        assert all(
            torch.equal(x, y) for x, y in zip(tree.leaves(found), tree.leaves(tree.map(lambda a, b: b, found, wanted)))
        )


def _import_same(folder: Path) -> None:
    _import(folder, same=True)


def _read(folder: Path) -> None:
    """`bevfn eval` and --pretrained: what a checksum seals is what was written."""
    params, state = pretrained.read_weights(folder / "a.safetensors")
    wanted, wanted_state, _ = upstream.import_state(upstream_state(MODEL), MODEL)
    for found, right in ((params, wanted), (state, wanted_state)):
        assert tree.diff(found, right) == []
        assert all(
            torch.equal(x, y)
            for x, y in zip(tree.flatten(found).values(), map(tree.flatten(right).get, tree.flatten(found)))
        )


def _export(folder: Path) -> None:
    checkpoint.show(folder / "a.safetensors")
    checkpoint.export(folder / "a.safetensors", folder / "out.pth")
    (folder / "out.pth").unlink()
    read = upstream.read_imported(folder / "a.safetensors")
    assert read.model == MODEL and read.sparse in ("spconv2", "mmcv") and small(MODEL) is not None
