"""From a shard directory to the batches of a run: training windows by number, and fixed held-out windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
    from nextvec.text.batches import Batches
    from nextvec.text.shards import Stream, TokenShards

    assert isinstance(config, AutoencoderRun | CalmRun | TokenLMRun)
    folder, beside = data_folders(config.data.path)

    def batches(where: Path) -> Batches:
        shards = TokenShards.open(where)
        if shards.tokenizer.vocab_size != config.model.vocab_size:
            raise DataError(
                f"{where} was written with a vocabulary of {shards.tokenizer.vocab_size} tokens and the model has "
                f"{config.model.vocab_size}; prepare the shards with the model's tokenizer"
            )
        stream = Stream(shards, config.model.patch_size, config.data.packing)
        return Batches(stream, config.data.rows, config.data.context_tokens, config.train.seed)

    train = batches(folder)
    digest = train.stream.digest
    where = valid or beside
    if where is None:
        return Data(train, digest), None
    try:
        held_out = batches(where)
    except ConfigError as error:
        if valid is not None:
            raise
        return Data(train, digest), f"no evaluation during training: {error}"
    return Data(train, digest, held_out, min(eval_batches, max(1, held_out.windows // config.data.rows))), None
