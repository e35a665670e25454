"""The teacher's posterior of every patch of a corpus, computed once and kept beside the tokens (`nextvec prepare --latents`).

SHARDS/latents-XXXXXXXXXXXX/ (a hash of autoencoder, tokens and layout): latents-NNNNN.npy, float16 (n, 2L), a patch's mean and
log_std in the order of the stream, sums.json, and manifest.json, written last. It saves the encoder's pass in training, 4 % of a
step at the reference configuration, for 4 L / K bytes a token (docs/performance.md).

Legend: B rows, T tokens, P patches, K tokens per patch, L latent.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nextvec.config import Config
from nextvec.errors import ConfigError, DataError
from nextvec.files import atomic_path, read_json, sha256, write_json
from nextvec.model.autoencoder import Autoencoder
from nextvec.model.calm import Calm
from nextvec.model.posterior import Posterior
from nextvec.text.batches import Batches, samples
from nextvec.text.layout import Stream
from nextvec.text.mixture import Mixture
from nextvec.train.checkpoint import parameters_digest
from nextvec.train.data import Data

FILE_PATCHES = 1 << 18  # patches in a file: 128 MiB at L = 128
PASS_TOKENS = 1 << 14  # tokens encoded at once
FOLDERS, MANIFEST = "latents-*", "manifest.json"
SUMS = "sums.json"  # SHA-256 of each file, by its name, taken when it was written; latents from before there were sums have none
_MEND = "remove its folder and run nextvec prepare --latents again"


class LatentsManifest(Config):
    """What a folder of latents says of itself; its name holds the hash of what it was made from."""

    patches: int
    latent: int  # L
    patch_size: int
    packing: str


class Encoded(NamedTuple):
    """A batch whose teacher is known: ids (B, T), and the posterior of its patches (B, P, L)."""

    ids: Tensor
    mean: Tensor
    log_std: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Encoded:
        return Encoded(*(part.to(device, non_blocking=non_blocking) for part in self))

    def head(self, rows: int) -> Encoded:
        """The first rows."""
        return Encoded(*(part[:rows] for part in self))

    def targets(self) -> Posterior:
        """Of patches 2..P, in float32 at least."""
        return Posterior(_wide(self.mean[:, 1:]), _wide(self.log_std[:, 1:]))

    def inputs(self) -> Tensor:
        """Means of patches 1..P-1, what a model of latents reads, in float32 at least."""
        return _wide(self.mean[:, :-1])


class EncodedBatches:
    """Batches of ids with their posteriors, read from disk."""

    def __init__(self, batches: Batches, autoencoder: Autoencoder) -> None:
        """Raises ConfigError when there are no latents of this autoencoder for these tokens, DataError for damaged ones."""
        self.batches = batches
        stream = batches.stream
        folder = latents_folder(stream, autoencoder)
        if not (folder / MANIFEST).is_file():
            raise ConfigError(
                f"data.latents needs what `nextvec prepare ... --latents RUN` stores; {stream.shards.path} holds none of this "
                f"autoencoder at {stream.patch_size} tokens a patch, packing {stream.packing}: make it, or leave data.latents out"
            )
        manifest = _manifest(folder)
        self._patch_size, self._latent = manifest.patch_size, manifest.latent
        self._files: list[NDArray[Any]] = []
        for number, patches in enumerate(_pieces(manifest.patches)):
            path = _file(folder, number)
            try:
                self._files.append(np.load(path, mmap_mode="r"))
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{path} is missing or damaged ({error}); {_MEND}") from None
            if self._files[-1].shape != (patches, 2 * manifest.latent):
                raise DataError(f"{path} does not fit its manifest; {_MEND}")

    def batch(self, index: int, part: int = 0, parts: int = 1) -> Encoded:
        """Batch `index`, or a part of it, as `Batches.batch`."""
        rows = samples(self.batches.rows, index, part, parts)
        patches = self.batches.context_tokens // self._patch_size
        starts = [self.batches.start(sample) // self._patch_size for sample in rows]
        both_BPL = torch.from_numpy(np.stack([self._read(start, patches) for start in starts]))
        return Encoded(self.batches.batch(index, part, parts), *both_BPL.split(self._latent, dim=-1))

    def _read(self, start: int, patches: int) -> NDArray[Any]:
        parts = []
        while patches:
            number, inside = divmod(start, FILE_PATCHES)
            part = self._files[number][inside : inside + patches]
            parts.append(part)
            start, patches = start + len(part), patches - len(part)
        return np.concatenate(parts)


def with_latents(data: Data, module: nn.Module) -> Data:
    """The same data with training batches that know their teacher, the frozen autoencoder inside `module`.

    Raises ConfigError where there is none that is learnt from or read, or no latents of it; DataError for damaged ones.
    """
    autoencoder = next((part for part in module.modules() if isinstance(part, Autoencoder)), None)
    models = [part for part in module.modules() if isinstance(part, Calm)]
    learns = any(model.learns_from_posterior or model.config.reads_latents for model in models)
    if isinstance(data.train, Mixture):
        raise ConfigError("data.latents is for one corpus, and data.mixture names several; leave data.latents out")
    if autoencoder is None or not learns or not isinstance(data.train, Batches):
        raise ConfigError(
            "data.latents is for a CALM whose head learns from latents or whose input holds them; this run has neither: "
            "leave it out"
        )
    return dataclasses.replace(data, train=EncodedBatches(data.train, autoencoder))


def latents_folder(stream: Stream, autoencoder: Autoencoder) -> Path:
    """Where the posteriors of this stream by this autoencoder are kept, whether or not they exist."""
    digest = hashlib.sha256()
    for part in (parameters_digest(autoencoder.named_parameters()), stream.digest, str(stream.patch_size)):
        digest.update(part.encode())
    return stream.shards.path / f"latents-{digest.hexdigest()[:12]}"


@torch.inference_mode()
def write_latents(stream: Stream, autoencoder: Autoencoder, show: Callable[[float], None] | None = None) -> Path:
    """Encode every patch of a stream in float32; returns the folder. Interrupted, it goes on at the file that was not finished;
    one that is not as it was written is made again.

    autoencoder: in evaluation mode, on any device. Raises DataError when the disk is full.
    """
    patches, size = stream.length // stream.patch_size, stream.patch_size
    folder, latent = latents_folder(stream, autoencoder), autoencoder.config.latent
    if (folder / MANIFEST).is_file():
        return folder
    device = autoencoder.embedding.weight.device
    step = max(1, PASS_TOKENS // size)
    sums = _sums(folder)
    for number, count in enumerate(_pieces(patches)):
        path, first = _file(folder, number), number * FILE_PATCHES
        if path.is_file() and sums.get(path.name) == sha256(path):
            continue
        both = np.empty((count, 2 * latent), dtype=np.float16)
        for start in range(0, count, step):
            here = min(step, count - start)
            ids = torch.from_numpy(stream.read((first + start) * size, here * size)).to(device).view(here, size)
            posterior = autoencoder.encode(ids)
            both[start : start + here] = torch.cat((posterior.mean, posterior.log_std), dim=-1).half().cpu().numpy()
            if show is not None:
                show((first + start + here) / patches)
        with atomic_path(path) as temporary, open(temporary, "wb") as handle:
            np.save(handle, both)
        sums[path.name] = sha256(path)
        write_json(folder / SUMS, sums)
    manifest = LatentsManifest(patches=patches, latent=latent, patch_size=size, packing=stream.packing)
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    return folder


def check_latents(folder: Path) -> str:
    """A line on a folder of latents, all of it read again.

    Raises DataError, naming the file that is not as it was written, and ConfigError for a manifest that is none.
    """
    if not (folder / MANIFEST).is_file():
        return f"{folder}: not finished"
    patches, sums = _manifest(folder).patches, _sums(folder)
    if not (folder / SUMS).is_file():
        return f"{folder}: not known, there is no {SUMS}; to have one, {_MEND}"
    for number, _ in enumerate(_pieces(patches)):
        path = _file(folder, number)
        if not path.is_file() or sums.get(path.name) != sha256(path):
            raise DataError(f"{path} is missing or damaged: it does not have the SHA-256 in {SUMS}; {_MEND}")
    return f"{folder}: latents of {patches:,} patches, as they were written"


def _manifest(folder: Path) -> LatentsManifest:
    return LatentsManifest.parse(read_json(folder / MANIFEST, "latents manifest"), str(folder / MANIFEST))


def _sums(folder: Path) -> dict[str, str]:
    """Of the files written so far; none where there is no list of them."""
    found = read_json(folder / SUMS, "sums of latents") if (folder / SUMS).is_file() else {}
    if not isinstance(found, dict):
        raise DataError(f"{folder / SUMS} is damaged: it is no list of sums; {_MEND}")
    return {str(name): str(value) for name, value in found.items()}


def _wide(stored: Tensor) -> Tensor:
    return stored.float() if stored.dtype == torch.float16 else stored


def _pieces(patches: int) -> list[int]:
    """Patches of each file."""
    return [min(FILE_PATCHES, patches - first) for first in range(0, patches, FILE_PATCHES)]


def _file(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:05d}.npy"
