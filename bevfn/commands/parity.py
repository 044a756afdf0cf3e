"""`bevfn parity CASE_DIR`: is our model the published one?"""

import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bevfn import waiting
from bevfn.choices import Backend, ModelName
from bevfn.files import check_json
from bevfn.names import printable


def parity(
    case_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CASE_DIR")],
    *,
    make: ModelName | None = None,
    only: Literal["eval", "train"] | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    device: str = "cpu",
    backend: Backend = "eager",
) -> int:
    """Compare a model with the implementation that published it, on a golden case.

    Says which implementation made the case, draws its checkpoint, imports it like a published file, runs our model on the stored inputs and prints one
    line per stored boundary: name, relative L2 error, tolerance, ok or FAIL. Exit code 1 if any fails.

    Args:
        case_dir: folder of a golden case: manifest.json, stats.json, inputs.safetensors, outputs.safetensors (docs/parity.md)
        make: makes a small case of this model there first, of bevfn itself in eager torch on the CPU, for other devices, compilers,
            machines and versions; it says nothing about published implementations
        only: compare evaluation or one training step alone; both by default
        json_file: also write the table there
        device: torch device to run on
        backend: what compiles the model, for a case that --make made
    """
    import torch  # which help need not wait for

    from bevfn import distributed, provenance
    from bevfn.commands import own_case
    from bevfn.parity import compare, golden, replay

    distributed.check_device(device)
    device = distributed.chosen(device)
    check_json(json_file)
    started = time.perf_counter()
    if make is not None:
        with waiting.told("making the case", waiting.aside):
            own_case.make(case_dir, make)
    case = golden.read(case_dir)
    print(f"made by running {printable(case.origin)}")
    table = compare.Table(str(case_dir))
    torch.manual_seed(0)  # nothing here draws random numbers; a difference between runs would be a bug
    ours = own_case.OWN in case.manifest
    if not ours and backend != "eager":
        raise ValueError(
            f"--backend {backend} is for cases that --make made; published ones are compared eagerly, leave it out"
        )
    with waiting.told("computing the case", waiting.aside):
        if ours:
            own_case.replay(case, table, only=only, device=device, backend=backend)
        else:
            replay.replay(case, table, only=only, device=device)
    failed = [line.name for line in table.lines if not line.ok]
    print(
        f"{len(table.lines) - len(failed)} of {len(table.lines)} ok in {time.perf_counter() - started:.0f} s"
        + (f"; FAILED: {', '.join(failed)}" if failed else "")
    )
    if json_file is not None:
        provenance.write(json_file, table.to_json(), device=device)
    return 0 if table.ok else 1
