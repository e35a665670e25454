"""A launch by `torchrun`, which gives the same command again when a process has died: what that may go on with.

RUN/.launch     which launch began the run, or went on with it last
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nextvec.errors import ConfigError, DataError
from nextvec.files import atomic_open
from nextvec.train.world import rank, restarted

MARK = ".launch"
REFUSED = "nextvec-refused"  # in the launcher's own folder: why its first attempt did not begin


def note_launch(run: Path) -> None:
    """Write into `run` that it is of this launch; nothing without a launcher."""
    name = _launch()
    if name is not None:
        with atomic_open(run / MARK) as handle:
            handle.write(f"{name}\n")


def goes_on(run: Path) -> bool:
    """Whether this is a restart, and `run` was begun by the same launch: whatever else lies there was refused before."""
    if not restarted() or not (run / "config.yaml").is_file():
        return False
    return rank() != 0 or _begun(run)  # process 0 decides for all; another node knows its launch by another name


@contextmanager
def refused_once(run: Path) -> Iterator[None]:
    """A launch that was refused before it began is refused at once when it tries again, in the same sentence."""
    folder = _folder()
    note = folder / REFUSED if folder is not None else None
    if note is not None and restarted() and note.is_file():
        raise ConfigError(note.read_text(encoding="utf-8"))
    before = _written(run)
    try:
        yield
    except (ConfigError, DataError) as error:
        if note is not None and rank() == 0 and _written(run) == before:
            with suppress(OSError):
                note.write_text(str(error), encoding="utf-8")
        raise


def _begun(run: Path) -> bool:
    try:
        return (run / MARK).read_text(encoding="utf-8", errors="replace").strip() == _launch()
    except OSError:
        return False


def _written(run: Path) -> tuple[int, int] | None:
    """Changes whenever a launch writes its name into `run`: names may be used again, for instance --rdzv-id."""
    try:
        found = (run / MARK).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _launch() -> str | None:
    """A name that this launch keeps over its restarts; None without a launcher."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name != "none":  # what all are called that get no name
        return name
    return str(_folder() or f"process {os.getppid()}")


def _folder() -> Path | None:
    """The folder that torchrun made for the files of this launch on this machine."""
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    found = file.parents[1:3]  # FOLDER/attempt_N/RANK/error.json
    return found[1] if len(found) == 2 and found[0].name.startswith("attempt_") and found[1].is_dir() else None


__all__ = ["goes_on", "note_launch", "refused_once"]
