"""Mixture head: its law and loss by plain loops, the law of its draws, what it reads, its use of context in the whole model."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from nextvec.config import AutoencoderConfig, BackboneConfig, CalmConfig, MixtureHeadConfig
from nextvec.errors import ConfigError
from nextvec.evaluate.bound import _log_p
from nextvec.evaluate.windows import Batch
from nextvec.model.calm import Calm
from nextvec.model.heads.mixture import MixtureHead
from nextvec.model.init import initialise
from nextvec.model.text_states import vector_of

VOCAB, K, E, D = 7, 3, 4, 12


def calm(blocks: int = 1, patch_size: int = K, recall: int = 0, grams: int = 0) -> Calm:
    """Random parameters everywhere in float64."""
    config = CalmConfig(
        autoencoder=AutoencoderConfig(
            vocab_size=VOCAB, patch_size=patch_size, width=16, inner=24, latent=patch_size * E, factored=True
        ),
        backbone=BackboneConfig(layers=1, width=D, inner=20, heads=2),
        head=MixtureHeadConfig(blocks=blocks, inner=12 if blocks > 1 else None, recall=recall, grams=grams),
    )
    model = Calm(config).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.3, generator=generator)
    return model


def head_of(model: Calm) -> MixtureHead:
    assert isinstance(model.head, MixtureHead)
    return model.head


def patches(*shape: int, seed: int = 0, patch_size: int = K) -> Tensor:
    return torch.randint(VOCAB, (*shape, patch_size), generator=torch.Generator().manual_seed(seed))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def log_law(head: MixtureHead, state: Tensor, line: list[int], place: int) -> Tensor:
    """log p(y | ...), (V,), by the docstring; `line`: the tokens before the place."""
    width, window = head.width, head.window
    read = torch.cat([rms(head.embedding.weight[y], head.embedding_norm.weight) for y in line[-window:]])
    x = head.slots(state)[place * width : (place + 1) * width] + head.before.weight @ read
    for block in head.blocks:
        x = block(x)
    return (head.output.weight @ rms(x, head.norm.weight)).log_softmax(-1)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_its_law_is_its_definition_and_reads_the_tokens_before_across_the_patches_border(patch_size: int) -> None:
    model = calm(blocks=2, patch_size=patch_size)
    head, ids = head_of(model), patches(2, 5, patch_size=patch_size)
    state_BPD, target = model.states(ids[:, :-1]), ids[:, 1:]
    assert state_BPD.shape == (2, 4, D + max(1, patch_size - 1) * D)
    bare = model.backbone(model.compressor(ids[:, :-1]))
    torch.testing.assert_close(state_BPD[..., :D], bare)
    found = head.log_probabilities(state_BPD, target)
    total, right = 0.0, 0
    for row, patch, place in product(range(2), range(4), range(patch_size)):
        line = ids[row].flatten().tolist()[: (patch + 1) * patch_size + place]
        law = log_law(head, bare[row, patch], line, place)
        token = int(target[row, patch, place])
        assert float(found[row, patch, place]) == pytest.approx(float(law[token]), abs=1e-10)
        total, right = total - float(law[token]), right + int(law.argmax() == token)
    loss, metrics = head.loss(state_BPD, target, None)
    assert float(loss) == pytest.approx(total / (8 * patch_size), rel=1e-9)
    assert float(metrics["accuracy"]) == pytest.approx(right / (8 * patch_size))


def test_draws_have_its_law() -> None:
    """Chi-square of 30,000 patches against all 343 probabilities, and the moments of a component."""
    model = calm()
    head, codes = head_of(model), head_of(model).codes()
    state = model.states(patches(1, 2))[0, -1:]
    draws = head.draw(state, 30_000, torch.Generator().manual_seed(0))[:, 0].view(-1, K, E)
    every = torch.tensor(list(product(range(VOCAB), repeat=K)))
    law = head.log_probabilities(state.expand(len(every), -1), every).sum(-1).exp()
    assert float(law.sum()) == pytest.approx(1.0)
    # which component a latent came from: drawn again with the same numbers, and codes far apart
    far = codes._replace(
        mean=10.0 * torch.arange(VOCAB).double()[:, None].expand(-1, E), std=torch.zeros(VOCAB, E).double()
    )
    head.codes = lambda: far  # type: ignore[method-assign]
    tokens = (head.draw(state, 30_000, torch.Generator().manual_seed(0))[:, 0].view(-1, K, E)[..., 0] / 10.0).long()
    counts = torch.bincount((tokens * torch.tensor([VOCAB**2, VOCAB, 1])).sum(-1), minlength=VOCAB**K).double()
    common = 30_000 * law > 8
    statistic = float(((counts - 30_000 * law).square() / (30_000 * law))[common].sum())
    freedom = int(common.sum())
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)
    first = draws[:, 1][tokens[:, 1] == int(tokens[:, 1].mode().values)]
    token = int(tokens[:, 1].mode().values)
    torch.testing.assert_close(first.mean(0), codes.mean[token], rtol=0.0, atol=0.1)
    torch.testing.assert_close(first.std(0), codes.std[token], rtol=0.1, atol=0.0)


@pytest.mark.parametrize("given", [(), (5,)])
@pytest.mark.parametrize("most_told", [0, 1 << 20])
@pytest.mark.parametrize(("recall", "grams"), [(0, 0), (2, 0), (1, 5)])
@pytest.mark.parametrize("patch_size", [1, 2, 3, 4])
def test_each_token_drawn_is_where_the_law_passes_its_random_number(
    patch_size: int, recall: int, grams: int, most_told: int, given: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws go by tables of what tokens tell the places after them, laws by the text as a whole."""
    monkeypatch.setattr("nextvec.model.heads.mixture.MOST_TOLD", most_told)
    model, draws, given = calm(2, patch_size, recall, grams), 6, given[: patch_size - 1]
    head, states = head_of(model), model.states(patches(2, 3, patch_size=patch_size))
    share = torch.rand(draws, 6, patch_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    flat = vector_of(states).flatten(0, -2)
    chosen = torch.cat(
        [head._chosen(flat[rows], asking, share[:, rows], None, given) for rows, asking in head.askings(states)], dim=1
    ).view(draws, 2, 3, patch_size)
    if given:
        assert (chosen[..., 0] == 5).all()
    for draw, row, patch in product(range(draws), range(2), range(3)):
        for place in range(len(given), patch_size):
            every = chosen[draw, row, patch].repeat(VOCAB, 1)
            every[:, place] = torch.arange(VOCAB)
            below = head.log_probabilities(states[row, patch].expand(VOCAB, -1), every)[:, place].exp().cumsum(0)
            point, token = float(share[draw, 3 * row + patch, place]), int(chosen[draw, row, patch, place])
            assert (float(below[token - 1]) if token else 0.0) <= point + 1e-12
            assert point <= float(below[token]) + 1e-12


def test_a_draw_is_one_of_the_places_in_turn() -> None:
    """The first place is read once for all draws; a later one follows from the draw's own tokens and not another's."""
    model = calm()
    head, state = head_of(model), model.states(patches(3, 2))[:, -1]
    some = head.draw(state, 50, torch.Generator().manual_seed(3))
    assert some.shape == (50, 3, K * E)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    alone = [head.draw(state[row : row + 1], 4, torch.Generator().manual_seed(5 + row)) for row in range(3)]
    torch.testing.assert_close(head.draw(state, 4, generators), torch.cat(alone, dim=1), rtol=0.0, atol=1e-12)
    nested = head.draw(state.view(3, 1, -1), 2, torch.Generator().manual_seed(0))
    assert nested.shape == (2, 3, 1, K * E)


def test_trained_on_a_language_of_pairs_it_draws_them() -> None:
    """Tokens go in pairs (y, y + 1 mod V): what the second place is, only the first one says."""
    torch.manual_seed(0)
    config = calm().config
    model = Calm(config)
    initialise(model, torch.Generator().manual_seed(0), 0.2)
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(150):
        first = torch.randint(VOCAB, (16, 3, 1), generator=g)
        ids = torch.cat((first, (first + 1) % VOCAB, (first + 2) % VOCAB), dim=-1)
        loss, _ = model.loss(model.states(ids[:, :-1]), ids[:, 1:], g)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.1 + math.log(VOCAB) / K
    head = head_of(model)
    far = head.codes()._replace(mean=10.0 * torch.arange(VOCAB).float()[:, None].expand(-1, E))
    head.codes = lambda: far  # type: ignore[method-assign]
    tokens = (head.draw(model.states(ids[:, :-1])[:, -1], 20, g).view(-1, K, E).mean(-1) / 10.0).round().long()
    assert float(((tokens[:, 1] - tokens[:, 0]) % VOCAB == 1).float().mean()) > 0.95
    assert len(tokens[:, 0].unique()) == VOCAB


def test_it_needs_a_factored_autoencoder() -> None:
    config = calm().config
    plain = config.autoencoder.model_copy(update={"factored": False})
    with pytest.raises(ConfigError, match=r"head.kind mixture needs an autoencoder .* model.factored=true"):
        CalmConfig.parse({**config.model_dump(), "autoencoder": plain.model_dump()}, "model")
    assert not any("codes" in name or "autoencoder" in name for name in head_of(calm()).state_dict())


def test_the_bound_looks_at_the_patchs_own_gaussians(monkeypatch: pytest.MonkeyPatch) -> None:
    """With codes that the decoder never confuses it is the exact code length, at one draw; else it is above."""
    model = calm()
    head, ids = head_of(model), patches(2, 4)
    state_BPD = model.states(ids)
    z = head.latents_of(ids, 50, torch.Generator().manual_seed(0))
    assert z.shape == (50, 2, 4, K * E)
    codes = head.codes()
    eps = (z.unflatten(-1, (K, E)) - codes.mean[ids]) / codes.std[ids]
    assert float(eps.mean().abs()) < 0.1
    assert float(eps.std()) == pytest.approx(1.0, abs=0.1)
    batch = Batch(
        ids=ids.flatten(1),
        starts=torch.tensor([K, 2 * K, 3 * K]),
        target=torch.stack([ids[:, 1], ids[:, 2], ids[:, 3]], dim=1),
        valid=torch.ones(2, 3, K, dtype=torch.bool).index_fill(2, torch.tensor([K - 1]), False),
        owner=torch.zeros(6, dtype=torch.int64),
    )

    def bound() -> Tensor:
        chosen = torch.ones(2, 3, dtype=torch.bool)
        return _log_p(model, batch, chosen, 4, (1.0,), torch.Generator().manual_seed(0))[0]

    expected = head.log_probabilities(state_BPD[:, :-1], ids[:, 1:])[..., : K - 1].sum(-1).flatten()
    assert bool((bound() < expected).all())

    def nearest(z: Tensor) -> Tensor:
        return one_hot(torch.cdist(z.unflatten(-1, (K, E)), codes.mean).argmin(-1), 16).double()

    monkeypatch.setattr(head, "codes", lambda: codes._replace(std=torch.full_like(codes.std, 1e-9)))
    monkeypatch.setattr(model.autoencoder, "decode_hidden", nearest)
    model.autoencoder.embedding.weight.copy_(50.0 * torch.eye(VOCAB, 16))
    torch.testing.assert_close(bound(), expected.expand(4, -1), rtol=0.0, atol=1e-9)
