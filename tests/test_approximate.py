"""The approximations against slow twins, and the stated error of the adaptive pool."""

from __future__ import annotations

import math

import pytest
import torch

from nextvec.config import EnergyHeadConfig
from nextvec.errors import UserError
from nextvec.model.heads.energy import EnergyHead
from nextvec.sampling.approximate import adaptive_patch, centre, lower_bound, medoid, scaled_noise, shrunk
from nextvec.sampling.temperature import batch_temperature


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def head() -> EnergyHead:
    made = EnergyHead(EnergyHeadConfig(noise=6, blocks=1), width=8, latent=5)
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.5, generator=seeded(len(parameter)))
    return made.double().requires_grad_(False)


def test_noise_that_is_not_scaled_is_the_heads_own() -> None:
    model, state = head(), torch.randn(3, 8, generator=seeded(), dtype=torch.float64)
    assert torch.equal(scaled_noise(model, state, 4, seeded(1), 1.0), model.draw(state, 4, seeded(1)))
    still = scaled_noise(model, state, 4, seeded(1), 0.0)
    assert torch.equal(still, still[:1].expand_as(still))
    spreads = [float(scaled_noise(model, state, 200, seeded(1), scale).std(0).mean()) for scale in (0.2, 0.6, 1.0)]
    assert spreads == sorted(spreads)
    with pytest.raises(UserError, match=r"the noise scale must be in \[0, 1\]; got 1.5"):
        scaled_noise(model, state, 4, None, 1.5)


def test_the_medoid_is_the_latent_nearest_to_the_others() -> None:
    latent_BNL = torch.randn(6, 9, 4, generator=seeded(), dtype=torch.float64)
    for row, found in zip(latent_BNL, medoid(latent_BNL), strict=True):
        sums = [sum(math.dist(a, b) for b in row.tolist()) for a in row.tolist()]
        assert torch.equal(found, row[sums.index(min(sums))])
    assert torch.equal(medoid(latent_BNL[:, :1]), latent_BNL[:, 0])
    torch.testing.assert_close(centre(latent_BNL)[2], sum(latent_BNL[2]) / 9)
    torch.testing.assert_close(shrunk(latent_BNL, 1.0), latent_BNL[:, 0])
    torch.testing.assert_close(shrunk(latent_BNL, 0.0), centre(latent_BNL))
    torch.testing.assert_close(shrunk(latent_BNL, 0.25), 0.25 * latent_BNL[:, 0] + 0.75 * centre(latent_BNL))


def law(probabilities: list[float], seed: int):  # type: ignore[no-untyped-def]
    """draw(m) of patches of two tokens, and how many were drawn."""
    generator, weights = seeded(seed), torch.tensor(probabilities)

    def draw(count: int) -> torch.Tensor:
        value = torch.multinomial(weights, count, replacement=True, generator=generator)
        return torch.stack((value // 2, value % 2), dim=-1)

    return draw


def test_a_pool_without_a_certain_winner_is_that_of_the_batch_sampler() -> None:
    for seed in range(20):
        found, used = adaptive_patch(law([0.4, 0.3, 0.3], seed), 0.5, 100, 0.05, seeded(seed))
        draw = law([0.4, 0.3, 0.3], seed)
        pool = torch.cat([draw(25) for _ in range(4)])
        assert used == 100
        assert torch.equal(found, batch_temperature(pool[None], 0.5, [seeded(seed)])[0])


@pytest.mark.parametrize("temperature", [0.5, 0.3, 0.7])
@pytest.mark.parametrize("sure", [0.9, 0.97, 1.0])
def test_where_the_pool_stops_the_error_is_within_what_was_stated(sure: float, temperature: float) -> None:
    error, runs = 0.1, 400
    probabilities = [sure, (1 - sure) * 0.9, (1 - sure) * 0.1]
    powers = [p ** (1 / temperature) for p in probabilities]
    wrong, used_all = 0, 0
    for seed in range(runs):
        found, used = adaptive_patch(law(probabilities, seed), temperature, 200, error, seeded(seed))
        wrong += found.tolist() != [0, 0]
        used_all += used
    allowed = 1 - powers[0] / sum(powers) + error
    assert wrong / runs <= allowed + 5 * math.sqrt(allowed * (1 - allowed) / runs)
    if sure == 1.0:
        assert used_all < runs * 101  # half of the pool, or less


def test_the_bound_on_a_probability() -> None:
    assert lower_bound(10, 10, 0.01) == pytest.approx(0.01**0.1)  # all agree: p^10 = 0.01
    assert lower_bound(0, 10, 0.01) == 0
    assert 0.3 < lower_bound(60, 100, 0.01) < 0.6
    exceeded = torch.distributions.Binomial(50, torch.tensor(lower_bound(40, 50, 0.05)))
    assert float((exceeded.sample((20_000,)) >= 40).float().mean()) <= 0.05


def test_bad_settings_are_refused() -> None:
    draw = law([1.0], 0)
    with pytest.raises(UserError, match=r"the error of an adaptive pool must be in \(0, 1\); got 0"):
        adaptive_patch(draw, 0.5, 10, 0.0, seeded())
    with pytest.raises(UserError, match="needs at least 2 candidates"):
        adaptive_patch(draw, 0.5, 1, 0.1, seeded())
