"""CPU lowering of `deform_conv`: cpu.cpp samples one image at a time into columns, torch multiplies them.

One image's columns (13 MB at BEVDepth's size) are memory that is reused, and mostly in the caches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bevfn.kernels import indices, native


def forward(x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *step: int) -> Tensor:
    """Shapes as in `reference.forward`."""
    call = _Call.of(x, offset, mask, weight, *step)
    matrix, columns = _matrix(weight, call), call.empty_columns()
    y = torch.empty(x.shape[0], weight.shape[0], *offset.shape[2:], dtype=call.dtype)
    parts = y.view(x.shape[0], *matrix.shape[:2], columns.shape[1])  # B G O/G P
    for b in range(x.shape[0]):
        call.sample(b, columns)
        torch.bmm(matrix, columns.transpose(1, 2), out=parts[b])
    return y.to(x.dtype)


def backward(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes as in `reference.backward`."""
    call = _Call.of(x, offset, mask, weight, *step)
    matrix, columns, grad_columns = _matrix(weight, call), call.empty_columns(), call.empty_columns()
    grad_matrix = torch.zeros_like(matrix)
    grad_pixels, grad_offset = torch.zeros_like(call.pixels), torch.empty_like(call.offset)
    grad_mask = None if call.mask is None else torch.empty_like(call.mask)
    slopes = grad.to(call.dtype).reshape(x.shape[0], *matrix.shape[:2], columns.shape[1])  # B G O/G P
    for b in range(x.shape[0]):
        call.sample(b, columns)
        grad_matrix += torch.bmm(slopes[b], columns)
        torch.bmm(slopes[b].transpose(1, 2), matrix, out=grad_columns)
        call.spread(b, grad_columns, grad_pixels, grad_offset, grad_mask)
    O, I, kh, kw = weight.shape
    return (
        grad_pixels.permute(0, 3, 1, 2).to(x.dtype, memory_format=torch.contiguous_format),
        grad_offset.to(offset.dtype),
        offset.new_empty(0) if mask is None or grad_mask is None else grad_mask.to(mask.dtype),
        grad_matrix.view(O, kh, kw, I).permute(0, 3, 1, 2).to(weight.dtype, memory_format=torch.contiguous_format),
    )


@dataclass(frozen=True)
class _Call:
    """The operands as cpu.cpp takes them, float32 or float64."""

    pixels: Tensor  # B H W C
    offset: Tensor  # B 2DK H' W'
    mask: Tensor | None  # B DK H' W'
    groups: int
    kernel: tuple[int, int]
    step: tuple[int, int, int]  # stride, padding, dilation

    @staticmethod
    def of(x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, *step: int) -> "_Call":
        indices.check("deform_conv", "pixels of an image", x.shape[2] * x.shape[3], smaller="image")
        wide = torch.promote_types(x.dtype, torch.float32)
        stride, padding, dilation = step
        return _Call(
            x.permute(0, 2, 3, 1).to(wide, memory_format=torch.contiguous_format).contiguous(),
            offset.to(wide).contiguous(),
            None if mask is None else mask.to(wide).contiguous(),
            x.shape[1] // weight.shape[1],
            (weight.shape[2], weight.shape[3]),
            (stride, padding, dilation),
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.pixels.dtype

    def empty_columns(self) -> Tensor:
        """[G P KI], of one image."""
        positions, taps = self.offset.shape[2] * self.offset.shape[3], self.kernel[0] * self.kernel[1]
        return torch.empty(self.groups, positions, taps * self.pixels.shape[3] // self.groups, dtype=self.dtype)

    def sample(self, b: int, columns: Tensor) -> None:
        """Overwrites columns [G P KI] with the masked samples of image b."""
        self._run("deform_sample", b, columns)

    def spread(
        self, b: int, grad_columns: Tensor, grad_pixels: Tensor, grad_offset: Tensor, grad_mask: Tensor | None
    ) -> None:
        """The gradient of `sample`: adds to row b of grad_pixels, overwrites row b of grad_offset and grad_mask."""
        self._run("deform_spread", b, grad_columns, grad_pixels[b], grad_offset[b], _item(grad_mask, b))

    def _run(self, name: str, b: int, *results: Tensor | None) -> None:
        _, H, W, C = self.pixels.shape
        D = self.offset.shape[1] // (2 * self.kernel[0] * self.kernel[1])
        numbers = (C, H, W, *self.offset.shape[2:], *self.kernel, *self.step, self.groups, D)
        operands = [self.pixels[b], self.offset[b], _item(self.mask, b), *results]
        kind = "double" if self.dtype == torch.float64 else "float"
        native.call("deform_conv", f"{name}_{kind}", *operands, numbers)


def _item(tensor: Tensor | None, b: int) -> Tensor | None:
    return None if tensor is None else tensor[b]


def _matrix(weight: Tensor, call: _Call) -> Tensor:
    """[O I kh kw] -> [G O/G KI]."""
    O, I, kh, kw = weight.shape
    return weight.to(call.dtype).permute(0, 2, 3, 1).reshape(call.groups, O // call.groups, kh * kw * I)
