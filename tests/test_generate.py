"""The generation loop against a plain loop without cache, batch or streaming, and against scripted models."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nextvec.errors import UserError
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.sampling.generate import Step, generate, generate_texts, stream_text
from nextvec.sampling.settings import Sampling, row_generator
from nextvec.sampling.stream import TextStream, patch_texts
from nextvec.sampling.temperature import batch_temperature, sample_logits
from nextvec.text.tokenizer import train_tokenizer
from sampling_models import EOS, PAD, TOKENIZER, VOCAB, calm, token_lm

CPU = torch.device("cpu")
TEXT = "naïve café — 東京 🎲🎲 Ωmega, "


def collect(steps: Sequence[Step]) -> list[tuple[list[int], str | None]]:
    """Each row's ids and how it finished."""
    return [
        ([t for step in steps for t in step.tokens[row]], steps[-1].finished[row])
        for row in range(len(steps[0].tokens))
    ]


def plain_loop(model: Calm | TokenLM, prompt: list[int], settings: Sampling, row: int = 0) -> tuple[list[int], str]:
    """One row, the whole text through the model for every patch, plain Python around it."""
    size, generator = model.patch_size, row_generator(settings.seed, row, CPU)
    ids = [EOS] + [PAD] * (size - 1) + prompt
    rest = ids[len(ids) // size * size :]
    ids = ids[: len(ids) // size * size]
    text: list[int] = []
    while True:
        with torch.no_grad():
            state = model.states(torch.tensor(ids).view(1, -1, size))[:, -1]
            if isinstance(model, TokenLM):
                patch = sample_logits(model.logits(state), settings.temperature, generator).tolist()
            else:
                draws = 1 if settings.temperature == 1 and not rest else settings.candidates
                pool = model.draw_tokens(state[0], draws, generator).tolist()
                while rest and sum(c[: len(rest)] == rest for c in pool) < 8 and len(pool) < 4 * draws:
                    pool += model.draw_tokens(state[0], draws, generator).tolist()
                keep = [candidate[: len(rest)] == rest for candidate in pool]
                if not any(keep):  # pads before the prompt instead
                    ids, rest = [EOS] + [PAD] * (size - 1) + [PAD] * (size - len(rest)) + prompt, []
                    continue
                pool = [rest + candidate[len(rest) :] for candidate in pool]
                patch = batch_temperature(torch.tensor([pool]), settings.temperature, generator, torch.tensor([keep]))[
                    0
                ].tolist()
        for token in patch[len(rest) :]:
            if token == EOS:
                return text, "eos"
            text.append(token)
            if len(text) == settings.max_tokens:
                return text, "length"
        ids, rest = ids + patch, []


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.4])
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_cached_generation_equals_the_plain_loop_at_every_prompt_length(patch_size: int, temperature: float) -> None:
    model, settings = calm(patch_size), Sampling(temperature, candidates=12, max_tokens=11, seed=3)
    different = set()
    for length in range(2 * patch_size + 2):
        prompt = TOKENIZER.encode(TEXT)[:length]
        got = collect(list(generate(model, [prompt], settings, eos_id=EOS, pad_id=PAD)))[0]
        assert got == plain_loop(model, prompt, settings)
        different.add(tuple(got[0]))
    assert len(different) > patch_size  # the prompt matters, so equality means something


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_cached_generation_of_the_baseline_equals_the_plain_loop(temperature: float) -> None:
    model, settings = token_lm(), Sampling(temperature, candidates=1, max_tokens=20)
    for length in (0, 1, 7):
        prompt = TOKENIZER.encode(TEXT)[:length]
        got = collect(list(generate(model, [prompt], settings, eos_id=EOS, pad_id=PAD)))[0]
        assert got == plain_loop(model, prompt, settings)


@pytest.mark.parametrize("model", [calm(3), token_lm()], ids=["calm", "token_lm"])
def test_a_batch_of_any_lengths_gives_each_row_its_own_text(model: Calm | TokenLM) -> None:
    prompts = [TOKENIZER.encode(TEXT)[:length] for length in (0, 5, 4, 9, 1, 5, 12)]
    settings = Sampling(0.5, candidates=8, max_tokens=13, seed=1)
    rows = collect(list(generate(model, prompts, settings, eos_id=EOS, pad_id=PAD)))
    for row, prompt in enumerate(prompts):
        assert rows[row] == plain_loop(model, prompt, settings, row)
    assert rows[1] != rows[5]  # the same prompt in another row is another draw


def test_a_text_is_a_function_of_its_seed() -> None:
    model, prompt = calm(2), TOKENIZER.encode("ab")
    texts = [
        collect(list(generate(model, [prompt], Sampling(0.5, 8, 10, seed), eos_id=EOS, pad_id=PAD)))[0][0]
        for seed in (0, 0, 1, -1)
    ]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts}) == 3


class Seen:
    """A cache that holds the ids themselves, one list of patches per row."""

    def __init__(self, texts: list[list[list[int]]]) -> None:
        self.texts = texts

    def rows(self, start: int, stop: int) -> Seen:
        return Seen(self.texts[start:stop])

    def copy(self, source: int, target: int) -> None:
        self.texts[target][:] = self.texts[source]

    def clear(self, row: int) -> None:
        self.texts[row].clear()


class Scripted:
    """A stand-in model, K = 3: the pool after p patches of a row that starts with token t is script[t, p], repeated."""

    patch_size, vocab_size, device = 3, 50, CPU

    def __init__(self, script: dict[tuple[int, int], list[list[int]]]) -> None:
        self.script = script
        self.calls: list[tuple[int, int]] = []
        self.read: list[list[list[list[int]]]] = []

    def new_cache(self, rows: int, patches: int) -> Seen:
        self.capacity = rows, patches
        return Seen([[] for _ in range(rows)])

    def states(self, ids_BPK: Tensor, cache: Seen) -> Tensor:
        self.read.append(ids_BPK.tolist())
        for text, new in zip(cache.texts, ids_BPK.tolist(), strict=True):
            text.extend(new)
            assert len(text) <= self.capacity[1]
        known = [(text[min(1, len(text) - 1)][0], len(text)) for text in cache.texts]
        return torch.tensor(known)[:, None]

    def draw_tokens(self, state: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
        first, position = state.tolist()
        self.calls.append((first, draws))
        pool = self.script[first, position]
        return torch.tensor([pool[i % len(pool)] for i in range(draws)])


def run(script: dict[tuple[int, int], list[list[int]]], prompts: list[list[int]], **settings: float) -> list[Step]:
    options = {"temperature": 1.0, "candidates": 6, "max_tokens": 100, **settings}
    return list(generate(Scripted(script), prompts, Sampling(**options), eos_id=2, pad_id=0))  # type: ignore[arg-type]


def test_end_of_text_inside_a_patch_ends_the_row_and_drops_what_follows() -> None:
    script = {
        (10, 2): [[11, 12, 13]],
        (10, 3): [[14, 2, 15]],
        (20, 2): [[2, 2, 2]],
        (30, 2): [[31, 0, 2]],  # a pad is an id like any other: never filtered
    }
    script |= {(10, 4): [[9, 9, 9]], (20, 3): [[9, 9, 9]], (30, 3): [[9, 9, 9]]}
    steps = run(script, [[10, 1, 1], [20, 1, 1], [30, 1, 1]])
    assert [step.tokens for step in steps] == [((11, 12, 13), (), (31, 0)), ((14,), (), ())]
    assert [step.finished for step in steps] == [(None, "eos", "eos"), ("eos", "eos", "eos")]


def test_max_tokens_cuts_inside_a_patch() -> None:
    script = {(10, 2): [[11, 12, 13]], (10, 3): [[14, 15, 2]]}
    assert collect(run(script, [[10, 1, 1]], max_tokens=4)) == [([11, 12, 13, 14], "length")]
    assert collect(run(script, [[10, 1, 1]], max_tokens=5)) == [([11, 12, 13, 14, 15], "length")]
    assert collect(run(script, [[10, 1, 1]], max_tokens=6)) == [([11, 12, 13, 14, 15], "eos")]


def test_the_rest_of_a_prompt_conditions_the_next_patch() -> None:
    script = {
        (10, 2): [[7, 8, 5], [20, 21, 22], [7, 8, 9], [7, 1, 1], [7, 8, 5]],
        (10, 3): [[2, 0, 0]],
    }
    prompt = [10, 1, 1, 7, 8]
    assert collect(run(script, [prompt])) == [([5], "eos")]  # T = 1: the first that agrees
    assert collect(run(script, [prompt], temperature=1 / 3, candidates=5)) == [([5], "eos")]  # two of three that agree
    texts = {
        tuple(collect(run(script, [prompt], temperature=0.99, candidates=5, seed=seed))[0][0]) for seed in range(30)
    }
    assert texts == {(5,), (9,)}


def test_without_an_agreeing_draw_the_prompt_is_read_with_pads_on_its_left() -> None:
    script = {
        (10, 2): [[20, 21, 22], [7, 1, 23], [24, 8, 25]],
        (0, 3): [[31, 32, 33]],  # what follows [2 0 0] [0 10 1] [1 7 8]
        (0, 4): [[2, 0, 0]],
    }
    model = Scripted(script)
    steps = generate(model, [[10, 1, 1, 7, 8]], Sampling(1.0, 6, 99), eos_id=2, pad_id=0)  # type: ignore[arg-type]
    assert collect(list(steps)) == [([31, 32, 33], "eos")]
    assert model.read[1] == [[[2, 0, 0], [0, 10, 1], [1, 7, 8]]]
    assert model.calls == [(10, 6)] * 4 + [(0, 1)] * 2  # four pools looked for it


def test_a_pool_grows_until_enough_draws_begin_with_the_rest() -> None:
    class Rare(Scripted):
        def draw_tokens(self, state: Tensor, draws: int, generator: torch.Generator | None) -> Tensor:
            pool = super().draw_tokens(state, draws, generator)
            if state[1] == 2 and len(self.calls) == 3:
                pool[1] = torch.tensor([7, 8, 9])
            return pool

    model = Rare({(10, 2): [[20, 21, 22]], (10, 3): [[2, 0, 0]]})
    steps = generate(model, [[10, 1, 1, 7, 8]], Sampling(1.0, 6, 99), eos_id=2, pad_id=0)  # type: ignore[arg-type]
    assert collect(list(steps)) == [([9], "eos")]
    assert model.calls == [(10, 6)] * 4 + [(10, 1)]


def test_the_patch_that_holds_the_rest_of_the_prompt_becomes_the_next_input() -> None:
    model = Scripted({(7, 2): [[2, 0, 0]], (2, 1): [[4, 4, 4], [7, 3, 3]]})
    steps = generate(model, [[7]], Sampling(1.0, 2, 9), eos_id=2, pad_id=0)  # type: ignore[arg-type]
    assert collect(list(steps)) == [([3, 3], "eos")]
    assert model.read == [[[[2, 0, 0]]], [[[7, 3, 3]]]]  # the boundary, then the completed patch


@pytest.mark.parametrize(("packed", "first"), [(False, [[[2, 0, 0], [10, 1, 1]]]), (True, [[[10, 1, 1]]])])
def test_a_model_of_packed_documents_never_sees_a_padded_boundary(packed: bool, first: list[list[list[int]]]) -> None:
    model = Scripted({(10, 2): [[2, 0, 0]], (10, 1): [[2, 0, 0]]})
    steps = generate(model, [[10, 1, 1]], Sampling(1.0, 2, 9), eos_id=2, pad_id=0, packed=packed)  # type: ignore[arg-type]
    assert collect(list(steps)) == [([], "eos")]
    assert model.read[0] == first


def test_temperature_one_draws_one_candidate_where_nothing_is_given() -> None:
    model = Scripted({(10, 2): [[10, 3, 3]], (10, 3): [[2, 0, 0]]})
    list(generate(model, [[10, 1, 1, 10]], Sampling(1.0, 6, 9), eos_id=2, pad_id=0))  # type: ignore[arg-type]
    assert model.calls == [(10, 6)] * 2 + [(10, 1)]  # of six draws six agree, which is fewer than 8


def test_generation_leaves_the_callers_grad_mode_alone() -> None:
    steps = generate(calm(2), [[]], Sampling(0.5, 4, 4), eos_id=EOS, pad_id=PAD)
    next(steps)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_streamed_text_holds_incomplete_characters_back_and_joins_to_the_whole(size: int) -> None:
    ids = TOKENIZER.encode(TEXT * 9)
    stream = TextStream(TOKENIZER, before=TOKENIZER.encode("é🎲"))
    pieces = [stream.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) == TEXT * 9
    assert stream.finish() == ""
    assert "".join(patch_texts(TOKENIZER, ids, size)) == TEXT * 9
    assert len(patch_texts(TOKENIZER, ids, size)) == -(-len(ids) // size)


@pytest.mark.parametrize("seed", range(20))
def test_streamed_bytes_that_are_not_utf8_equal_the_batch_decoding(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokenizer = TOKENIZER if seed % 2 else train_tokenizer([TEXT * 3], 300)
    good = tokenizer.encode(TEXT * 4)
    noise = torch.randint(0, tokenizer.vocab_size, (len(good),), generator=generator).tolist()
    ids = [g if torch.rand((), generator=generator) < 0.8 else n for g, n in zip(good, noise, strict=True)]
    stream, pieces, start = TextStream(tokenizer), [], 0
    while start < len(ids):
        size = int(torch.randint(1, 6, (), generator=generator))
        pieces.append(stream.push(ids[start : start + size]))
        start += size
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


def test_a_character_cut_off_by_the_end_is_shown_as_the_batch_shows_it() -> None:
    ids = TOKENIZER.encode("a🎲")[:-1]
    stream = TextStream(TOKENIZER)
    assert stream.push(ids) == "a"
    assert stream.finish() == TOKENIZER.decode(ids)[1:]
    assert patch_texts(TOKENIZER, [], 2) == []


@pytest.mark.parametrize("model", [calm(3), token_lm()], ids=["calm", "token_lm"])
def test_streamed_text_equals_batch_text(model: Calm | TokenLM) -> None:
    settings = Sampling(0.5, candidates=8, max_tokens=40, seed=2)
    pieces = list(stream_text(model, TEXT, temperature=0.5, candidates=8, max_tokens=40, seed=2))
    ids, _ = plain_loop(model, TOKENIZER.encode(TEXT), settings)
    assert "".join(pieces) == TOKENIZER.decode(ids)
    assert generate_texts(model, [TEXT, "other"], settings)[0] == "".join(pieces)
    assert "".join(model.stream(TEXT, temperature=0.5, candidates=8, max_tokens=40, seed=2)) == "".join(pieces)
    assert generate_texts(model, [], settings) == []


def test_bad_settings_are_refused_at_the_call() -> None:
    model = calm(2)
    for temperature in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"temperature must be in \(0, 1\]"):
            stream_text(model, "a", temperature=temperature)
    with pytest.raises(UserError, match=r"temperature 0\.1 needs at least 10 candidates .* got 9"):
        stream_text(model, "a", temperature=0.1, candidates=9)
    with pytest.raises(UserError, match="max_tokens must be at least 1; got 0"):
        stream_text(model, "a", max_tokens=0)
    with pytest.raises(UserError, match=rf"prompt tokens must be in \[0, {VOCAB}\), .* got {VOCAB}"):
        generate(model, [[VOCAB]], Sampling(), eos_id=EOS, pad_id=PAD)
    with pytest.raises(UserError, match="the prompt must be valid Unicode text"):
        stream_text(model, "a\udcff")
    model.tokenizer = None
    with pytest.raises(UserError, match="this model has no tokenizer"):
        stream_text(model, "a")
