"""Start-up time, memory and time per batch of a corpus of 100 GB of token ids, simulated.

    OMP_NUM_THREADS=1 python benchmarks/scale_simulation.py --json scale_simulation.json

Token files are sparse (they hold no data but have their full size), documents are 1,000 tokens long on average and the files
that say where they lie are real, hard links to one another. So system calls, arithmetic and memory are those of the real
thing; reading the disk is not. Each size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from nextvec.files import check_target, write_json
from nextvec.text.batches import Batches
from nextvec.text.layout import Stream
from nextvec.text.shards import FORMAT, Manifest, ShardRecord, TokenShards
from nextvec.text.tokenizer import byte_tokenizer

SHARD_TOKENS, DOCUMENT = 1 << 24, 1000  # as `nextvec prepare` writes them; tokens per document


def simulate(folder: Path, gigabytes: float) -> None:
    """A shard directory of so many bytes of uint16 ids."""
    tokenizer = byte_tokenizer()
    tokenizer.save(folder)
    documents = SHARD_TOKENS // DOCUMENT
    lengths = np.random.default_rng(0).integers(1, 2 * DOCUMENT, documents)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    tokens = int(ends[-1])
    np.save(folder / "documents.npy", ends.astype("<i8"))
    records = []
    for number in range(max(1, round(gigabytes * 1e9 / (2 * tokens)))):
        names = f"tokens-{number:05d}.bin", f"documents-{number:05d}.npy"
        with open(folder / names[0], "wb") as handle:
            handle.truncate(2 * tokens)
        os.link(folder / "documents.npy", folder / names[1])
        records.append(
            ShardRecord(
                file=names[0],
                offsets=names[1],
                tokens=tokens,
                documents=documents,
                text_bytes=4 * tokens,
                sha256=f"{number:064x}",
                offsets_sha256="0" * 64,
            )
        )
    manifest = Manifest(
        format=FORMAT,
        tokenizer=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        eos_id=2,
        pad_id=0,
        mask_id=1,
        dtype="uint16",
        packing="aligned",
        split="train",
        shards=records,
        tokens=tokens * len(records),
        documents=documents * len(records),
        text_bytes=4 * tokens * len(records),
        skipped=0,
        empty=0,
        sources=["simulated"],
        fingerprint="",
        valid_fraction=0.0,
        text_key="text",
        python=None,
        nextvec="0",
    )
    write_json(folder / "manifest.json", manifest.model_dump(mode="json"))


def measure(folder: Path) -> dict[str, float]:
    """Seconds to open, MiB of memory taken, milliseconds per batch of 8 windows of 1,024 tokens; in processor time."""
    before = anonymous()
    began = time.process_time()
    batches = Batches(Stream(TokenShards.open(folder), 4), rows=8, context_tokens=1024, seed=0)
    batches.batch(0)
    opened = time.process_time() - began
    began = time.process_time()
    for index in range(10**9, 10**9 + 300):  # anywhere, as after a resume
        batches.batch(index)
    each = (time.process_time() - began) / 300
    return {
        "gigabytes": 2 * batches.stream.shards.tokens / 1e9,
        "shards": len(batches.stream.shards.manifest.shards),
        "documents": batches.stream.shards.documents,
        "open_seconds": opened,
        "memory_mebibytes": anonymous() - before,
        "batch_milliseconds": 1000 * each,
    }


def anonymous() -> float:
    """MiB of this process's own memory: pages of mapped files, which the system may drop, are left out."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(next(line.split()[1] for line in rollup.splitlines() if line.startswith("Anonymous:"))) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 10.0, 100.0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(measure(options.folder)))
        return
    check_target(options.json)
    found = []
    for gigabytes in options.gigabytes:
        with tempfile.TemporaryDirectory() as folder:
            simulate(Path(folder), gigabytes)
            words = [sys.executable, __file__, "--folder", folder]
            found.append(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
        print("  ".join(f"{name} {value:,.3g}" for name, value in found[-1].items()))
    if options.json is not None:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
