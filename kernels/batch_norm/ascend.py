"""`batch_norm` for Ascend: BNTrainingReduce and BNTrainingUpdate, its gradient BNTrainingUpdateGrad and BNTrainingReduceGrad.

Four tasks that read or write the images eight times. Rows of which some count are the pixels of as many images, those that do not
are made 0 before and after, and sums over all are scaled to the number of those that count: a mean is then theirs. A2's kernels take the variance as a difference of squares (`interpret.a2`),
float16, bfloat16 or float32 images, float32 per channel, and the layout of the cube's results. Not run on a device.
Source: CANN 8.1.RC1, impl/dynamic/bn_training_*.py; outputs as in op_proto/inc/reduce_ops.h.
"""

from collections.abc import Callable
from typing import Any

import torch

from bevfn.kernels.batch_norm import backward, forward

FUSED = True
"""Whether they are used. If not, the closed form is, which is slower on paper: for who finds them wrong or slow on a device."""
_OPERATORS = torch.ops.bevfn.batch_norm.default, torch.ops.bevfn.batch_norm_backward.default


def decompositions() -> dict[Any, Callable[..., Any]]:
    """{operator: the same in aten operators}, none where Ascend's are used."""
    return {} if FUSED else dict(zip(_OPERATORS, (forward, backward)))


def register() -> None:
    """The converters."""
    import torchair
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair._ge_concrete_graph.utils import specific_op_input_layout, specific_op_output_layout
    from torchair.ge._ge_graph import DataType

    def images(node: Any, operands: int, results: int) -> None:
        specific_op_input_layout(node, indices=list(range(operands)), layout="NCHW")
        specific_op_output_layout(node, indices=list(range(results)), layout="NCHW")

    def zeroed(x: Any, mask: Any, like: Any) -> Any:
        """x with 0 in the rows that do not count."""
        return ge.Mul(x, mask if like.dtype == DataType.DT_FLOAT else ge.Cast(mask, dst_type=like.dtype))

    def scaled(sums: list[Any], rows: Any, sizes: list[int]) -> list[Any]:
        """Sums over all rows, of which a mean over those that count is the sum by the number of all."""
        return [ge.Mul(x, ge.RealDiv(ge.Const(float(sizes[0]), dtype=DataType.DT_FLOAT), rows)) for x in sums]

    @torchair.register_fx_node_ge_converter(_OPERATORS[0])
    def convert(
        x: Any, weight: Any, bias: Any, eps: float, mask: Any = None, rows: Any = None, meta_outputs: Any = None
    ) -> Any:
        sizes = list(meta_outputs[0].size)
        if mask is not None:
            x = ge.Reshape(zeroed(x, mask, meta_outputs[0]), [*sizes, 1, 1])
        sums = ge.BNTrainingReduce(x)
        images(sums[0], 1, 2)
        total, squares = sums if rows is None else scaled(sums, rows, sizes)
        # The running statistics that it writes to are nobody's: the layer updates the step's.
        running = [ge.TensorMove(ge.Const([n] * sizes[1], dtype=DataType.DT_FLOAT)) for n in (0.0, 1.0)]
        y, *_, mean, var = ge.BNTrainingUpdate(x, total, squares, weight, bias, *running, factor=0.0, epsilon=eps)
        images(y, 7, 5)
        return y if mask is None else zeroed(ge.Reshape(y, sizes), mask, meta_outputs[0]), mean, var

    @torchair.register_fx_node_ge_converter(_OPERATORS[1])
    def convert_backward(
        grad: Any,
        x: Any,
        weight: Any,
        mean: Any,
        var: Any,
        eps: float,
        mask: Any = None,
        rows: Any = None,
        meta_outputs: Any = None,
    ) -> Any:
        sizes = list(meta_outputs[0].size)
        if mask is not None:
            grad, x = (ge.Reshape(zeroed(t, mask, meta_outputs[0]), [*sizes, 1, 1]) for t in (grad, x))
        of_weight, of_bias = ge.BNTrainingUpdateGrad(grad, x, mean, var, epsilon=eps)
        images(of_weight, 4, 2)
        sums = [of_weight, of_bias] if rows is None else scaled([of_weight, of_bias], rows, sizes)
        of_x = ge.BNTrainingReduceGrad(grad, x, *sums, weight, mean, var, epsilon=eps)
        images(of_x, 7, 1)
        return of_x if mask is None else zeroed(ge.Reshape(of_x, sizes), mask, meta_outputs[0]), of_weight, of_bias
