"""Norms and gated layers that keep less for the backward pass: the same bits forward, the same gradients, fewer bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextvec.config import BackboneConfig
from nextvec.model import lean
from nextvec.model.layers import Block, ResidualMLP, RMSNorm, SwiGLU, rotary_table

EPS = 1e-6


def norm_twin(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def down_twin(gate_up: Tensor, weight: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, weight)


WAYS: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = [
    (lambda x, weight: lean.rms_norm(x, weight, EPS), norm_twin, (3, 5, 16), (16,)),
    (lean.swiglu_down, down_twin, (3, 5, 24), (16, 12)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_values_are_the_same_bits_and_gradients_the_same(
    way: tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[int, ...], tuple[int, ...]], dtype: torch.dtype
) -> None:
    ours, twin, shape, weight_shape = way
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in (shape, weight_shape))
    found, wanted = ours(x, weight), twin(x, weight)
    assert found.grad_fn is not None
    assert found.dtype == dtype
    assert torch.equal(found, wanted)
    slope = torch.randn(found.shape, generator=generator).to(dtype)
    close = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    for mine, theirs in zip(
        torch.autograd.grad(found, (x, weight), slope), torch.autograd.grad(wanted, (x, weight), slope), strict=True
    ):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=close * float(theirs.abs().max()))


def test_gradients_that_nobody_needs_are_not_made() -> None:
    gate_up, weight = torch.randn(2, 8, requires_grad=True), torch.randn(3, 4)
    lean.swiglu_down(gate_up, weight).sum().backward()
    assert gate_up.grad is not None
    assert weight.grad is None


def kept_bytes(work: Callable[[], Tensor]) -> int:
    """Bytes of all that autograd keeps of `work`, parameters left out, each storage once."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = work()
    assert result.grad_fn is not None
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformer_block_keeps_less(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    config = BackboneConfig(layers=1, width=64, inner=192, heads=4)
    block, x = Block(config).to(dtype), torch.randn(2, 40, 64, dtype=dtype, requires_grad=True)
    cos, sin = rotary_table(torch.arange(40), 16, 1e4, dtype)
    ours = kept_bytes(lambda: block(x, cos, sin))
    for module in ("model.lean", "model.layers"):
        monkeypatch.setattr(f"nextvec.{module}.keeps_for_backward", lambda: False)
    plain = kept_bytes(lambda: block(x, cos, sin))
    assert ours < 0.7 * plain


def test_without_gradients_and_in_compiled_code_the_layers_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("keeps something")

    monkeypatch.setattr(lean._RMSNorm, "apply", never)
    monkeypatch.setattr(lean._SwiGLUDown, "apply", never)
    block, x = ResidualMLP(8, 8, EPS), torch.randn(3, 8)
    with torch.no_grad():
        block(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    block(x)


def test_without_gradients_the_second_matrix_is_asked_as_a_module() -> None:
    """Generation puts packed layers there."""
    layer, calls = SwiGLU(8, 8), 0

    def note(*_: object) -> None:
        nonlocal calls
        calls += 1

    layer.down.register_forward_hook(note)
    with torch.no_grad():
        layer(torch.randn(3, 8))
    assert calls == 1


def test_the_norm_takes_the_dtype_of_its_input() -> None:
    assert RMSNorm(8, eps=EPS)(torch.randn(3, 8).bfloat16()).dtype == torch.bfloat16
