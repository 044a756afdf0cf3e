"""`bevfn graph EXPERIMENT`: the train step and the inference step as Ascend graphs, without an Ascend. Its flags; the work is
`lowering`'s, which imports what help need not wait for."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from bevfn import catalogue
from bevfn.choices import Experiment, Precision, Scale, one_of


def graph(
    experiment: tyro.conf.Positional[Experiment],
    *,
    model: Annotated[str | None, one_of(catalogue.MODELS)] = None,
    stage: Literal[1, 2] | None = None,
    precision: Precision = "fp32",
    scale: Scale = "published",
    batch_size: int | None = None,
    ops: Literal["stock", "drivingsdk"] = "stock",
    execute: int = 0,
    kernels: Literal["published", "a2", "a2-hf32"] = "published",
    checkpoint_activations: bool = False,
    host_tables: bool = True,
    capacities: tuple[int, ...] | None = None,
    opp: Path | None = None,
    estimate: bool = False,
    calibrate: Path | None = None,
    rates: Path | None = None,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    out: Path | None = None,
) -> int:
    """Lower an experiment's steps to Ascend graphs and report what is in them; needs torch_npu's converters (`make npu`), no NPU.

    The whole train step and the inference step are traced with fake tensors and go through torchair's own converters.
    Exit code 1 if a step is not one static graph, or has a node without a kernel: docs/ascend.md says how to read the report.

    Args:
        experiment: the recipe
        model: of the experiment; by default its first
        stage: of bevnext, short for --model bevnext-stage1 or bevnext-stage2
        precision: of the step
        scale: published sizes, or the mini ones of demos and CI
        batch_size: samples per device; by default the recipe's (4, or 8 of the camera-only ones), and 1 at mini scale
        ops: what bevfn's own operators become: GE types that CANN has, or DrivingSDK's where docs/ascend.md says so
        execute: steps to run in the interpreter, from the same state as the eager step, on a generated frame (with an
            AdamW eps of 1 and a loss scale of 64: see `steps`)
        kernels: --execute computes by the published meaning of the types, or as an Atlas A2's kernels do where that differs
            (integer selects through float32), or with its HF32 convolutions besides
        checkpoint_activations: blocks are computed again for the gradient
        host_tables: of BEVFusion and BEVNeXt, as a run on an Ascend has it: voxels, neighbour tables, depth maps and the cells of
            the frustums' points come with the batch; no: the graph makes them
        capacities: of BEVFusion's family, voxels of a sample, then active sites at each level of the encoder, such as
            `bevfn data prepare --capacities` counted; none: the recipe's
        opp: an installed CANN (its toolkit's folder, or opp): where each node runs, by its tables instead of our facts
        estimate: also print how long each step would take on an Atlas A2, in three scenarios (docs/ascend.md)
        calibrate: an op_summary_*.csv of msprof, of the train step: --estimate by what its tasks took
        rates: a report of `bevfn ascend probe` on an NPU: --estimate with the costs of a row that it took, as a fourth scenario
        json_file: also write the figures there
        out: folder for the graphs, as .pbtxt for reading and .air (the serialized model)
    """
    asked = dict(locals())
    from bevfn.commands import lowering

    return lowering.graph(**asked)
