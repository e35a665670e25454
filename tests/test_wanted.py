"""Draws that go no further than a Brier score asks: the scores are those of whole draws, of every head that has latents."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from nextvec.config import (
    AutoencoderConfig,
    BackboneConfig,
    CalmConfig,
    CategoricalHeadConfig,
    EnergyHeadConfig,
    HeadKind,
    MixtureHeadConfig,
)
from nextvec.evaluate.ngrams import Scored, draw_ngrams
from nextvec.model import autoencoder as autoencoder_module
from nextvec.model.calm import Calm
from nextvec.model.recall import Recall
from nextvec.scoring.brier import brier_scores

VOCAB, DRAWS, STRIDE = 7, 8, 4
HEADS: dict[str, HeadKind] = {
    "energy": EnergyHeadConfig(blocks=1, noise=8),
    "categorical": CategoricalHeadConfig(blocks=1, steps=3),
    "mixture": MixtureHeadConfig(blocks=1),
    "mixture, recall, n-grams": MixtureHeadConfig(blocks=1, recall=2, grams=50),
}


def lively(head: HeadKind, patch_size: int) -> Calm:
    factored = not isinstance(head, EnergyHeadConfig)
    autoencoder = AutoencoderConfig(
        vocab_size=VOCAB, patch_size=patch_size, width=16, inner=24, latent=4 * patch_size, factored=factored
    )
    backbone = BackboneConfig(layers=1, width=16, inner=24, heads=2)
    model = Calm(CalmConfig(autoencoder=autoencoder, backbone=backbone, head=head))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 * parameter.shape[1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
    return model.double().eval()


def goes_on(drawn: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Which tokens of the draws (S, B, Q, n) matter, by the words of the docstring of `draw_ngrams`."""
    wanted = torch.ones_like(drawn, dtype=torch.bool)
    draws, rows, starts, order = drawn.shape
    for row, start, place in itertools.product(range(rows), range(starts), range(1, order)):
        prefixes = [tuple(drawn[s, row, start, :place].tolist()) for s in range(draws)]
        for s, prefix in enumerate(prefixes):
            met = prefixes.count(prefix) > 1 or prefix == tuple(target[row, start, :place].tolist())
            wanted[s, row, start, place] = wanted[s, row, start, place - 1] and met and valid[row, start, place]
    return wanted


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("patch_size", [4, 8])
@pytest.mark.parametrize("name", HEADS)
def test_what_is_drawn_is_what_whole_draws_have_and_scores_the_same(
    name: str, patch_size: int, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:  # texts are asked one by one, and latents decoded a few at a time
        monkeypatch.setattr(Recall, "texts_at_once", lambda self, tokens: 1)
        monkeypatch.setattr(autoencoder_module, "CHUNK_ELEMENTS", 24 * patch_size * 5)
    model, size = lively(HEADS[name], patch_size), patch_size
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (3, 5 * size + 4), generator=generator)
    starts = range(size, 5 * size + 1, size)
    target = torch.stack([ids[:, start : start + 4] for start in starts], dim=1)
    valid = torch.ones_like(target, dtype=torch.bool)
    valid[0, 3, 2:] = valid[1, 4] = False
    context = ids[:, : 5 * size]

    def drawn(scored: Scored | None) -> Tensor:
        return draw_ngrams(model, context, DRAWS, 4, torch.Generator().manual_seed(2), stride=size, scored=scored)

    whole, some = drawn(None), drawn(Scored(target, valid))
    wanted = goes_on(whole, target, valid)
    assert 0.2 < wanted[..., 1:].double().mean() < 0.9
    assert some.equal(whole * wanted)
    flat = target.flatten(0, 1), valid.flatten(0, 1)
    scores = brier_scores(whole.flatten(1, 2), *flat, "all_pairs")
    assert brier_scores(some.flatten(1, 2), *flat, "all_pairs").equal(scores)
    assert scores.nan_to_num().unique().numel() > 4
