"""Products of one size: texts alone and in company, by every kind of law, in bf16; and models in whose tiles places differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nextvec.config import MixtureHeadConfig
from nextvec.model.cache import KVCache
from nextvec.sampling import tiles
from nextvec.sampling.draw import abilities
from nextvec.sampling.engine import Engine
from nextvec.sampling.settings import Sampling
from nextvec.sampling.tiles import Tiles
from sampling_models import EOS, PAD, TOKENIZER, calm, token_lm

PROMPT = TOKENIZER.encode(
    "The quick brown fox jumps over the lazy dog, and once more over it, since it lies there still"
)
LAWS = [
    Sampling(1.0, max_tokens=40),
    Sampling(0.5, 6, 40),
    Sampling(0.5, 70, 40),
    Sampling(candidates=6, max_tokens=40, method="centre"),
]


TOKENWISE = [  # of a head that knows tokens' laws; the first is the default of such a model
    Sampling(max_tokens=40),
    Sampling(1.0, max_tokens=40, method="token"),
    Sampling(0.8, max_tokens=40, top_k=9, frequency_penalty=0.5),
    Sampling(0.5, 6, 40),
]


def texts(
    model: torch.nn.Module, jobs: list[tuple[list[int], Sampling]], slots: int, **options: bool
) -> list[list[int]]:
    engine = Engine(model, eos_id=EOS, pad_id=PAD, slots=slots, capacity=140, **options)  # type: ignore[arg-type]
    numbers = {engine.add(*job)[0]: index for index, job in enumerate(jobs)}
    found: list[list[int]] = [[] for _ in jobs]
    while len(engine):
        for event in engine.step():
            found[numbers[event.row]] += event.tokens
    return found


def jobs_of(laws: list[Sampling]) -> list[tuple[list[int], Sampling]]:
    """Rows of different laws, lengths and seeds; prompts of less than a tile and of more."""
    return [
        (
            PROMPT[: (7 * number) % len(PROMPT)],
            replace(law, max_tokens=12 + number, seed=number),
        )
        for number, law in enumerate(laws * 4)
    ]


@pytest.mark.parametrize("kind", ["calm", "mixture", "tokens"])
def test_a_text_is_the_same_alone_and_in_company_whatever_its_law(kind: str) -> None:
    mixture = MixtureHeadConfig(blocks=1)
    laws = {"calm": LAWS, "mixture": [*TOKENWISE, LAWS[3]], "tokens": [*LAWS[:3], *TOKENWISE]}[kind]
    if kind == "tokens":
        model: torch.nn.Module = token_lm(torch.bfloat16)
    else:
        model = calm(3, torch.bfloat16) if kind == "calm" else calm(3, torch.bfloat16, mixture)
    jobs = jobs_of(laws)
    alone = [texts(model, [job], 1, deterministic=True)[0] for job in jobs]
    assert texts(model, jobs, 20, deterministic=True) == alone
    assert texts(model, jobs[::-1], 7, deterministic=True)[::-1] == alone
    if kind != "tokens":
        assert texts(model, jobs, 20) != alone, "without the mode rounding shows: the test could fail"


def test_a_model_is_tried_once_and_tiles_have_few_draws() -> None:
    model = calm(2)
    first = Tiles(model)
    assert first.rows in (1, tiles.ROWS)
    assert [first._most_rows(law.for_model(abilities(model)).law) for law in LAWS] == [
        min(first.rows, most) for most in (16, 8, 1, 8)
    ]
    calls = 0
    states = model.states

    def counted(*arguments: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return states(*arguments)  # type: ignore[arg-type]

    model.states = counted  # type: ignore[method-assign, assignment]
    assert Tiles(model).rows == first.rows
    assert calls == 0
    model.to(torch.float32)
    Tiles(model)
    assert calls in (2, 3), "another dtype rounds otherwise"


def test_where_a_place_changes_bits_a_tile_is_one_row() -> None:
    model = calm(2)
    states = model.states

    def uneven(ids: Tensor, cache: KVCache) -> Tensor:
        found = states(ids, cache)
        return found * (1 + 1e-3 * torch.arange(ids.shape[0])[:, None, None])

    model.states = uneven  # type: ignore[method-assign, assignment]
    assert Tiles(model).rows == 1
    jobs = jobs_of(LAWS)[:6]
    alone = [texts(model, [job], 1, deterministic=True)[0] for job in jobs]
    assert texts(model, jobs, 6, deterministic=True) == alone


def test_where_a_place_changes_draws_they_are_drawn_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = calm(2)
    draw = model.draw_latents

    def uneven(state: Tensor, draws: int, generator: object) -> Tensor:
        found = draw(state, draws, generator)  # type: ignore[arg-type]
        return found + 1e-9 * torch.arange(found.shape[-2])[:, None] if state.ndim == 2 else found

    monkeypatch.setattr(model, "draw_latents", uneven)
    found = Tiles(model)
    assert [found._rows_drawn(law.for_model(abilities(model)).law) for law in LAWS] == [1, 1, 1, 1]
