"""The plain arm of `nextvec bench generate`: the product's texts, by the authors' algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nextvec.bench import plain_generation
from nextvec.bench.plain_generation import choose, plain_calm, plain_text
from nextvec.config import AutoencoderConfig, BackboneConfig, CalmConfig, EnergyHeadConfig
from nextvec.model.calm import Calm
from nextvec.sampling.generate import generate
from nextvec.sampling.settings import Sampling, row_generator
from nextvec.sampling.temperature import batch_temperature

CPU = torch.device("cpu")
VOCAB, EOS, PAD = 40, 2, 0


def calm(kv_heads: int) -> Calm:
    model = Calm(
        CalmConfig(
            autoencoder=AutoencoderConfig(vocab_size=VOCAB, patch_size=3, width=16, inner=24, layers=2, latent=8),
            backbone=BackboneConfig(layers=2, width=16, inner=24, heads=4, kv_heads=kv_heads),
            head=EnergyHeadConfig(noise=8, blocks=2),
        )
    )
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return model.double().eval()


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1 / 3])
def test_both_arms_write_the_same_texts(temperature: float, kv_heads: int) -> None:
    model = calm(kv_heads)
    plain, prompt, texts = plain_calm(model), [5, 6, 7, 8, 9, 10], set()
    for seed in range(4):
        settings = Sampling(temperature, candidates=30, max_tokens=14, seed=seed)
        steps = list(generate(model, [prompt], settings, eos_id=EOS, pad_id=PAD))
        ours = [token for step in steps for token in step.tokens[0]]
        generator = row_generator(seed, 0, CPU)
        assert ours == plain_text(plain, prompt, temperature, 30, 14, generator, eos_id=EOS, pad_id=PAD)
        texts.add(tuple(ours))
    assert len(texts) > 1


@pytest.mark.parametrize("power", [1, 2, 3, 5])
def test_the_loops_over_candidates_choose_as_the_product_does(power: int) -> None:
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        pool = torch.randint(0, 3, (12, 2), generator=generator)
        mine = choose([tuple(patch) for patch in pool.tolist()], power, torch.Generator().manual_seed(seed))
        ours = batch_temperature(pool[None], 1 / power, [torch.Generator().manual_seed(seed)])[0]
        assert list(mine) == ours.tolist()


def test_the_plain_arm_decodes_every_candidate_to_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[Sequence[int]] = []
    original = plain_generation.all_logits

    def watched(decoder: Any, latent_NL: Tensor) -> Tensor:
        logits = original(decoder, latent_NL)
        shapes.append(tuple(logits.shape))
        return logits

    monkeypatch.setattr(plain_generation, "all_logits", watched)
    plain = plain_calm(calm(4))
    text = plain_text(plain, [], 0.5, 20, 9, row_generator(0, 0, CPU), eos_id=39, pad_id=PAD)
    assert len(text) == 9
    assert shapes == [(20, 3, VOCAB)] * 3
    plain_text(plain, [], 1.0, 20, 9, row_generator(0, 0, CPU), eos_id=39, pad_id=PAD)
    assert shapes[3:] == [(1, 3, VOCAB)] * 3
