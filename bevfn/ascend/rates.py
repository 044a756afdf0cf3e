"""What an Atlas 800T A2 (Ascend 910B, one of its eight NPUs) is taken to do in a second, in three scenarios, with sources.

"Floor" is a published or measured rate; what is above it is an assumption, and says so. No number here was measured by us.

[1] CANN's platform files of the 910B variants (`Ascend910B*.ini`): 20 to 24 cube cores, 295 to 364 TFLOP/s in float16,
    40 to 48 vector cores, L2 of 192 MB.
[2] Huawei's DataCopy sample on A2: 1.49 TB/s for large copies, 128-byte copies at 0.232 ns each over the whole chip.
[3] An audit of the published models' fp16 train graphs against CANN 8.1.RC1's operator tables: costs of gather, index_add, sort and launches, assumed there on
    top of these floors.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from bevfn.files import read_json

LARGE_COPIES = 1.49e12
"""Bytes a second [2]; the floor of everything that moves memory."""
L2 = 192 * 2**20
"""Bytes that all cores share [1]."""
MEMORY = 64 * 2**30
"""Bytes of an NPU's memory."""
SMALL_TASK = 65_536
"""Bytes below which a task is mostly its launch."""


@dataclass(frozen=True)
class Rates:
    """Of one scenario."""

    half: float
    """FLOP/s of the cube in float16 and bfloat16 [1], times the share of it that a product reaches: assumed"""
    single: float
    """likewise in float32 without HF32: assumed a quarter"""
    traffic: float
    """share of a graph's bytes that reach memory. GE's fusion and the L2 save some, lines half used cost more: assumed"""
    gather: float
    """seconds per gathered row [3]; no copy is cheaper than 0.232 ns [2]"""
    index_add: float
    """seconds per added row [3]: a scalar loop per index"""
    sort: float
    """seconds per sorted element [3]"""
    launch: float
    """seconds per task [3]"""
    cpu_launch: float
    """seconds per task of the AI CPU: assumed"""
    cpu_bytes: float
    """bytes a second of the AI CPU: assumed"""


SCENARIOS = {
    "optimistic": Rates(0.7 * 364e12, 0.7 * 91e12, 0.5, 0.30e-9, 5e-9, 1.2e-9, 1.1e-6, 50e-6, 4e9),
    "middle": Rates(0.5 * 330e12, 0.5 * 82e12, 0.8, 0.65e-9, 15e-9, 1.6e-9, 2.7e-6, 100e-6, 2e9),
    "pessimistic": Rates(0.35 * 295e12, 0.35 * 74e12, 1.5, 1.2e-9, 35e-9, 2.5e-9, 4.8e-6, 200e-6, 1e9),
}

PROBED = ("gather", "index_add", "sort")
"""Rates that a probe takes: of a row."""
SLOWEST = 1e-6
"""seconds a row that nothing of the AI Core takes: 28 times the pessimistic case"""
PUBLISHED = {
    "bevfusion-lidar-camera": 4.10,
    "bevdepth-2key": 4.04,
    "matrixvt": 46.19 / 8,
    "bevnext-stage1": 16.568 / 8,
    "bevnext-stage2": 7.572 / 8,
}
"""Samples a second and NPU in training on Atlas 800T A2, by model: the "FPS" of the results of Ascend/DrivingSDK's
model_examples, which are of 8 NPUs, in fp16 (BEVNeXt's page does not say)."""


def probed(path: Path) -> Rates:
    """The middle scenario with the costs of a row that `bevfn ascend probe --json` took on a device.

    Raises ValueError, one sentence, if there are none in the file.
    """
    wanted = "give what `bevfn ascend probe --json` wrote on a machine with an NPU"
    try:
        report = read_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the rates {path} ({error}); {wanted}") from None
    found = report.get("rates") if isinstance(report, dict) else None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} has no rates: it is no probe's report, or of one without a device; {wanted}")
    for name, value in found.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name not in PROBED or not number or not 0 < value < SLOWEST:
            raise ValueError(
                f"{path}: rate {name!r} is {value!r}, and not {', '.join(PROBED)} in seconds a row, below {SLOWEST}; {wanted}"
            )
    return replace(SCENARIOS["middle"], **found)
