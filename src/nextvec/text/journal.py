"""prepare.json, the journal of a preparation: what was asked for and every finished group of shards.

It is what makes a preparation resumable: written whole after each group, checked against the files and the command
before going on.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from nextvec.errors import ConfigError, DataError
from nextvec.files import read_json, sha256, write_json
from nextvec.settings import Config, Count
from nextvec.text.shards import ShardRecord, Split

STATE = "prepare.json"


class Group(Config):
    """State after a finished group; `shards` holds its record for each split that got a document."""

    item: Count = 0  # place in the sources: number of the item being read,
    entry: Count = 0  # and entries of it used up, good or bad
    skipped: Count = 0  # so far
    empty: Count = 0  # so far
    shards: dict[Split, ShardRecord] = Field(default_factory=dict)


class State(Config):
    """The whole journal."""

    format: int
    arguments: dict[str, str | int | float]  # what the shards depend on
    fingerprint: str  # of the source files
    groups: list[Group]
    done: bool


def begin(out: Path, plan: State) -> State:
    """The state to go on from in folder `out`: a fresh one, or an earlier one that fits `plan`, damage taken off.

    Raises ConfigError when `out` holds other work.
    """
    path = out / STATE
    if not path.is_file():
        if any((out / name).exists() for name in ("train", "valid", "manifest.json")):
            raise ConfigError(f"{out} holds files that nextvec prepare did not write; choose another --out")
        write_json(path, plan.model_dump(mode="json"))
        return plan
    data = read_json(path, "preparation journal")
    if not isinstance(data, dict) or data.get("format") != plan.format:
        raise DataError(f"{path} was written by another version of nextvec; choose another --out or delete {out}")
    found = State.parse(data, str(path))
    if found.groups:
        _same(out, found, plan)
    for leftover in out.glob("*/.*.tmp"):  # of a run that was killed
        leftover.unlink()
    sound = _sound(out, found.groups)
    if sound == len(found.groups) > 0:
        return found
    doomed = ["manifest.json"] if sound else ["manifest.json", "tokens-*.bin", "documents-*.npy"]
    for file in [file for pattern in doomed for file in out.glob(f"*/{pattern}")]:
        file.unlink()
    state = plan.override(groups=found.groups[:sound])
    write_json(path, state.model_dump(mode="json"))
    return state


def _same(out: Path, found: State, plan: State) -> None:
    for key, value in plan.arguments.items():
        if found.arguments.get(key) != value:
            raise ConfigError(
                f"{out} was prepared with {key} {_short(found.arguments.get(key))}, not {_short(value)}; "
                "choose another --out, or delete it to start again"
            )
    if found.fingerprint != plan.fingerprint:
        raise ConfigError(
            f"{out} was prepared from other sources, or they have changed since; "
            "choose another --out, or delete it to start again"
        )


def _sound(out: Path, groups: list[Group]) -> int:
    """How many groups from the first on still have all their files as written."""
    for number, group in enumerate(groups):
        for split, record in group.shards.items():
            for name, expected in ((record.file, record.sha256), (record.offsets, record.offsets_sha256)):
                file = out / split / name
                if not file.is_file() or sha256(file) != expected:
                    return number
    return len(groups)


def _short(value: object) -> str:
    return f"{str(value)[:12]!r}" if isinstance(value, str) else str(value)
