"""The folder of a sweep: whose it is, what lies where, and which of several processes works at what.

OUT/sweep.json                        the spec, as the report needs it
OUT/rates.json                        seconds of a step, where the budget is in seconds
OUT/data/                             tokenizer and shards, where the spec names a source
OUT/autoencoders/HASH/                run directories shared by rows, with reconstruction.json
OUT/rows/STAGE/ROW/seed-N/            a run directory with job.json (what was begun) and result.json (when finished)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nextvec import __version__
from nextvec.errors import ConfigError
from nextvec.files import read_json, write_json
from nextvec.settings import differences
from nextvec.sweep.plan import Job
from nextvec.sweep.spec import STAGES, SweepSpec
from nextvec.train.checkpoint import with_defaults

FORMAT = 1  # of sweep.json, job.json and result.json
SWEEP, RATES, JOB, RESULT = "sweep.json", "rates.json", "job.json", "result.json"
LOCK = ".sweep-lock"  # held by the process that works at the folder it lies in


def check_folder(out: Path) -> None:
    """Raises ConfigError for a folder that holds something else than a sweep."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"a sweep is a folder; {out} is a file: give another name with --out")
    if out.exists() and not (out / SWEEP).is_file() and any(path.name != LOCK for path in out.iterdir()):
        raise ConfigError(f"{out} holds something that is not a sweep; give another folder with --out")


def open_folder(out: Path, spec: SweepSpec) -> None:
    """Make the folder this sweep's, new or begun before. Raises ConfigError where rows read other data than the spec names."""
    if (out / SWEEP).is_file() and any(out.glob("rows/*/*/*/" + JOB)):
        before = read_sweep(out)["spec"]["data"]
        found = _first_difference({"data": before}, {"data": spec.data.model_dump(mode="json")})
        if found is not None:
            raise _edited(spec, out, "its rows", found)
    if not (out / SWEEP).is_file():
        write_sweep(out, spec)


def write_sweep(out: Path, spec: SweepSpec) -> None:
    """Keep the spec for the report; once it is known to fit what was begun."""
    points = [{"name": row.name, "stage": row.stage, "folder": row.folder} for row in spec.points()]
    write_json(
        out / SWEEP, {"format": FORMAT, "nextvec": __version__, "spec": spec.model_dump(mode="json"), "rows": points}
    )


def read_sweep(out: Path) -> dict[str, Any]:
    """sweep.json. Raises DataError when damaged, ConfigError for one of a newer nextvec."""
    found: dict[str, Any] = read_json(out / SWEEP, "sweep")
    if found.get("format", 0) > FORMAT:
        raise ConfigError(f"{out / SWEEP} has format {found['format']}, newer than this nextvec reads ({FORMAT})")
    return found


def check_begun(out: Path, spec: SweepSpec, jobs: Sequence[Job]) -> None:
    """Refuse a spec that would change or drop a row that was begun; new rows and seeds are welcome. Raises ConfigError."""
    planned = {job.folder: job for job in jobs}
    begun_in = {path.parent for name in (JOB, RESULT) for path in out.glob("rows/*/*/*/" + name)}
    for path in sorted(begun_in):
        folder = path.relative_to(out)
        begun = read_json(
            path / JOB if (path / JOB).is_file() else path / RESULT, "begun row"
        )  # results alone may be kept
        job = planned.get(folder)
        if job is None:
            raise ConfigError(
                f"{spec.name} was edited after rows were run: {out} holds the row {begun['row']} at seed {begun['seed']}, "
                "which it no longer has; put it back, or give a new folder with --out"
            )
        found = _first_difference(_filled(begun["identity"], job.identity), job.identity)
        if found is not None:
            raise _edited(spec, out, f"row {job.row.name}", found)


def begin(folder: Path, job: Job) -> None:
    """Note what is begun in the folder of a row, before its training."""
    if not (folder / JOB).is_file():
        content = {"format": FORMAT, "row": job.row.name, "seed": job.seed, "identity": job.identity}
        write_json(folder / JOB, content)


def _first_difference(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """A setting that a newer nextvec added counts as its default in what was begun before."""
    return next(differences(before, now, added=False), None)


def _filled(begun: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Settings of every stage, those that only `now` has at their defaults: a newer nextvec brought them."""

    def fill(before: Any, after: Any, default: Any) -> Any:
        if not all(isinstance(each, dict) for each in (before, after, default)):
            return before
        new = {name: default[name] for name in after if name not in before and name in default}
        return {name: fill(value, after.get(name), default.get(name)) for name, value in before.items()} | new

    stages = [stage for stage in STAGES if begun.get(stage) is not None]
    return begun | {stage: fill(begun[stage], now.get(stage), with_defaults(begun[stage])) for stage in stages}


def _edited(spec: SweepSpec, out: Path, what: str, found: tuple[str, Any, Any]) -> ConfigError:
    key, before, now = found
    return ConfigError(
        f"{spec.name} was edited after rows were run: {what} in {out} began with {key} {before!r} and it now says {now!r}; "
        "set it back, or give a new folder with --out"
    )
