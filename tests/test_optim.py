"""AdamW against plain loops in float64, parameter groups, and the schedule by hand numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nextvec.config import OptimSettings
from nextvec.train.optim import adamw, parameter_groups, rate_factor


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(5, 4), "norm": nn.LayerNorm(4), "out": nn.Linear(4, 3)})
    module["out"].weight.requires_grad_(False)
    groups = parameter_groups(module.named_parameters(), 0.1)
    assert [(group["param_names"], group["weight_decay"]) for group in groups] == [
        (["embed.weight"], 0.1),
        (["norm.weight", "norm.bias", "out.bias"], 0.0),
    ]


def test_adamw_equals_plain_loops() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    settings = OptimSettings(lr=0.05, weight_decay=0.2)
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(3, 2)
    gradients = [torch.randn(2, 3, generator=generator) for _ in range(5)]
    expected = module.weight.detach().double().clone()
    mean, square = torch.zeros_like(expected), torch.zeros_like(expected)
    optimizer = adamw(module, settings)
    for step, gradient in enumerate(gradients, start=1):
        module.weight.grad = gradient.clone()
        optimizer.step()
        expected *= 1 - settings.lr * settings.weight_decay
        mean = settings.beta1 * mean + (1 - settings.beta1) * gradient
        square = settings.beta2 * square + (1 - settings.beta2) * gradient.double() ** 2
        root = (square / (1 - settings.beta2**step)).sqrt() + settings.eps
        expected -= settings.lr * mean / (1 - settings.beta1**step) / root
    torch.testing.assert_close(module.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("step", "linear", "constant"),
    [(0, 0.25, 0.25), (3, 1.0, 1.0), (4, 1.0, 1.0), (12, 0.5, 1.0), (19, 1 / 16, 1.0)],
)
def test_schedule_by_hand(step: int, linear: float, constant: float) -> None:
    for schedule, expected in (("linear", linear), ("constant", constant)):
        settings = OptimSettings(warmup=4, schedule=schedule)  # type: ignore[arg-type]
        assert rate_factor(step, step / 20, 20, settings) == pytest.approx(expected)


def test_schedule_limits() -> None:
    assert rate_factor(0, 0.0, 10, OptimSettings(warmup=0)) == 1.0
    assert rate_factor(9, 0.9, 10, OptimSettings(warmup=20)) == 0.5  # shorter than its warm-up: it just ends
    late = OptimSettings(warmup=5)
    assert rate_factor(50, 0.75, 1_000_000, late) == pytest.approx(0.25, rel=1e-4)  # progress by time
    factors = [rate_factor(step, step / 100, 100, OptimSettings(warmup=10)) for step in range(100)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors.index(max(factors)) == 9
