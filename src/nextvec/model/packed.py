"""Linear layers whose weights lie in memory as a product of a CPU reads them.

bf16: torch rearranges the matrix at every product. For a batch that is small change; for the single row of a generation step it
is most of the time (measured: 1.4 to 3.1 times, docs/sampling.md). The arithmetic is the same, bit for bit.
float32: a row times a matrix with more outputs than inputs takes 1.4 to 2.6 times as long by dot products with short rows of it
as by adding up its long columns, above all where it comes from memory. The sum is then another to rounding.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

T = TypeVar("T")
Product: TypeAlias = Callable[[Tensor, "Tensor | None"], Tensor]  # x, bias -> x W^T + bias

FEW_ROWS = 2  # up to which columns are faster in float32, from the processor's caches as well


class PackedLinear(nn.Module):
    """y = x W^T + b of an nn.Linear, for inference on a CPU in the precision of W; elsewhere it is the nn.Linear.

    Holds the parameters of the layer it replaces under their names, so that a state dict does not change.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._product = Kept[Product]()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or x.dtype != weight.dtype
            or x.device.type != "cpu"
        ):
            return F.linear(x, weight, self.bias)
        return self._product.of((weight,), lambda: _product_with(weight))(x, self.bias)


def version(weight: Tensor) -> tuple[int, int]:
    """Another value after each in-place change or replacement of a parameter.

    Not after one of its `.data`, nor after a step of torch's fused optimisers: `train.optim` adds one for these.
    """
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


class Kept(Generic[T]):
    """What is made of parameters, until these change, or are moved or cast."""

    def __init__(self) -> None:
        self._state: object = None
        self.value: T | None = None

    def __getstate__(self) -> dict[str, object]:
        """Copied and saved without it."""
        return {"_state": None, "value": None}

    def of(self, weights: Sequence[Tensor], make: Callable[[], T]) -> T:
        """The same object as long as the weights are the same; made without gradients and outside of autocast."""
        state = tuple((version(weight), weight.dtype, weight.device) for weight in weights)
        if self.value is None or self._state != state:
            with torch.no_grad(), torch.autocast(weights[0].device.type, enabled=False):
                self._state, self.value = state, make()
        return self.value


def pack_linears(module: nn.Module) -> None:
    """Replace, in place, each linear layer inside `module` that gains by it; does nothing where none does."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and (_packs(child.weight) or _is_wide(child.weight)):
                setattr(parent, name, PackedLinear(child))


def _packs(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and can_pack()


def _is_wide(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.shape[0] > weight.shape[1]


@functools.cache
def can_pack() -> bool:
    """True where this torch has the packed product and the processor has bf16 instructions."""
    return has_bf16_products() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def has_bf16_products() -> bool:
    """True where a bf16 product is faster than a float32 one: x86 with AVX512-BF16 or AMX."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def integer_steps() -> int:
    """The largest whole number in a row of a product with 8-bit integers that is fast and exact here; 0 where there is none.

    127 where a processor has instructions for it (VNNI). One with AVX2 alone adds two products in 16 bits, which up to 63
    are exact. This torch is asked whether its sums are.
    """
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or platform.machine().lower() not in ("x86_64", "amd64"):
        return 0
    most = 127 if torch.cpu._is_vnni_supported() else 63 if torch.cpu._is_avx2_supported() else 0
    if not most:
        return 0
    steps = torch.tensor([[127, -127, 3], [127, 127, 127], [-127, -127, -127]] * 8, dtype=torch.int8).repeat(1, 16)
    rows = steps.float().clamp(-most, most)
    try:
        found = integer_product(steps, torch.ones(len(steps)), most)(rows)
    except RuntimeError:
        return 0
    return most if torch.equal(found, (rows @ steps.float().T).to(found.dtype)) else 0


def integer_product(steps_OI: Tensor, scale_O: Tensor, most: int) -> Callable[[Tensor], Tensor]:
    """q -> scale * (q . steps) for whole numbers q of at most `most`, (N, I) -> (N, O); the sum is exact.

    In bf16, or float32 on a processor without it, where rounding the result to bf16 takes longer than the product.
    """
    packed = torch.ops.onednn.qlinear_prepack(steps_OI, None)
    zero = torch.zeros(len(steps_OI), dtype=torch.int32)
    dtype = torch.bfloat16 if has_bf16_products() else torch.float32

    def product(q_NI: Tensor) -> Tensor:
        shifted = (q_NI + (most + 1)).to(torch.uint8)
        found: Tensor = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, most + 1, packed, scale_O, zero, None, 1.0, 0, dtype, "none", [], ""
        )
        return found

    return product


def pack(weight: Tensor) -> Tensor:
    """The matrix (out, in) rearranged; opaque, to be given to `packed_linear`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with a packed W."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def product_with(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + b for inference; with W as it is read best."""
    product = _product_with(weight)
    return lambda x: product(x, bias)


def _product_with(weight: Tensor) -> Product:
    if _packs(weight):
        packed = pack(weight)
        return lambda x, bias: packed_linear(x, packed, bias)
    if not _is_wide(weight):
        return lambda x, bias: F.linear(x, weight, bias)
    few = FEW_ROWS * weight.shape[1]

    @functools.cache
    def columns() -> Tensor:
        """A second copy, made for the first few rows: many layers are never given as few."""
        return weight.detach().T.contiguous().T

    return lambda x, bias: F.linear(x, columns() if x.numel() <= few else weight, bias)


def _operations(x: Any, *others: Any, out_shape: Any = None, **named: Any) -> int:
    """Operations of a packed product, a multiply-add counted as 2, for torch's counter."""
    return 2 * math.prod(x) * int(out_shape[-1])


for _library, _name in ((torch.ops.mkldnn, "_linear_pointwise"), (torch.ops.onednn, "qlinear_pointwise")):
    if hasattr(_library, _name):
        register_flop_formula(getattr(_library, _name))(_operations)
