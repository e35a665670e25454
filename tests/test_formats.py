"""Run directories of every released format stay loadable (tests/fixtures/formatN, tiny random models of each kind)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from nextvec import Calm, TokenLM, load_run
from nextvec.errors import ConfigError, DataError
from nextvec.model.autoencoder import Autoencoder

FIXTURES = Path(__file__).parent / "fixtures"
PROMPT = "def main():     return 0"  # 24 bytes: whole patches


@pytest.mark.parametrize("kind", ["autoencoder", "calm", "token_lm"])
@pytest.mark.parametrize("version", [1])
def test_every_released_format_loads_and_computes_what_it_did(version: int, kind: str) -> None:
    folder = FIXTURES / f"format{version}"
    run = load_run(folder / kind)
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))[kind]
    assert run.tokenizer is not None
    ids = torch.tensor([run.tokenizer.encode(PROMPT)])
    if isinstance(run.model, Autoencoder):
        values = run.model.encode(ids.unflatten(1, (-1, 4))).mean
    elif isinstance(run.model, Calm):
        values = run.model.states(ids.unflatten(1, (-1, 4)))
    else:
        values = run.model.logits(run.model.states(ids[..., None]))[..., :8]
    assert list(values.shape) == expected["shape"]
    torch.testing.assert_close(values.flatten()[:6], torch.tensor(expected["first"]), rtol=0.0, atol=1e-3)


def test_from_pretrained_streams_text_and_names_a_run_of_another_kind() -> None:
    folder = FIXTURES / "format1"
    model = Calm.from_pretrained(folder / "calm")
    pieces = list(model.stream("def ", temperature=0.5, candidates=8, max_tokens=12, seed=0))
    assert len(pieces) >= 1
    assert "".join(pieces) == model.generate("def ", temperature=0.5, candidates=8, max_tokens=12, seed=0)
    with pytest.raises(ConfigError, match="holds a Calm, not a TokenLM"):
        TokenLM.from_pretrained(folder / "calm")


def test_damaged_and_foreign_run_directories_are_one_sentence(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(FIXTURES / "format1" / "calm", run)
    config = (run / "config.yaml").read_text(encoding="utf-8")

    (run / "config.yaml").write_text(config.replace("format: 1", "format: 2"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"format 2 is newer than this nextvec reads \(1\); upgrade nextvec"):
        load_run(run)
    (run / "config.yaml").write_text(config.replace("latent: 6", "latnet: 6"), encoding="utf-8")
    with pytest.raises(ConfigError, match="unknown key 'latnet'; did you mean 'latent'"):
        load_run(run)
    (run / "config.yaml").write_text(config.replace("latent: 6", "latent: 7"), encoding="utf-8")
    with pytest.raises(DataError, match=r"has shape .* config.yaml needs"):
        load_run(run)
    (run / "config.yaml").write_text(config, encoding="utf-8")
    whole = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"model.safetensors is damaged"):
        load_run(run)
    (run / "model.safetensors").unlink()
    with pytest.raises(DataError, match="the run was not finished"):
        load_run(run)
    with pytest.raises(DataError, match="is not a run directory"):
        load_run(tmp_path)
