"""Cheap decoding of many candidates against all logits in float64, on weights with near ties, duplicates and any size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nextvec.config import AutoencoderConfig
from nextvec.model import vocabulary as vocabulary_module
from nextvec.model.autoencoder import Autoencoder
from nextvec.model.packed import has_bf16_products, integer_product, integer_steps
from nextvec.model.vocabulary import Vocabulary
from nextvec.sampling.pools import choose_patch, count_latents, decode_beginning
from nextvec.sampling.temperature import batch_temperature, count_equal

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact(x_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """The slow twin: every logit in float64, the lowest id of the largest."""
    return (x_ND.double() @ weight_VD.double().T).argmax(-1)


def decaying(size: int, width: int, generator: torch.Generator) -> Tensor:
    """Rows whose directions decay as those of a trained embedding do."""
    scale = torch.linspace(0, -3, width).exp()
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return (torch.randn(size, width, generator=generator) * scale) @ rotation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "width"), [(5, 8), (64, 16), (300, 32), (8200, 64), (8192, 128)])
def test_the_argmax_is_that_of_exact_logits(dtype: torch.dtype, size: int, width: int) -> None:
    g = seeded(size)
    for weight in (torch.randn(size, width, generator=g), decaying(size, width, g)):
        weight = weight.to(dtype)
        near = weight[torch.randint(size, (500,), generator=g)].float()
        rows = torch.cat((near + 0.3 * torch.randn(500, width, generator=g), torch.randn(50, width, generator=g)))
        rows = torch.cat((rows, 1e-3 * rows[:20], 1e3 * rows[:20], torch.zeros(2, width))).to(dtype)
        vocabulary = Vocabulary(weight)
        assert torch.equal(vocabulary.argmax(rows), exact(rows, weight))
        for few in (1, 3, 8, 9):
            assert torch.equal(vocabulary.argmax(rows[-few:]), exact(rows[-few:], weight))
        assert vocabulary.argmax(rows[:0]).shape == (0,)


@pytest.mark.parametrize("size", [300, 8192])
def test_autocast_does_not_round_the_logits(size: int) -> None:
    """Held-out scores are taken inside the training's autocast."""
    g = seeded()
    weight = torch.randn(size, 128, generator=g)
    weight[1::2] = weight[::2] + 1e-3 * torch.randn(size // 2, 128, generator=g)  # pairs that bf16 cannot tell apart
    vocabulary = Vocabulary(weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = vocabulary.argmax(weight[:200])
    assert torch.equal(found, exact(weight[:200], weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_and_near_ties_are_settled_exactly(dtype: torch.dtype) -> None:
    """Rows halfway between two tokens, equal tokens, and gaps far below bf16: the lowest id of the largest logit.

    Also where a few rows are asked for at a time, whose logits are all computed.
    """
    g = seeded()
    weight = torch.randn(8192, 128, generator=g)
    weight[4096:] = weight[:4096]  # each token twice
    weight[6000:] += 1e-6 * torch.randn(2192, 128, generator=g)
    weight = weight.to(dtype)
    rows = (weight[:200].float() + weight[200:400].float()).to(dtype)
    rows = torch.cat((rows, weight[:100], weight[4096:4196], weight[7000:7100]))
    vocabulary = Vocabulary(weight)
    found = vocabulary.argmax(rows)
    if vocabulary.quick:
        assert torch.equal(torch.cat([vocabulary.argmax(few) for few in rows.split(7)]), found)
    logits = rows.double() @ weight.double().T
    off = (logits.amax(1) - logits.gather(1, found[:, None])[:, 0]).max()
    assert off < (1e-12 if vocabulary.quick else 1e-4)  # float64 sums differ by their order
    if dtype == torch.bfloat16 and has_bf16_products():
        plain = (rows @ weight.T).argmax(-1)
        assert not torch.equal(plain, found)  # rounded logits do not settle them: the check above means something


def autoencoder(dtype: torch.dtype, vocab: int = 300) -> Autoencoder:
    model = Autoencoder(AutoencoderConfig(vocab_size=vocab, patch_size=3, width=16, inner=24, layers=2, latent=8))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.4, generator=seeded(len(parameter)))
    return model.to(dtype).eval()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_tokens_are_the_argmax_of_the_logits_of_their_hidden_states(dtype: torch.dtype) -> None:
    model, z = autoencoder(dtype), torch.randn(4, 50, 8, generator=seeded())
    tokens = model.decode_tokens(z)
    assert tokens.shape == (4, 50, 3)
    assert torch.equal(tokens, exact(model.decode_hidden(z), model.embedding.weight))
    if dtype == torch.float64:
        assert torch.equal(tokens, model.decode(z).argmax(-1))
        stem = model.decode_stem(z.flatten(0, 1))
        for place in range(3):
            assert torch.equal(model.decode_place(stem, place), tokens[..., place].flatten())
    assert len(tokens.unique()) > 50


def test_the_prepared_vocabulary_follows_the_weights() -> None:
    model, z = autoencoder(torch.float32), torch.randn(50, 8, generator=seeded())
    with torch.no_grad():
        before = model.decode_tokens(z)
        model.embedding.weight.add_(torch.randn(300, 16, generator=seeded(1)))
        after = model.decode_tokens(z)
        assert not torch.equal(before, after)
        assert torch.equal(after, exact(model.decode_hidden(z), model.embedding.weight))
        model.load_state_dict(autoencoder(torch.float32).state_dict())
        assert torch.equal(model.decode_tokens(z), before)


def pools(rows: int, candidates: int, spread: float) -> Tensor:
    """Latents (B, N, L) around a few centres, so that draws coincide often (small spread) or seldom."""
    g = seeded(candidates)
    centres = torch.randn(rows, 6, 8, generator=g, dtype=torch.float64)
    which = torch.randint(6, (rows, candidates), generator=g)
    noise = torch.randn(rows, candidates, 8, generator=g, dtype=torch.float64)
    return centres.gather(1, which[..., None].expand(-1, -1, 8)) + spread * noise


@torch.inference_mode()
@pytest.mark.parametrize("spread", [0.0, 0.05, 0.3, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.8, 0.5, 0.4, 1 / 3, 0.2])
def test_a_patch_chosen_with_least_decoding_is_that_of_full_decoding(temperature: float, spread: float) -> None:
    model, latent_BNL = autoencoder(torch.float64), pools(7, 40, spread)
    full_BNK = model.decode_tokens(latent_BNL)
    for seed in range(5):
        choice = choose_patch(model, latent_BNL, 3, temperature, [seeded(100 * seed + row) for row in range(7)])
        plain = batch_temperature(full_BNK, temperature, [seeded(100 * seed + row) for row in range(7)])
        assert torch.equal(choice.patch, plain)
    if temperature < 1:
        assert torch.equal(choice.copies, count_equal(full_BNK))


@torch.inference_mode()
def test_only_draws_that_agree_so_far_are_decoded_further(monkeypatch: pytest.MonkeyPatch) -> None:
    model, latent_BNL = autoencoder(torch.float64), pools(3, 60, 0.5)
    full_BNK = model.decode_tokens(latent_BNL)
    decoded: list[int] = []
    original = model.decode_place

    def watched(stem_ND: Tensor, place: int) -> Tensor:
        decoded.append(len(stem_ND))
        return original(stem_ND, place)

    monkeypatch.setattr(model, "decode_place", watched)
    copies, tokens = count_latents(model, latent_BNL, 3)
    assert torch.equal(copies, count_equal(full_BNK))
    agree = [int((count_equal(full_BNK[..., :place]) > 1).sum()) for place in (1, 2)]
    assert decoded == [180, *agree]
    assert agree[1] < agree[0] < 180
    known = tokens >= 0
    assert torch.equal(tokens[known], full_BNK[known])
    assert int(known.sum()) == sum(decoded)


@torch.inference_mode()
@pytest.mark.parametrize("length", [0, 1, 2])
def test_only_draws_that_begin_with_the_rest_of_a_prompt_are_decoded_further(
    monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    model, latent_NL = autoencoder(torch.float64), pools(1, 180, 0.3)[0]
    full_NK = model.decode_tokens(latent_NL)
    rest = full_NK.unique(dim=0, return_counts=True)
    rest_K = rest[0][rest[1].argmax(), :length]
    decoded: list[int] = []
    original = model.decode_place

    def watched(stem_ND: Tensor, place: int) -> Tensor:
        decoded.append(len(stem_ND))
        return original(stem_ND, place)

    monkeypatch.setattr(model, "decode_place", watched)
    token_NK = decode_beginning(model, latent_NL, 3, rest_K.tolist())
    agree = [(full_NK[:, :place] == rest_K[:place]).all(1) for place in range(length + 1)]
    assert torch.equal(token_NK[agree[-1]], full_NK[agree[-1]])
    assert torch.equal((token_NK[:, :length] == rest_K).all(1), agree[-1])
    if length:
        assert 1 < agree[-1].sum() < 180
        assert decoded == [int(agree[min(place, length)].sum()) for place in range(3)]
        for place, still in enumerate(agree[:-1]):
            assert torch.equal(token_NK[:, place] >= 0, still)
            assert torch.equal(token_NK[still, place], full_NK[still, place])
    else:
        assert torch.equal(token_NK, full_NK)
        assert not decoded
    foreign = decode_beginning(model, latent_NL, 3, [int(full_NK[:, 0].max()) + 1, 0])
    assert torch.equal(foreign[:, 0], full_NK[:, 0])
    assert bool((foreign[:, 1:] == -1).all())


@pytest.mark.parametrize(("most", "dtype"), [(127, torch.bfloat16), (127, torch.float32), (63, torch.float32)])
def test_bounds_by_integers_hold_on_every_kind_of_processor(
    most: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product itself is replaced by an exact one, so that all three are tried wherever this runs."""

    def product(steps_OI: Tensor, scale_O: Tensor, most: int) -> Callable[[Tensor], Tensor]:
        def bounds(q_NI: Tensor) -> Tensor:
            assert q_NI.abs().max() == most
            assert torch.equal(q_NI, q_NI.round())
            return (q_NI.double() @ steps_OI.double().T * scale_O.double()).to(dtype)

        return bounds

    monkeypatch.setattr(vocabulary_module, "integer_steps", lambda: most)
    monkeypatch.setattr(vocabulary_module, "integer_product", product)
    g = seeded()
    weight = decaying(8200, 128, g)
    near = weight[torch.randint(8200, (300,), generator=g)]
    rows = torch.cat((near + 0.2 * torch.randn(300, 128, generator=g), near[:50] + near[50:100], weight[8190:]))
    vocabulary = Vocabulary(weight)
    assert vocabulary.quick
    assert torch.equal(vocabulary.argmax(rows), exact(rows, weight))
    pairs = len(vocabulary._bound.pairs(rows, rows.norm(dim=1), vocabulary._logit)[0])
    assert pairs < 30 * len(rows)  # bounds that let everything through would hold as well


def test_integer_products_are_exact_at_their_largest_numbers() -> None:
    """Sums of 512 products of the largest numbers, of either sign: what saturates on processors without VNNI."""
    most = integer_steps()
    if not most:
        return
    steps = torch.full((40, 512), 127, dtype=torch.int8)
    steps[1::2] = -127
    steps[2::4, ::3] = 5
    rows = torch.full((9, 512), float(most))
    rows[::2] = -most
    found = integer_product(steps, torch.ones(40), most)(rows)
    assert torch.equal(found, (rows.double() @ steps.double().T).to(found.dtype))
