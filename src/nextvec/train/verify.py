"""All of a corpus or a run read again and held against the checksums that were written with it (`nextvec verify`)."""

from __future__ import annotations

from pathlib import Path

from nextvec.errors import DataError
from nextvec.rundir import CONFIG, SUM, WEIGHTS, check_sum
from nextvec.text.shards import TokenShards
from nextvec.train import checkpoint
from nextvec.train.data import MANIFEST, data_folders
from nextvec.train.latents import FOLDERS, check_latents


def verify(folder: Path) -> list[str]:
    """A line for each part of a run directory or of what `nextvec prepare` wrote. Raises DataError, naming the damaged file."""
    folder = Path(folder)
    if (folder / CONFIG).is_file():
        return _run(folder)
    if not any((folder / name).is_file() for name in (MANIFEST, f"train/{MANIFEST}")):
        raise DataError(f"{folder} is neither a run directory nor what `nextvec prepare` wrote")
    return [line for each in data_folders(folder) if each is not None for line in _shards(each)]


def _run(run: Path) -> list[str]:
    lines = []
    if (run / WEIGHTS).is_file():
        check_sum(run)
        known = (run / SUM).is_file()
        lines.append(f"{run / WEIGHTS}: " + ("as it was written" if known else f"not known, there is no {SUM}"))
    for path in checkpoint.folders(run):
        lines.append(f"{checkpoint.read(path).path}: as it was written")
    return lines or [f"{run}: nothing was saved yet"]


def _shards(path: Path) -> list[str]:
    shards = TokenShards.open(path, verify=True)
    line = f"{path}: {len(shards.manifest.shards):,} shards, {shards.tokens:,} tokens, as they were written"
    return [line, *(check_latents(each) for each in sorted(path.glob(FOLDERS)))]
