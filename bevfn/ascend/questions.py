"""What only a device can answer, as graphs of one operator: the table of `bevfn ascend probe`.

A question has the answers that are thinkable, each with what it would compute: by mathematics first, then as a kernel
may do it. What is computed says which one it is, and an answer says what is then to be set. Expectations are written in
int64, float64 or plain indexing, and use neither the interpreter nor a converter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bevfn.ascend.rates import L2
from bevfn.kernels.batch_norm import ascend as batch_norm

Results = tuple[Tensor | None, ...]
ROWS = 4096
"""of a rate's graph where no time is taken"""
INT32, INT64 = 3, 9  # in GE's numbering
POINTS = 330_000
"""of a sample of ten sweeps, which voxelization sorts"""


@dataclass(frozen=True)
class Answer:
    """One thing that a kernel may compute."""

    name: str
    results: Callable[..., Results]
    """of the operands; None for a result that does not matter"""
    then: str
    """what follows for bevfn"""
    tolerance: float = 0.0
    """largest relative error, as a norm; 0: the same bits"""


@dataclass(frozen=True)
class Question:
    """One graph."""

    name: str
    asks: str
    assumes: str
    """what bevfn takes for granted today, and the file"""
    operands: Callable[[int], tuple[Tensor, ...]]
    """of a number of rows, on the CPU"""
    answers: tuple[Answer, ...]
    """the first one is by mathematics"""
    build: Callable[..., Any] | None = None
    """(torchair's builders of GE types, operands) -> nodes; None: `step`"""
    step: Callable[..., tuple[Tensor, ...]] | None = None
    """in torch's operators, through bevfn's own lowering"""
    rows: int = 0
    """whose time is taken on a device; 0: none"""
    rate: Literal["gather", "index_add", "sort"] | None = None
    """the field of `rates.Rates` that a row's time is"""
    hf32: bool = False
    """whether the device may compute float32 in HF32"""
    refused: str = "GE does not take the graph: a device cannot run what bevfn lowers to it"
    """what follows where there is no kernel"""


def random(*shape: int) -> Tensor:
    """float32, the same numbers every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(13))


def whole(*shape: int, most: int) -> Tensor:
    """int32 from 0 below `most`, the same numbers every time."""
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(17), dtype=torch.int32)


# --------------------------------------------------------------------------------------------------- integer arithmetic

LARGE = (2**24 + 1, 2**30 + 1, -(2**24) - 3, 340_000_001, 83_000_003, 7)
LIMITS = (-(2**31), 2**31 - 1)


def select(condition: Tensor, a: Tensor, b: Tensor) -> Results:
    """What SelectV2 means."""
    return (torch.where(condition, a, b),)


def select_float(condition: Tensor, a: Tensor, b: Tensor) -> Results:
    """Through float32."""
    return (torch.where(condition, a.float(), b.float()).to(torch.int32),)


def floor_div(a: Tensor, b: Tensor) -> Results:
    """Of int64."""
    return (torch.div(a.long(), b.long(), rounding_mode="floor").int(),)


def floor_div_float(a: Tensor, b: Tensor) -> Results:
    """Through float32."""
    return (torch.floor(a.float() / b.float()).to(torch.int32),)


def multiples() -> tuple[Tensor, Tensor]:
    """Products below 2^24 and one of their factors, of either sign."""
    b = whole(ROWS, most=4095) + 1
    a = b * (whole(ROWS, most=2**24) // b)
    return torch.where(whole(ROWS, most=2) > 0, a, -a), b


def neighbouring() -> tuple[Tensor, Tensor]:
    """Numbers of all sizes, against themselves, one more, one less, and the ends of the type."""
    some = torch.tensor([*LARGE, *LIMITS, 0, 2**24])
    pairs = [torch.stack((some, (some + step).clamp(*LIMITS))) for step in (-1, 0, 1)]
    ends = [torch.stack((some, torch.full_like(some, end))) for end in LIMITS]
    a, b = torch.cat([*pairs, *ends], 1).int()
    return a, b


def wrapped(a: Tensor, b: Tensor) -> Results:
    """The lower 32 bits of the product, as a signed number."""
    return (((a.long() * b.long() + 2**31) % 2**32 - 2**31).int(),)


def saturated(a: Tensor, b: Tensor) -> Results:
    """The product, cut off at int32's ends."""
    return ((a.long() * b.long()).clamp(*LIMITS).int(),)


def product_float(a: Tensor, b: Tensor) -> Results:
    """As float32 rounds it, cut off at int32's ends."""
    return ((a.float() * b.float()).double().clamp(*LIMITS).long().int(),)


def running(x: Tensor) -> Results:
    """Sums up to each place."""
    return (x.long().cumsum(0).int(),)


def running_float(x: Tensor) -> Results:
    """Of float32, one after the other."""
    total, sums = torch.zeros(()), []
    for number in x.float():
        total = total + number
        sums.append(total)
    return (torch.stack(sums).to(torch.int32),)


def recast(x: Tensor) -> Results:
    """To the other width."""
    return (x.to(torch.int32 if x.dtype == torch.int64 else torch.int64),)


def recast_float(x: Tensor) -> Results:
    """Through float32."""
    return (x.float().to(torch.int32 if x.dtype == torch.int64 else torch.int64),)


def _whole_numbers(
    name: str, kind: str, operands: tuple[Tensor, ...], build: Callable[..., Any], exact: Any, rounded: Any, says: str
) -> Question:
    """Whether `kind` is exact for integers that float32 has not; as a2.json's "integers" has it."""
    return Question(
        name=name,
        asks=f"Is {kind} of integers above 2^24 exact?",
        assumes=f"{says} (ascend/a2.json)",
        operands=lambda rows: operands,
        build=build,
        answers=(
            Answer("exact", exact, "integers of any size may meet it"),
            Answer("through float32", rounded, "let interpret/a2.py compute it so, and keep its integers below 2^24"),
        ),
    )


NUMBERS = torch.tensor(LARGE).int()
WHOLE = (
    _whole_numbers(
        "maximum",
        "Maximum",
        (NUMBERS, NUMBERS.flip(0)),
        lambda ge, a, b: ge.Maximum(a, b),
        lambda a, b: (torch.maximum(a, b),),
        lambda a, b: (torch.maximum(a.float(), b.float()).to(torch.int32),),
        "yes, its source casts nothing",
    ),
    _whole_numbers(
        "clip",
        "ClipByValueV2",
        (NUMBERS, torch.tensor(-(2**24) - 1).int(), torch.tensor(2**25 + 1).int()),
        lambda ge, x, low, high: ge.ClipByValueV2(x, low, high),
        lambda x, low, high: (x.clamp(low, high),),
        lambda x, low, high: (x.float().clamp(low.float(), high.float()).to(torch.int32),),
        "yes, its source casts nothing",
    ),
    _whole_numbers(
        "reduce-max",
        "ReduceMax",
        (torch.stack((NUMBERS, NUMBERS - 2)),),
        lambda ge, x: ge.ReduceMax(x, ge.Const([1], dtype=INT32), keep_dims=False),
        lambda x: (x.amax(1),),
        lambda x: (x.float().amax(1).to(torch.int32),),
        "nobody knows, as A2's instruction takes floats only: ranks below 2^24 meet it (heads/suppression.py)",
    ),
    _whole_numbers(
        "cumsum",
        "Cumsum",
        (torch.tensor([2**24, 1, 1, 2**28, 3, 5]).int(),),
        lambda ge, x: ge.Cumsum(x, ge.Const(0, dtype=INT32)),
        running,
        running_float,
        "yes, its source adds in int32",
    ),
    _whole_numbers(
        "cast-narrow",
        "Cast of int64 to int32",
        (torch.tensor(LARGE),),
        lambda ge, x: ge.Cast(x, dst_type=INT32),
        recast,
        recast_float,
        "nobody knows, and indices above 2^24 meet it where the graph makes its tables",
    ),
    _whole_numbers(
        "cast-wide",
        "Cast of int32 to int64",
        (NUMBERS,),
        lambda ge, x: ge.Cast(x, dst_type=INT64),
        recast,
        recast_float,
        "nobody knows, and indices above 2^24 meet it where the graph makes its tables",
    ),
)
INTEGERS = (
    Question(
        name="select",
        asks="Does SelectV2 choose int32 above 2^24 exactly?",
        assumes="no, through float32: integers are chosen by products and a sum (ascend/fixes/decompositions.py)",
        operands=lambda rows: (
            torch.tensor([True, False] * 3),
            torch.tensor(LARGE).int(),
            torch.tensor(LARGE[::-1]).int(),
        ),
        build=lambda ge, c, a, b: ge.SelectV2(c, a, b),
        answers=(
            Answer("exact", select, "_where may go, which saves two products and a sum per select of integers"),
            Answer("through float32", select_float, "as assumed: keep _where"),
        ),
    ),
    Question(
        name="floor-div",
        asks="Does FloorDiv divide int32 above 2^24 exactly?",
        assumes="no, through float32: only numbers below 2^24 are divided (ascend/interpret/a2.py, docs/ascend.md)",
        operands=lambda rows: (torch.tensor(LARGE).int(), torch.tensor([1, 3, 1, 7, 1, 2]).int()),
        build=lambda ge, a, b: ge.FloorDiv(a, b),
        answers=(
            Answer("exact", floor_div, "voxelization may divide larger cell numbers"),
            Answer("through float32", floor_div_float, "as assumed: keep quotients' operands below 2^24"),
        ),
    ),
    Question(
        name="floor-div-small",
        asks="Does FloorDiv of int32 below 2^24 give the whole quotient where the divisor divides it?",
        assumes="yes, float32 divides with the nearest number: cells and shifts are divided so (ascend/fixes/rewrites.py)",
        operands=lambda rows: multiples(),
        build=lambda ge, a, b: ge.FloorDiv(a, b),
        answers=(
            Answer("exact", floor_div, "as assumed"),
            Answer(
                "by the reciprocal",
                lambda a, b: (torch.floor(a.float() * (1 / b.float())).int(),),
                "quotients are one less at times: keep --host-tables; shifts, by powers of 2, are right all the same",
            ),
        ),
    ),
    Question(
        name="compare",
        asks="Does GreaterEqual compare int32 above 2^24 exactly, to both ends of the type?",
        assumes="yes: cell numbers of 340 M are compared (ascend/a2.json)",
        operands=lambda rows: neighbouring(),
        build=lambda ge, a, b: ge.GreaterEqual(a, b),
        answers=(
            Answer("exact", lambda a, b: (a.long() >= b.long(),), "as assumed"),
            Answer(
                "through float32",
                lambda a, b: (a.float() >= b.float(),),
                "keep --host-tables: voxelize and neighbours compare cells in the graph",
            ),
            Answer(
                "by the difference",
                lambda a, b: ((a - b) >= 0,),
                "the difference of the type's ends overflows: cells, below 2^30, may be compared",
            ),
        ),
    ),
    Question(
        name="mul-wrap",
        asks="Does Mul of int32 keep the lower 32 bits of a product that overflows?",
        assumes="yes: the hash of dropout's random numbers multiplies so (bevfn/rng.py, _mix)",
        operands=lambda rows: (
            torch.tensor([0x7FEB352D, 4099, 2**31 - 1, -(2**31) + 5, 77_777]).int(),
            torch.tensor([0x7FEB352D, 4099, 2**31 - 1, 3, -0x7B935975]).int(),
        ),
        build=lambda ge, a, b: ge.Mul(a, b),
        answers=(
            Answer("wraps", wrapped, "as assumed"),
            Answer("saturates", saturated, "dropout is biased: give rng._bits int64, as before the int32 hash"),
            Answer(
                "through float32", product_float, "dropout is biased: give rng._bits int64, as before the int32 hash"
            ),
        ),
    ),
    Question(
        name="sxpy",
        asks="Is there a kernel of Sxpy (x1 - alpha x2)?",
        assumes="no: what torchair makes Sxpy of is lowered to Sub (ascend/fixes/decompositions.py, _rsub)",
        operands=lambda rows: (random(8), random(8).flip(0)),
        build=lambda ge, a, b: ge.Sxpy(a, b, None),
        answers=(
            Answer("difference", lambda a, b: (a - b,), "_rsub may go; Sub costs the same, so nothing is urgent"),
        ),
        refused="as assumed: keep _rsub",
    ),
)

# ---------------------------------------------------------------------------------------------------------------- rows


def added(buffer: Tensor, index: Tensor, rows: Tensor) -> Results:
    """Whole numbers, whose sums float32 has exactly in any order."""
    return (buffer.double().index_add(0, index.long(), rows.double()).to(buffer.dtype),)


def to_add(rows: int) -> tuple[Tensor, ...]:
    """Lift-splat's: cells of 80 channels, in no order, some hit often."""
    cells = max(rows // 8, 1)
    return torch.zeros(cells, 80), whole(rows, most=cells), whole(rows, 80, most=8).float()


def to_gather(rows: int) -> tuple[Tensor, ...]:
    """Rows of 128 bytes, in no order. Timed, they are of a table of four times the L2's size: what is taken is the memory's rate,
    where three of four rows are; tables of the steps that fit into L2 are read faster."""
    table = 4 * L2 // 128 if rows > ROWS else ROWS
    return random(table, 64).half(), whole(rows, most=table)


ONE = 0x3F800000
"""the bits of 1.0: those of whole numbers are denormal, which a device may take for 0"""


def stable(x: Tensor) -> Results:
    """The sorted values, and places of equal ones in their order: of a sort of pairs (value, place)."""
    pairs = x.view(torch.int32).long() * x.shape[0] + torch.arange(x.shape[0], device=x.device)
    order = pairs.sort()[0] % x.shape[0]
    return x[order], order.int()


MOVES = (
    Question(
        name="index-add",
        asks="What does a row of InplaceIndexAdd without alpha cost?",
        assumes="5, 15 or 35 ns (ascend/rates.py)",
        operands=to_add,
        build=lambda ge, x, index, rows: ge.InplaceIndexAdd(ge.TensorMove(x), index, rows, None, axis=0),
        answers=(Answer("sums", added, "give the report to `bevfn graph --estimate --rates`"),),
        rows=1_000_000,
        rate="index_add",
    ),
    Question(
        name="scatter-add",
        asks="Does the installed GE take InplaceScatterAdd, and is a row cheaper there?",
        assumes="it is absent: index_add becomes InplaceIndexAdd (ascend/fixes/converters.py, _index_add)",
        operands=to_add,
        build=lambda ge, x, index, rows: _custom(
            "InplaceScatterAdd", var=ge.TensorMove(x), indices=index, updates=rows
        ),
        answers=(Answer("sums", added, "where a row is cheaper than index-add's, let _index_add make this type"),),
        rows=1_000_000,
        refused="as assumed: keep InplaceIndexAdd (operand names var, indices, updates are guesses from eager's)",
    ),
    Question(
        name="gather",
        asks="What does a row of GatherV2 of 128 bytes cost, of a table that the L2 does not hold?",
        assumes="0.30, 0.65 or 1.2 ns (ascend/rates.py)",
        operands=to_gather,
        build=lambda ge, table, index: ge.GatherV2(table, index, ge.Const(0, dtype=INT32)),
        answers=(
            Answer(
                "rows",
                lambda table, index: (table[index.long()],),
                "give the report to `bevfn graph --estimate --rates`",
            ),
        ),
        rows=10_000_000,
        rate="gather",
    ),
    Question(
        name="sort",
        asks=f"Does Sort keep equal ones among {POINTS:,} numbers in their order, and what does a number cost?",
        assumes="yes: points of a voxel are taken in their order (kernels/voxelize/ascend.py)",
        operands=lambda rows: ((whole(POINTS, most=60_000) + ONE).view(torch.float32),),
        build=lambda ge, x: ge.Sort(x, axis=0, descending=False, stable=True),
        answers=(
            Answer("stable", stable, "as assumed"),
            Answer(
                "sorted, not stable",
                lambda x: (stable(x)[0], None),
                "use --host-tables, the default here; in the graph, which points a full voxel keeps is undefined",
            ),
        ),
        rows=POINTS,
        rate="sort",
    ),
)

# -------------------------------------------------------------------------------------------------------------- floats


def convolved(x: Tensor, weight: Tensor) -> Results:
    """In float64, rounded once."""
    return (torch.nn.functional.conv2d(x.double(), weight.double()).float(),)


def convolved_hf32(x: Tensor, weight: Tensor) -> Results:
    """Of operands with 11 bits of mantissa, halves to even."""
    return convolved(
        *(torch.ldexp(torch.round(m * 2**12) / 2**12, e).float() for m, e in map(torch.frexp, (x, weight)))
    )


def convolve(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    """The step."""
    return (torch.nn.functional.conv2d(x, weight),)


def images(rows: int) -> tuple[Tensor, ...]:
    """A convolution's."""
    return random(1, 64, 24, 24), random(64, 64, 3, 3)


def _precision(name: str, asks: str, assumes: str, then: tuple[str, str], **other: Any) -> Question:
    answers = (
        Answer("float32", convolved, then[0], 1e-5),
        Answer("HF32", convolved_hf32, then[1], 5e-5),
    )
    return Question(name, asks, assumes, images, answers, step=convolve, **other)


EPS = 1e-5


def normalised(x: Tensor) -> tuple[Tensor]:
    """By mean and variance of each channel, two passes: as layers/batch_norm.py."""
    mean = x.mean((0, 2, 3), keepdim=True)
    centred = x - mean
    return (centred * torch.rsqrt((centred * centred).mean((0, 2, 3), keepdim=True) + EPS),)


CHANNELS = 64
OFF_CENTRE = 1000.0
"""mean over standard deviation, of which a difference of squares loses most of float32's digits"""
UNFUSE = "set FUSED = False in kernels/batch_norm/ascend.py: batch norm is written out then"
EXACT, SQUARES = (
    "exact: take what is faster",
    "as read in CANN's source: the variance is a difference of squares, of numbers this far off 0",
)


def activations(rows: int, mean: float = OFF_CENTRE, deviation: float = 1.0) -> Tensor:
    """[N C 128 128] of 2 x 64 images' worth of numbers."""
    size = 128 if rows > ROWS else 16
    return deviation * random(2, CHANNELS, size, size) + mean


def affine() -> tuple[Tensor, Tensor]:
    """Weight and bias."""
    return random(CHANNELS) + 2, random(CHANNELS).flip(0)


def fused(x: Tensor, weight: Tensor, bias: Tensor, share: float | Tensor = 1.0, *, half: bool = False) -> Results:
    """y, mean and biased variance of images, in float64; of statistics that are rounded to float16, if `half`.

    share: numbers of a channel over those that count, where the others are 0.
    """
    wide = x.double()
    mean = wide.mean((0, 2, 3)) * share
    var = wide.square().mean((0, 2, 3)) * share - mean.square()
    if half:
        mean, var = mean.half().double(), var.half().double()
    h = (wide - _of_channels(mean)) * _of_channels((var + EPS).rsqrt())
    y = h * _of_channels(weight.double()) + _of_channels(bias.double())
    return y.to(x.dtype), mean.float(), var.float()


def fused_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    share: float | Tensor = 1.0,
    *,
    is_rstd: bool = False,
) -> Results:
    """Gradients of x, weight and bias in float64; `is_rstd`: if the last operand were 1 / deviation."""
    dy, rstd = grad.double(), var.double() if is_rstd else (var.double() + EPS).rsqrt()
    h = (x.double() - _of_channels(mean.double())) * _of_channels(rstd)
    of_weight, of_bias = (dy * h).sum((0, 2, 3)), dy.sum((0, 2, 3))
    count = x.numel() // x.shape[1] / share
    dx = (dy - _of_channels(of_bias / count) - h * _of_channels(of_weight / count)) * _of_channels(weight * rstd)
    return dx.to(x.dtype), of_weight.float(), of_bias.float()


def _of_channels(c: Tensor) -> Tensor:
    return c[:, None, None]


def _fused(dtype: torch.dtype) -> tuple[Question, Question]:
    """The four operators by the nodes that a train step has, forward and gradient, of images in `dtype`."""
    name = {torch.float32: "fp32", torch.float16: "fp16"}[dtype]

    def images(rows: int) -> Tensor:
        return activations(rows, 3.0, 2.0).to(dtype)

    def operands_of_gradient(rows: int) -> tuple[Tensor, ...]:
        x, (weight, _) = images(rows), affine()
        wide = x.double()
        mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
        return x.flip(0, 2) - 3, x, weight, mean.float(), var.float()

    forward = Question(
        name=f"batch-norm-{name}",
        asks=f"Do BNTrainingReduce and BNTrainingUpdate normalise images of {name} by statistics of float32?",
        assumes="yes, biased ones, which are returned too (kernels/batch_norm/ascend.py)",
        operands=lambda rows: (images(rows), *affine()),
        build=lambda ge, x, weight, bias: batch_norm.nodes(x, weight, bias, EPS, CHANNELS),
        answers=(
            Answer("float32", fused, "as assumed", 1e-4),
            Answer(
                "in float16", lambda *operands: fused(*operands, half=True), f"statistics are inexact: {UNFUSE}", 1e-4
            ),
        ),
        rows=2 * 128 * 128,
        refused=UNFUSE,
    )
    gradient = Question(
        name=f"batch-norm-grad-{name}",
        asks=f"Do BNTrainingUpdateGrad and BNTrainingReduceGrad give the gradients for images of {name}?",
        assumes="yes, of the mean and the variance (kernels/batch_norm/ascend.py)",
        operands=operands_of_gradient,
        build=lambda ge, grad, x, weight, mean, var: batch_norm.gradient_nodes(grad, x, weight, mean, var, EPS),
        answers=(
            Answer("closed form", fused_gradients, "as assumed", 1e-4),
            Answer(
                "of 1 / deviation",
                lambda *operands: fused_gradients(*operands, is_rstd=True),
                f"the operand is no variance, as torchair's own converter has it: {UNFUSE}",
                1e-4,
            ),
        ),
        rows=2 * 128 * 128,
        refused=UNFUSE,
    )
    return forward, gradient


COUNTED = 4
"""Of so many rows one counts."""


def counted(rows: int) -> tuple[Tensor, ...]:
    """Gradient and rows [R C 1 1] in float16, 0 where they do not count, weight, bias and R over those that do."""
    x = activations(rows, 3.0, 2.0).half().permute(0, 2, 3, 1).reshape(-1, CHANNELS, 1, 1)
    counts = torch.arange(len(x)).view(-1, 1, 1, 1) % COUNTED == 0
    return (x.flip(0) - 3) * counts, x * counts, *affine(), torch.tensor(float(COUNTED))


def of_rows(*operands: Tensor, every: bool = False) -> Results:
    """What `fused` and `fused_gradients` are of them; every: if all rows counted."""
    grad, x, weight, bias, share = operands
    given = torch.ones(()) if every else share
    y, mean, var = fused(x, weight, bias, given)
    assert mean is not None and var is not None
    return y, mean, var, *fused_gradients(grad, x, weight, mean, var, given)


def _nodes_of_rows(ge: Any, grad: Any, x: Any, weight: Any, bias: Any, share: Any) -> tuple[Any, ...]:
    y, mean, var = batch_norm.nodes(x, weight, bias, EPS, CHANNELS, share)
    return y, mean, var, *batch_norm.gradient_nodes(grad, x, weight, mean, var, EPS, share)


FLOATS = (
    _precision(
        "hf32-off",
        "Are convolutions of float32 computed in float32 where HF32 is off?",
        "yes: HF32 is switched off (ascend/lower.py, HF32; ascend/device.py, set_hf32)",
        ("as assumed", "the switch does not reach GE: losses of fp32 differ from a CPU's by 1e-4, not 1e-7"),
    ),
    _precision(
        "hf32-on",
        "Does the switch do anything?",
        "yes: torchair's default is HF32 for convolutions",
        ("the switch does nothing, and costs nothing", "as assumed: fp32 runs could be faster with it, at 1e-4"),
        hf32=True,
    ),
    Question(
        name="batch-norm",
        asks="What does batch norm that is written out cost, as bevfn's of rows that all count?",
        assumes="its bytes over 1.49 TB/s and 1 to 5 us a node (ascend/rates.py)",
        operands=lambda rows: (activations(rows),),
        step=normalised,
        answers=(
            Answer("float32", lambda x: tuple(y.float() for y in normalised(x.double())), EXACT, 3e-3),
            Answer("loses digits", lambda x: tuple(y.float() for y in normalised(x.double())), SQUARES, 0.5),
        ),
        rows=2 * 128 * 128,
    ),
    Question(
        name="batch-norm-fused",
        asks="Do BNTrainingReduce and BNTrainingUpdate normalise as exactly, and faster?",
        assumes="less than batch-norm does, and so used; its variance is a difference of squares (docs/ascend.md)",
        operands=lambda rows: (activations(rows), *affine()),
        build=lambda ge, x, weight, bias: batch_norm.nodes(x, weight, bias, EPS, CHANNELS),
        answers=(
            Answer("float32", fused, EXACT, 3e-3),
            Answer("loses digits", lambda *operands: (fused(*operands)[0], None, None), SQUARES, 0.5),
        ),
        rows=2 * 128 * 128,
        refused=UNFUSE,
    ),
    *_fused(torch.float32),
    *_fused(torch.float16),
    Question(
        name="batch-norm-rows",
        asks="Do the four take sums that are multiplied, and rows as images of one pixel?",
        assumes="yes: rows that do not count are 0, and sums are scaled (kernels/batch_norm/ascend.py)",
        operands=counted,
        build=_nodes_of_rows,
        answers=(
            Answer("those that count", of_rows, "as assumed", 1e-4),
            Answer(
                "all rows",
                lambda *operands: of_rows(*operands, every=True),
                f"sums are taken again: {UNFUSE}",
                1e-4,
            ),
        ),
        rows=2 * 128 * 128,
        refused=UNFUSE,
    ),
)

QUESTIONS: dict[str, Question] = {question.name: question for question in (*INTEGERS, *WHOLE, *MOVES, *FLOATS)}


def _custom(kind: str, **operands: Any) -> Any:
    """A node of a type that torchair has no builder of; its result is called as its first operand."""
    import torchair

    return torchair.ge.custom_op(kind, inputs=operands, attrs={}, outputs=[next(iter(operands))])
