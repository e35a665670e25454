"""Whole-or-nothing file writing: a temporary name in the same folder, fsync, then rename.

A reader never sees half a file, and a full disk leaves the previous file as it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nextvec.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

_NUMBERS = re.compile(r"\[\n([\s\d.,eE+-]+)\]")  # a list of numbers; inside a string there is no line break


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed to `path`.

    Raises DataError when the disk is full; `path` keeps what it held before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        temporary.chmod(0o666 & ~_umask())  # some writers make private files; ours are as open as any other
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_open(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Like `open(path, mode)` for writing a whole new file, but whole or nothing."""
    with atomic_path(path) as temporary:
        encoding = None if "b" in mode else "utf-8"
        with open(temporary, mode, encoding=encoding) as handle:
            yield handle


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, a list of numbers on one line, whole or nothing."""
    text = json.dumps(value, indent=2, allow_nan=False)
    with atomic_open(path) as handle:
        handle.write(_NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as one safetensors file, whole or nothing. Raises DataError when the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        try:
            save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, {"format": "pt"})
        except SafetensorError as error:  # the library hides the system's error number in its text
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def read_json(path: Path, what: str) -> Any:
    """Read JSON; DataError names `what` and the path when it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{what} {path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{what} {path} cannot be read: {error}") from None


def check_target(path: Path | None) -> None:
    """Refuse, before any work, a file that could not be written: its folder is missing, or it is a folder.

    Raises ConfigError; None passes.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the name of a file to write")
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}; make it, or give another name")


def disk_error(error: OSError, path: Path) -> Exception:
    """Turn a full disk into one clear sentence; any other OSError is returned unchanged."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        kept = " and its previous version is kept" if path.exists() else ""
        return DataError(f"the disk is full: {path} was not written{kept}; free some space and try again")
    return error


def sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 of a file, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make the rename itself durable where the system allows a folder to be fsynced."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
