"""What the machine can do: its matrix and memory rates, and the time that the matrix products of a piece of work take alone.

The second is the yardstick of `share_of_limit`: a step that spent no time on anything but its own products, each at the
speed that it has alone, would have a share of 1.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from nextvec.hardware import DTYPES, Precision, has_bf16, synchronize
from nextvec.train.flops import count_flops

PACKED = ("_linear_pointwise", "qlinear_pointwise")
NAMES = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "_scaled_mm", "_addmm_activation", *PACKED)
ATTENTION = "_scaled_dot_product"
SIDES = (256, 1024, 4096)  # of the square products whose rates are reported
BURST = 2e-3  # seconds of calls of one product in one reading
LONGEST = 5.0  # seconds: a square product that would take longer is left out
SLOW = 0.1  # seconds: a product that takes longer is read once, not three times
FILL = 1 << 16  # random numbers from which operands are filled


@dataclass(frozen=True)
class Layout:
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Any) -> Any:
        """A packed matrix has no strides, and stays itself."""
        if not isinstance(value, Tensor) or value.is_mkldnn:
            return value
        return cls(tuple(value.shape), value.stride(), value.dtype, value.device)

    def tensor(self) -> Tensor:
        """Normal values in this layout; zeros for integers (random states of attention)."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        size = 0 if 0 in self.shape else last + 1
        if not self.dtype.is_floating_point:
            return torch.zeros(size, dtype=self.dtype, device=self.device).as_strided(self.shape, self.stride)
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(min(size, FILL), generator=generator).to(self.device, self.dtype)
        return values.repeat(math.ceil(size / FILL))[:size].as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Product:
    """One matrix product or fused attention: the operation with the layouts of its operands and its other arguments."""

    operation: Any  # torch's OpOverload
    arguments: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]

    def call(self) -> Callable[[], object]:
        """A function that runs it on operands of its own."""
        arguments, named = tree_map(
            lambda leaf: leaf.tensor() if isinstance(leaf, Layout) else leaf, (self.arguments, dict(self.named))
        )
        return lambda: self.operation(*arguments, **named)

    @property
    def shapes(self) -> list[list[int]]:
        return [list(leaf.shape) for leaf in self.arguments if isinstance(leaf, Layout)]

    @property
    def dtype(self) -> str:
        return str(next(leaf.dtype for leaf in self.arguments if isinstance(leaf, Layout))).removeprefix("torch.")

    @property
    def name(self) -> str:
        return str(self.operation.overloadpacket.__name__)


class _Collector(TorchDispatchMode):
    """Counts the products that run inside it, backward passes included, and runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name.rstrip("_") in NAMES or name.startswith(ATTENTION):
            arguments, named = tree_map(Layout.of, (tuple(args), kwargs))
            self.found[Product(func, _hashable(arguments), tuple(sorted(_hashable(named).items())))] += 1
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # composites arrive whole there
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        return func(*args, **kwargs)


def collect(work: Callable[[], object]) -> Counter[Product]:
    """The matrix products of one eager call of `work`, with how often each runs."""
    collector = _Collector()
    with collector:
        work()
    return collector.found


class Stopwatch:
    """Times each of many products alone, warm, in readings that may lie far apart; the median counts."""

    def __init__(self, products: Iterable[Product], device: torch.device) -> None:
        self._device = device
        self._readings: dict[Product, list[float]] = {product: [] for product in products}

    @torch.no_grad()
    def read(self) -> None:
        """One reading of each product: the mean of a burst of calls after warm-up calls."""
        for product, readings in self._readings.items():
            call = product.call()
            self._time(call, 1)
            once = self._time(call, 1)
            readings.append(self._time(call, max(1, min(100, round(BURST / max(once, 1e-7))))))

    def seconds(self, product: Product) -> float:
        readings = sorted(self._readings[product])
        return readings[len(readings) // 2]

    def limit(self, counts: Counter[Product]) -> float:
        """Seconds that these products take alone, one after the other."""
        return sum(count * self.seconds(product) for product, count in counts.items())

    def table(self, counts: Counter[Product]) -> list[dict[str, Any]]:
        """A row for each product, the most costly first."""
        rows = []
        for product, count in counts.items():
            each = self.seconds(product)
            with torch.no_grad():
                rate = count_flops(product.call()) / each
            row = {"operation": product.name, "shapes": product.shapes, "dtype": product.dtype, "count": count}
            rows.append(row | {"seconds_each": each, "seconds": count * each, "flops_per_s": rate})
        return sorted(rows, key=lambda row: -row["seconds"])

    def _time(self, call: Callable[[], object], calls: int) -> float:
        synchronize(self._device)
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(self._device)
        return (time.perf_counter() - begin) / calls


@torch.no_grad()
def square_rates(device: torch.device, sides: Iterable[int] = SIDES) -> list[dict[str, Any]]:
    """Rates of square products, medians of readings: {dtype, side, flops_per_s}; null where one would take too long."""
    rows: list[dict[str, Any]] = []
    names: list[Precision] = ["fp32", "bf16"] if has_bf16(device) else ["fp32"]
    for name in names:
        rate = 0.0
        for side in sorted(sides):
            row: dict[str, Any] = {"dtype": name, "side": side, "flops_per_s": None}
            rows.append(row)
            if rate and 2.0 * side**3 / rate > LONGEST:
                continue
            layout = Layout((side, side), (side, 1), DTYPES[name], device)
            product = Product(torch.ops.aten.mm.default, (layout, layout), ())
            watch = Stopwatch([product], device)
            for _ in range(1 if rate and 2.0 * side**3 / rate > SLOW else 3):
                watch.read()
            rate = 2.0 * side**3 / watch.seconds(product)
            row["flops_per_s"] = rate
    return rows


def _hashable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_hashable(item) for item in value)
    return {name: _hashable(item) for name, item in value.items()} if isinstance(value, dict) else value
