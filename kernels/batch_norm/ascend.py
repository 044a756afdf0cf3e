"""`batch_norm` for Ascend: BNTrainingReduce and BNTrainingUpdate, its gradient BNTrainingUpdateGrad and BNTrainingReduceGrad.

Four tasks that read or write the images eight times. A2's kernels take the variance as a difference of squares (`interpret.a2`),
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


def nodes(x: Any, weight: Any, bias: Any, eps: float, channels: int) -> tuple[Any, Any, Any]:
    """y, mean and variance as GE nodes, of such."""
    from torchair._ge_concrete_graph import ge_apis as ge
    from torchair.ge._ge_graph import DataType

    total, squares = ge.BNTrainingReduce(x)
    _images(total, 1, 2)
    # The running statistics that it writes to are nobody's: the layer updates the step's.
    running = [ge.TensorMove(ge.Const([n] * channels, dtype=DataType.DT_FLOAT)) for n in (0.0, 1.0)]
    made = ge.BNTrainingUpdate(x, total, squares, weight, bias, *running, factor=0.0, epsilon=eps)
    _images(made[0], 7, 5)
    return made[0], made[3], made[4]


def gradient_nodes(grad: Any, x: Any, weight: Any, mean: Any, var: Any, eps: float) -> tuple[Any, Any, Any]:
    """The gradients of x, weight and bias."""
    from torchair._ge_concrete_graph import ge_apis as ge

    of_weight, of_bias = ge.BNTrainingUpdateGrad(grad, x, mean, var, epsilon=eps)
    _images(of_weight, 4, 2)
    of_x = ge.BNTrainingReduceGrad(grad, x, of_weight, of_bias, weight, mean, var, epsilon=eps)
    _images(of_x, 7, 1)
    return of_x, of_weight, of_bias


def _images(node: Any, operands: int, results: int) -> None:
    """States the layout: GE would take ND for another one."""
    from torchair._ge_concrete_graph.utils import specific_op_input_layout, specific_op_output_layout

    specific_op_input_layout(node, indices=list(range(operands)), layout="NCHW")
    specific_op_output_layout(node, indices=list(range(results)), layout="NCHW")


def register() -> None:
    """The converters."""
    import torchair

    @torchair.register_fx_node_ge_converter(_OPERATORS[0])
    def convert(x: Any, weight: Any, bias: Any, eps: float, meta_outputs: Any = None) -> Any:
        return nodes(x, weight, bias, eps, meta_outputs[1].size[0])

    @torchair.register_fx_node_ge_converter(_OPERATORS[1])
    def convert_backward(
        grad: Any, x: Any, weight: Any, mean: Any, var: Any, eps: float, meta_outputs: Any = None
    ) -> Any:
        return gradient_nodes(grad, x, weight, mean, var, eps)
