"""The built-in corpus `python-stdlib`: the standard library of the running interpreter, on every machine, no download."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

NAME = "python-stdlib"
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}  # installed packages differ between machines


def stdlib_files(root: Path | None = None) -> list[tuple[Path, str]]:
    """(file, relative name) of every .py file, sorted by name.

    Folders and files whose name starts with `test` are left out everywhere, and installed packages, so that figures
    compare between installations. `root` defaults to the interpreter's own library folder.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith("test")]
        for name in files:
            if name.endswith(".py") and not name.startswith("test"):
                path = Path(folder, name)
                found.append((path, path.relative_to(root).as_posix()))
    return sorted(found, key=lambda pair: pair[1])
