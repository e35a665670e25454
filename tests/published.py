"""Published checkpoints for the tests of conversion: the fixtures, changed copies of them, and the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers.models import WordLevel
from torch import Tensor

from nextvec.cli import main

FIXTURES = Path(__file__).parent / "fixtures" / "reference"
ENERGY, AUTOENCODER = FIXTURES / "k4" / "energy", FIXTURES / "k4" / "autoencoder"
BIN, SAFE = "pytorch_model.bin", "model.safetensors"


def published(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / BIN, weights_only=True)


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def checkpoint(
    folder: Path,
    change: Callable[[dict[str, Tensor]], None] | None = None,
    source: Path = ENERGY,
    **changed: Any,
) -> str:
    """A copy of a published checkpoint with changed tensors or settings (None: left out)."""
    folder.mkdir(parents=True)
    state = published(source)
    if change is not None:
        change(state)
    torch.save(state, folder / BIN)
    config = {key: value for key, value in {**settings(source), **changed}.items() if changed.get(key, "") is not None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def words_tokenizer(folder: Path, size: int = 128) -> Path:
    """A tokenizer.json with as many ids as the fixtures have."""
    vocab = {"<|endoftext|>": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, size)}}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizers.Tokenizer(WordLevel(vocab, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def command(patch: pytest.MonkeyPatch, *words: str) -> int:
    patch.setattr(sys, "argv", ["nextvec", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)
