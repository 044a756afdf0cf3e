"""`bevfn ascend probe`: what only an NPU can say, asked as graphs of one operator."""

from pathlib import Path
from typing import Annotated

import tyro

from bevfn.choices import QUESTIONS, one_of
from bevfn.files import check_json


def probe(
    *,
    only: Annotated[str | None, one_of(QUESTIONS.split())] = None,
    dry_run: bool = False,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> int:
    """Ask an NPU what bevfn takes for granted about it: exact integers, stable sorts, costs of a row; before all else.

    Each question is a graph of one operator through torchair, in a process of its own. Without an NPU the graphs run in
    the interpreter, by the published meaning of the types and as an Atlas A2's kernels do: no times, and nothing learnt
    about a device. A machine that has an NPU or CANN which this process cannot use is refused. docs/ascend.md says what follows from the answers.

    Args:
        only: one question
        dry_run: in the interpreter, also where there is an NPU
        json_file: also write the report there; `bevfn graph --estimate --rates` reads its costs of a row
    """
    from bevfn import provenance  # and what these import, which help need not wait for
    from bevfn.ascend import device
    from bevfn.ascend import probe as asking
    from bevfn.ascend import questions as table

    check_json(json_file)
    questions = [table.QUESTIONS[only]] if only else list(table.QUESTIONS.values())
    there = not dry_run and device.available()
    if not there and not dry_run and (why := device.hindrance()):
        raise ValueError(f"no NPU can be asked: {why}, or rehearse without one by --dry-run")
    if not there:
        print(
            f"{'--dry-run' if dry_run else 'no NPU was found'}: a rehearsal in the interpreter, in its two modes; nothing of a "
            "device is measured"
        )
        found = [asking.interpreted(question, mode) for question in questions for mode in asking.MODES]
    else:
        found = [asking.in_a_process(question) for question in questions]
    print(asking.text(found), flush=True)
    if json_file is not None:
        provenance.write(json_file, asking.figures(found), device="npu" if there else "cpu")
    return 0
