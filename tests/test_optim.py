"""AdamW against plain loops in float64, parameter groups, and the schedule by hand numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz

from nextvec.config import AutoencoderConfig, BackboneConfig, CalmConfig, EnergyHeadConfig, OptimSettings
from nextvec.model.autoencoder import Autoencoder
from nextvec.model.calm import Calm
from nextvec.model.packed import version
from nextvec.train import muon as muon_module
from nextvec.train.muon import Muon
from nextvec.train.optim import make_optimizer, parameter_groups, rate_factor
from nextvec.train.polar import orthogonal


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(5, 4), "norm": nn.LayerNorm(4), "out": nn.Linear(4, 3)})
    module["out"].weight.requires_grad_(False)
    hidden, rest, _ = parameter_groups(module.named_parameters(), OptimSettings(name="adamw", weight_decay=0.1))
    assert hidden == []
    assert [(group["param_names"], group["weight_decay"]) for group in rest] == [
        (["embed.weight"], 0.1),
        (["norm.weight", "norm.bias", "out.bias"], 0.0),
    ]


def test_muon_takes_hidden_matrices_and_adamw_lookups_readouts_and_vectors() -> None:
    config = CalmConfig(
        autoencoder=AutoencoderConfig(vocab_size=11, width=8, inner=8, latent=4),
        backbone=BackboneConfig(layers=1, width=8, inner=8, heads=2),
        head=EnergyHeadConfig(blocks=1, noise=4),
    )
    hidden, rest, _ = parameter_groups(
        Calm(config).named_parameters(), OptimSettings(name="muon", lr=0.1, matrix_lr=0.3)
    )
    names = {name for group in hidden for name in group["param_names"]}
    assert "backbone.blocks.0.attention.out.weight" in names
    assert "head.blocks.0.gate_up.weight" in names
    assert "compressor.project.0.weight" in names
    assert [(group["peak_lr"], group["weight_decay"]) for group in hidden + rest] == [
        (0.3, 0.1),
        (0.1, 0.1),
        (0.1, 0.0),
    ]
    assert set(rest[0]["param_names"]) == {"compressor.embedding.weight", "head.noise_in.weight", "head.out.weight"}
    model = Autoencoder(config.autoencoder)
    _, rest, _ = parameter_groups(model.named_parameters(), OptimSettings(name="muon"))
    assert set(rest[0]["param_names"]) == {"embedding.weight", "to_latent.weight", "from_latent.weight"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_counts_in_the_version_of_every_parameter(name: str) -> None:
    """Also where torch's fused AdamW does it, which leaves it as it was: tables made of parameters go by it."""
    module = nn.ModuleDict({"hidden": nn.Linear(4, 4), "embedding": nn.Embedding(5, 4)})
    optimizer = make_optimizer(module, OptimSettings.parse({"name": name}))
    before = {key: version(parameter) for key, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for key, parameter in module.named_parameters():
        assert version(parameter) != before[key], key


def test_muon_with_adamw_is_torchs_two_apart_and_survives_a_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but how the orthogonal factor is made is `torch.optim.Muon`."""
    monkeypatch.setattr(muon_module, "iteration_dtype", lambda device: torch.bfloat16)
    torchs = {"ns_coefficients": (3.4445, -4.775, 2.0315), "ns_steps": 5, "eps": 1e-7}
    monkeypatch.setattr(muon_module, "orthogonal", lambda update: _zeropower_via_newtonschulz(update, **torchs))
    settings = OptimSettings(name="muon", lr=0.05, matrix_lr=0.03, weight_decay=0.2)
    generator = torch.Generator().manual_seed(0)
    module, twin = nn.Linear(6, 4), nn.Linear(6, 4)
    twin.load_state_dict(module.state_dict())
    ours = make_optimizer(module, settings)
    muon = torch.optim.Muon([twin.weight], lr=0.03, weight_decay=0.2, momentum=0.95)
    adamw = torch.optim.AdamW([twin.bias], lr=0.05, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(6):
        for a, b in zip(module.parameters(), twin.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        if step == 3:  # as after a resume: fresh objects, the saved state
            saved = ours.state_dict()
            ours = make_optimizer(module, settings)
            ours.load_state_dict(saved)
        ours.param_groups[0]["lr"] = muon.param_groups[0]["lr"] = 0.03 / (step + 1)
        ours.step()
        muon.step()
        adamw.step()
    assert torch.equal(module.weight, twin.weight)
    assert torch.equal(module.bias, twin.bias)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_turns_the_momentum_in_what_the_device_multiplies_fast(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], bf16: bool
) -> None:
    monkeypatch.setattr(muon_module, "has_bf16", lambda device: bf16)
    muon_module.iteration_dtype.cache_clear()
    dtypes: list[torch.dtype] = []

    def seen(update: torch.Tensor) -> torch.Tensor:
        dtypes.append(update.dtype)
        return orthogonal(update)

    monkeypatch.setattr(muon_module, "orthogonal", seen)
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer = Muon([parameter], lr=1.0, weight_decay=0.0)
    optimizer.step()
    muon_module.iteration_dtype.cache_clear()
    assert dtypes == [torch.bfloat16 if bf16 else torch.float32]
    torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], 0.05 * parameter.grad)  # left alone
    size = max(1.0, shape[0] / shape[1]) ** 0.5  # by which torch scales the update of a tall matrix
    values = torch.linalg.svdvals(parameter.detach()) / size
    assert 0.65 < values.min() < values.max() < 1.3
    assert parameter.dtype == torch.float32


def test_adamw_equals_plain_loops() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    settings = OptimSettings(name="adamw", lr=0.05, weight_decay=0.2)
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(3, 2)
    gradients = [torch.randn(2, 3, generator=generator) for _ in range(5)]
    expected = module.weight.detach().double().clone()
    mean, square = torch.zeros_like(expected), torch.zeros_like(expected)
    optimizer = make_optimizer(module, settings)
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
