"""A published checkpoint: a directory, or an id on the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextvec.errors import DataError
from nextvec.files import read_json
from nextvec.reference.weights import weight_files

HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"  # owner/name
WEIGHTS = ["model*.safetensors", "pytorch_model*.bin"]  # the first that a hub repository has is fetched


@dataclass(frozen=True)
class Checkpoint:
    """Files of a published checkpoint. Weights on the hub are fetched when they are asked for, after config.json."""

    source: str  # as the user gave it
    folder: Path
    revision: str | None = None  # commit on the hub; None for a directory

    def settings(self) -> Any:
        """Its config.json, as it is. Raises DataError when there is none."""
        return read_json(self.folder / "config.json", "config")

    def files(self) -> list[Path]:
        """Its weight files. Raises DataError when there are none."""
        if self.revision is not None:
            for pattern in WEIGHTS:
                _fetch(self.source, [pattern], self.revision)
                if any(self.folder.glob(pattern)):
                    break
        return weight_files(self.folder)


def open_checkpoint(source: str) -> Checkpoint:
    """Find `source`: a directory here, else an id on the hub. Raises DataError when it is neither."""
    path = Path(source)
    if path.is_dir():
        return Checkpoint(source, path)
    if path.exists():
        raise DataError(f"{source} is a file: give the directory that holds it and its config.json")
    if not re.fullmatch(HUB_ID, source):
        raise DataError(f"{source} is no directory here, and no hub id, which is written owner/name")
    folder = _fetch(source, ["*.json"], None)
    return Checkpoint(source, folder, revision=folder.name)


def _fetch(source: str, patterns: list[str], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=patterns, revision=revision))
    except Exception as error:  # the HTTP library beneath has kinds of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source} is no directory here and could not be fetched from the Hugging Face hub: {reason}"
        ) from None
