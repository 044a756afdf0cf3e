"""What the interpreter refuses or makes visible: unknown parts of a graph, contradictions, memory, order, opaque bits."""

import pytest
import torch
from ge_graphs import assert_same, need_torchair, node_graph, round_trip, run_node
from hypothesis import given, settings
from hypothesis import strategies as st

from bevfn.ascend import interpret
from bevfn.ascend.interpret.node import DTYPES

need_torchair()
X = torch.arange(6.0).view(2, 3)


def images(value, *indices):
    from torchair._ge_concrete_graph.utils import specific_op_input_layout

    specific_op_input_layout(value[0] if isinstance(value, tuple) else value, indices=list(indices), layout="NCHW")
    return value


def edited(build, edit, *tensors):
    """The graph of a node after edit(its OpDef, the one before NetOutput)."""
    graph = node_graph(build, *tensors)
    edit(graph.op[-2])
    return graph


def set_attribute(name, field, value):
    return lambda op: setattr(op.attr[name], field, value)


# ------------------------------------------------------------------------------------------------------- what is unknown


@pytest.mark.parametrize(
    "build,edit,message",
    [
        (lambda ge, x: ge.Abs(x), lambda op: setattr(op, "type", "Abz"), r"GE node Abs \(Abz\): the type is not known"),
        (lambda ge, x: ge.Abs(x), set_attribute("speed", "i", 2), r"Abs \(Abs\): attribute 'speed' = 2 is not known"),
        (lambda ge, x: ge.Abs(x), set_attribute("_op_hint", "b", True), "attribute '_op_hint' = True is not known"),
        (lambda ge, x: ge.GeluV2(x), set_attribute("approximate", "s", b"fast"), r"'fast' is not known, .*; operands: x float32 \[2, 3\]"),
        (lambda ge, x: ge.Sort(x), set_attribute("axis", "b", True), "attribute 'axis' = True is not of the type int"),
        (lambda ge, x: ge.Cast(x, dst_type=1), set_attribute("dst_type", "i", 77), "'dst_type' = 77 is no data type"),
        (lambda ge, x: ge.Muls(x, value=2.0), lambda op: op.attr.pop("value"), "required attribute 'value' is missing"),
        (lambda ge, x: ge.Roll(x, shifts=[1]), set_attribute("shifts", "expression", b"s0"), "kind 'expression'"),
        (lambda ge, x: ge.ReduceStdWithMean(x, x), set_attribute("invert", "b", True), "'invert' = True is not known, only False"),
        (lambda ge, x: ge.Relu(x), lambda op: setattr(op.input_desc[0], "name", "features"), "operand 'x' is missing"),
        (lambda ge, x: ge.Relu(x), lambda op: op.input.append("Data:0"), "2 operands, but 1 descriptors"),
        (lambda ge, x: ge.Add(x, x), lambda op: op.input.pop(), "1 operands, but 2 descriptors"),
        (lambda ge, x: ge.Relu(x), lambda op: op.input.__setitem__(0, ""), "operand 'x' is required, but not fed"),
        (lambda ge, x: ge.Relu(x), lambda op: op.output_desc.add(), "1 results, but 2 output descriptors"),
        (lambda ge, x: ge.Relu(x), lambda op: op.input.__setitem__(0, "Nobody:0"), "no node 'Nobody'"),
    ],
)  # fmt: skip
def test_an_unknown_part_is_refused_by_node_and_name(build, edit, message):
    with pytest.raises(ValueError, match=message) as error:
        interpret.run(edited(build, edit, X), [X])
    assert isinstance(error.value, (interpret.Unsupported, interpret.Invalid))
    assert "\n" not in str(error.value)


def test_an_optional_operand_that_is_not_known_is_refused():
    with pytest.raises(interpret.Unsupported, match=r"MatMulV2\): optional operand 'offset_w' is fed"):
        run_node(lambda ge, x, w: ge.MatMulV2(x, x, None, w, transpose_x2=True), X, torch.zeros(3, dtype=torch.int8))


def test_the_first_of_several_unknown_types_is_named_and_the_others_are_counted():
    graph = node_graph(lambda ge, x: ge.Sub(ge.Abs(ge.Neg(x)), ge.Neg(x)), X)
    for op in graph.op:
        op.type = {"Neg": "Negg", "Abs": "Abz"}.get(op.type, op.type)
    with pytest.raises(interpret.Unsupported, match=r"GE node Neg \(Negg\): .*; neither can 1 Abz, 1 Negg be executed"):
        interpret.prepare(graph)


def test_random_numbers_are_refused_with_the_way_out():
    with pytest.raises(interpret.Unsupported, match=r"StatelessBernoulli.*make them an input"):
        run_node(lambda ge, x: ge.StatelessBernoulli([2, 3], 0.5, 1, 0, dtype=0), X)


def test_a_node_that_no_output_needs_does_not_run():
    graph = node_graph(lambda ge, x: (ge.StatelessBernoulli([2, 3], 0.5, 1, 0, dtype=0), ge.Neg(x))[1], X)
    assert torch.equal(interpret.run(graph, [X])[0], -X)


def test_custom_types_get_their_meaning_from_the_caller():
    graph = edited(lambda ge, x: ge.Muls(x, value=2.0), lambda op: setattr(op, "type", "Ours"), X)

    def ours(x: torch.Tensor, *, value: float) -> torch.Tensor:
        return x + value

    assert torch.equal(interpret.run(interpret.prepare(graph, {"Ours": ours}), [X])[0], X + 2)


# ----------------------------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    "build,tensors,message",
    [
        (lambda ge, x, y: ge.Add(x, y), (X, X.half()), "one dtype, got float32 and float16; operands: x1 float32"),
        (lambda ge, x, y: ge.Add(x, y), (X, torch.zeros(4)), r"Add \(Add\): The size of tensor a \(3\) .* operands: x1"),
        (lambda ge, x: ge.Sqrt(x), (X.int(),), "must be floating point, got int32"),
        (lambda ge, x, y: ge.LogicalAnd(x, y), (X, X), "must be bool, got float32"),
        (lambda ge, x: ge.Reshape(x, [4, 2]), (X,), r"Reshape\): shape '\[4, 2\]' is invalid"),
        (lambda ge, x, i: ge.GatherV2(x, i, 0), (X, torch.tensor([0, 2])), "indices from 0 to 2 into an axis of 2"),
        (lambda ge, x, i: ge.GatherV2(x, i, 0), (X, torch.tensor([-1])), "indices from -1 to -1 into an axis of 2"),
        (lambda ge, x, i: ge.IndexByTensor(x, [i], indices_mask=[1]), (X, torch.tensor([0]).int()), "must be int64"),
        (lambda ge, x: ge.Cast(x, dst_type=3), (torch.tensor([2**40]),), "1099511627776 .* do not fit int32"),
        (lambda ge, x: ge.ReduceSum(x, [], keep_dims=False), (X,), "no axes"),
        (lambda ge, x: ge.ConcatV2([x, x], 0, N=3), (X,), "attribute 'N' = 3, but there are 2 parts"),
        (lambda ge, x: ge.Conv2D(x, x, None, None, strides=[1] * 4, pads=[0] * 4, data_format="NCHW"),
         (torch.ones(1, 1, 2, 2),), "must be marked NCHW, not ND"),
        (lambda ge, x: images(ge.Conv2D(x, x, None, None, strides=[1] * 4, pads=[0] * 4), 0),
         (torch.ones(1, 1, 2, 2),), "'data_format' = 'NHWC' is not known"),
        (lambda ge, x: images(ge.ResizeNearestNeighborV2(x, ge.Cast([22, 22], dst_type=3)), 0),
         (torch.ones(1, 1, 26, 26),), "resizing 26 to 22 pixels: rounding decides"),
        (lambda ge, x: ge.StridedSliceV2(x, [0], [2], [0], [-1]), (X,), "only positive ones"),
        (lambda ge, x: ge.AsStrided(x, [2], [6], 1), (X,), "leave a tensor of 6 elements"),
    ],
)  # fmt: skip
def test_operands_that_do_not_fit_are_refused_by_node(build, tensors, message):
    with pytest.raises(ValueError, match=rf"GE node .*{message}"):
        run_node(build, *tensors)


def test_results_must_be_what_the_descriptors_state():
    def stated(op):
        op.output_desc[0].shape.dim[:] = [3, 2]

    with pytest.raises(interpret.Invalid, match=r"Abs\): output y should have the shape \[3, 2\], is float32 \[2, 3\]"):
        interpret.run(edited(lambda ge, x: ge.Abs(x), stated, X), [X])
    with pytest.raises(interpret.Invalid, match=r"output y should be int32, is float32 \[2, 3\]"):
        interpret.run(edited(lambda ge, x: ge.Abs(x), lambda op: setattr(op.output_desc[0], "dtype", 7), X), [X])

    def viewed(op):  # torchair notes a later view of the value: only its number of elements must be right
        op.output_desc[0].attr["_meta"].s = b"Tensor(dtype=torch.float32, shape=torch.Size([3, 2])"

    graph = edited(lambda ge, x: ge.Abs(x), viewed, X)
    assert torch.equal(interpret.run(graph, [X])[0], X)
    graph.op[-2].output_desc[0].attr["_meta"].s = b"Tensor(dtype=torch.float32, shape=torch.Size([7])"
    with pytest.raises(interpret.Invalid, match=r"should have 7 elements, is float32 \[2, 3\]"):
        interpret.run(graph, [X])


@pytest.mark.parametrize(
    "inputs,message",
    [
        ([], "the graph has 1 inputs, got 0 tensors"),
        ([X, X], "the graph has 1 inputs, got 2"),
        ([X.double()], r"input 0 of the graph \(Data\): y should be float32, is float64 \[2, 3\]"),
        ([X.T], r"input 0 .* should have the shape \[2, 3\]"),
    ],
)
def test_inputs_must_be_those_of_the_graph(inputs, message):
    with pytest.raises(interpret.Invalid, match=message):
        interpret.run(node_graph(lambda ge, x: ge.Abs(x), X), inputs)


def test_a_dynamic_shape_is_refused():
    graph = node_graph(lambda ge, x: ge.Abs(x), X)
    graph.op[0].output_desc[0].shape.dim[0] = -1
    with pytest.raises(interpret.Unsupported, match=r"Data\).* dynamic shape \[-1, 3\]"):
        interpret.prepare(graph)


# ----------------------------------------------------------------------------------------------------------- constants


@settings(max_examples=40, derandomize=True, database=None)
@given(
    dtype=st.sampled_from([dtype for _, _, dtype in DTYPES]),
    shape=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 99),
)
def test_constants_of_every_dtype_are_read_bit_for_bit(dtype, shape, seed):
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair.ge._ge_graph import GeGraph

    code = next(proto for proto, _, d in DTYPES if d == dtype)
    value = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with GeGraph() as graph:
        ge.NetOutput([ge.Const(0.0)])
    definition = graph._proto.op[0].attr["value"].t
    definition.desc.dtype, definition.desc.shape.dim[:] = code, shape
    definition.data = value.contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else _bytes(value)
    graph._proto.op[0].output_desc[0].dtype = code
    graph._proto.op[0].output_desc[0].shape.dim[:] = shape
    graph._proto.op[1].input_desc[0].CopyFrom(graph._proto.op[0].output_desc[0])
    assert_bits(interpret.run(graph._proto, [])[0], value)
    definition.data += b"\0"
    with pytest.raises(interpret.Invalid, match=r"Const\): \d+ bytes for"):
        interpret.run(graph._proto, [])


def _bytes(value):
    return value.reshape(1).view(torch.uint8).numpy().tobytes()


def assert_bits(actual, expected):
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(actual.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


# ---------------------------------------------------------------------------------------------- memory, order, private bits


def test_memory_that_nobody_wrote_is_poison():
    """torchair's own gradient of x[1] scatters into it: everything but x[1] is NaN."""

    def select_backward(ge, grad):
        empty = ge.Empty(ge.Cast([3, 2], dst_type=3), dtype=0)
        return ge.ScatterElements(empty, ge.BroadcastTo(1, [3, 2]), ge.BroadcastTo(grad, [3, 2]), axis=0)

    (result,) = run_node(select_backward, torch.ones(1, 2))
    assert torch.equal(result[1], torch.ones(2)) and result[[0, 2]].isnan().all()
    integers = run_node(lambda ge, x: ge.Empty(ge.Cast([2], dst_type=3), dtype=3), X)[0]
    assert torch.equal(integers, torch.full((2,), -(2**31), dtype=torch.int32))


def test_updates_of_one_cell_poison_it_unless_they_agree():
    def scatter(ge, x, i, u):
        return ge.ScatterElements(x, i, u, axis=0)

    i = torch.tensor([1, 1, 3, 3])
    (result,) = run_node(scatter, torch.zeros(5), i, torch.tensor([1.0, 2.0, 7.0, 7.0]))
    assert result[1].isnan() and torch.equal(result[[0, 2, 3, 4]], torch.tensor([0.0, 0.0, 7.0, 0.0]))
    (result,) = run_node(scatter, torch.zeros(5).int(), i, torch.tensor([1, 2, 7, 7]).int())
    assert result.tolist() == [0, -(2**31), 0, 7, 0]


def test_a_sort_that_is_not_stable_turns_equal_keys_around():
    x = torch.tensor([2.0, 1.0, 2.0, 1.0])
    assert run_node(lambda ge, x: ge.Sort(x, stable=True), x)[1].tolist() == [1, 3, 0, 2]
    values, order = run_node(lambda ge, x: ge.Sort(x), x)
    assert values.tolist() == [1.0, 1.0, 2.0, 2.0] and order.tolist() == [3, 1, 2, 0]


def test_a_range_of_several_dtypes_is_float32():
    (result,) = run_node(lambda ge, x: ge.Range(ge.Cast(0, dst_type=3), 4, ge.Cast(1, dst_type=3)), X)
    assert_same(result, torch.arange(4.0))


def test_float_to_integer_truncates_and_saturates():
    x = torch.tensor([-1.9, 1.9, 3e9, -3e9, float("inf"), float("nan")])
    (result,) = run_node(lambda ge, x: ge.Cast(x, dst_type=3), x)
    assert result.tolist() == [-1, 1, 2**31 - 1, -(2**31), 2**31 - 1, 0]


INDEX, UPDATES = torch.tensor([1], dtype=torch.int32), torch.ones(1, 3)


def test_a_copy_is_written_in_place_and_nothing_else():
    def index_add(ge, x, i, u):
        moved = ge.TensorMove(x)
        return ge.InplaceIndexAdd(moved, i, u, None, axis=0), ge.Neg(x)

    before = X.clone()
    added, negative = run_node(index_add, X, INDEX, UPDATES)
    assert torch.equal(X, before) and torch.equal(negative, -X)
    assert torch.equal(added, X.index_add(0, INDEX.long(), UPDATES))


@pytest.mark.parametrize(
    "target,message",
    [
        (lambda ge, x: x, "writes in place into Data, and it is not the node's own to write"),
        (lambda ge, x: ge.Identity(x), "writes in place into memory shared with an input"),
        (lambda ge, x: ge.Reshape(ge.Reshape(x, [6]), [2, 3]), "memory shared with an input"),
    ],
)
def test_writing_into_an_input_is_refused(target, message):
    with pytest.raises(interpret.Invalid, match=rf"InplaceIndexAdd\): .*{message}"):
        run_node(lambda ge, x, i, u: ge.InplaceIndexAdd(target(ge, x), i, u, None, axis=0), X, INDEX, UPDATES)


def test_writing_into_a_value_that_others_read_is_refused():
    def shared(ge, x, i, u):
        value = ge.Neg(x)
        return ge.InplaceIndexAdd(value, i, u, None, axis=0), ge.Abs(value)

    with pytest.raises(interpret.Invalid, match="writes in place into Neg, and Abs reads it too; without a TensorMove"):
        run_node(shared, X, INDEX, UPDATES)

    def through_a_view(ge, x, i, u):
        value = ge.Neg(x)
        return ge.InplaceIndexAdd(ge.Identity(value), i, u, None, axis=0), ge.Abs(value)

    with pytest.raises(interpret.Invalid, match="memory shared with Neg"):
        run_node(through_a_view, X, INDEX, UPDATES)


def test_a_strided_write_goes_into_its_copy():
    def write(ge, x, u):
        return ge.ViewCopy(ge.TensorMove(x), [2, 2], [3, 1], 1, u, [2, 2], [1, 2], 0)

    u = torch.tensor([10.0, 20.0, 30.0, 40.0])
    expected = X.clone()
    expected[:, 1:] = u.as_strided((2, 2), (1, 2))
    assert torch.equal(run_node(write, X, u)[0], expected)
    with pytest.raises(interpret.Invalid, match=r"ViewCopy.*not the node's own"):
        run_node(lambda ge, x, u: ge.ViewCopy(x, [2, 2], [3, 1], 1, u, [2, 2], [1, 2], 0), X, u)


def test_a_broadcast_can_be_copied_and_written():
    def write(ge, i, u):
        return ge.InplaceIndexAdd(ge.TensorMove(ge.Fill([2, 3], 0.0)), i, u, None, axis=0)

    assert run_node(write, INDEX, UPDATES)[0].tolist() == [[0.0] * 3, [1.0] * 3]


WINDOW = {"ksize": [1, 2, 2, 1], "strides": [1, 2, 2, 1], "pads": [1, 0, 0, 1]}


@pytest.mark.parametrize("use", [lambda ge, argmax: ge.Cast(argmax, dst_type=9), lambda ge, argmax: argmax])
def test_the_argmax_of_a_max_pool_is_no_index(use):
    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(interpret.Invalid, match="MaxPoolWithArgmaxV1's argmax, which is no index"):
        run_node(lambda ge, x: use(ge, images(ge.MaxPoolWithArgmaxV1(x, **WINDOW), 0)[1]), x)


def test_the_argmax_of_another_window_is_refused():
    def mixed(ge, x):
        _, argmax = images(ge.MaxPoolWithArgmaxV1(x, **WINDOW), 0)
        other = {**WINDOW, "ksize": [1, 1, 1, 1]}
        return images(ge.MaxPoolGradWithArgmaxV1(x, ge.ZerosLike(x), argmax, **other), 0)

    with pytest.raises(interpret.Invalid, match="not of a MaxPoolWithArgmaxV1 of the same window"):
        run_node(mixed, torch.randn(1, 1, 4, 4))


# ---------------------------------------------------------------------------------------------------------- execution


def test_a_watcher_sees_every_node_and_finds_the_first_nan():
    graph = node_graph(lambda ge, x: ge.Exp(ge.Log(ge.Neg(x))), X)
    seen = []
    interpret.run(graph, [X], watch=lambda node, results: seen.append((node.type, bool(results[0].isnan().any()))))
    assert seen == [("Neg", False), ("Log", True), ("Exp", True)]


def test_values_are_dropped_after_their_last_use():
    import weakref

    graph = node_graph(lambda ge, x: ge.Sin(ge.Cos(ge.Exp(ge.Abs(x)))), X)
    made, alive = [], []

    def watch(node, results):
        made.append(weakref.ref(results[0]))
        alive.append(sum(reference() is not None for reference in made))

    interpret.run(graph, [X], watch=watch)
    assert alive == [1, 2, 2, 2]  # a node's operand and its result


def test_nodes_may_stand_in_any_order_but_not_in_a_circle():
    graph = node_graph(lambda ge, x: ge.Sub(ge.Abs(x), ge.Neg(x)), X)
    shuffled = type(graph)()
    shuffled.op.extend(reversed(list(graph.op)))
    assert torch.equal(interpret.run(shuffled, [X])[0], X.abs() + X)
    neg = next(op for op in shuffled.op if op.type == "Neg")
    neg.input[0] = "Sub:0"
    with pytest.raises(interpret.Invalid, match="cycle"):
        interpret.prepare(shuffled)


def test_a_prepared_program_runs_again_and_gives_new_tensors():
    program = interpret.prepare(node_graph(lambda ge, x: (ge.Neg(x), x), X))
    (first, same), (second, _) = interpret.run(program, [X]), interpret.run(program, [X + 1])
    assert torch.equal(first, -X) and torch.equal(second, -X - 1)
    assert torch.equal(same, X) and same.data_ptr() != X.data_ptr()


def test_inputs_may_be_strided():
    graph = node_graph(lambda ge, x: ge.Reshape(x, [6]), X)
    assert torch.equal(interpret.run(graph, [X.T.contiguous().T])[0], X.reshape(-1))


def test_a_whole_step_with_gradients_is_executed():
    def loss(params, x):
        y = torch.nn.functional.layer_norm(torch.relu(x @ params["w"]), (4,))
        return (y.softmax(-1)[:, 1] - 0.3).square().mean()

    def step(w, x):
        grads, value = torch.func.grad_and_value(loss)({"w": w}, x)
        return w - 0.1 * grads["w"], value

    generator = torch.Generator().manual_seed(0)
    round_trip(step, torch.randn(3, 4, generator=generator), torch.randn(5, 3, generator=generator))
