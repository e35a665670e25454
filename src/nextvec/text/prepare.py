"""Corpus to token shards: streamed, in parallel, safe to interrupt, and the same bytes whatever happened on the way.

Documents pass in the order of the sources. A group of shards (one of train, one of valid) is closed at the first
document that brings it to `shard_tokens`; the place in the sources after that document goes into the journal
(journal.py), from where a later run of the same command continues.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nextvec
from nextvec.errors import ConfigError, DataError
from nextvec.files import write_json
from nextvec.lock import run_lock
from nextvec.text import builtin
from nextvec.text.journal import STATE, Group, State, begin
from nextvec.text.readers import Item, expand, fingerprint
from nextvec.text.reading import Reading
from nextvec.text.shards import FORMAT, DTypeName, Manifest, Packing, ShardRecord, Split, shard_dtype
from nextvec.text.tokenizer import TextTokenizer
from nextvec.text.writing import ShardWriter, group

SHARD_TOKENS = 1 << 24  # tokens of a group: about a minute of work lost at most, 32 MiB of uint16
SPLITS: tuple[Split, ...] = ("train", "valid")


@dataclass(frozen=True)
class Prepared:
    """What a preparation left on disk."""

    train: Path
    valid: Path | None  # None: no document was held out
    documents: int
    valid_documents: int
    tokens: int
    text_bytes: int
    skipped: int
    empty: int
    messages: tuple[str, ...]  # the first sentences of skipped documents in this run
    resumed: int  # documents kept from an earlier run
    seconds: float  # of this run

    def __str__(self) -> str:
        lines = [
            f"{self.train.parent}: {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.text_bytes / max(1, self.tokens):.2f} bytes per token, {self.seconds:.1f} s",
            f"train    {self.train} ({self.documents - self.valid_documents:,} documents)",
            f"held out {self.valid} ({self.valid_documents:,} documents)"
            if self.valid
            else "held out nothing: --valid-fraction picks whole documents, by hash",
        ]
        if self.resumed:
            lines.append(f"kept {self.resumed:,} documents from an earlier run")
        if self.empty:
            lines.append(f"left out {self.empty:,} empty documents")
        if self.skipped:
            lines += [f"skipped {self.skipped:,} bad documents", *(f"  {message}" for message in self.messages)]
        return "\n".join(lines)


Show = Callable[[float, int, int], None]  # fraction of the sources read, documents, tokens


def prepare(
    sources: Sequence[str],
    tokenizer: TextTokenizer,
    out: str | Path,
    *,
    packing: Packing = "aligned",
    valid_fraction: float = 0.01,
    skip_bad: bool = False,
    workers: int | None = None,
    text_key: str = "text",
    dtype: DTypeName | Literal["auto"] = "auto",
    shard_tokens: int = SHARD_TOKENS,
    show: Show | None = None,
) -> Prepared:
    """Write OUT/train and OUT/valid (shard directories) from `sources`.

    valid_fraction: share of documents held out, by hash of their text (of the relative path for python-stdlib), in
    [0, 1). workers: processes, default one per core. Interrupted at any point, the same call continues.
    Raises ConfigError for bad arguments, an OUT that holds other work or that another process writes; DataError for a
    missing, empty or bad corpus and a full disk.
    """
    began = time.monotonic()
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be at least 1; got {workers}")
    items = expand(sources)
    plan = planned(items, tokenizer, packing, valid_fraction, text_key, dtype, shard_tokens)
    with out_lock(Path(out)):
        work = Work(Path(out), items, plan, skip_bad)
        resumed = work.documents
        if not work.state.done:
            work.run(tokenizer, workers or cores(), show)
            work.finish(tokenizer, list(sources))
    return work.result(resumed, time.monotonic() - began)


def out_lock(out: Path) -> AbstractContextManager[None]:
    """Hold OUT for this process. Raises ConfigError when it is a file, or another process writes it."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out must be a folder; {out} is a file")
    return run_lock(out)


def planned(
    items: list[Item],
    tokenizer: TextTokenizer,
    packing: Packing,
    valid_fraction: float,
    text_key: str,
    dtype: DTypeName | Literal["auto"],
    shard_tokens: int,
) -> State:
    """The journal of a preparation that has not begun. Raises ConfigError for bad arguments."""
    if not 0 <= valid_fraction < 1:
        raise ConfigError(f"valid_fraction must be in [0, 1); got {valid_fraction}")
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens must be at least 1; got {shard_tokens}")
    return State(
        format=FORMAT,
        arguments={
            "tokenizer": tokenizer.hash,
            "packing": packing,
            "valid_fraction": valid_fraction,
            "text_key": text_key,
            "dtype": shard_dtype(tokenizer.vocab_size, dtype),
            "shard_tokens": shard_tokens,
        },
        fingerprint=fingerprint(items),
        groups=[],
        done=False,
    )


class Work:
    """One preparation, from a fresh or an earlier state to finished shard directories."""

    def __init__(self, out: Path, items: list[Item], plan: State, skip_bad: bool):
        self.folders = {split: out / split for split in SPLITS}
        self.state = begin(out, plan)
        self.journal = out / STATE
        last = self.state.groups[-1] if self.state.groups else Group()
        if last.skipped and not skip_bad:
            raise ConfigError(f"{out} was begun with --skip-bad ({last.skipped} documents left out); give it again")
        self.skipped, self.empty = last.skipped, last.empty
        self.item, self.entry = last.item, last.entry
        self.reading = self.reading_of(plan, items, skip_bad, self.item, self.entry, self.skipped)

    @staticmethod
    def reading_of(
        plan: State, items: Sequence[Item], skip_bad: bool, item: int = 0, entry: int = 0, skipped: int = 0
    ) -> Reading:
        """The documents of `items` from a place on, as the plan's arguments want them read."""
        key, fraction = str(plan.arguments["text_key"]), float(plan.arguments["valid_fraction"])
        return Reading(items, key, fraction, skip_bad, item, entry, skipped)

    def records(self, split: Split) -> list[ShardRecord]:
        return [record for done in self.state.groups if (record := done.shards.get(split))]

    @property
    def documents(self) -> int:
        return sum(record.documents for split in SPLITS for record in self.records(split))

    @property
    def tokens(self) -> int:
        return sum(record.tokens for split in SPLITS for record in self.records(split))

    def run(self, tokenizer: TextTokenizer, workers: int, show: Show | None) -> None:
        """Read, encode and write until the sources are used up."""
        target = int(self.state.arguments["shard_tokens"])
        dtype = str(self.state.arguments["dtype"])
        documents, tokens = self.documents, self.tokens
        with closing(self.reading.encoded(tokenizer, dtype, workers)) as stream:
            ended = False
            while not ended:
                ended = True
                numbers = {split: len(self.records(split)) for split in SPLITS}
                with group(self.folders, numbers) as writers:
                    for note, ids in stream:
                        self.item, self.entry, self.skipped = note.item, note.entry, note.skipped
                        if ids is None:
                            self.empty += 1
                            continue
                        writers[note.split].add(ids, note.text_bytes)
                        documents, tokens = documents + 1, tokens + len(ids)
                        if show is not None:
                            show(note.fraction, documents, tokens)
                        if sum(writer.tokens for writer in writers.values()) >= target:
                            ended = False
                            break
                    if ended:
                        self.skipped = self.reading.skipped  # bad entries after the last document count too
                    self._close(writers)

    def finish(self, tokenizer: TextTokenizer, sources: list[str]) -> None:
        """Write the manifests: from here on the shards can be opened."""
        problem = ""
        if not self.documents:
            problem = (
                f"the corpus is empty: no text in {', '.join(sources)} "
                f"({self.empty} empty documents, {self.skipped} skipped)"
            )
        elif not self.records("train"):
            problem = f"all {self.documents} documents fell to the held-out split; use a smaller --valid-fraction, or 0"
        if problem:
            self._save(self.state.override(groups=[]))  # nothing worth keeping: the next command starts afresh
            raise DataError(problem)
        for split in SPLITS:
            if self.records(split):
                tokenizer.save(self.folders[split])
                manifest = self._manifest(tokenizer, sources, split)
                write_json(self.folders[split] / "manifest.json", manifest.model_dump(mode="json"))
        self._save(self.state.override(done=True))

    def result(self, resumed: int, seconds: float) -> Prepared:
        held_out = self.records("valid")
        return Prepared(
            train=self.folders["train"],
            valid=self.folders["valid"] if held_out else None,
            documents=self.documents,
            valid_documents=sum(record.documents for record in held_out),
            tokens=self.tokens,
            text_bytes=sum(record.text_bytes for split in SPLITS for record in self.records(split)),
            skipped=self.skipped,
            empty=self.empty,
            messages=tuple(self.reading.messages),
            resumed=resumed,
            seconds=seconds,
        )

    def _close(self, writers: dict[Split, ShardWriter]) -> None:
        shards = {split: record for split, writer in writers.items() if (record := writer.finish())}
        done = Group(item=self.item, entry=self.entry, skipped=self.skipped, empty=self.empty, shards=shards)
        self._save(self.state.override(groups=[*self.state.groups, done]))

    def _save(self, state: State) -> None:
        write_json(self.journal, state.model_dump(mode="json"))
        self.state = state

    def _manifest(self, tokenizer: TextTokenizer, sources: list[str], split: Split) -> Manifest:
        records = self.records(split)
        arguments = self.state.arguments
        return Manifest.parse(
            {
                "format": FORMAT,
                "tokenizer": tokenizer.hash,
                "vocab_size": tokenizer.vocab_size,
                "eos_id": tokenizer.eos_id,
                "pad_id": tokenizer.pad_id,
                "mask_id": tokenizer.mask_id,
                "dtype": arguments["dtype"],
                "packing": arguments["packing"],
                "split": split,
                "shards": records,
                "tokens": sum(record.tokens for record in records),
                "documents": sum(record.documents for record in records),
                "text_bytes": sum(record.text_bytes for record in records),
                "skipped": self.skipped,
                "empty": self.empty,
                "sources": sources,
                "fingerprint": self.state.fingerprint,
                "valid_fraction": arguments["valid_fraction"],
                "text_key": arguments["text_key"],
                "python": platform.python_version() if builtin.NAME in sources else None,
                "nextvec": nextvec.__version__,
            }
        )


def cores() -> int:
    """Cores this process may use, which on a shared machine can be fewer than it has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
