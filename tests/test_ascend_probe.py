"""The questions to a device: they can be asked, their answers can be told apart, and what is found can be used."""

import json
import sys
import types
from dataclasses import asdict
from pathlib import Path

import ge_graphs
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bevfn import choices
from bevfn.ascend import device, placement, probe
from bevfn.ascend.interpret import a2
from bevfn.ascend.lower import lower
from bevfn.ascend.probe import NEITHER, REFUSED, Found
from bevfn.ascend.questions import CHANNELS, EPS, QUESTIONS, ROWS
from bevfn.ascend.rates import L2, SCENARIOS, probed
from bevfn.commands.ascend import probe as command
from bevfn.commands.graph import graph
from bevfn.layers import batch_norm

# What the interpreter says: by the published meanings, and as an A2's kernels do (of hf32-on: with HF32 allowed).
SAID = {
    "select": ("exact", "through float32"),
    "floor-div": ("exact", "through float32"),
    "floor-div-small": ("exact", "exact"),
    "compare": ("exact", "exact"),
    "mul-wrap": ("wraps", "wraps"),
    "sxpy": ("difference", REFUSED),
    **dict.fromkeys(("maximum", "clip", "reduce-max", "cumsum", "cast-narrow", "cast-wide"), ("exact", "exact")),
    "index-add": ("sums", "sums"),
    "scatter-add": (REFUSED, REFUSED),  # no published prototype
    "gather": ("rows", "rows"),
    "sort": ("stable", "stable"),
    "hf32-off": ("float32", "float32"),
    "hf32-on": ("float32", "HF32"),
    "batch-norm": ("float32", "float32"),
    "batch-norm-fused": ("float32", "loses digits"),
    **dict.fromkeys(("batch-norm-fp32", "batch-norm-fp16"), ("float32", "float32")),
    **dict.fromkeys(("batch-norm-grad-fp32", "batch-norm-grad-fp16"), ("closed form", "closed form")),
    "batch-norm-rows": ("those that count", "those that count"),
}


@pytest.fixture(scope="module")
def found():
    ge_graphs.need_torchair()
    return [probe.interpreted(question, mode) for question in QUESTIONS.values() for mode in probe.MODES]


def test_the_command_line_and_the_docs_know_every_question():
    assert choices.QUESTIONS.split() == list(QUESTIONS)
    page = (Path(__file__).parents[1] / "docs/ascend.md").read_text()
    table = page.partition("| an answer that stops you |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1].strip() for row in table.splitlines()[2:]]
    assert sorted(name for row in rows for name in row.split(", ")) == sorted(QUESTIONS)
    assert f" {len(QUESTIONS)} questions" in page


def test_every_question_can_be_asked_of_the_interpreter(found):
    said = {name: tuple(one.answer for one in found if one.question == name) for name in QUESTIONS}
    assert said == SAID
    assert [one.asked for one in found if one.question == "hf32-on"] == ["published", "a2-hf32"]
    assert not probe.rates(found)  # times are a device's


@pytest.mark.parametrize("name", QUESTIONS)
def test_answers_can_be_told_apart(name):
    question = QUESTIONS[name]
    operands = question.operands(ROWS)
    exact = question.answers[0].results(*operands)
    for answer in question.answers:
        results = [y if y is not None else x.flip(0) for x, y in zip(exact, answer.results(*operands))]
        if answer.tolerance > 0.1:  # inexact by definition
            results = [y * 1.05 for y in results]
        assert probe.judged(question, operands, results) == (answer.name, answer.then)
    for wrong in ([y + 1 for y in exact], [exact[0].double()], [exact[0].ravel()[:1]]):
        said, then = probe.judged(question, operands, [y * 3 for y in wrong])
        assert said == NEITHER and "from" in then


def nodes_of(lowered):
    """{type: what the node states: attributes but names, dtypes and layouts of operands and results} of batch norm's."""
    left_out = {"_input_name_key", "_input_name_value", "_output_name_key", "_output_name_value", "_readable_value"}
    return {
        op.type: (
            {k: v.SerializeToString(deterministic=True) for k, v in op.attr.items() if k not in left_out},
            [(d.name, d.dtype, d.layout) for d in (*op.input_desc, *op.output_desc)],
        )
        for op in lowered.graph.op
        if op.type.startswith("BN")
    }


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_batch_norm_is_asked_by_the_nodes_of_a_train_step(name):
    """All four, in their formats; and what is expected of them is what torch computes and derives."""
    ge_graphs.need_torchair()
    probe.register()
    forward, gradient = QUESTIONS[f"batch-norm-{name}"], QUESTIONS[f"batch-norm-grad-{name}"]
    asked = [lower(probe.step_of(question), question.operands(ROWS)) for question in (forward, gradient)]

    def step(x, weight, bias):
        def loss(x, weight, bias):
            y, seen = batch_norm.apply({"weight": weight, "bias": bias}, state, x, train=True)
            return (y.float() ** 2).sum(), seen

        return torch.func.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, weight, bias)

    operands, (_, state) = forward.operands(ROWS), batch_norm.init(CHANNELS)
    emitted = nodes_of(lower(step, operands))
    assert len(emitted) == 4 and {**nodes_of(asked[0]), **nodes_of(asked[1])} == emitted

    grad, x, weight, mean, var = gradient.operands(ROWS)
    wide = [t.double().requires_grad_() for t in (x, weight, operands[2])]
    y = torch.nn.functional.batch_norm(wide[0], None, None, *wide[1:], training=True, eps=EPS)
    wanted = (y, *torch.autograd.grad(y, wide, grad.double()))
    found = forward.answers[0].results(*operands)[0], *gradient.answers[0].results(grad, x, weight, mean, var)
    assert [t.dtype for t in found] == [x.dtype, x.dtype, torch.float32, torch.float32]
    for ours, theirs in zip(found, wanted):
        assert (ours - theirs).norm() <= (1e-3 if ours.dtype == torch.float16 else 1e-5) * theirs.norm()


def test_the_command_without_an_npu(capsys, tmp_path):
    ge_graphs.need_torchair()
    assert command(only="mul-wrap", json_file=tmp_path / "p.json") == 0
    out = capsys.readouterr().out
    assert "no NPU was found: a rehearsal in the interpreter, in its two modes; nothing of a device is measured" in out
    assert "wraps (published)           wraps (a2)" in out and "bevfn/rng.py" in out
    made = json.loads((tmp_path / "p.json").read_text())
    assert made["rates"] == {} and [one["answer"] for one in made["found"]] == ["wraps", "wraps"]
    assert made["questions"]["mul-wrap"]["answers"]["wraps"] == "as assumed" and made["command"]
    with pytest.raises(ValueError, match=r"p.json has no rates: it is no probe's report, or of one without a device"):
        probed(tmp_path / "p.json")


def test_an_npu_or_a_cann_that_cannot_be_used_is_refused_with_what_to_do(monkeypatch, capsys, tmp_path):
    ge_graphs.need_torchair()
    monkeypatch.setattr(device, "available", lambda: False)
    monkeypatch.setattr(device, "INSTALLATIONS", (tmp_path / "Ascend",))
    monkeypatch.setattr(device, "DEVICES", tmp_path)

    def refused(said):
        with pytest.raises(ValueError, match=f"no NPU can be asked: {said}, or rehearse without one by --dry-run"):
            command(only="sxpy")

    (tmp_path / "davinci0").write_text("")
    (tmp_path / "davinci_manager").write_text("")  # no device
    refused(r"the machine has an NPU \(.*davinci0\) and no CANN was found: install it, and source its set_env.sh")
    script = tmp_path / "Ascend" / "ascend-toolkit" / "set_env.sh"
    script.parent.mkdir(parents=True)
    script.write_text("")
    refused(f"CANN is installed at {script.parent} and this shell does not have it: source {script}")
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: None)  # sourced
    refused(r"torch_npu sees no device beside .*davinci0: look at npu-smi info and ASCEND_RT_VISIBLE_DEVICES")
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    refused(r"the machine has an NPU \(.*davinci0\) and CANN, and no torch_npu: pip install -e '.\[npu\]'")
    monkeypatch.undo()
    monkeypatch.setattr(device, "hindrance", lambda: "nobody asks")
    assert command(only="sxpy", dry_run=True) == 0
    assert "--dry-run: a rehearsal in the interpreter" in capsys.readouterr().out


def test_a_machine_with_cann_alone_rehearses(monkeypatch, tmp_path):
    """As one that only lowers graphs has it, for `--opp`."""
    monkeypatch.setattr(device, "INSTALLATIONS", (tmp_path,))
    monkeypatch.setattr(device, "DEVICES", tmp_path)
    assert device.hindrance() is None
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: None)
    assert device.hindrance() is None


def test_a_process_that_dies_is_an_answer_and_one_that_answers_too(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    died = probe.in_a_process(QUESTIONS["sxpy"])
    assert died.answer == REFUSED and died.then == "as assumed: keep _rsub (its process ended with 1: it said nothing)"
    script = tmp_path / "python"  # -m bevfn.ascend.probe NAME FILE
    script.write_text(f"#!/bin/sh\necho '{json.dumps(asdict(FOUND[0]))}' > \"$4\"\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert probe.in_a_process(QUESTIONS["gather"]) == FOUND[0]


def test_what_a_device_computes_is_judged_and_timed(monkeypatch):
    """With the traced module in place of what torchair would make of it, and a CPU in place of the NPU."""
    switched = types.SimpleNamespace(
        conv=types.SimpleNamespace(), matmul=types.SimpleNamespace(), synchronize=lambda: None
    )
    monkeypatch.setattr(probe, "NPU", "cpu")
    monkeypatch.setattr(probe, "register", lambda: None)
    monkeypatch.setattr(device, "check", lambda backend: None)
    monkeypatch.setattr(device, "npu", lambda tensors, backend: torch.device("cpu"))
    monkeypatch.setattr(device, "_compile", lambda module, where, backend: module)
    monkeypatch.setattr(torch, "get_device_module", lambda name: {"npu": switched}[name])
    assert probe.on_device(QUESTIONS["hf32-on"]).answer == "float32"
    assert switched.conv.allow_hf32 and switched.matmul.allow_hf32
    timed = probe.on_device(QUESTIONS["batch-norm"])
    assert timed.answer == "float32" and timed.nanoseconds > 0 and not switched.conv.allow_hf32


FOUND = [
    Found("gather", "npu", "rows", "", 0.5),
    Found("index-add", "npu", NEITHER, "", 9.0),  # a wrong kernel's speed is of no use
    Found("sort", "npu", "sorted, not stable", "", 2.0),
    Found("sort", "npu", "stable", "", 0.0),  # no longer than an empty call
    Found("batch-norm", "npu", "float32", "", 3.0),
]


def test_rates_are_read_by_the_estimate(monkeypatch, capsys, tmp_path):
    ge_graphs.need_torchair()
    from bevfn.commands import lowering

    file = tmp_path / "p.json"
    file.write_text(json.dumps(probe.figures(FOUND)))
    assert json.loads(file.read_text())["rates"] == {"gather": 0.5e-9}
    made = probed(file)
    assert made.gather == 0.5e-9 and made.index_add == SCENARIOS["middle"].index_add
    assert "0.5 ns a row (0.3, 0.65, 1.2 assumed)" in probe.text(FOUND)

    def train(train_state, batch):
        return train_state[batch], {}

    arguments = (torch.ones(4, 1), torch.zeros(10**7, dtype=torch.int64))
    monkeypatch.setattr(lowering, "steps", lambda *_, **__: {"train": (train, arguments)})
    assert graph("bevdepth", estimate=True, rates=file, json_file=tmp_path / "g.json") == 0
    seconds = json.loads((tmp_path / "g.json").read_text())["steps"]["train"]["estimate"]["groups"]["gather"]["seconds"]
    assert set(seconds) == {*SCENARIOS, "probed"} and seconds["probed"] == pytest.approx(5e-3 + made.launch, rel=1e-3)
    assert "probed" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--rates is of the estimate; add --estimate"):
        graph("bevdepth", rates=file)


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", r"cannot read the rates .*p.json \("),
        ("[]", "has no rates"),
        ('{"rates": {"gathers": 1e-9}}', "rate 'gathers' is 1e-09, and not gather, index_add, sort in seconds a row"),
        ('{"rates": {"traffic": 0.5}}', "rate 'traffic' is 0.5, and not gather, index_add, sort"),
        ('{"rates": {"gather": 2e-6}}', "rate 'gather' is 2e-06, .* below 1e-06"),
        ('{"rates": {"sort": 0.0}}', "rate 'sort' is 0.0"),
        ('{"rates": {"gather": true}}', "rate 'gather' is True"),
    ],
)
def test_what_are_no_rates_is_one_sentence(tmp_path, text, said):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        probed(tmp_path / "p.json")


def test_the_gathered_table_is_larger_than_the_l2_where_time_is_taken():
    """Else the rate would be the cache's."""
    gather = QUESTIONS["gather"]
    with FakeTensorMode():
        table, index = gather.operands(gather.rows)
    assert table.nbytes >= 4 * L2 and table[0].nbytes == 128 and index.shape[0] == gather.rows
    table, index = gather.operands(ROWS)
    assert table.nbytes < 2**20 and index.max() < table.shape[0]


def test_what_is_unknown_about_integers_is_asked():
    facts = placement.facts()
    for kind, fact in facts["integers"].items():
        assert kind in facts["types"] and fact["source"] in facts["sources"] and set(fact) - {"probe"} == {
            "int32", "says", "source",
        }  # fmt: skip
        asked = fact.get("probe", "").split()
        assert all(kind in QUESTIONS[name].asks for name in asked)
        assert asked or fact["int32"] in ("exact", "through float32")
    through = {kind for kind, fact in facts["integers"].items() if fact["int32"] == "through float32"}
    assert (
        through
        == {"SelectV2", "FloorDiv", "FloorMod", "TruncateDiv", "Mod"}
        == a2.OPS.keys() - {"Sxpy", "BNTrainingUpdate"}
    )  # as the interpreter's mode computes
