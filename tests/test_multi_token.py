"""The multi-token model: no autoencoder to train, a temperature for each token, exact bits per byte."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nextvec.cli import main
from nextvec.config import (
    AutoencoderConfig,
    AutoregressiveHeadConfig,
    BackboneConfig,
    CalmConfig,
    CalmRun,
    DataSettings,
)
from nextvec.errors import ConfigError
from nextvec.evaluate.bound import evaluate_likelihood
from nextvec.evaluate.cost import calm_cost
from nextvec.model.calm import Calm
from nextvec.model.heads.autoregressive import AutoregressiveHead
from nextvec.model.init import initialise
from nextvec.rundir import load_run
from nextvec.sampling.temperature import sharpener
from nextvec.text.prepare import prepare
from nextvec.text.tokenizer import byte_tokenizer
from nextvec.train.objectives import build_objective

TOKENIZER = byte_tokenizer()
CONFIG = CalmConfig(
    autoencoder=AutoencoderConfig(vocab_size=TOKENIZER.vocab_size, patch_size=2, width=16, inner=16, latent=8),
    backbone=BackboneConfig(layers=1, width=16, inner=24, heads=2),
    head=AutoregressiveHeadConfig(),
)


def model_of(seed: int = 0) -> Calm:
    """Float64, with weights so large that its laws are far from even."""
    model = Calm(CONFIG)
    initialise(model, torch.Generator().manual_seed(seed), 0.5)
    return model.double().eval().requires_grad_(False)


def test_it_is_built_without_an_autoencoder_and_from_the_seed_alone() -> None:
    run = CalmRun(model=CONFIG, data=DataSettings(path="x"))
    torch.manual_seed(1)
    first = build_objective(run, TOKENIZER).model.state_dict()
    torch.manual_seed(2)
    second = build_objective(run, TOKENIZER).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    energy = CalmRun(
        model=CalmConfig(autoencoder=CONFIG.autoencoder, backbone=CONFIG.backbone), data=DataSettings(path="x")
    )
    with pytest.raises(ConfigError, match="training CALM needs a trained autoencoder: give --autoencoder RUN"):
        build_objective(energy, TOKENIZER)


def test_the_command_line_trains_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").mkdir()
    for index in range(20):
        (tmp_path / "text" / f"{index}.txt").write_text(f"line {index} of a small text\n" * 20)
    prepare([str(tmp_path / "text")], TOKENIZER, tmp_path / "shards", valid_fraction=0.2, workers=1)
    settings = ["model.head.kind=autoregressive", "model.autoencoder.patch_size=2", "train.steps=2"]
    settings += [f"model.backbone.{name}" for name in ("layers=1", "width=16", "inner=16", "heads=2")]
    settings += ["data.context_tokens=32", "data.rows=2"]
    words = ["train", "lm", "--data", str(tmp_path / "shards"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["nextvec", *words, *settings])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    model = load_run(tmp_path / "run").model
    assert (model.patch_size, model.vocab_size) == (2, TOKENIZER.vocab_size)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_each_token_is_drawn_at_the_temperature(temperature: float) -> None:
    """Draws of both tokens against the law by enumeration; the chance of a failure is below 1e-6 (6 standard deviations)."""
    model = model_of()
    head = model.head
    assert isinstance(head, AutoregressiveHead)
    state_D = torch.randn(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    V, S = CONFIG.vocab_size, 40_000

    def law(tokens: list[int], place: int) -> torch.Tensor:
        ids_VK = torch.tensor([[*tokens[:place], v, *[0] * (1 - place)][:2] for v in range(V)])
        log_V = head.log_probabilities(state_D.expand(V, -1), ids_VK)[:, place]
        return (log_V / temperature).softmax(-1)

    draws_SK = head.draw(state_D, S, torch.Generator().manual_seed(0), sharpen=sharpener(temperature))
    first_V = law([], 0)
    likely = int(first_V.argmax())
    second_V = law([likely], 1)
    for v in first_V.topk(5).indices.tolist():
        p = float(first_V[v])
        assert float((draws_SK[:, 0] == v).double().mean()) == pytest.approx(p, abs=6 * math.sqrt(p * (1 - p) / S))
    after = draws_SK[draws_SK[:, 0] == likely, 1]
    for v in second_V.topk(5).indices.tolist():
        p = float(second_V[v])
        assert float((after == v).double().mean()) == pytest.approx(p, abs=6 * math.sqrt(p * (1 - p) / len(after)))


def test_its_bits_per_byte_are_exact() -> None:
    """Against a loop over patches of a document, each given all before it."""
    model = model_of()
    texts = ["a small text to score", "another one, of another length", "and a third"]
    documents = [np.array([*TOKENIZER.encode(text), TOKENIZER.eos_id]) for text in texts]
    found = evaluate_likelihood(
        None, model, documents, TOKENIZER, context_tokens=64, generator=torch.Generator().manual_seed(0), patch_size=4
    )
    head = model.head
    assert isinstance(head, AutoregressiveHead)
    nats = count = 0.0
    for document in documents[1:]:  # the first is kept for fitting temperatures
        ids = torch.tensor(document)
        padded = torch.cat([ids, ids.new_zeros(len(ids) % 2)]).view(1, -1, 2)
        state_PD = model.states(padded)[0]
        for p in range(1, padded.shape[1]):
            log_K = head.log_probabilities(state_PD[p - 1 : p], padded[0, p : p + 1])[0]
            real = min(2, len(ids) - 2 * p)
            nats, count = nats - float(log_K[:real].sum()), count + real
    assert found.exact is not None
    assert found.text.patch_size == 2
    assert found.text.tokens == count
    assert found.exact.nats_per_token == pytest.approx(nats / count)
    assert found.exact.bits_per_byte == pytest.approx(nats / math.log(2) / found.text.bytes)


def test_a_mean_of_latents_costs_its_draws_and_one_decoding() -> None:
    energy = CalmConfig(autoencoder=CONFIG.autoencoder, backbone=CONFIG.backbone)
    one, pool, centre = (
        calm_cost(energy, candidates=candidates, decoded=decoded).inference_split
        for candidates, decoded in ((1, None), (8, None), (8, 1))
    )
    assert (centre.head, centre.autoencoder, centre.vocabulary) == (pool.head, one.autoencoder, one.vocabulary)
    assert one.total < centre.total < pool.total
