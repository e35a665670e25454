"""Activation checkpointing changes what is kept, not what is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nextvec.config import parse_run
from nextvec.model.autoencoder import Autoencoder
from nextvec.text.tokenizer import byte_tokenizer
from nextvec.train.compile import compile_regions_of
from nextvec.train.data import Data
from nextvec.train.loop import train
from nextvec.train.metrics import read_metrics
from nextvec.train.objectives import build_objective
from test_train_loop import TIMES, VOCAB, Source

AUTOENCODER = {"vocab_size": VOCAB, "patch_size": 2, "width": 8, "inner": 8, "latent": 4}
BACKBONE = {"layers": 2, "width": 8, "inner": 8, "heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "autoencoder": AUTOENCODER,
    "calm": {"autoencoder": AUTOENCODER, "backbone": BACKBONE, "head": {"noise": 4, "blocks": 1}},
    "token_lm": {"vocab_size": VOCAB, "backbone": BACKBONE},
}


@pytest.mark.parametrize("kind", list(MODELS))
def test_recomputed_blocks_give_the_same_bits_from_twice_the_passes(tmp_path: Path, kind: str) -> None:
    found = []
    for wanted in (False, True):
        settings = {"steps": 3, "log_every": 1, "precision": "fp32", "activation_checkpointing": wanted}
        config = parse_run(
            {
                "kind": kind,
                "data": {"path": "x", "rows": 3, "context_tokens": 8},
                "model": MODELS[kind],
                "train": settings,
            },
            "test",
        )
        autoencoder = Autoencoder(config.model.autoencoder) if kind == "calm" else None
        if autoencoder is not None:
            for parameter in autoencoder.parameters():
                torch.nn.init.normal_(parameter, 0, 0.3, torch.Generator().manual_seed(parameter.numel()))
        objective = build_objective(config, byte_tokenizer(), autoencoder)
        objective.save = lambda path, trained: None  # type: ignore[method-assign]
        block, passes = compile_regions_of(objective.module)[0], 0
        real = block.forward

        def counted(*arguments: Any, forward: Any = real) -> Any:
            nonlocal passes
            passes += 1
            return forward(*arguments)

        block.forward = counted
        out = tmp_path / str(wanted)
        train(config, objective, out, data=Data(Source(), "d"), device="cpu", show=False)
        assert block.forward is counted  # the loop took its own off again
        rows = [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(out)]
        found.append((rows, [p.detach() for p in objective.module.parameters()], passes))
    (rows, parameters, once), (again, others, twice) = found
    assert rows == again
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))
    assert twice == 2 * once
