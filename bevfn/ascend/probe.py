"""Asks the questions of `questions`: an NPU through torchair, or the interpreter, which shows that they can be asked.

On a device every question is a process of its own: a kernel that fails takes its process with it, and GE takes the
switch of HF32 once. Times are a call's, over several calls, less that of a graph of one addition (launch and host).
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevfn.ascend import device, interpret, torchair
from bevfn.ascend.lower import lower
from bevfn.ascend.questions import QUESTIONS, ROWS, Answer, Question
from bevfn.ascend.rates import SCENARIOS
from bevfn.files import read_json, to_json, write_atomically

MODES: tuple[interpret.Device, ...] = ("published", "a2")
CALLS = 10
LONGEST = 900.0
"""seconds that a question's process may take: GE compiles one operator"""
NEITHER, REFUSED = "none of them", "refused"
NPU = "npu"

_library = torch.library.Library("bevfn", "FRAGMENT")
_library.define("ge_nodes(Tensor[] operands, str question) -> Tensor[]")


@torch.library.register_fake("bevfn::ge_nodes", lib=_library)
def _fake(operands: list[Tensor], question: str) -> list[Tensor]:
    return [x for x in QUESTIONS[question].answers[0].results(*operands) if x is not None]


@dataclass(frozen=True)
class Found:
    """What one question got, of a device or of a mode of the interpreter."""

    question: str
    asked: str
    """"npu", or a mode of the interpreter"""
    answer: str
    """the name of one, `NEITHER` or `REFUSED`"""
    then: str
    """what follows"""
    nanoseconds: float | None = None
    """per row; None: not taken"""


def register() -> None:
    """The converter of `ge_nodes`, once per process; torchair must be loaded."""
    if getattr(register, "done", False):
        return
    register.done = True  # type: ignore[attr-defined]
    import torchair as ta
    from torchair._ge_concrete_graph import ge_apis as ge

    @ta.register_fx_node_ge_converter(torch.ops.bevfn.ge_nodes.default)
    def convert(operands: list[Any], question: str, meta_outputs: Any = None) -> Any:
        build = QUESTIONS[question].build
        assert build is not None
        made = build(ge, *operands)
        return list(made) if isinstance(made, (tuple, list)) else [made]


def step_of(question: Question) -> Callable[..., tuple[Tensor, ...]]:
    """The question as a function of its operands, to be lowered."""
    if question.step is not None:
        return question.step
    return lambda *operands: tuple(torch.ops.bevfn.ge_nodes(list(operands), question.name))


def judged(question: Question, operands: Sequence[Tensor], results: Sequence[Tensor]) -> tuple[str, str]:
    """(the first answer that the results are, what follows)."""
    for answer in question.answers:
        if _is(answer, operands, results):
            return answer.name, answer.then
    return (
        NEITHER,
        f"unknown arithmetic ({_distance(question, operands, results)}): find out which before training",
    )


def interpreted(question: Question, mode: interpret.Device) -> Found:
    """Of the interpreter, with few rows and no times."""
    mode = "a2-hf32" if question.hf32 and mode == "a2" else mode
    operands = question.operands(ROWS)
    torchair.load()
    register()
    lowered = lower(step_of(question), operands)
    try:
        program = interpret.prepare(lowered.graph, device=mode)
        results = lowered.results(interpret.run(program, lowered.arguments(*operands)))
    except (interpret.Unsupported, interpret.Invalid) as error:
        return Found(question.name, mode, REFUSED, f"{question.refused} ({error})")
    return Found(question.name, mode, *judged(question, operands, results))


def on_device(question: Question) -> Found:
    """Of the NPU of this process. Raises what torchair, GE and the device raise."""
    device.check("torchair")
    operands = question.operands(question.rows or ROWS)
    inputs = tuple(x.to(NPU) for x in operands)
    call = _compiled(step_of(question), hf32=question.hf32)
    results = [x.cpu() for x in call(*inputs)]
    taken = None
    if question.rows:
        one = torch.ones(8, device=NPU)
        idle = _seconds(_compiled(lambda x: (x + 1,), hf32=question.hf32), (one,))
        taken = max(_seconds(call, inputs) - idle, 0.0) / question.rows * 1e9
    return Found(question.name, NPU, *judged(question, operands, results), taken)


def in_a_process(question: Question) -> Found:
    """`on_device` in a process of its own, whose death is an answer too."""
    with tempfile.TemporaryDirectory(prefix="bevfn-probe-") as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "bevfn.ascend.probe", question.name, str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            return Found(question.name, NPU, REFUSED, f"{question.refused} (no answer in {LONGEST:.0f} s)")
        if done.returncode == 0 and file.is_file():
            return Found(**read_json(file.read_bytes()))
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        return Found(
            question.name, NPU, REFUSED, f"{question.refused} (its process ended with {done.returncode}: {lines[-1]})"
        )


def rates(found: Iterable[Found]) -> dict[str, float]:
    """{field of `rates.Rates`: seconds per row} of right answers with a time; what `bevfn graph --rates` reads."""
    made: dict[str, float] = {}
    for one in found:
        question = QUESTIONS[one.question]
        # A call that took no longer than the empty one says nothing of a row.
        if question.rate and one.nanoseconds and one.answer == question.answers[0].name:
            made[question.rate] = one.nanoseconds * 1e-9
    return made


def figures(found: Sequence[Found]) -> dict[str, Any]:
    """Plain values: what was asked, what was found, and the rates."""
    asked = {
        name: {
            "asks": question.asks,
            "assumes": question.assumes,
            "answers": {answer.name: answer.then for answer in question.answers},
        }
        for name, question in QUESTIONS.items()
        if any(one.question == name for one in found)
    }
    return {"questions": asked, "found": [asdict(one) for one in found], "rates": rates(found)}


def text(found: Sequence[Found]) -> str:
    """The report for people: a table of the answers; then per question what is asked and assumed, and what follows."""
    names = list(dict.fromkeys(one.question for one in found))
    lines = [_row("question", "by mathematics", [f"answer {i + 1}" for i in range(len(found) // len(names))])]
    for name in names:
        said = [f"{one.answer} ({one.asked})" for one in found if one.question == name]
        lines.append(_row(name, QUESTIONS[name].answers[0].name, said))
    lines.append("")
    for name in names:
        question = QUESTIONS[name]
        lines += [f"{name}: {question.asks}", f"  assumed: {question.assumes}"]
        for one in found:
            if one.question == name:
                taken = "" if one.nanoseconds is None else f", {one.nanoseconds:.3g} ns a row{_assumed(question)}"
                lines.append(f"  {one.asked:<10} {one.answer}{taken}: {one.then}")
    return "\n".join(lines)


def _row(name: str, expected: str, said: Sequence[str]) -> str:
    return f"{name:<22}{expected:<16}{''.join(f'{one:<28}' for one in said)}".rstrip()


def _assumed(question: Question) -> str:
    if question.rate is None:
        return ""
    return f" ({', '.join(f'{getattr(one, question.rate) * 1e9:g}' for one in SCENARIOS.values())} assumed)"


def _compiled(step: Callable, *, hf32: bool) -> Callable:
    call = device.compiled(step, "torchair", hf32=hf32)  # on its first call
    register()
    return call


def _seconds(call: Callable, inputs: tuple[Tensor, ...]) -> float:
    """Of one call, compiled and warm."""
    npu: Any = torch.get_device_module("npu")
    for _ in range(3):
        call(*inputs)
    npu.synchronize()
    started = time.perf_counter()
    for _ in range(CALLS):
        call(*inputs)
    npu.synchronize()
    return (time.perf_counter() - started) / CALLS


def _is(answer: Answer, operands: Sequence[Tensor], results: Sequence[Tensor]) -> bool:
    wanted = answer.results(*operands)
    if len(wanted) != len(results):
        return False
    return all(y is None or _error(x, y) <= answer.tolerance for x, y in zip(results, wanted))


def _error(found: Tensor, wanted: Tensor) -> float:
    """Relative, as a norm; infinite where shape, dtype or any number is no number."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype or not found.isfinite().all():
        return float("inf")
    if torch.equal(found, wanted):
        return 0.0
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def _distance(question: Question, operands: Sequence[Tensor], results: Sequence[Tensor]) -> str:
    wanted = question.answers[0].results(*operands)
    errors = [f"{_error(x, y):.1e}" for x, y in zip(results, wanted) if y is not None]
    return f"{', '.join(errors)} from {question.answers[0].name!r}"


if __name__ == "__main__":  # of `in_a_process`
    write_atomically(Path(sys.argv[2]), to_json(asdict(on_device(QUESTIONS[sys.argv[1]]))))
