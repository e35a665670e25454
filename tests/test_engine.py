"""The engine: rows that join and leave between patches, samples of one prompt, a sliding window, and the deterministic mode."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nextvec.config import CalmConfig, TokenLMConfig
from nextvec.errors import UserError
from nextvec.model.cache import KVCache
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.sampling import draw
from nextvec.sampling.engine import Engine, Pool, inputs_needed
from nextvec.sampling.generate import generate, generate_texts, stream_pieces, stream_text
from nextvec.sampling.settings import Sampling
from sampling_models import EOS, PAD, TOKENIZER, VOCAB, calm, token_lm

PROMPT = TOKENIZER.encode("The quick brown fox jumps over")


def engine(model: Calm | TokenLM, slots: int = 4, capacity: int = 40, **options: bool) -> Engine:
    return Engine(model, eos_id=EOS, pad_id=PAD, slots=slots, capacity=capacity, **options)


def alone(model: Calm | TokenLM, prompt: Sequence[int], settings: Sampling, row: int = 0, **options: bool) -> list[int]:
    """A row's ids with nobody beside it."""
    one = engine(model, slots=1, **options)
    one.add(prompt, settings, row=row)
    return run(one)[0]


def run(one: Engine, texts: dict[int, list[int]] | None = None) -> dict[int, list[int]]:
    texts = {} if texts is None else texts
    while len(one):
        for event in one.step():
            texts.setdefault(event.row, []).extend(event.tokens)
    return texts


@pytest.mark.parametrize("model", [calm(3), token_lm()], ids=["calm", "token_lm"])
def test_rows_that_join_and_leave_between_patches_keep_their_texts(model: Calm | TokenLM) -> None:
    one = engine(model, slots=3)
    jobs = [
        (PROMPT[:length], Sampling(temperature, 8, tokens, seed))
        for seed, (length, temperature, tokens) in enumerate(
            [(0, 0.5, 20), (7, 1.0, 9), (12, 0.4, 14), (5, 0.5, 3), (11, 1.0, 17), (3, 0.5, 8)]
        )
    ]
    texts: dict[int, list[int]] = {}
    numbers = []
    for prompt, settings in jobs:
        numbers += one.add(prompt, settings)
        for _ in range(2):
            events = one.step()
            assert len(events) <= 3
            for event in events:
                texts.setdefault(event.row, []).extend(event.tokens)
    run(one, texts)
    assert numbers == list(range(6))
    for number, (prompt, settings) in zip(numbers, jobs, strict=True):
        assert texts[number] == alone(model, prompt, settings)
    assert one.step() == []


@pytest.mark.parametrize("model", [calm(3), token_lm()], ids=["calm", "token_lm"])
@pytest.mark.parametrize("slots", [2, 9])
def test_samples_share_one_reading_of_their_prompt(
    model: Calm | TokenLM, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, ...]] = []
    original = model.states

    def watched(ids_BPK: Tensor, cache: KVCache) -> Tensor:
        read.append(tuple(ids_BPK.shape[:2]))
        return original(ids_BPK, cache)

    settings = Sampling(0.5, 8, 9, seed=4)
    whole = [alone(model, PROMPT, settings, row) for row in range(5)]
    monkeypatch.setattr(model, "states", watched)
    one = engine(model, slots)
    one.add(PROMPT, settings, samples=5)
    texts = run(one)
    assert [texts[row] for row in range(5)] == whole
    assert len({tuple(text) for text in whole}) > 1
    long = 1 + len(PROMPT) // model.patch_size
    assert sum(shape == (1, long) for shape in read) == (1 if slots == 9 else 3)


def test_a_cancelled_row_leaves_and_its_slot_serves_the_next() -> None:
    model, settings = calm(3), Sampling(0.5, 8, 12)
    one = engine(model, slots=2)
    first, second, third, fourth = (one.add(PROMPT[:length], settings)[0] for length in (9, 10, 11, 12))
    one.step()
    one.cancel(first)
    one.cancel(fourth)  # still in the queue
    one.cancel(fourth)
    one.cancel(99)
    assert len(one) == 2
    events = one.step()
    assert [event.row for event in events] == [second, third]
    texts = run(one, {third: list(events[1].tokens)})
    assert texts[third] == alone(model, PROMPT[:11], settings)
    assert first not in texts


def test_closing_the_iterator_frees_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = calm(2)
    caches: list[weakref.ref[KVCache]] = []
    original = model.new_cache

    def watched(rows: int, patches: int) -> KVCache:
        cache = original(rows, patches)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(model, "new_cache", watched)
    steps = generate(model, [PROMPT] * 3, Sampling(0.5, 4, 50), eos_id=EOS, pad_id=PAD)
    next(steps)
    assert caches[0]() is not None
    steps.close()  # type: ignore[attr-defined]
    gc.collect()
    assert caches[0]() is None


@pytest.mark.parametrize("model", [calm(3), token_lm()], ids=["calm", "token_lm"])
def test_many_prompts_wait_for_few_slots(model: Calm | TokenLM) -> None:
    prompts, settings = [PROMPT[:length] for length in (4, 4, 0, 9, 1)], Sampling(0.5, 8, 7, seed=2)

    def ids(**options: int) -> list[list[int]]:
        steps = list(generate(model, prompts, settings, eos_id=EOS, pad_id=PAD, samples=2, **options))
        assert None not in steps[-1].finished
        return [[token for step in steps for token in step.tokens[row]] for row in range(10)]

    assert ids(slots=1) == ids(slots=3) == ids()


def sliding_twin(model: Calm, prompt: list[int], settings: Sampling, capacity: int) -> list[int]:
    """Plain loop: read the last patches anew whenever there are more than `capacity`, one patch at a time otherwise."""
    from nextvec.sampling.draw import abilities, draw_patches
    from nextvec.sampling.settings import row_generator

    size, generator = model.patch_size, row_generator(settings.seed, 0, torch.device("cpu"))
    patches = torch.tensor([EOS] + [PAD] * (size - 1) + prompt).view(-1, size).tolist()
    text: list[int] = []
    while len(text) < settings.max_tokens:
        if len(patches) > capacity:
            patches = patches[-(capacity * 3 // 4) :]
        with torch.no_grad():
            state = model.states(torch.tensor([patches]))[:, -1]
            patch = draw_patches(model, state, settings.for_model(abilities(model)).law, [generator]).patch[0].tolist()
        if EOS in patch:
            return text + patch[: patch.index(EOS)]
        text += patch
        patches.append(patch)
    return text[: settings.max_tokens]


@pytest.mark.parametrize("length", [0, 6, 12, 30])
def test_a_sliding_window_reads_the_end_of_the_text_as_training_would(length: int) -> None:
    model = calm(2)
    prompt = (PROMPT * 2)[:length]
    for seed in range(3):
        settings = Sampling(0.5, 8, 41, seed)
        steps = generate(model, [prompt], settings, eos_id=EOS, pad_id=PAD, context=16, slide=True)
        ids = [token for step in steps for token in step.tokens[0]]
        assert ids == sliding_twin(model, prompt, settings, 8)
        assert len(ids) > 16  # it did slide


@pytest.mark.parametrize("capacity", [2, 3])
def test_the_smallest_windows_slide(capacity: int) -> None:
    steps = generate(calm(2), [PROMPT], Sampling(1.0, 4, 20), eos_id=EOS, pad_id=PAD, context=2 * capacity, slide=True)
    assert len(list(steps)) > capacity


def test_a_prompt_beyond_the_context_is_refused_or_slides() -> None:
    model = calm(2)
    model.context_tokens = 20
    with pytest.raises(UserError, match=r"a prompt has 21 tokens, and the model was trained to read 20: shorten it"):
        stream_text(model, "x" * 21)
    stream_text(model, "x" * 20)
    assert "".join(stream_text(model, "x" * 21, slide=True, max_tokens=30, candidates=4))
    with pytest.raises(UserError, match="a prompt of 30 tokens and 60 new ones take 90 of context, and there are 20"):
        engine(model, capacity=10).add(PROMPT, Sampling(max_tokens=60))
    assert inputs_needed(30, 60, 2) * 2 == 90  # the boundary, and all but the last patch


# --- the deterministic mode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("patch_size", [2, 3, 4])
def test_streamed_batch_cached_and_read_anew_are_one_text_in_the_deterministic_mode(
    patch_size: int, dtype: torch.dtype
) -> None:
    model = calm(patch_size, dtype)
    settings = Sampling(0.9, 30, 16, seed=1)
    prompts = [PROMPT[:length] for length in range(8, 8 + patch_size)] + [[], PROMPT]
    steps = list(generate(model, prompts, settings, eos_id=EOS, pad_id=PAD, deterministic=True, samples=2))
    batch = [[token for step in steps for token in step.tokens[row]] for row in range(2 * len(prompts))]
    for index, prompt in enumerate(prompts):
        for sample in range(2):
            row = 2 * index + sample
            assert batch[row] == alone(model, prompt, settings, row, deterministic=True)
            assert batch[row] == read_anew(model, prompt, settings, row)
    assert len({tuple(text) for text in batch}) > 1


def read_anew(model: Calm, prompt: list[int], settings: Sampling, row: int) -> list[int]:
    """Without a cache that lasts: for every patch an engine of its own reads all of the text before it."""
    from nextvec.sampling.settings import row_generator

    generator, text, size = row_generator(settings.seed, row, torch.device("cpu")), [], model.patch_size
    whole, rest = prompt[: len(prompt) // size * size], prompt[len(prompt) // size * size :]
    while True:
        one = engine(model, slots=1, deterministic=True)
        one.add(whole + rest, Sampling(settings.temperature, settings.candidates, settings.max_tokens - len(text)))
        one._queue[0].started = generator
        event = one.step()[0]
        text += event.tokens
        if event.finished:
            return text
        if event.pool.given < len(rest):  # no draw began with them
            whole = [PAD] * (size - len(rest)) + whole
        whole, rest = whole + rest + list(event.tokens), []


def test_batched_products_in_bf16_are_why_there_is_a_deterministic_mode() -> None:
    """The check above could pass for want of rounding: without the mode, states of a batch differ from those alone."""
    model = calm(3, torch.bfloat16)
    ids = torch.tensor(PROMPT).view(1, -1, 3)
    with torch.inference_mode():
        together = model.states(ids, model.new_cache(1, 20))[:, -1]
        cache = model.new_cache(1, 20)
        for position in range(ids.shape[1]):
            single = model.states(ids[:, position : position + 1], cache)[:, -1]
    assert not torch.equal(together, single)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_text_is_batch_text_in_the_deterministic_mode(dtype: torch.dtype) -> None:
    model, prompts = calm(3, dtype), ["one", "another one", ""]
    settings = Sampling(0.5, 20, 24, seed=5)
    texts = [""] * 6
    for piece in stream_pieces(model, prompts, settings, samples=2, deterministic=True):
        texts[piece.row] += piece.text
    streamed = stream_text(model, "one", candidates=20, max_tokens=24, seed=5, deterministic=True)
    assert texts[0] == "".join(streamed)


# --- pools and stops


def test_the_figures_of_a_pool() -> None:
    assert Pool(1, None).unanimous is False
    assert Pool(1, None).unique == 1
    assert Pool(6, torch.tensor([3, 3, 2, 3, 2, 1])).unique == 3
    assert Pool(6, torch.tensor([0, 3, 0, 3, 0, 3])).unanimous  # of those that agree with the prompt's rest
    assert not Pool(3, torch.tensor([1, 1, 1])).unanimous


def test_every_event_tells_its_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    model = calm(3)
    pool = torch.tensor([[7, 8, 9]] * 5 + [[7, 1, 1]] * 3 + [[5, 5, 5]] * 4)
    decode = model.autoencoder.decode_tokens
    monkeypatch.setattr(model.autoencoder, "decode_tokens", lambda z: pool if len(z) == len(pool) else decode(z))
    monkeypatch.setattr(draw, "decode_beginning", lambda decoder, latent, size, rest: pool)
    one = engine(model)
    one.add(PROMPT[:9], Sampling(0.5, 12, 6))
    one.add(PROMPT[:9], Sampling(1.0, 12, 6))
    one.add([*PROMPT[:9], 7], Sampling(1.0, 12, 6, seed=1))  # the rest of a prompt is met by whole draws
    pools = [event.pool for event in one.step()]
    assert [pool.draws for pool in pools] == [12, 1, 12]
    assert pools[0].copies is not None
    assert pools[1].copies is None
    assert pools[2].copies is not None
    assert pools[2].copies.tolist() == [5] * 5 + [3] * 3 + [0] * 4
    assert pools[2].unique == 2


@pytest.mark.parametrize("rest", [0, 1])
def test_a_pool_holds_the_latents_that_were_voted_on(rest: int) -> None:
    from nextvec.sampling.explain import hold_vote, next_patch

    model, prompt = calm(3), PROMPT[: 9 + rest]
    one = engine(model)
    one.add(prompt, Sampling(0.5, 40, 6, seed=8))
    pool = one.step()[0].pool
    assert pool.latents is not None
    assert pool.copies is not None
    tokens = model.autoencoder.decode_tokens(pool.latents)
    vote = hold_vote(tokens, prompt[9 : 9 + pool.given], 0.5)
    assert vote == next_patch(model, prompt, 0.5, 40, 8, eos_id=EOS, pad_id=PAD)
    assert vote.kept == int((pool.copies > 0).sum())
    winner = next(each for each in vote.candidates if each.ids == pool.patch[pool.given :])
    assert winner.votes in pool.copies.tolist()
    assert pool.tokens is None


@pytest.mark.parametrize("model", [calm(3), token_lm()], ids=["calm", "token_lm"])
def test_a_text_ends_before_a_stop_string_wherever_patches_meet(model: Calm | TokenLM) -> None:
    settings = Sampling(1.0, max_tokens=60, seed=0)
    whole = generate_texts(model, ["go"], settings)[0]
    assert len(whole) > 30
    for start in range(3, 20):
        for length in (1, 2, 5):
            stop = whole[start : start + length]
            text = generate_texts(model, ["go"], settings, stop=["never seen", stop])[0]
            assert text == whole[: whole.index(stop)]
    pieces = list(stream_pieces(model, ["go"], settings, stop=[whole[7:12]]))
    assert [piece.finished for piece in pieces[-2:]] == [None, "stop"]
    assert sum(piece.tokens for piece in pieces) < 60  # it stopped drawing
    assert generate_texts(model, ["go"], settings, stop=["never seen", whole + "!"])[0] == whole


def test_samples_stop_each_for_itself() -> None:
    model, settings = calm(3), Sampling(1.0, max_tokens=45, seed=3)
    plain = generate_texts(model, ["go", "on"], settings, samples=3)
    stop = plain[1][4]
    cut = generate_texts(model, ["go", "on"], settings, samples=3, stop=[stop])
    assert cut == [text.split(stop)[0] for text in plain]
    assert len({len(text) for text in cut}) > 1


def test_the_centre_of_latents_is_decoded_once() -> None:
    model = calm(3)
    for prompt in (PROMPT[:9], PROMPT[:10]):
        one = engine(model)
        one.add(prompt, Sampling(candidates=8, max_tokens=30, seed=2, method="centre"), samples=2)
        events = one.step()
        assert len(one._rows) == 2
        for event in events:
            assert event.pool.latents is not None
            assert event.pool.latents.shape == (8, 8)
            assert event.pool.given == 0  # a rest is padded for at once
            decoded = model.autoencoder.decode_tokens(event.pool.latents.mean(0, keepdim=True))[0]
            assert event.pool.patch == tuple(decoded.tolist())
        assert not torch.equal(events[0].pool.latents, events[1].pool.latents)


def test_mistakes_are_told_at_the_call() -> None:
    model = calm(2)
    with pytest.raises(UserError, match="method must be one of auto, pool, centre, token; got 'mean'"):
        Sampling(method="mean")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="method centre averages latents, which this model does not draw"):
        engine(token_lm()).add([], Sampling(method="centre"))
    with pytest.raises(UserError, match="stop must be a list of texts, none of them empty"):
        stream_text(model, "a", stop=[""])
    with pytest.raises(UserError, match="stop must be a list of texts"):
        stream_text(model, "a", stop="x")
    with pytest.raises(UserError, match="samples must be between 1 and 100,000; got 0"):
        engine(model).add([], Sampling(), samples=0)
    with pytest.raises(UserError, match=r"prompt tokens must be in \[0, "):
        engine(model).add([VOCAB], Sampling())
    with pytest.raises(UserError, match="slots must be at least 1"):
        engine(model, slots=0)
    with pytest.raises(UserError, match=r"top_k changes the law of the next token, which method pool does not look at"):
        stream_text(model, "a", top_k=3)
    with pytest.raises(UserError, match=r"top_p changes the law of the next token, which method pool does not look at"):
        stream_text(model, "a", top_p=0.5)
    with pytest.raises(UserError, match=r"top_p must be in \(0, 1\]; got 1.5"):
        stream_text(token_lm(), "a", top_p=1.5)
    with pytest.raises(UserError, match="top_k must be at least 1; got 0"):
        stream_text(token_lm(), "a", top_k=0)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["energy", "mixture", "autoregressive", "token"])
def test_generation_in_bfloat16_with_all_that_a_model_may_have(kind: str, deterministic: bool) -> None:
    """Its linear layers are packed there, where the processor has products for it."""
    backbone = {"layers": 1, "width": 64, "inner": 64, "heads": 2}
    more = {} if kind == "energy" else {"recall": 1, "grams": 64}
    autoencoder = {"vocab_size": 64, "patch_size": 4, "width": 32, "inner": 32, "latent": 32, "factored": True}
    model: Calm | TokenLM
    if kind == "token":
        model = TokenLM(TokenLMConfig.parse({"vocab_size": 64, "backbone": backbone, **more}))
    else:
        head = {"kind": kind, **more}
        model = Calm(CalmConfig.parse({"autoencoder": autoencoder, "backbone": backbone, "head": head}))
    model = model.bfloat16().eval()
    engine = Engine(model, eos_id=0, pad_id=1, slots=2, capacity=16, deterministic=deterministic)
    for prompt in ([3, 4, 5, 6, 7, 8, 9, 10], [3, 4, 5]):
        engine.add(prompt, Sampling(max_tokens=8, seed=0, temperature=0.5))
    events = [event for _ in range(8) for event in engine.step()]
    drawn = [sum(len(event.tokens) for event in events if event.row == row) for row in range(2)]
    ended = [any(event.finished for event in events if event.row == row) for row in range(2)]
    assert all(ended) or drawn == [8, 8]
