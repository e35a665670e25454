"""Flow, diffusion and autoregressive heads: solvers against closed forms, losses against plain loops, laws of the draws.

The closed form: latents that are normal with mean m and variance s^2 in each dimension. There the best prediction at every
time is known and linear, so the solvers can be asked for their order and their law without any network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise, product
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextvec.config import (
    SOLVERS,
    TIMES,
    AutoencoderConfig,
    AutoregressiveHeadConfig,
    BackboneConfig,
    CalmConfig,
    CategoricalHeadConfig,
    DiffusionHeadConfig,
    EnergyHeadConfig,
    FlowHeadConfig,
    HeadKind,
    MixtureHeadConfig,
)
from nextvec.errors import ConfigError
from nextvec.model.calm import Calm
from nextvec.model.heads.autoregressive import AutoregressiveHead
from nextvec.model.heads.denoise import denoise, evenly_in_signal, first_time
from nextvec.model.heads.diffusion import DiffusionHead
from nextvec.model.heads.flow import FlowHead, integrate
from nextvec.model.heads.mixture import MixtureHead
from nextvec.model.heads.schedule import cosine_schedule, spaced
from nextvec.model.init import initialise
from nextvec.model.posterior import Posterior

MEAN, STD = 0.7, 0.4
HEADS: list[HeadKind] = [
    EnergyHeadConfig(blocks=2, noise=8),
    FlowHeadConfig(blocks=2, steps=3),
    DiffusionHeadConfig(blocks=2, steps=7),
    CategoricalHeadConfig(blocks=2, steps=3),
    MixtureHeadConfig(blocks=2),
    AutoregressiveHeadConfig(blocks=2),
]
BY_KIND = {head.kind: head for head in HEADS}
every_head = pytest.mark.parametrize("head", HEADS, ids=lambda head: head.kind)


def calm(head: HeadKind, vocab: int = 61, patch_size: int = 4) -> Calm:
    """Random parameters everywhere in float64, so that no zero initialisation hides a difference."""
    factored = head.kind in ("categorical", "mixture")
    latent = 2 * patch_size if factored else 6
    model = Calm(
        CalmConfig(
            autoencoder=AutoencoderConfig(
                vocab_size=vocab, patch_size=patch_size, width=16, inner=24, latent=latent, factored=factored
            ),
            backbone=BackboneConfig(layers=1, width=12, inner=20, heads=2),
            head=head,
        )
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
    return model.double().eval().requires_grad_(False)


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def read_by(model: Calm, *shape: int) -> Tensor:
    """States as the model's head reads them: with what it reads of the last patch behind them."""
    more = 3 * 12 if isinstance(model.head, MixtureHead) else 0
    return torch.cat((states(*shape), normal(*shape, more, seed=9)), dim=-1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# solvers, on a normal law


def velocity(x: Tensor, time: float) -> Tensor:
    """E[z - x0 | (1 - t) x0 + t z = x]."""
    variance = (1 - time) ** 2 + time**2 * STD**2
    return MEAN + (time * STD**2 - (1 - time)) / variance * (x - time * MEAN)


def best(x: Tensor, time: int) -> tuple[Tensor, Tensor]:
    """E[eps | signal z + noise eps = x]; the variance position is that of the posterior."""
    kept = float(cosine_schedule(TIMES).kept[time])
    found = math.sqrt(1 - kept) * (x - math.sqrt(kept) * MEAN) / (kept * STD**2 + 1 - kept)
    return found, torch.full_like(x, -1.0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_flow_solvers_converge_at_their_order(solver: str, order: int) -> None:
    x = normal(50)
    exact = MEAN + STD * x  # the flow of a normal law is affine
    errors = [float((integrate(velocity, x, solver, steps) - exact).abs().max()) for steps in (20, 40, 80)]
    assert errors[0] < (0.1 if order == 1 else 0.005)
    for coarse, fine in pairwise(errors):
        assert coarse / fine > 0.9 * 2**order


def ode_error(solver: str, steps: int) -> float:
    """Against the solution of the ODE from `first_time` to the clean end."""
    x = normal(50)
    kept = float(cosine_schedule(TIMES).kept[first_time()])
    exact = MEAN + STD * (x - math.sqrt(kept) * MEAN) / math.sqrt(kept * STD**2 + 1 - kept)
    return float((denoise(best, lambda: x, solver, steps) - exact).abs().max())


def test_diffusion_solvers_follow_the_ode_and_the_second_order_one_in_fewer_steps() -> None:
    ddim, second = ([ode_error(solver, steps) for steps in (10, 20, 40)] for solver in ("ddim", "dpm++"))
    assert ddim[2] < 0.6 * ddim[1] < 0.6**2 * ddim[0]
    assert all(fine < coarse / 5 for fine, coarse in zip(second, ddim, strict=True))
    assert ode_error("dpm++", 200) < 0.001


@pytest.mark.parametrize("count", [1, 2, 3, 10, 100, 968])
def test_steps_even_in_signal_are_different_and_reach_both_ends(count: int) -> None:
    found = evenly_in_signal(count)
    assert len(found) == count
    assert all(a < b for a, b in pairwise(found))
    assert found[-1] == first_time()
    assert found[0] == (0 if count > 1 else first_time())


def test_the_solvers_first_step_is_plain_ddim_by_hand() -> None:
    """One step from `first_time` is the clean latent's prediction; two steps of ddim written out."""
    x, kept = normal(5), cosine_schedule(TIMES).kept
    start = float(kept[first_time()])
    eps, _ = best(x, first_time())
    clean = (x - math.sqrt(1 - start) * eps) / math.sqrt(start)
    for solver in ("ddim", "dpm++"):
        torch.testing.assert_close(denoise(best, lambda: x, solver, 1), clean)
    end = float(kept[0])
    middle = math.sqrt(end) * clean + math.sqrt(1 - end) * eps
    last, _ = best(middle, 0)
    torch.testing.assert_close(
        denoise(best, lambda: x, "ddim", 2), (middle - math.sqrt(1 - end) * last) / math.sqrt(end), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(("solver", "steps"), [("ddpm", 100), ("ddim", 100), ("dpm++", 25)])
def test_diffusion_solvers_draw_from_the_law(solver: str, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    count = 40_000
    drawn = denoise(best, lambda: torch.randn(count, generator=generator, dtype=torch.float64), solver, steps)
    late = 0.0 if solver == "ddpm" else float(cosine_schedule(TIMES).kept[first_time()]) ** 0.5
    expected = MEAN - late * MEAN * STD  # of an ODE that takes a latent with that share of signal for noise
    assert abs(float(drawn.mean()) - expected) < 5 * STD / math.sqrt(count) + 0.003  # and the steps' own bias
    assert abs(float(drawn.std()) / STD - 1) < 5 / math.sqrt(2 * count) + 0.03


def test_ddpm_is_the_published_loop() -> None:
    """Written out for 5 respaced steps with the published tables, a network and injected noise."""
    head = calm(DiffusionHeadConfig(blocks=1, steps=5)).head
    assert isinstance(head, DiffusionHead)
    condition = head.net.condition(states(3))
    noises = [normal(3, 6, seed=seed) for seed in range(6)]
    share = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    kept, product_so_far = [], 1.0
    for i in range(1000):
        product_so_far *= 1 - min(1 - share[i + 1] / share[i], 0.999)
        kept.append(product_so_far)
    times = [0, 250, 500, 749, 999]  # 249.75, 499.5 (to even), 749.25
    x = noises[0]
    for i in reversed(range(5)):
        now, before = kept[times[i]], kept[times[i - 1]] if i else 1.0
        beta = 1 - now / before
        eps, position = head.predict(x, torch.tensor(times[i]), condition)
        clean = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
        mean = beta * math.sqrt(before) / (1 - now) * clean + (1 - before) * math.sqrt(1 - beta) / (1 - now) * x
        x = mean
        if i:
            low, high = math.log(beta * (1 - before) / (1 - now)), math.log(beta)
            deviation = (0.5 * ((position + 1) / 2 * high + (1 - position) / 2 * low)).exp()
            x = mean + deviation * noises[5 - i]
    given = iter(noises)
    ours = denoise(lambda x, time: head.predict(x, torch.tensor(time), condition), lambda: next(given), "ddpm", 5)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def test_kept_steps_run_from_the_first_to_the_last() -> None:
    assert spaced(5, 999) == (0, 250, 500, 749, 999)
    assert spaced(1000, 999) == tuple(range(1000))
    for count in (2, 3, 10, 50, 333):
        found = spaced(count, 999)
        assert (len(set(found)), found[0], found[-1]) == (count, 0, 999)
    assert float(cosine_schedule(10).kept[-1]) == float(cosine_schedule(TIMES).kept[-1])


# losses


def teacher(*shape: int) -> Posterior:
    return Posterior(normal(*shape, 6, seed=3), 0.3 * normal(*shape, 6, seed=4) - 1.0)


@pytest.mark.parametrize("predicts", ["velocity", "latent"])
def test_the_flow_loss_is_its_definition(predicts: Literal["velocity", "latent"]) -> None:
    head = calm(FlowHeadConfig(blocks=2, teacher_draws=5, predicts=predicts)).head
    assert isinstance(head, FlowHead)
    state, target = states(2, 3), teacher(2, 3)
    loss, metrics = head.loss(state, target, torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    eps = torch.randn(5, 2, 3, 6, generator=generator, dtype=torch.float64)
    start = torch.randn(5, 2, 3, 6, generator=generator, dtype=torch.float64)
    time = torch.rand(5, 2, 3, generator=generator)
    total = 0.0
    for s, b, p in product(range(5), range(2), range(3)):
        z = target.mean[b, p] + target.log_std[b, p].exp() * eps[s, b, p]
        t = float(time[s, b, p])
        at = (1 - t) * start[s, b, p] + t * z
        found = plain_network(head.net, at, math.floor(t * 1000), state[b, p])
        true = z - start[s, b, p] if predicts == "velocity" else z
        total += float((found - true).square().mean())
    assert float(loss) == pytest.approx(total / 30, rel=1e-6)
    assert float(metrics["flow"]) == float(loss.detach())


@pytest.mark.parametrize("solver", SOLVERS["flow"])
def test_a_flow_head_that_predicts_the_latent_draws_from_its_law(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the best prediction of a normal latent in the place of the network: as the velocity's flow, affine in the noise."""
    config = FlowHeadConfig(predicts="latent", solver=solver, steps=100)
    head = calm(config).head
    assert isinstance(head, FlowHead)
    times = []

    def clean(x: Tensor, time: Tensor, _: Tensor) -> Tensor:
        times.append(float(time))
        assert float(time) < 1  # there z says nothing of the velocity
        return x + (1 - float(time)) * velocity(x, float(time))

    monkeypatch.setattr(head, "_predict", clean)
    x = normal(50, 3, 6)
    found = head.transport(x, states(3))
    torch.testing.assert_close(found, MEAN + STD * x, rtol=0, atol=0.03 if solver == "euler" else 1e-3)
    assert len(times) == config.evaluations


def plain_network(net: torch.nn.Module, x: Tensor, time: int, state: Tensor) -> Tensor:
    """Spec section 3, one draw at a time."""
    waves = torch.tensor([math.exp(float(-math.log(10000) * torch.tensor(float(j)) / 128)) for j in range(128)])
    waves = torch.cat(((time * waves).cos(), (time * waves).sin())).double()  # float32 until here, as published
    y = net.time_out(F.silu(net.time_in(waves))) + net.state_in(state)
    x = net.latent_in(x)
    for block in net.blocks:
        shift, scale, gate = block.modulation(F.silu(y)).chunk(3)
        normed = F.layer_norm(x, x.shape, block.norm.weight, block.norm.bias, 1e-6)
        x = x + gate * block.second(F.silu(block.first(normed * (1 + scale) + shift)))
    shift, scale = net.modulation(F.silu(y)).chunk(2)
    return net.out(F.layer_norm(x, x.shape, eps=1e-6) * (1 + scale) + shift)


@pytest.mark.parametrize("time", [0, 1, 400, 999])
def test_the_hybrid_loss_by_plain_numbers(time: int) -> None:
    """KL of two normals by torch.distributions in bits; at step 0 the mass of bins by the published formula."""
    head = calm(DiffusionHeadConfig(blocks=2)).head
    assert isinstance(head, DiffusionHead)
    z, eps, state = normal(3, 6, seed=5), normal(3, 6, seed=6), states(3)
    z[0, :2] = torch.tensor([1.5, -1.5])  # in the outer bins
    found = head.hybrid(z, torch.full((3,), time), eps, state)
    schedule = cosine_schedule(TIMES)
    tables = [float(table[time].float()) for table in schedule.all]
    signal, noise, inverse, ratio, from_clean, from_noisy, low, high = tables
    for n in range(3):
        x = signal * z[n] + noise * eps[n]
        guess, position = plain_network(head.net, x, time, state[n]).chunk(2)
        mse = (guess - eps[n]).square().mean()
        log_variance = (position + 1) / 2 * high + (1 - position) / 2 * low
        mean = from_clean * (inverse * x - ratio * guess) + from_noisy * x
        model = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        if time:
            truth = torch.distributions.Normal(from_clean * z[n] + from_noisy * x, math.exp(0.5 * low))
            vb = torch.distributions.kl_divergence(truth, model).mean() / math.log(2)
        else:
            vb = -torch.stack([bin_log_mass(*values) for values in zip(z[n], mean, model.scale, strict=True)]).mean()
            vb = vb / math.log(2)
        torch.testing.assert_close(found.mse[n], mse, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.vb[n], vb, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.loss, found.mse + found.vb)


def bin_log_mass(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    def cdf(x: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    upper, lower = cdf((z - mean + 1 / 255) / std), cdf((z - mean - 1 / 255) / std)
    mass = upper if z < -0.999 else 1 - lower if z > 0.999 else upper - lower
    return mass.clamp(min=1e-12).log()


def test_the_variational_term_trains_the_variance_alone() -> None:
    head = calm(DiffusionHeadConfig(blocks=1)).head.requires_grad_(True)
    assert isinstance(head, DiffusionHead)
    head.hybrid(normal(4, 6), torch.tensor([1, 50, 500, 900]), normal(4, 6, seed=1), states(4)).vb.sum().backward()
    gradient = head.net.out.weight.grad
    assert gradient is not None
    assert float(gradient[:6].abs().max()) == 0.0
    assert float(gradient[6:].abs().min()) > 0.0


@pytest.mark.parametrize(("kind", "solver"), [("flow", "midpoint"), ("diffusion", "dpm++")])
def test_a_head_that_learns_draws_the_teachers_law(kind: str, solver: str) -> None:
    """Two states with two teachers: after a little training draws follow the state that they are given."""
    model = Calm(
        CalmConfig(
            autoencoder=AutoencoderConfig(vocab_size=9, width=8, inner=8, latent=2),
            backbone=BackboneConfig(layers=1, width=32, inner=8, heads=2),
            head=BY_KIND[kind].override(blocks=1, teacher_draws=128, solver=solver, steps=20),
        )
    )
    initialise(model, torch.Generator().manual_seed(0), std=0.15)
    head = model.head
    state = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    target = Posterior(torch.tensor([[1.0, -0.5], [-1.0, 0.5]]), torch.full((2, 2), math.log(0.3)))
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 400)
        loss, metrics = head.loss(state, target, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(metrics[head.objective]))
    assert sum(losses[-20:]) < 0.6 * sum(losses[:5]) * 4
    drawn = head.draw(state, 2000, generator)
    assert drawn.shape == (2000, 2, 2)
    torch.testing.assert_close(drawn.mean(0), target.mean, rtol=0.0, atol=0.3)
    torch.testing.assert_close(drawn.std(0), torch.full((2, 2), 0.3), rtol=0.35, atol=0.0)


# draws


@every_head
def test_draws_depend_on_state_noise_and_seed_alone(head: HeadKind) -> None:
    model = calm(head)
    state = read_by(model, 2, 3)
    draw: Callable[[int], Tensor] = lambda seed: model.head.draw(state, 5, torch.Generator().manual_seed(seed))  # noqa: E731
    assert draw(0).shape == (5, 2, 3, model.config.autoencoder.latent if model.has_latents else 4)
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    tokens = model.draw_tokens(state, 5, torch.Generator().manual_seed(0))
    assert tokens.shape == (5, 2, 3, 4)
    assert tokens.dtype == torch.int64
    if model.has_latents:
        assert torch.equal(tokens, model.autoencoder.decode(draw(0)).argmax(-1))
    else:
        assert torch.equal(tokens, draw(0))


@every_head
def test_with_a_generator_for_each_state_a_draw_is_what_it_would_be_alone(head: HeadKind) -> None:
    model = calm(head)
    state = read_by(model, 3)
    together = model.head.draw(state, 4, [torch.Generator().manual_seed(seed) for seed in range(3)])
    for row in range(3):
        alone = model.head.draw(state[row : row + 1], 4, [torch.Generator().manual_seed(row)])
        torch.testing.assert_close(together[:, row : row + 1], alone, rtol=1e-9, atol=1e-9)


@every_head
def test_a_bf16_model_draws_in_its_own_precision(head: HeadKind) -> None:
    model = calm(head).to(torch.bfloat16)
    state = read_by(model, 3).bfloat16()
    drawn = model.head.draw(state, 2, torch.Generator().manual_seed(0))
    assert drawn.dtype == (torch.bfloat16 if model.has_latents else torch.int64)
    assert bool(torch.isfinite(drawn.float()).all())
    assert model.draw_tokens(state, 2, torch.Generator().manual_seed(0)).shape == (2, 3, 4)


@every_head
def test_losses_are_float32_under_autocast_and_reach_every_parameter(head: HeadKind) -> None:
    model = calm(head).float()
    model.head.requires_grad_(True)
    ids = torch.randint(0, 61, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = model.loss(read_by(model, 2, 3).float(), ids, torch.Generator().manual_seed(0))
    assert loss.dtype == torch.float32
    assert float(metrics[model.head.objective]) == float(loss.detach())
    loss.backward()
    for name, parameter in model.head.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0.0, name


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_every_solver_draws_with_few_steps(kind: str, steps: int) -> None:
    for solver in SOLVERS[kind]:
        model = calm(BY_KIND[kind].override(solver=solver, steps=steps))
        drawn = model.head.draw(states(2), 3, torch.Generator().manual_seed(0))
        assert bool(torch.isfinite(drawn).all())


# the autoregressive head


def test_the_autoregressive_head_draws_by_its_probabilities() -> None:
    """All 27 patches of three tokens over a vocabulary of three, against the chain rule; 26 degrees of freedom."""
    model = calm(AutoregressiveHeadConfig(blocks=2), vocab=3, patch_size=3)
    head = model.head
    assert isinstance(head, AutoregressiveHead)
    state = states(1)
    every = torch.tensor(list(product(range(3), repeat=3)))
    p = head.log_probabilities(state.expand(27, -1), every).sum(-1).exp()
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(p.max() / p.min()) > 5  # not uniform, so that a wrong law would show
    count = 40_000
    drawn = head.draw(state, count, torch.Generator().manual_seed(0))[:, 0]
    seen = (drawn @ torch.tensor([9, 3, 1])).bincount(minlength=27)
    assert float(((seen - count * p) ** 2 / (count * p)).sum()) < 80.0  # chance of more for a fresh seed: 2e-7
    loss, _ = head.loss(state.expand(27, -1), every, None)
    assert float(loss) == pytest.approx(-float(head.log_probabilities(state.expand(27, -1), every).mean()), rel=1e-9)


def test_the_autoregressive_head_is_causal() -> None:
    head = calm(AutoregressiveHeadConfig(blocks=2)).head
    assert isinstance(head, AutoregressiveHead)
    ids = torch.randint(0, 61, (2, 4), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 2] = (ids[:, 2] + 1) % 61
    before, after = head.log_probabilities(states(2), ids), head.log_probabilities(states(2), changed)
    assert torch.equal(before[:, :2], after[:, :2])
    assert float((before[:, 2:] - after[:, 2:]).abs().min()) > 1e-4
    moved = head.log_probabilities(states(2, seed=1), ids)
    assert float((before - moved).abs().min()) > 1e-4  # every token sees the state


# configuration


def test_a_settings_file_from_before_there_were_heads_has_the_energy_head() -> None:
    data = {"autoencoder": {"vocab_size": 9}, "backbone": {}, "head": {"noise": 5, "blocks": 1}}
    assert CalmConfig.parse(data).head == EnergyHeadConfig(noise=5, blocks=1)
    assert CalmConfig.parse({**data, "head": {}}).head == EnergyHeadConfig()


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        ({"kind": "flow", "solver": "ddim"}, "head: the flow head knows the solvers midpoint, heun, euler; got 'ddim'"),
        ({"kind": "diffusion", "solver": "euler"}, "head: the diffusion head knows the solvers ddpm, ddim, dpm++; got 'euler'"),
        ({"kind": "diffusion", "steps": 1001}, "the times of the diffusion head's schedule; got 1001"),
        ({"kind": "flow", "noise": 3}, "head: unknown key 'noise'"),
        ({"kind": "flow", "blocks": 0}, "head.blocks: Input should be greater than 0; got 0"),
        ({"kind": "flwo"}, "head: kind must be one of energy, flow, diffusion, categorical, mixture, autoregressive; got"),
    ],
)  # fmt: skip
def test_what_a_head_cannot_do_is_one_sentence(head: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as told:
        CalmConfig.parse({"autoencoder": {"vocab_size": 9}, "backbone": {}, "head": head})
    assert sentence in str(told.value)
    assert "\n" not in str(told.value)


def test_another_solver_for_the_same_model() -> None:
    def config(head: HeadKind) -> CalmConfig:
        return CalmConfig(autoencoder=AutoencoderConfig(vocab_size=9), backbone=BackboneConfig(), head=head)

    flow = config(FlowHeadConfig(blocks=2)).with_solver("heun", 4)
    assert flow.head == FlowHeadConfig(blocks=2, solver="heun", steps=4)
    assert config(DiffusionHeadConfig()).with_solver("ddpm", None).head == DiffusionHeadConfig(solver="ddpm")
    assert config(EnergyHeadConfig()).with_solver(None, None).head == EnergyHeadConfig()
    with pytest.raises(ConfigError, match="the energy head draws without a solver: leave out solver and steps"):
        config(EnergyHeadConfig()).with_solver("heun", None)
    with pytest.raises(ConfigError, match="the flow head knows the solvers"):
        config(FlowHeadConfig()).with_solver("ddpm", None)
    with pytest.raises(ConfigError, match="steps must be at most 1000"):
        config(DiffusionHeadConfig()).with_solver(None, 2000)
