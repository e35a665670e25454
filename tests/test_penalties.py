"""Penalties on tokens that a text has: laws by enumeration, in every model that has laws of tokens, and texts in company."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from nextvec.errors import UserError
from nextvec.model.heads.autoregressive import AutoregressiveHead
from nextvec.model.heads.mixture import MixtureHead
from nextvec.sampling.draw import abilities, draw_patches
from nextvec.sampling.engine import Engine
from nextvec.sampling.generate import generate
from nextvec.sampling.settings import Sampling
from sampling_models import token_lm
from test_by_token import EOS, KINDS, PAD, VOCAB, K, agrees, calm, exact_decoder, same_in_any_company, texts_of

TEXT = [3, 3, 1, 0, 3]


def counts_of(text: list[int], vocab_size: int = VOCAB) -> Tensor:
    return torch.bincount(torch.tensor(text, dtype=torch.int64), minlength=vocab_size).float()


def penalised(logs: list[float], text: list[int], settings: Sampling) -> list[float]:
    """The law of one token by the definition."""
    weights = []
    for token, log in enumerate(logs):
        times = text.count(token)
        log -= settings.frequency_penalty * times + settings.presence_penalty * (times > 0)
        weights.append(math.exp(log / settings.temperature))
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("kind", ["mixture", "autoregressive"])
@pytest.mark.parametrize(
    ("penalties", "temperature", "given"),
    [((1.5, 0.0), 1.0, ()), ((0.0, 0.7), 0.6, ()), ((-1.0, 2.0), 0.8, (2,)), ((2.0, -0.5), 0.5, (4, 0))],
)
def test_places_of_a_patch_have_the_law_less_what_text_and_patch_have(
    kind: str,
    penalties: tuple[float, float],
    temperature: float,
    given: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nextvec.sampling.penalties import law_of

    model = calm(kind)
    exact_decoder(model, monkeypatch)
    settings = Sampling(temperature, presence_penalty=penalties[0], frequency_penalty=penalties[1])
    state_D = model.states(torch.tensor([[[1, 2, 3], [0, 4, 2]]]))[0, -1]
    head = model.head
    assert isinstance(head, MixtureHead | AutoregressiveHead)
    every = torch.tensor(list(product(range(VOCAB), repeat=K)))
    place_NK = head.log_probabilities(state_D.expand(len(every), -1), every)
    table = {tuple(ids): row for ids, row in zip(every.tolist(), place_NK.tolist(), strict=True)}
    law = {}
    for patch in table:
        chance = float(patch[: len(given)] == given)
        for place in range(len(given), K):
            logs = [table[(*patch[:place], v, *(0,) * (K - place - 1))][place] for v in range(VOCAB)]
            chance *= penalised(logs, [*TEXT, *patch[len(given) : place]], settings)[patch[place]]
        if chance:
            law[patch] = chance
    assert sum(law.values()) == pytest.approx(1.0)
    counts = counts_of(TEXT).expand(6000, -1).clone()
    sharpen = law_of(temperature, None, None, *penalties, counts)
    patch_NK, _ = model.draw_by_token(state_D.expand(6000, -1), torch.Generator().manual_seed(0), sharpen, given)
    agrees([tuple(patch) for patch in patch_NK.tolist()], law)
    drawn = [counts_of([*TEXT, *patch[len(given) :]]) for patch in patch_NK.tolist()]
    assert torch.equal(counts, torch.stack(drawn)), "what is drawn is counted, what is given is not"


def test_a_token_model_has_them() -> None:
    model = token_lm()
    state_BD = model.states(torch.tensor([[[5], [9]]]))[:, -1]
    settings = Sampling(0.9, presence_penalty=1.0, frequency_penalty=0.5)
    text = model.logits(state_BD)[0].topk(3).indices.repeat(2).tolist()
    counts_1V = counts_of(text, model.vocab_size)[None]
    expected = penalised(model.log_probabilities(state_BD)[0].tolist(), text, settings)
    generators = [torch.Generator().manual_seed(row) for row in range(4000)]
    law = settings.for_model(abilities(model)).law
    found = draw_patches(model, state_BD.expand(4000, -1), law, generators, counts_1V.expand(4000, -1).clone())
    agrees([tuple(patch) for patch in found.patch.tolist()], {(v,): p for v, p in enumerate(expected)})


@pytest.mark.parametrize("kind", ["mixture", "autoregressive", "token_lm"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_text_counts_what_it_drew_itself(kind: str, deterministic: bool) -> None:
    """With a penalty beyond all logits no token comes twice, whatever the prompt has and whoever is beside it."""
    model: Any = token_lm() if kind == "token_lm" else calm(kind, 40)
    if kind == "mixture":
        exact = model.head.codes()
        model.autoencoder.decode_tokens = (
            lambda z: (  # an autoencoder that loses nothing
                torch.cdist(z.unflatten(-1, (K, -1)).flatten(0, -2), exact.mean).argmin(-1).view(*z.shape[:-1], K)
            )
        )
        with torch.no_grad():
            model.head.output.weight.mul_(0.02)
    elif kind == "autoregressive":
        with torch.no_grad():
            model.head.embedding.weight.mul_(0.02)
    settings = Sampling(0.05, max_tokens=12, seed=3, presence_penalty=2.0, frequency_penalty=2.0)
    prompts = [[1, 2, 3, 4], [0, 1], [], [2, 2, 2, 3, 1, 0, 4]]

    together = same_in_any_company(model, prompts, settings, 39, deterministic)
    plain = texts_of(model, prompts, Sampling(0.05, max_tokens=12, seed=3), 39, deterministic=deterministic)
    assert plain != together
    if kind != "token_lm":  # whose logits lie further apart than penalties reach
        assert all(len(set(text)) == len(text) for text in together)
        assert any(len(set(text)) < len(text) for text in plain)


def test_rows_with_and_without_are_drawn_side_by_side() -> None:
    model = calm("mixture")
    engine = Engine(model, eos_id=EOS, pad_id=PAD, slots=4, capacity=16)
    asked = [Sampling(0.7, max_tokens=9, seed=1), Sampling(0.7, max_tokens=9, seed=1, presence_penalty=1.0)]
    rows = {engine.add([1, 2, 3], each)[0]: each for each in asked}
    texts: dict[int, list[int]] = {row: [] for row in rows}
    while len(engine):
        for event in engine.step():
            texts[event.row] += event.tokens
    for row, each in rows.items():
        alone = [ids for step in generate(model, [[1, 2, 3]], each, eos_id=EOS, pad_id=PAD) for ids in step.tokens[0]]
        assert texts[row] == alone


def test_bad_ones_are_refused_in_one_sentence() -> None:
    with pytest.raises(UserError, match=r"presence_penalty must be from -2 to 2; got 2.5: 0 is none"):
        Sampling(presence_penalty=2.5)
    with pytest.raises(UserError, match="frequency_penalty must be from -2 to 2; got nan"):
        Sampling(frequency_penalty=float("nan"))
    assert set(KINDS) == {"mixture", "autoregressive", "energy"}
    for name in ("presence_penalty", "frequency_penalty"):
        with pytest.raises(
            UserError, match=f"{name} changes the law of the next token, which method pool does not look"
        ):
            Sampling(**{name: 0.5}).for_model(abilities(calm("energy")))
