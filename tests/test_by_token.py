"""Method token: laws of single tokens sharpened, cut and conditioned, by enumeration; and when it is the one that is used."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from nextvec.bakeoff.speed import operations
from nextvec.cli import main
from nextvec.config import (
    AutoencoderConfig,
    AutoregressiveHeadConfig,
    BackboneConfig,
    CalmConfig,
    CalmRun,
    DataSettings,
    EnergyHeadConfig,
    MixtureHeadConfig,
    TokenLMConfig,
)
from nextvec.errors import UserError
from nextvec.evaluate.collision import TEMPERATURES, TOKENS, Tally, contexts, measure_by_token
from nextvec.model.calm import Calm
from nextvec.model.heads.autoregressive import AutoregressiveHead
from nextvec.model.heads.mixture import MixtureHead
from nextvec.model.interface import LanguageModel
from nextvec.rundir import save_run
from nextvec.sampling.draw import abilities, abilities_of, draw_patches
from nextvec.sampling.engine import Engine
from nextvec.sampling.generate import generate, stream_text
from nextvec.sampling.settings import Sampling
from nextvec.sampling.temperature import pick, sample_logits, sharpener
from nextvec.serve.asked import asked_job
from nextvec.serve.explain import explain_patch
from nextvec.serve.models import Served
from nextvec.serve.schema import CompletionRequest
from nextvec.serve.settings import ServeSettings
from nextvec.serve.worker import Worker
from nextvec.text.tokenizer import byte_tokenizer
from test_cost import counted

VOCAB, K, WIDTH = 7, 3, 12
EOS, PAD = 5, 6
KINDS = {
    "mixture": MixtureHeadConfig(blocks=1),
    "autoregressive": AutoregressiveHeadConfig(blocks=1),
    "energy": EnergyHeadConfig(blocks=1),
}


def calm(kind: str, vocab_size: int = VOCAB, dtype: torch.dtype = torch.float64) -> Calm:
    """Random parameters everywhere; the autoencoder's decoder then reads back what each latent's place says."""
    config = CalmConfig(
        autoencoder=AutoencoderConfig(
            vocab_size=vocab_size, patch_size=K, width=16, inner=24, latent=4 * K, factored=True
        ),
        backbone=BackboneConfig(layers=1, width=WIDTH, inner=20, heads=2),
        head=KINDS[kind],
    )
    model = Calm(config).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.6, generator=generator)
    return model


def exact_decoder(model: Calm, monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoencoder that loses nothing: each place is the token whose code is nearest."""
    if not isinstance(model.head, MixtureHead):
        return
    codes = model.head.codes()
    model.head._codes.value = codes._replace(std=codes.std * 1e-6)
    mean_VE = codes.mean

    def decode(latent_NL: Tensor) -> Tensor:
        return (
            torch.cdist(latent_NL.unflatten(-1, (K, -1)).flatten(0, -2), mean_VE)
            .argmin(-1)
            .view(*latent_NL.shape[:-1], K)
        )

    monkeypatch.setattr(model.autoencoder, "decode_tokens", decode)


def sharpened_law(
    model: Calm, state_D: Tensor, settings: Sampling, given: Sequence[int]
) -> dict[tuple[int, ...], float]:
    """Of whole patches, by loops over all of them and plain sorting of each place's law."""
    head = model.head
    assert isinstance(head, MixtureHead | AutoregressiveHead)
    every = torch.tensor(list(product(range(model.vocab_size), repeat=K)))
    place_NK = head.log_probabilities(state_D.expand(len(every), -1), every)
    table = {tuple(ids): row for ids, row in zip(every.tolist(), place_NK.tolist(), strict=True)}
    found = {}
    for patch in table:
        chance = 1.0
        for place in range(K):
            if place < len(given):
                chance *= patch[place] == given[place]
                continue
            rest = (0,) * (K - place - 1)
            law = [table[(*patch[:place], v, *rest)][place] for v in range(model.vocab_size)]
            weights = {v: math.exp(log / settings.temperature) for v, log in enumerate(law)}
            order = sorted(weights, key=lambda v: (-weights[v], v))[: settings.top_k]
            whole, kept, before = sum(weights[v] for v in order), {}, 0.0
            for v in order:
                if settings.top_p is None or before < settings.top_p * whole:
                    kept[v] = weights[v]
                before += weights[v]
            chance *= kept.get(patch[place], 0.0) / sum(kept.values())
        if chance:
            found[patch] = chance
    return found


def test_the_yardstick_tells_a_wrong_law() -> None:
    law = {(0,): 0.5, (1,): 0.5}
    with pytest.raises(AssertionError):
        agrees([(0,)] * 600 + [(1,)] * 400, law)
    agrees([(0,)] * 505 + [(1,)] * 495, law)


def agrees(draws: list[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> None:
    """Pearson's chi-square, rare patches together, below a bound that a right law passes once in a million; nothing outside."""
    counts = dict.fromkeys(law, 0)
    for patch in draws:
        assert patch in counts, f"{patch} cannot be drawn"
        counts[patch] += 1
    cells = [(counts[patch], len(draws) * chance) for patch, chance in law.items() if len(draws) * chance >= 8]
    rare = len(draws) - sum(count for count, _ in cells)
    expected = len(draws) - sum(mean for _, mean in cells)
    if expected > 1e-9:
        cells.append((rare, expected))
    value, free = sum((count - mean) ** 2 / mean for count, mean in cells), len(cells) - 1
    far = math.log(1e6)
    assert value < free + 2 * math.sqrt(free * far) + 2 * far  # Laurent and Massart 2000


@pytest.mark.parametrize("kind", ["mixture", "autoregressive"])
@pytest.mark.parametrize(
    ("settings", "given"),
    [
        (Sampling(1.0), ()),
        (Sampling(0.5), ()),
        (Sampling(0.7, top_k=3), ()),
        (Sampling(0.8, top_p=0.6), ()),
        (Sampling(1.0, top_k=4, top_p=0.7), (2,)),
        (Sampling(0.5), (1,)),
        (Sampling(0.5), (4, 0)),
    ],
)
def test_a_patch_has_the_sharpened_law_of_its_tokens(
    kind: str, settings: Sampling, given: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = calm(kind)
    exact_decoder(model, monkeypatch)
    state_D = model.states(torch.tensor([[[1, 2, 3], [0, 4, 2]]]))[0, -1]
    law = sharpened_law(model, state_D, settings, given)
    assert sum(law.values()) == pytest.approx(1.0)
    sharpen = sharpener(settings.temperature, settings.top_k, settings.top_p)
    patch_NK, latent_NL = model.draw_by_token(
        state_D.expand(6000, -1), torch.Generator().manual_seed(0), sharpen, given
    )
    assert (latent_NL is not None) == (kind == "mixture")
    agrees([tuple(patch) for patch in patch_NK.tolist()], law)


@pytest.mark.parametrize("kind", ["mixture", "autoregressive"])
def test_the_rest_of_a_prompt_is_conditioned_on_exactly(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = calm(kind)
    exact_decoder(model, monkeypatch)
    state_D = model.states(torch.tensor([[[EOS, PAD, PAD], [1, 2, 3]]]))[0, -1]
    settings = Sampling(0.6, max_tokens=2, seed=4)
    law = sharpened_law(model, state_D, settings, (4,))
    engine = Engine(model, eos_id=EOS, pad_id=PAD, slots=64, capacity=8)
    engine.add([1, 2, 3, 4], settings, samples=800)
    drawn, pools = [], set()
    while len(engine):
        for event in engine.step():
            drawn.append(event.pool.patch)
            pools.add((event.pool.draws, event.pool.copies is None, event.pool.given))
    assert pools == {(1, True, 1)}, "one draw, whatever the rest"
    agrees(drawn, law)


def test_cuts_leave_nothing_at_the_edges() -> None:
    """The largest uniform number there is picks the last token that has any probability, never one that was cut."""
    logits = torch.tensor([[3.0, 2.9, -1.0, -2.0]], dtype=torch.float64)
    sharpen = sharpener(0.5, top_k=2)
    assert sharpen is not None
    law = sharpen(logits).softmax(-1)
    assert law[0, 2:].tolist() == [0.0, 0.0]
    assert pick(law, torch.full((1, 1), 1.0, dtype=torch.float64)).tolist() == [1]
    assert pick(law, torch.zeros(1, 1, dtype=torch.float64)).tolist() == [0]
    assert sharpener(1.0) is None
    equal = torch.zeros(2000, 5)
    found = sample_logits(equal, 1.0, torch.Generator().manual_seed(0), top_k=2)
    assert set(found.tolist()) == {0, 1}, "of equal logits the lower ids"
    assert set(sample_logits(equal, 1.0, torch.Generator().manual_seed(0), top_p=0.5).tolist()) == {0, 1, 2}


def test_it_is_what_a_head_with_laws_of_tokens_is_drawn_by() -> None:
    expected = {"mixture": (False, True, True), "autoregressive": (False, False, True), "energy": (False, True, False)}
    for kind, can in expected.items():
        model = calm(kind)
        assert abilities(model) == abilities_of(model.config) == can
        chosen = Sampling().for_model(abilities(model))
        assert (chosen.method, chosen.candidates) == (("token", 1) if can[2] else ("pool", 200))
        assert Sampling(candidates=30).for_model(abilities(model)).method == "pool", "candidates ask for a pool"
        assert chosen.for_model(abilities(model)) == chosen
    token = abilities_of(TokenLMConfig(vocab_size=VOCAB, backbone=BackboneConfig(layers=1, width=8, inner=8, heads=1)))
    assert token == (True, False, True)
    assert Sampling(candidates=30).for_model(token).method == "token"
    with pytest.raises(
        UserError, match="method token sharpens the law of each token, which this model's head does not"
    ):
        Sampling(method="token").for_model(abilities(calm("energy")))
    mixture = abilities(calm("mixture"))
    with pytest.raises(
        UserError, match="which method pool does not look at: leave the candidates out, or take method token"
    ):
        Sampling(top_k=3, candidates=10).for_model(mixture)
    with pytest.raises(UserError, match="method token draws a patch once, and got 10 candidates"):
        Sampling(method="token", candidates=10).for_model(mixture)
    assert Sampling(candidates=200).for_model(token).law == Sampling().for_model(token).law, "drawn together"


@pytest.mark.parametrize("kind", ["mixture", "autoregressive"])
@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 5e-324])
def test_a_temperature_near_zero_draws_the_likeliest_tokens(kind: str, temperature: float) -> None:
    model = calm(kind, dtype=torch.float32)
    state_D = model.states(torch.tensor([[[1, 2, 3]]]))[0, -1]

    def drawn(seed: int, temperature: float) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return model.draw_by_token(state_D.expand(5, -1), generator, sharpener(temperature))[0].tolist()

    assert drawn(0, temperature) == drawn(1, temperature) == drawn(2, 1e-6)
    assert sample_logits(torch.tensor([[1.0, 2.0, 0.0]]), temperature, torch.Generator()).tolist() == [1]
    with pytest.raises(UserError, match="needs at least"):
        Sampling(temperature, candidates=20).for_model(abilities(calm("energy")))


@pytest.mark.parametrize("vocab_size", [VOCAB, 9, 50])
def test_a_sharpened_law_leaves_latents_no_noise_and_the_decoder_reads_their_means(vocab_size: int) -> None:
    model = calm("mixture", vocab_size)
    assert isinstance(model.head, MixtureHead)
    state_D = model.states(torch.tensor([[[1, 2, 3]]]))[0, -1]

    def drawn(count: int = 200, temperature: float = 0.9) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        patch, latent = model.draw_by_token(state_D.expand(count, -1), generator, sharpener(temperature))
        assert latent is not None
        return patch, latent

    drawn(1)  # some are known, and others asked for later
    for changed in ("embedding", "to_latent", "from_latent", "expand", "decoder_norm"):
        patch, latent = drawn()
        torch.testing.assert_close(model.autoencoder.decode_tokens(latent), patch)
        means = {tuple(row) for row in model.head.codes().mean.tolist()}
        assert {tuple(place) for place in latent.view(-1, 4).tolist()} <= means
        with torch.no_grad():
            getattr(model.autoencoder, changed).weight.mul_(-1.0)  # what was read before is read again
    _, noisy = model.draw_by_token(state_D.expand(200, -1), torch.Generator().manual_seed(0), None)
    assert noisy is not None
    assert not {tuple(place) for place in noisy.view(-1, 4).tolist()} & means
    assert pickle.loads(pickle.dumps(model)) is not None, "nothing that is kept stands in the way"
    with torch.inference_mode():
        model.to(torch.float32)
        drawn(1)
    assert drawn()[1].dtype == model.dtype


@pytest.mark.parametrize("kind", ["mixture", "autoregressive"])
def test_at_temperature_one_it_is_the_models_first_draw(kind: str) -> None:
    model = calm(kind)
    state_BD = model.states(torch.tensor([[[1, 2, 3]], [[4, 0, 2]]]))[:, -1]
    can = abilities(model)

    def drawn(settings: Sampling) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(row) for row in range(2)]
        return draw_patches(model, state_BD, settings.for_model(can).law, generators).patch.tolist()

    assert drawn(Sampling(1.0)) == drawn(Sampling(1.0, method="pool"))
    assert drawn(Sampling(0.5)) != drawn(Sampling(1.0)) or drawn(Sampling(0.2)) != drawn(Sampling(1.0))


def test_what_sharpened_draws_do_without_is_what_torch_no_longer_counts() -> None:
    model, generator = calm("mixture", dtype=torch.float32), torch.Generator().manual_seed(0)
    state_1D = model.states(torch.tensor([[[1, 2, 3]]]))[:, -1]
    for _ in range(40):
        model.draw_by_token(state_1D, generator, sharpener(0.5))  # tables, and what means decode to
    whole = counted(lambda: model.draw_by_token(state_1D, generator, None))
    sharpened = counted(lambda: model.draw_by_token(state_1D, generator, sharpener(0.5)))
    ours = [K * operations(model, Sampling(temperature), 1024) for temperature in (1.0, 0.5)]
    assert whole - sharpened == pytest.approx(ours[0] - ours[1])
    assert ours[0] > ours[1]


def texts_of(
    model: LanguageModel, prompts: list[list[int]], settings: Sampling, eos_id: int, **how: Any
) -> list[list[int]]:
    """What `generate` writes of each prompt."""
    rows: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, prompts, settings, eos_id=eos_id, pad_id=PAD, **how):
        for row, tokens in zip(rows, step.tokens, strict=True):
            row += tokens
    return rows


def same_in_any_company(
    model: LanguageModel, prompts: list[list[int]], settings: Sampling, eos_id: int, deterministic: bool
) -> list[list[int]]:
    """The texts, the same with fewer at once and the first one alone."""
    together = texts_of(model, prompts, settings, eos_id, deterministic=deterministic, slots=4)
    assert texts_of(model, prompts, settings, eos_id, deterministic=deterministic, slots=2) == together
    assert texts_of(model, prompts[:1], settings, eos_id, deterministic=deterministic, slots=1) == together[:1]
    return together


@pytest.mark.parametrize("kind", ["mixture", "autoregressive"])
@pytest.mark.parametrize(("dtype", "deterministic"), [(torch.float64, False), (torch.float32, True)])
def test_a_text_is_the_same_alone_and_in_company(kind: str, dtype: torch.dtype, deterministic: bool) -> None:
    model = calm(kind, dtype=dtype)
    prompts = [[1, 2, 3, 4], [0, 1], [], [2, 2, 2, 3, 1, 0, 4]]
    settings = Sampling(0.6, max_tokens=17, seed=3, top_p=0.9)

    same_in_any_company(model, prompts, settings, EOS, deterministic)


def test_the_curve_of_collisions_has_its_points() -> None:
    """Collision grows as the temperature falls, and the law at T = 1 has the head's own first-token accuracy."""
    model = calm("mixture", dtype=torch.float32)
    model.tokenizer = None
    documents = [
        torch.randint(5, (60 + row,), generator=torch.Generator().manual_seed(row)).numpy() for row in range(4)
    ]
    places, tally = contexts(documents, K, 4, 0, longest=60, after=2), Tally()
    measure_by_token(model, places, tally, eos_id=EOS, pad_id=PAD, seed=0)
    points = {point["strength"]: point for point in tally.points()}
    assert {point["method"] for point in points.values()} == {TOKENS}
    assert set(points) == set(TEMPERATURES)
    collisions = [points[temperature]["token_collision"] for temperature in sorted(TEMPERATURES)]
    assert collisions[0] > collisions[-1] + 0.05


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    tokenizer, data = byte_tokenizer(), DataSettings(path="unused")
    for kind in ("mixture", "autoregressive", "energy"):
        model = calm(kind, tokenizer.vocab_size, torch.float32)
        save_run(tmp_path / kind, CalmRun(data=data, model=model.config), model, tokenizer)
    return tmp_path


def test_the_command_takes_it(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def said(kind: str, *arguments: object, status: int = 0) -> str:
        asked = ["generate", str(runs / kind), "--prompt", "abcd", "--max-tokens", "9", *map(str, arguments)]
        monkeypatch.setattr("sys.argv", ["nextvec", *asked])
        with pytest.raises(SystemExit) as caught:
            main()
        assert (caught.value.code or 0) == status
        told = capsys.readouterr()
        return told.err if status else told.out

    plain = said("mixture")
    assert plain == said("mixture", "--method", "token")
    assert plain == "abcd" + "".join(stream_text(Calm.from_pretrained(runs / "mixture"), "abcd", max_tokens=9)) + "\n"
    assert said("mixture", "--candidates", 30) == said("mixture", "--method", "pool", "--candidates", 30)
    assert said("autoregressive", "--candidates", 30) != said("autoregressive")
    greedy = said("mixture", "--top-k", 1, "--seed", 1)
    assert said("mixture", "--top-k", 1, "--temperature", 0.3, "--seed", 2) == greedy
    assert "method token sharpens the law of each token" in said("energy", "--method", "token", status=2)


def test_a_server_draws_by_it_unless_candidates_are_asked_for() -> None:
    model, tokenizer = calm("mixture", byte_tokenizer().vocab_size, torch.float32), byte_tokenizer()
    served = Served("m", model, tokenizer, None, cast(Worker, None), context=64, created=0)  # type: ignore[arg-type]
    settings = ServeSettings(candidates=50)

    def asked(**more: object) -> Sampling:
        return asked_job(
            served, CompletionRequest.model_validate({"model": "m", "prompt": "a", **more}), [[1]], 8, settings
        ).settings

    assert asked().method == "token"
    assert asked(temperature=0.3, top_p=0.9, top_k=5).law == (0.3, 1, 5, 0.9, "token", 0.0, 0.0)
    assert asked(presence_penalty=0.5, frequency_penalty=-1).law[-2:] == (0.5, -1)
    assert asked(candidates=20).law[:2] == (0.5, 20)
    assert asked(candidates=20).method == "pool"
    assert asked(method="pool").candidates == 50, "the default, within what the server allows"
    assert asked(method="centre").candidates == 8
    with pytest.raises(UserError, match="top_k changes the law of the next token, which method pool does not look at"):
        asked(candidates=20, top_k=5)
    with pytest.raises(UserError, match="needs at least 100 candidates"):
        asked(method="pool", temperature=0.01)


def test_the_page_tells_of_one_draw() -> None:
    model = calm("mixture", dtype=torch.float32)
    engine = Engine(model, eos_id=EOS, pad_id=PAD, slots=1, capacity=8)
    settings = Sampling(0.5, max_tokens=2).for_model(abilities(model))
    engine.add([1, 2, 3, 4], settings)
    pool = engine.step()[0].pool
    detail = explain_patch(model, pool, [4], settings)
    assert detail is not None
    assert (detail.draws, len(detail.latent or ())) == (1, 4 * K)
    assert (pool.unanimous, pool.unique) == (False, 1)
