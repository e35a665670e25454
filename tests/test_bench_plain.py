"""The textbook arm of `nextvec bench`: the product's function and gradients, the authors' outputs, another way there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nextvec.bench import plain, plain_model
from nextvec.bench.plain import plain_module, plain_optimizer, plain_tensors
from nextvec.bench.steps import TrainStep, training_module, write_text
from nextvec.config import (
    AutoencoderConfig,
    AutoencoderRun,
    BackboneConfig,
    CalmConfig,
    CalmRun,
    DataSettings,
    EnergyHeadConfig,
    EnergySettings,
    OptimSettings,
    RecipeSettings,
    RunConfig,
    TokenLMConfig,
    TokenLMRun,
)
from nextvec.model import cross_entropy
from nextvec.model.calm import Calm
from nextvec.reference.convert import convert
from nextvec.rundir import load_run
from nextvec.scoring.energy import energy_score_loss
from nextvec.train.optim import make_optimizer

FIXTURES = Path(__file__).parent / "fixtures" / "reference"
VOCAB, S, M, L, ROWS, TOKENS = 31, 3, 5, 6, 2, 16
AUTOENCODER = AutoencoderConfig(
    vocab_size=VOCAB, patch_size=2, width=12, inner=20, layers=4, latent=L, kl_clip=0.1, mask_id=1
)
BACKBONE = BackboneConfig(layers=2, width=16, inner=24, heads=4, kv_heads=2)
DATA = DataSettings(path="data", rows=ROWS, context_tokens=TOKENS)
ADAMW = OptimSettings(name="adamw", lr=1e-2, warmup=0)


def calm_run(recipe: str = "paper", alpha: float = 1.0, teacher: str = "sampled") -> CalmRun:
    return CalmRun(
        data=DATA,
        model=CalmConfig(autoencoder=AUTOENCODER, backbone=BACKBONE, head=EnergyHeadConfig(noise=7, blocks=2)),
        energy=EnergySettings.parse({"draws": S, "teacher": teacher, "teacher_draws": M, "alpha": alpha}),
        recipe=RecipeSettings.parse({"name": recipe, "auxiliary_weight": 0.7}),
        optim=ADAMW,
    )


RUNS: dict[str, RunConfig] = {
    "calm": calm_run(),
    "autoencoder": AutoencoderRun(data=DATA, model=AUTOENCODER, optim=ADAMW),
    "token_lm": TokenLMRun(
        data=DATA, model=TokenLMConfig(vocab_size=VOCAB, backbone=BACKBONE, embedding_norm=True), optim=ADAMW
    ),
    "token_lm with recall": TokenLMRun(
        data=DATA, model=TokenLMConfig(vocab_size=VOCAB, backbone=BACKBONE, recall=2, grams=11), optim=ADAMW
    ),
}


def pair(config: RunConfig) -> tuple[Any, Any]:
    """Both arms in float64 with lively parameters: what starts at 0 or 1 would hide mistakes."""
    ours = training_module(config).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return ours, plain_module(config, ours)


def ids() -> Tensor:
    return torch.randint(2, VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3))


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same(ours: nn.Module, loss: Tensor, other: nn.Module, plain_loss: Tensor) -> None:
    torch.testing.assert_close(plain_loss, loss, rtol=1e-11, atol=0)
    expected, found = plain_tensors(gradients(ours, loss)), gradients(other, plain_loss)
    assert found.keys() == expected.keys()
    assert len(found) == len([p for p in other.parameters() if p.requires_grad])
    for name, gradient in found.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("recipe", "alpha"), [("paper", 1.0), ("paper", 1.25), ("paper", 0.75), ("fast", 1.0)])
def test_calm_has_the_same_loss_and_gradients_for_the_same_noise(recipe: str, alpha: float) -> None:
    config = calm_run(recipe, alpha)
    ours, other = pair(config)
    generator = torch.Generator().manual_seed(5)
    ids_BPK = ids().unflatten(1, (-1, 2))
    shape = ids_BPK[:, 1:, 0].shape
    noise = torch.rand(S, *shape, 7, generator=generator, dtype=torch.float64) - 0.5
    eps = torch.randn(M, *shape, L, generator=generator, dtype=torch.float64)

    state = ours.model.states(ids_BPK[:, :-1])
    teacher = ours.model.teacher(ids_BPK[:, 1:])
    draws = ours.model.head(state, noise)
    loss = energy_score_loss(draws, teacher.mean, teacher.log_std, config.energy, eps_MNL=eps).loss.mean()
    if recipe == "fast":
        loss = loss + 0.7 * ours.auxiliary(state.flatten(0, 1), ids_BPK[:, 1:].flatten(0, 1))
    assert_same(ours, loss, other, other.loss(ids_BPK, noise, eps))


@pytest.mark.parametrize("kind", RUNS)
def test_whole_steps_are_the_same_for_the_same_generator(kind: str) -> None:
    """All that a step draws included: noise, teacher draws, dropouts."""
    ours, other = pair(RUNS[kind])
    loss, _ = ours(ids(), torch.Generator().manual_seed(9), 0.0)
    plain_loss, _ = other(ids(), torch.Generator().manual_seed(9), 0.0)
    assert_same(ours, loss, other, plain_loss)


def test_coinciding_draws_have_gradient_zero() -> None:
    draws = torch.ones(S, 4, L, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(4, L, dtype=torch.float64)
    for alpha in (0.75, 1.0, 1.5):
        eps = torch.randn(M, 4, L, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        plain.energy_score(draws, zero, zero, eps, alpha).sum().backward()
        assert draws.grad is not None
        assert draws.grad.isfinite().all()
        torch.testing.assert_close(draws.grad[0], draws.grad[1])
        draws.grad = None


@pytest.mark.parametrize("kind", RUNS)
def test_updates_are_the_same(kind: str) -> None:
    """AdamW parameter by parameter against the fused one, the same gradients and decay groups."""
    ours, other = pair(RUNS[kind])
    optimizers = make_optimizer(ours, ADAMW), plain_optimizer(other, ADAMW)
    for turn in range(3):
        for module, optimizer in zip((ours, other), optimizers, strict=True):
            loss, _ = module(ids(), torch.Generator().manual_seed(turn), 0.0)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = plain_tensors(ours.state_dict())
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-8)


def test_muon_in_the_settings_leaves_the_plain_optimiser_as_it_is() -> None:
    _, other = pair(RUNS["calm"])
    assert type(plain_optimizer(other, OptimSettings(name="muon"))) is torch.optim.AdamW


@pytest.mark.parametrize("size", ["k4", "k2"])
def test_the_plain_networks_give_the_outputs_of_the_published_code(size: str) -> None:
    """Golden tensors of the authors' code, as in test_parity.py: 1e-6 where that code has float32 inside, else 1e-9."""
    golden = load_file(FIXTURES / size / "golden.safetensors")
    with TemporaryDirectory() as folder:
        convert(str(FIXTURES / size / "energy"), Path(folder) / "run")
        model = load_run(Path(folder) / "run", dtype=torch.float64).model
    assert isinstance(model, Calm)
    ours = plain_model.Calm(model.config).double()
    ours.load_state_dict(plain_tensors(model.state_dict()))
    ids_BPK = golden["input_ids"].unflatten(1, (-1, model.patch_size))

    def near(found: Tensor, name: str, tolerance: float) -> None:
        expected = golden[name].double()
        assert (found.flatten() - expected.flatten()).abs().max() <= tolerance * expected.abs().max(), name

    with torch.no_grad():
        mean, log_std = ours.teacher(ids_BPK)
        near(mean, "ae.mean", 1e-6)
        near(log_std, "ae.log_std", 1e-6)
        logits = nn.functional.linear(
            ours.autoencoder.decode_hidden(golden["ae.z"].double()), ours.autoencoder.embedding.weight
        )
        near(logits, "ae.logits", 1e-6)
        near(ours.compressor(ids_BPK[:, :-1]), "energy.patch_embeddings", 1e-9)
        near(ours.backbone(golden["energy.patch_embeddings"].double()), "energy.hidden", 1e-6)
        state_ND = golden["energy.hidden"].double().flatten(0, 1)
        near(ours.draw_latents(state_ND, golden["energy.noise"].double()), "energy.samples", 1e-9)
        score = plain.energy_score(
            golden["energy.samples"].double(),
            golden["ae.mean"][:, 1:].double().flatten(0, 1),
            golden["ae.log_std"][:, 1:].double().flatten(0, 1),
            golden["energy.eps"].double(),
        )
        near(-score, "energy.score", 1e-9)


class Recorder(TorchDispatchMode):
    """Which operations run, and the sizes of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.sizes: Counter[int] = Counter()
        self.linears: Counter[tuple[int, ...]] = Counter()  # rows, inner and outer dimension of linears with a bias

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] += 1
        if name == "addmm":
            self.linears[*args[1].shape, args[2].shape[1]] += 1
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor) and func._schema.returns[0].alias_info is None:  # views make nothing
                self.sizes[tensor.numel()] += 1
        return result


def recorded(work: Callable[[], object]) -> Recorder:
    with Recorder() as recorder:
        work()
    return recorder


def steps(config: RunConfig, folder: Path) -> tuple[Recorder, Recorder]:
    """What whole steps of both arms do."""
    write_text(folder, VOCAB, 2000)
    found = []
    for arm in ("ours", "plain"):
        step = TrainStep(config, arm, folder, torch.device("cpu"), "fp32")  # type: ignore[arg-type]
        step.warm()
        found.append(recorded(step))
    return found[0], found[1]


@pytest.mark.parametrize("teacher", ["sampled", "exact"])
def test_the_arms_differ_in_the_energy_loss_and_in_the_head(tmp_path: Path, teacher: str) -> None:
    ours, other = steps(calm_run(teacher=teacher), tmp_path)
    positions = ROWS * (TOKENS // 2 - 1)
    for difference in (S * M * positions * L, S * S * positions * L):
        assert other.sizes[difference] >= 2, "forward and backward materialise the differences"
        assert not ours.sizes[difference]
    width, draws = BACKBONE.width, S * positions
    unsplit, half = (draws, 2 * width, width), (positions, width, width)
    assert other.linears[unsplit] == 2  # l1 of both blocks, on the concatenation
    assert not ours.linears[unsplit]
    assert ours.linears[half]  # the state's layers run once per position
    assert not other.linears[half]


def test_the_arms_differ_in_the_projections_and_in_the_optimiser(tmp_path: Path) -> None:
    ours, other = steps(RUNS["token_lm"], tmp_path)
    assert other.counts["mm"] > ours.counts["mm"]  # q, k, v and gate, up apart
    assert ours.counts["_fused_adamw_"] == 2  # matrices and vectors
    assert not other.counts["_fused_adamw_"]
    assert other.counts["addcdiv_"] >= len(
        list(plain_module(RUNS["token_lm"], training_module(RUNS["token_lm"])).parameters())
    )


@pytest.mark.parametrize("kind", ["token_lm", "autoencoder"])
def test_only_the_plain_arm_materialises_all_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 4 * VOCAB)
    monkeypatch.setattr(cross_entropy, "LEAST_ROWS", 1)
    ours, other = steps(RUNS[kind], tmp_path)
    rows = ROWS * (TOKENS if kind == "autoencoder" else TOKENS - 1)
    assert other.sizes[rows * VOCAB] >= 2
    assert not ours.sizes[rows * VOCAB]
