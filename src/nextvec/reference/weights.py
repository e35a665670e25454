"""Weight files, tensor by tensor: memory-mapped reading of what is published, and a safetensors file filled in any order.

Nothing is unpickled but tensors (torch.load with weights_only=True), and no file is ever in memory as a whole.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nextvec.errors import DataError
from nextvec.files import read_json
from nextvec.reference.names import Shape

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"  # ends the name of a list of shards
CODES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
ZIP = b"PK\x03\x04"  # begins a file of torch.save since 1.6
BLOCK = 1 << 24  # bytes compared at a time
LISTED = 20  # names in an error


@dataclass(frozen=True)
class Stored:
    """What a file says of a tensor before its values are read."""

    shape: Shape
    dtype: torch.dtype


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a published checkpoint: safetensors before pickles, whole or in shards. Raises DataError."""
    for name in (SAFETENSORS, PICKLED):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / (name + INDEX)).is_file():
            return _shards(folder / (name + INDEX))
    raise DataError(f"{folder} holds no weights: neither {SAFETENSORS} nor {PICKLED}, nor {INDEX[1:]} of shards")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, memory-mapped: values are read from the disk when they are used.

    Raises DataError for a damaged file, and for a pickle that holds anything but tensors, without running it.
    """
    if path.suffix != ".safetensors":
        _check_zipped(path)
    try:
        found = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except pickle.UnpicklingError:
        raise DataError(
            f"{path} is refused: it is damaged, or holds more than tensors, which could run code when it is unpickled; "
            "get it again, best as safetensors"
        ) from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise DataError(f"{path} is damaged or cut off, and cannot be read ({reason}); get it again") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}, not the named tensors of a checkpoint")
    bad = sorted(str(name) for name, value in found.items() if not _is_plain(value))
    if bad:
        raise DataError(f"{path} holds entries that are not dense floating-point tensors: {listing(bad)}")
    return {name: tensor.detach() for name, tensor in found.items()}


def index(paths: Iterable[Path]) -> dict[str, Stored]:
    """Shape and dtype of every tensor in some files; only the files' lists of contents are read."""
    found: dict[str, Stored] = {}
    for path in paths:
        for name, tensor in read_weights(path).items():
            stored = Stored(tuple(tensor.shape), tensor.dtype)
            if found.setdefault(name, stored) != stored:
                raise DataError(f"{path}: {name} has another shape or dtype in another shard")
    return found


class TensorWriter:
    """A safetensors file that is filled in any order, some rows of a tensor at a time, so that nothing is held in memory.

    handle: a new file open for reading and writing; layout: shape and dtype of every tensor that will be put.
    """

    def __init__(self, handle: IO[bytes], layout: Mapping[str, Stored]) -> None:
        self._handle, self._layout = handle, layout
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets: dict[str, int] = {}
        end = 0
        for name in sorted(layout, key=lambda name: -layout[name].dtype.itemsize):  # so that each starts aligned
            stored = layout[name]
            offsets[name], end = end, end + torch.Size(stored.shape).numel() * stored.dtype.itemsize
            header[name] = {
                "dtype": CODES[stored.dtype],
                "shape": list(stored.shape),
                "data_offsets": [offsets[name], end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        handle.write(struct.pack("<Q", len(text)) + text)
        base = 8 + len(text)
        handle.truncate(base + end)
        self._offsets = {name: base + offset for name, offset in offsets.items()}

    def put(self, name: str, rows: Tensor, start: int = 0) -> None:
        """Write `rows` from row `start` of tensor `name`."""
        self._seek(name, rows, start)
        self._handle.write(_bytes(rows).data)

    def holds(self, name: str, rows: Tensor, start: int = 0) -> bool:
        """True when exactly these rows, bit for bit, have been put there."""
        self._seek(name, rows, start)
        wanted = _bytes(rows)
        return all(
            np.array_equal(np.frombuffer(self._handle.read(len(block)), dtype=np.uint8), block)
            for block in (wanted[at : at + BLOCK] for at in range(0, len(wanted), BLOCK))
        )

    def _seek(self, name: str, rows: Tensor, start: int) -> None:
        stored = self._layout[name]
        assert rows.dtype == stored.dtype
        assert tuple(rows.shape[1:]) == stored.shape[1:]
        assert start + rows.shape[0] <= stored.shape[0]
        row_bytes = torch.Size(stored.shape[1:]).numel() * stored.dtype.itemsize
        self._handle.seek(self._offsets[name] + start * row_bytes)


def listing(names: Sequence[str]) -> str:
    """Names for an error's sentence; a long list is cut, with its length."""
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _shards(path: Path) -> list[Path]:
    listed = read_json(path, "list of shards")
    weight_map = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{path} has no weight_map of tensors to shards")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise DataError(f"{path} names shards outside its own directory: {listing(outside)}")
    absent = [name for name in names if not (path.parent / name).is_file()]
    if absent:
        raise DataError(f"{path} names shards that are not there: {listing(absent)}; get them too")
    return [path.parent / name for name in names]


def _check_zipped(path: Path) -> None:
    with open(path, "rb") as handle:
        if handle.read(len(ZIP)) != ZIP:
            raise DataError(
                f"{path} is refused: it is not in the format of torch.save since 1.6 (it may be empty, a pointer of Git LFS, "
                "or a bare pickle, which could run code); get it again, best as safetensors"
            )


def _unpickle(path: Path) -> object:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _is_plain(value: object) -> bool:
    return type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided and value.dtype in CODES  # type: ignore[attr-defined]


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()
