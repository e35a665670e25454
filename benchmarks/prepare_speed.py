"""`nextvec prepare` against the tokenizer library alone, on the same text.

    python benchmarks/prepare_speed.py --megabytes 60 --json prepare_speed.json

raw: one `encode_batch` of all documents at once, ids thrown away, on all cores. prepare: the files read, split, encoded by as
many processes, written, hashed, with a journal. In turn; the ratio of processor time (children included) says what the work
costs and hardly sees what else the machine does, the ratio of wall-clock time says what a user of an idle machine sees.
Documents are the standard library's own files and pieces of 2,000 characters of them, as lines of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

from nextvec.files import check_target, write_json
from nextvec.text import builtin
from nextvec.text.prepare import prepare
from nextvec.text.readers import documents, expand
from nextvec.text.tokenizer import load_tokenizer, train_tokenizer


def write_corpus(path: Path, megabytes: float) -> list[str]:
    """JSON lines of about so much text; returns the texts."""
    sources = list(documents(expand([builtin.NAME]), "text", lambda message: None))
    texts: list[str] = []
    size, number = 0, 0
    while size < megabytes * 1e6:
        text = sources[number % len(sources)]
        if number % 2:
            text = text[:2000]
        texts.append(f"# {number}\n{text}")
        size += len(texts[-1])
        number += 1
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=60.0)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    check_target(options.json)
    cpu: dict[str, list[float]] = {"raw": [], "prepare": []}
    wall: dict[str, list[float]] = {"raw": [], "prepare": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = write_corpus(folder / "corpus.jsonl", options.megabytes)
        train_tokenizer(texts[:400], options.vocab).save(folder / "tokenizer")
        tokenizer = load_tokenizer(folder / "tokenizer")
        tokens = 0
        for repeat in range(options.repeats):
            for arm in ("raw", "prepare"):
                began, used = time.perf_counter(), processor_seconds()
                if arm == "raw":
                    tokens = sum(map(len, tokenizer.encode_batch(texts)))
                else:
                    prepare([str(folder / "corpus.jsonl")], tokenizer, folder / f"out{repeat}")
                cpu[arm].append(processor_seconds() - used)
                wall[arm].append(time.perf_counter() - began)
    size = options.megabytes
    for what, times in (("processor", cpu), ("wall clock", wall)):
        raw, ours = (statistics.median(times[arm]) for arm in ("raw", "prepare"))
        print(
            f"{what:10}  raw {raw:6.2f} s  prepare {ours:6.2f} s  ({size / ours:.1f} MB/s): {100 * raw / ours:.0f} % of raw"
        )
    print(f"{len(texts):,} documents, {tokens:,} tokens, {os.cpu_count()} cores")
    if options.json is not None:
        write_json(options.json, {"megabytes": size, "tokens": tokens, "cpu": cpu, "wall": wall})


if __name__ == "__main__":
    main()
