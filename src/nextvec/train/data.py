"""From a shard directory to the batches of a run: training windows by number, and fixed held-out windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nextvec.config import AutoencoderRun, CalmRun, RunConfig, TokenLMRun
from nextvec.errors import ConfigError, DataError

MANIFEST = "manifest.json"


class BatchSource(Protocol):
    """Batch i is a pure function of i. Legend: B rows, T tokens per row."""

    def batch(self, index: int, part: int = 0, parts: int = 1) -> Any:
        """(B, T) int64 token ids; where the teacher was stored (`data.latents`), `Encoded`.

        With `parts`, only the rows of one of so many equal parts, (B / parts, T).
        """
        ...


@dataclass(frozen=True)
class Data:
    """Training batches, held-out batches (0 of them: no evaluation) and the identity of the training tokens."""

    train: BatchSource
    digest: str
    held_out: BatchSource | None = None
    held_out_batches: int = 0

    def held_out_ids(self) -> Iterator[Tensor]:
        """The same held-out windows at every evaluation, (B, T) int64 each."""
        for index in range(self.held_out_batches):
            assert self.held_out is not None
            yield self.held_out.batch(index)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch, of one tensor or a tuple of them, on `device`; a GPU fetches it from pinned memory, and the host goes on."""
    if device.type == "cuda":
        batch = batch.pin_memory() if isinstance(batch, Tensor) else type(batch)(*(part.pin_memory() for part in batch))
    return batch.to(device, non_blocking=True)


def data_folders(path: str | Path) -> tuple[Path, Path | None]:
    """Training and held-out shard directories of what `nextvec prepare` wrote, or (path, None) for plain shards.

    Raises DataError when `path` holds neither.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path, None
    if (path / "train" / MANIFEST).is_file():
        return path / "train", path / "valid" if (path / "valid" / MANIFEST).is_file() else None
    raise DataError(
        f"{path} holds no shards: it has neither {MANIFEST} nor train/{MANIFEST}; write some with `nextvec prepare`"
    )


def open_data(config: RunConfig, valid: Path | None = None, eval_batches: int = 8) -> tuple[Data, str | None]:
    """Open the shards of a run; `valid` overrides the held-out directory that lies beside the training shards.

    The second value is None, or one line saying why nothing can be evaluated during training. Raises DataError or
    ConfigError when shards are missing or damaged, do not fit the model's vocabulary, or K does not divide the context.
    """
    from nextvec.text.batches import Batches, mix
    from nextvec.text.layout import Stream
    from nextvec.text.mixture import Mixture
    from nextvec.text.shards import TokenShards

    assert isinstance(config, AutoencoderRun | CalmRun | TokenLMRun)
    found = [(*data_folders(part.path), part.weight) for part in config.data.corpora]
    tokenizer = TokenShards.open(found[0][0]).tokenizer

    def batches(where: Path, number: int = 0) -> Batches:
        shards = TokenShards.open(where)
        shards.check_tokenizer(tokenizer, found[0][0])
        if shards.tokenizer.vocab_size != config.model.vocab_size:
            raise DataError(
                f"{where} was written with a vocabulary of {shards.tokenizer.vocab_size} tokens and the model has "
                f"{config.model.vocab_size}; prepare the shards with the model's tokenizer"
            )
        stream = Stream(shards, config.model.patch_size, config.data.packing)
        seed = config.train.seed if number == 0 else mix(config.train.seed ^ mix(number))  # an order of its own
        return Batches(stream, config.data.rows, config.data.context_tokens, seed)

    def mixed(folders: list[tuple[Path, float]]) -> Batches | Mixture:
        parts = [batches(folder, number) for number, (folder, _) in enumerate(folders)]
        return parts[0] if len(parts) == 1 else Mixture(parts, [weight for _, weight in folders], config.train.seed)

    train = mixed([(folder, weight) for folder, _, weight in found])
    beside = [(valid, 1.0)] if valid else [(held, weight) for _, held, weight in found if held is not None]
    if not beside:
        return Data(train, train.digest), None
    try:
        held_out = mixed(beside)
    except ConfigError as error:
        if valid is not None:
            raise
        return Data(train, train.digest), f"no evaluation during training: {error}"
    count = min(eval_batches, max(1, held_out.windows // config.data.rows))
    return Data(train, train.digest, held_out, count), None
