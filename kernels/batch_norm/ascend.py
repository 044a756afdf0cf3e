"""`batch_norm` for Ascend: BNTrainingReduce and BNTrainingUpdate, its gradient BNTrainingUpdateGrad and BNTrainingReduceGrad.

Four tasks that read or write the images eight times. A2's kernels take the variance as a difference of squares (`interpret.a2`),
float16, bfloat16 or float32 images, float32 per channel, and the layout of the cube's results. Rows of which some count are as many
images of one pixel: those that do not are made 0 before and after, and sums over all are scaled so that a mean is that of those that
count. Not run on a device.
Source: CANN 8.1.RC1, impl/dynamic/bn_training_*.py; outputs as in op_proto/inc/reduce_ops.h.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bevfn.kernels.batch_norm import reference

FUSED = True
"""Whether they are used. If not, the closed form is, which is slower on paper: for who finds them wrong or slow on a device."""
_OPERATORS = torch.ops.bevfn.batch_norm.default, torch.ops.bevfn.batch_norm_backward.default


def decompositions() -> dict[Any, Callable[..., Any]]:
    """{operator: the same in aten operators}, none where Ascend's are used."""
    return {} if FUSED else dict(zip(_OPERATORS, (reference.forward, reference.backward)))


def nodes(x: Any, weight: Any, bias: Any, eps: float, channels: int, share: Any = None) -> tuple[Any, Any, Any]:
    """y, mean and variance as GE nodes, of such. share: the numbers of a channel over those that count, where the others are 0."""
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair.ge._ge_graph import DataType

    sums = ge.BNTrainingReduce(x)
    _images(sums[0], 1, 2)
    # The running statistics that it writes to are nobody's: the layer updates the step's.
    running = [ge.TensorMove(ge.Const([n] * channels, dtype=DataType.DT_FLOAT)) for n in (0.0, 1.0)]
    made = ge.BNTrainingUpdate(x, *_scaled(sums, share), weight, bias, *running, factor=0.0, epsilon=eps)
    _images(made[0], 7, 5)
    return made[0], made[3], made[4]


def gradient_nodes(
    grad: Any, x: Any, weight: Any, mean: Any, var: Any, eps: float, share: Any = None
) -> tuple[Any, Any, Any]:
    """The gradients of x, weight and bias."""
    from torchair._ge_concrete_graph import ge_apis as ge

    sums = of_weight, of_bias = ge.BNTrainingUpdateGrad(grad, x, mean, var, epsilon=eps)
    _images(of_weight, 4, 2)
    of_x = ge.BNTrainingReduceGrad(grad, x, *_scaled(sums, share), weight, mean, var, epsilon=eps)
    _images(of_x, 7, 1)
    return of_x, of_weight, of_bias


def _scaled(sums: Sequence[Any], share: Any) -> Sequence[Any]:
    """A mean, which the operators take over all numbers, is then that over those that count."""
    from torchair._ge_concrete_graph import ge_apis as ge

    return sums if share is None else [ge.Mul(x, share) for x in sums]


def _images(node: Any, operands: int, results: int) -> None:
    """States the layout: GE would take ND for another one."""
    from torchair._ge_concrete_graph.utils import specific_op_input_layout, specific_op_output_layout

    specific_op_input_layout(node, indices=list(range(operands)), layout="NCHW")
    specific_op_output_layout(node, indices=list(range(results)), layout="NCHW")


def register() -> None:
    """The converters."""
    import torchair
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair.ge._ge_graph import DataType

    def zeroed(x: Any, mask: Any, like: Any) -> Any:
        """x with 0 in the rows that do not count."""
        return ge.Mul(x, mask if like.dtype == DataType.DT_FLOAT else ge.Cast(mask, dst_type=like.dtype))

    def pixels(x: Any, mask: Any, like: Any) -> Any:
        """Rows as images of one pixel."""
        return ge.Reshape(zeroed(x, mask, like), [*like.size, 1, 1])

    def share(rows: Any, like: Any) -> Any:
        return ge.RealDiv(ge.Const(float(like.size[0]), dtype=DataType.DT_FLOAT), rows)

    @torchair.register_fx_node_ge_converter(_OPERATORS[0])
    def convert(
        x: Any,
        weight: Any,
        bias: Any,
        eps: float,
        mask: Any = None,
        rows: Any = None,
        relu: bool = False,
        meta_outputs: Any = None,
    ) -> Any:
        assert not relu, "a step that is traced for Ascend has its ReLUs behind the norms (layers/batch_norm.py)"
        like, channels = meta_outputs[0], meta_outputs[1].size[0]
        if mask is None:
            return nodes(x, weight, bias, eps, channels)
        y, mean, var = nodes(pixels(x, mask, like), weight, bias, eps, channels, share(rows, like))
        return zeroed(ge.Reshape(y, list(like.size)), mask, like), mean, var

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
        relu_bias: Any = None,
        meta_outputs: Any = None,
    ) -> Any:
        assert relu_bias is None
        like = meta_outputs[0]
        if mask is None:
            return gradient_nodes(grad, x, weight, mean, var, eps)
        grad, x = (pixels(t, mask, like) for t in (grad, x))
        of_x, of_weight, of_bias = gradient_nodes(grad, x, weight, mean, var, eps, share(rows, like))
        return zeroed(ge.Reshape(of_x, list(like.size)), mask, like), of_weight, of_bias
