"""One optimiser step of each arm, as the training loop takes it, on synthetic text.

Legend: B rows, T tokens per row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from nextvec import __version__
from nextvec.bench.plain import plain_module, plain_optimizer
from nextvec.config import AutoencoderRun, CalmRun, RunConfig, TokenLMRun
from nextvec.hardware import Precision
from nextvec.model.autoencoder import Autoencoder
from nextvec.model.init import initialise
from nextvec.text.batches import Batches
from nextvec.text.layout import Stream
from nextvec.text.shards import Manifest, TokenShards, shard_dtype
from nextvec.text.tokenizer import byte_tokenizer
from nextvec.text.writing import ShardWriter
from nextvec.train.compile import compile_blocks
from nextvec.train.data import moved
from nextvec.train.noise import TRAIN, generator_for
from nextvec.train.objectives import build_objective
from nextvec.train.optim import clipped, make_optimizer, rate_factor

Arm = Literal["ours", "plain"]
DATA, OPTIMISER, OTHER = "data", "optimiser", "other"
SYNTHETIC = "ids drawn by Zipf's law from seed 0, in documents of 200 to 1,800 tokens, as shards in a temporary folder"


class Work(Protocol):
    """Something whose speed is measured."""

    tokens: int  # tokens of text that one call gets through
    mark: Callable[[str], None]  # told the name of the part that the time from now on belongs to

    def warm(self) -> None:
        """The smallest call after which everything lasting exists (optimiser state, loaded code)."""
        ...

    def __call__(self) -> None:
        """One unit of work; every call costs the same."""
        ...


class TrainStep:
    """Batch, forward, backward, clipping, update: the step that `nextvec train` takes, for either arm.

    Tests hold it to the training loop bit for bit. The parameters are those of `config.train.seed`; both arms start
    from the same values.
    """

    def __init__(self, config: RunConfig, arm: Arm, text: Path, device: torch.device, precision: Precision) -> None:
        assert isinstance(config, AutoencoderRun | CalmRun | TokenLMRun)
        self.config, self.arm, self.device, self.precision = config, arm, device, precision
        self.mark: Callable[[str], None] = lambda part: None
        self.tokens = config.data.rows * config.data.context_tokens * config.train.accumulate
        self.step = 0
        module = training_module(config)
        plain = arm == "plain"
        self.module = (plain_module(config, module) if plain else module).to(device)
        self.optimizer = (
            plain_optimizer(self.module, config.optim)
            if plain
            else make_optimizer(self.module, config.optim, alone=True)
        )
        self.parameters = clipped(self.optimizer)
        self._clip_by = False if plain else None  # foreach, as AdamW's
        self.batches = Batches(
            Stream(TokenShards.open(text), config.model.patch_size, config.data.packing),
            config.data.rows,
            config.data.context_tokens,
            config.train.seed,
        )

    def compile(self, say: Callable[[str], None]) -> None:
        """Compile the repeated blocks of our arm, if the settings ask for it."""
        if self.config.train.compile and self.arm == "ours":
            compile_blocks(self.module, self.device, lambda: self._backward(self.batches.batch(0), 0), say)
            self.optimizer.zero_grad()

    def warm(self) -> None:
        """A step on the start of one window, at the first step's rate."""
        first_BT = self.batches.batch(0)[:1, : 2 * self.batches.stream.patch_size]
        self._update(lambda: self._backward(first_BT, 0))

    def __call__(self) -> None:
        settings = self.config.train

        def gradients() -> None:
            for micro in range(settings.accumulate):
                self.mark(DATA)
                number = self.step * settings.accumulate + micro
                ids_BT = moved(self.batches.batch(number), self.device)
                self.mark(OTHER)
                self._backward(ids_BT, number)

        self._update(gradients)
        self.step += 1

    def _update(self, gradients: Callable[[], None]) -> None:
        self.mark(OTHER)
        factor = rate_factor(self.step, 0.0, self.config.train.steps, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
        gradients()
        self.mark(OPTIMISER)
        nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip, foreach=self._clip_by)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.mark(OTHER)

    def _backward(self, ids_BT: Tensor, number: int) -> None:
        generator = generator_for(self.config.train.seed, number, TRAIN, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss, _ = self.module(ids_BT.to(self.device), generator, 0.0)
        (loss / self.config.train.accumulate).backward()


def training_module(config: RunConfig) -> nn.Module:
    """The product's training module with fresh parameters; CALM's frozen autoencoder is a fresh one."""
    autoencoder = None
    if isinstance(config, CalmRun):
        autoencoder = Autoencoder(config.model.autoencoder)
        initialise(autoencoder, torch.Generator().manual_seed(config.train.seed))
    # The tokenizer is for saving a run, which no benchmark does.
    module: nn.Module = build_objective(config, byte_tokenizer(), autoencoder).module
    return module


def write_text(folder: Path, vocab_size: int, tokens: int) -> None:
    """A shard directory with at least `tokens` synthetic ids (SYNTHETIC). The last id stands for end-of-text."""
    generator = torch.Generator().manual_seed(0)
    law_V = 1.0 / torch.arange(1, vocab_size, dtype=torch.float64)
    writer, dtype, left = ShardWriter(folder, 0), shard_dtype(vocab_size), tokens
    while left > 0:
        length = int(torch.randint(200, 1800, (), generator=generator))
        ids = torch.multinomial(law_V, length, replacement=True, generator=generator).numpy()
        writer.add(np.append(ids, vocab_size - 1).astype(np.dtype(dtype).newbyteorder("<")), 0)
        left -= length + 1
    record = writer.finish()
    assert record is not None
    manifest = Manifest(
        format=1, tokenizer="", vocab_size=vocab_size, eos_id=vocab_size - 1, pad_id=0, mask_id=0, dtype=dtype,
        packing="aligned", split="train", shards=[record], tokens=record.tokens, documents=record.documents,
        text_bytes=0, skipped=0, empty=0, sources=[SYNTHETIC], fingerprint="", valid_fraction=0.0, text_key="text",
        python=None, nextvec=__version__,
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.model_dump_json(), encoding="utf-8")
