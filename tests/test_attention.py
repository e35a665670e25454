"""Causal attention as one product against torch's own, and the process settings that make steps fast."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from nextvec.model import attention


@pytest.mark.parametrize("positions", [1, 2, 63, 300])
def test_causal_attention_equals_torchs_in_value_and_gradient(positions: int) -> None:
    generator = torch.Generator().manual_seed(positions)
    shape = (2, positions, 3 * 3, 16)
    joint = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    query, key, value = (part.transpose(1, 2) for part in joint.split(3, dim=2))
    weight = torch.randn((2, 3, positions, 16), generator=generator, dtype=torch.float64)
    found = attention._WholeScores.apply(
        query.bfloat16(), key.bfloat16(), value.bfloat16(), torch.arange(1, positions + 1)
    )
    (found * weight).sum().backward()
    gradient, joint.grad = joint.grad, None
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    (wanted * weight).sum().backward()
    assert gradient is not None
    assert joint.grad is not None
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0.02 * float(wanted.detach().abs().max()))
    torch.testing.assert_close(gradient, joint.grad, rtol=0, atol=0.02 * float(joint.grad.abs().max()))


@pytest.mark.parametrize("queries", [1, 40, 300])
def test_prefix_attention_sees_so_many_positions(queries: int) -> None:
    """In value and gradient, of other texts than its queries, in any order."""
    generator = torch.Generator().manual_seed(queries)
    exact = [torch.randn(2, 3, size, 16, generator=generator, dtype=torch.float64) for size in (queries, 77, 77)]
    seen_Q = torch.randint(1, 78, (queries,), generator=generator)
    weight = torch.randn(exact[0].shape, generator=generator, dtype=torch.float64)
    visible = torch.arange(77) < seen_Q[:, None]
    results = []
    for own in (True, False):
        inputs = [x.bfloat16().to(torch.bfloat16 if own else torch.float64).requires_grad_() for x in exact]
        mixed = attention.prefix_attention(*inputs, seen_Q) if own else F.scaled_dot_product_attention(*inputs, visible)
        assert mixed is not None
        (mixed * weight).sum().backward()
        results.append([mixed, *(x.grad for x in inputs)])
    for found, wanted in zip(*results, strict=True):
        assert found is not None
        assert wanted is not None
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0.02 * float(wanted.detach().abs().max()))
    rough = [x.float() for x in exact]
    assert attention.prefix_attention(*rough, seen_Q) is None


def test_its_rounding_stays_near_that_of_torchs_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, 4, 255, 32, generator=generator, dtype=torch.float64) for _ in range(3)]
    rough = [x.bfloat16() for x in exact]
    wanted = F.scaled_dot_product_attention(*(x.double() for x in rough), is_causal=True)
    ours = (attention.causal_attention(*rough).double() - wanted).square().mean().sqrt()
    theirs = (F.scaled_dot_product_attention(*rough, is_causal=True).double() - wanted).square().mean().sqrt()
    assert ours <= 2 * theirs  # the scores are rounded to bfloat16 on their way to the softmax


def test_which_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        attention, "_WholeScores", type("Seen", (), {"apply": lambda q, k, v, seen: calls.append(len(q)) or q})
    )
    for dtype, positions, key_heads in (
        (torch.bfloat16, attention.WHOLE, 2),
        (torch.bfloat16, attention.WHOLE + 1, 2),
        (torch.bfloat16, 8, 1),
        (torch.float32, 8, 2),
    ):
        query, key = (torch.zeros(1, heads, positions, 8, dtype=dtype) for heads in (2, key_heads))
        assert attention.causal_attention(query, key, key).shape == query.shape
    assert len(calls) == 1


KEPT = """
import torch
from nextvec.process import keep_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
keep_freed_memory({keep})
before = resident()
x = torch.ones(4 << 20)
del x
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.parametrize(("keep", "variables"), [(True, {}), (False, {}), (True, {"MALLOC_MMAP_THRESHOLD_": "100000"})])
def test_freed_memory_is_kept_unless_the_user_set_the_allocator(keep: bool, variables: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KEPT.format(keep=keep)], env=variables, capture_output=True, text=True, check=True
    )
    kept = int(done.stdout)
    assert (kept > 12 << 20) if keep and not variables else (kept < 4 << 20)
