"""`nextvec prepare --executor`: the same shards, byte for byte, made by tasks of datatrove on this machine, Slurm or Ray.

Where a group of shards ends is known only when the documents before it are encoded. So there are two rounds of tasks. Each of
the first reads its run of the source files and leaves a piece: ids, and a table of documents. Each of the second finds where
all groups end in the tables, and writes its share of the groups. Then the journal and the manifests are written, and the
pieces go. A task whose piece is whole has nothing to do, so the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_all_start_methods
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nextvec.errors import ConfigError, DataError, UserError
from nextvec.files import atomic_open, atomic_path, read_json, write_json
from nextvec.text.journal import STATE, Group, State
from nextvec.text.prepare import SHARD_TOKENS, SPLITS, Prepared, Work, cores, out_lock, planned
from nextvec.text.readers import Item, expand, fingerprint
from nextvec.text.reading import SHOWN
from nextvec.text.shards import DTypeName, Packing, Split
from nextvec.text.tokenizer import TextTokenizer, load_tokenizer
from nextvec.text.writing import group

Kind = Literal["local", "slurm", "ray"]
PIECES = ".pieces-"  # begins the name of a folder of pieces
LOG = "log.txt"  # in OUT/executor
COLUMNS = 6  # of a piece's table: tokens (0: empty), held out, bytes of text, item, entry, bad entries before it here
MOST_TASKS = 1000  # by default; a Slurm array is rarely allowed more
LEAST_BYTES = 1 << 24  # of source files in a piece by default: starting a task takes as long as encoding some of it


@dataclass(frozen=True)
class Job:
    """One preparation, as its tasks are told of it. All of them see the same files."""

    sources: tuple[str, ...]
    out: Path
    plan: Mapping[str, Any]  # a journal that has not begun
    skip_bad: bool
    tasks: int  # of the first round, one piece each

    @property
    def state(self) -> State:
        return State.parse(dict(self.plan), STATE)

    @property
    def folder(self) -> Path:
        """Of the pieces; another preparation has another one."""
        content = json.dumps([self.plan, self.sources, self.skip_bad, self.tasks], sort_keys=True)
        return self.out / f"{PIECES}{hashlib.sha256(content.encode()).hexdigest()[:12]}"

    def file(self, number: int, suffix: str) -> Path:
        """ids (.bin), table (.npy) and note (.json, written last) of a piece."""
        return self.folder / f"piece-{number:05d}.{suffix}"


class Task:
    """A step of a pipeline as datatrove runs it, with the number of the task."""

    def __init__(self, work: Callable[[Job, int, int], object], job: Job) -> None:
        self._work, self._job = work, job

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        self._work(self._job, rank, world_size)

    def __repr__(self) -> str:
        return f"nextvec: {self._work.__name__}"


def prepare_by_tasks(
    executor: Kind,
    sources: Sequence[str],
    tokenizer: TextTokenizer,
    out: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    tasks: int | None = None,
    workers: int | None = None,
    packing: Packing = "aligned",
    valid_fraction: float = 0.01,
    skip_bad: bool = False,
    text_key: str = "text",
    dtype: DTypeName | Literal["auto"] = "auto",
    shard_tokens: int = SHARD_TOKENS,
) -> Prepared | None:
    """As `prepare`, on an executor of datatrove; None where Slurm has the jobs now and will write the manifests.

    options: more arguments of that executor (Slurm needs `partition` and `time`). tasks: pieces; by default one for each 16 MiB
    of source files or each worker, at most one a file and 1,000. workers: tasks that run at once, by default one per core here,
    and all elsewhere.
    Raises ConfigError when datatrove is not installed or its executor lacks an option, and as `prepare`.
    """
    began = time.monotonic()
    for name, value in (("tasks", tasks), ("workers", workers)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1; got {value}")
    make = _executor_class(executor, options or {})
    items = expand(sources)
    plan = planned(items, tokenizer, packing, valid_fraction, text_key, dtype, shard_tokens)
    at_once = workers or (cores() if executor == "local" else -1)
    pieces = tasks or usual_tasks([item.weight or unknown(item) for item in items], at_once)
    job = Job(tuple(sources), Path(out).absolute(), plan.model_dump(mode="json"), skip_bad, pieces)
    with out_lock(Path(out)):
        work = Work(Path(out), items, plan, skip_bad)
        if work.state.done:
            return work.result(work.documents, time.monotonic() - began)
        tokenizer.save(job.folder)
        done = _run(executor, make, job, at_once)
    return None if done is None else done.result(0, time.monotonic() - began)


def _run(executor: Kind, make: Any, job: Job, at_once: int) -> Work | None:
    """Both rounds of tasks and the end; None where Slurm has them all now."""

    def stage(name: str, work: Callable[[Job, int, int], object], count: int, depends: Any = None) -> Any:
        logs = str(job.out / "executor" / name)
        more = {"job_name": f"nextvec-{name}", "depends": depends} if executor == "slurm" else {}
        return make([Task(work, job)], tasks=count, workers=at_once, logging_dir=logs, skip_completed=False, **more)

    encode = stage("encode", encode_piece, job.tasks)
    write = stage("write", write_groups, job.tasks, encode)
    if executor == "slurm":
        try:
            stage("finish", finish_alone, 1, write).run()
        except subprocess.CalledProcessError as error:
            raise ConfigError(
                f"sbatch refused a job (exit status {error.returncode}; what it said is above): mend --executor-option, and run "
                "the same command again"
            ) from None
        return None
    with _quiet(job.out / "executor" / LOG):
        encode.run()
    _whole(job)  # a bad document is told before more work is done
    with _quiet(job.out / "executor" / LOG):
        write.run()
    return finish(job)


@contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """What this process and those that it starts say on stderr goes into `log`: datatrove tells of every task."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(log, "ab") as handle:
            os.dup2(handle.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def usual_tasks(sizes: Sequence[int], at_once: int) -> int:
    """Pieces by default: of at least LEAST_BYTES where that keeps `at_once` workers busy. sizes: of files in bytes.

    >>> usual_tasks([1000] * 60, 2), usual_tasks([1 << 30] * 60, 2), usual_tasks([1 << 22] * 60, 2), usual_tasks([0, 9], -1)
    (2, 60, 15, 1)
    """
    return max(1, min(len(sizes), MOST_TASKS, max(-(-sum(sizes) // LEAST_BYTES), at_once)))


def unknown(item: Item) -> int:
    """Bytes that a source without a size counts as: a data set that does not say it is worth a task."""
    return LEAST_BYTES if item.label.startswith("hf:") else 0


def encode_piece(job: Job, rank: int, tasks: int) -> None:
    """The task of the first round with number `rank`. What the user has to mend is kept in its note, for the end to tell."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a task: tasks already fill the cores
    note = job.file(rank, "json")
    if note.is_file() and not read_json(note, "note of a piece")["problem"]:
        return
    state, problem = job.state, ""
    items = expand(job.sources)
    if fingerprint(items) != state.fingerprint:
        problem = "the sources have changed since the preparation began; run the command again"
    first, last = _run_of_items(items, rank, tasks)
    reading = Work.reading_of(state, items[:last], job.skip_bad, item=first)
    rows = array("q")
    try:
        with atomic_open(job.file(rank, "bin"), "wb") as handle:
            tokenizer = load_tokenizer(job.folder)
            for told, ids in reading.encoded(tokenizer, str(state.arguments["dtype"]), 0) if not problem else ():
                count = 0 if ids is None else len(ids)
                rows.extend((count, told.split == "valid", told.text_bytes, told.item, told.entry, told.skipped))
                if ids is not None:
                    handle.write(ids.data.cast("B"))
    except UserError as error:
        problem = str(error)
    with atomic_path(job.file(rank, "npy")) as path, open(path, "wb") as handle:
        np.save(handle, np.array(rows, dtype=np.int64).reshape(-1, COLUMNS))
    write_json(note, {"skipped": reading.skipped, "messages": reading.messages, "problem": problem})


def write_groups(job: Job, rank: int, tasks: int) -> None:
    """The task of the second round with number `rank`: each `tasks`-th group of shards."""
    _whole(job)
    dtype = np.dtype(str(job.state.arguments["dtype"])).newbyteorder("<")
    for planned_group in _groups(job):
        if planned_group.number % tasks != rank:
            continue
        with group({split: job.out / split for split in SPLITS}, planned_group.numbers) as writers:
            for span in planned_group.spans:
                table = _table(job, span.piece)
                start = int(table[: span.first, 0].sum())
                here = table[span.first : span.last]
                ids = np.fromfile(
                    job.file(span.piece, "bin"), dtype, int(here[:, 0].sum()), offset=start * dtype.itemsize
                )
                start = 0
                for length, valid, text_bytes in here[:, :3].tolist():
                    if length:
                        writers["valid" if valid else "train"].add(ids[start : start + length], text_bytes)
                        start += length
            shards = {split: record for split, writer in writers.items() if (record := writer.finish())}
        done = planned_group.state.override(shards=shards)
        write_json(_group_file(job, planned_group.number), done.model_dump(mode="json"))


def finish(job: Job, rank: int = 0, tasks: int = 1) -> Work:
    """Journal and manifests, once every shard has been read again and has the sum that its task gave.

    Raises DataError in one sentence for whatever kept a task from its work.
    """
    _whole(job)
    groups = [
        Group.parse(read_json(_group_file(job, planned_group.number), "group of shards"), "group of shards")
        for planned_group in _groups(job)
    ]
    write_json(job.out / STATE, job.state.override(groups=groups).model_dump(mode="json"))
    work = Work(job.out, expand(job.sources), job.state, job.skip_bad)
    if len(work.state.groups) != len(groups):
        raise DataError(f"shards in {job.out} are not as they were written; run the same command again")
    work.finish(load_tokenizer(job.folder), list(job.sources))
    work.reading.messages = _messages(job)
    for pieces in job.out.glob(f"{PIECES}*"):  # of other arguments as well, given up before
        shutil.rmtree(pieces)
    return work


def finish_alone(job: Job, rank: int = 0, tasks: int = 1) -> None:
    """`finish` as a job of its own. Raises ConfigError when another process writes OUT."""
    with out_lock(job.out):
        finish(job)


class _Span(NamedTuple):
    """Documents `first` to before `last` of a piece."""

    piece: int
    first: int
    last: int


@dataclass
class _Planned:
    """A group of shards before it is written."""

    number: int
    numbers: dict[Split, int]  # of its shard in each split
    spans: list[_Span] = field(default_factory=list)
    tokens: int = 0
    held: set[Split] = field(default_factory=set)  # splits that got a document
    state: Group = field(default_factory=Group)  # as the journal will say, but for the shards


def _groups(job: Job) -> Iterator[_Planned]:
    """All groups in order, as `prepare` makes them: each ends with the document that brings it to the size wanted."""
    target = int(job.state.arguments["shard_tokens"])
    now = _Planned(0, dict.fromkeys(SPLITS, 0))
    skipped, empty = 0, 0
    for piece in range(job.tasks):
        table = _table(job, piece)
        ends, first = np.cumsum(table[:, 0]), 0
        while first < len(table):
            before = int(ends[first - 1]) if first else 0
            full = int(np.searchsorted(ends, before + target - now.tokens)) + 1
            last = min(full, len(table))
            here = table[first:last]
            now.spans.append(_Span(piece, first, last))
            now.tokens += int(ends[last - 1]) - before
            filled = here[:, 0] > 0
            empty += int((~filled).sum())
            now.held |= {split for valid, split in enumerate(SPLITS) if (here[filled, 1] == valid).any()}
            item, entry, met = (int(value) for value in here[-1, 3:])
            now.state = Group(item=item, entry=entry, skipped=skipped + met, empty=empty)
            if full == last:
                yield now
                numbers = {split: number + (split in now.held) for split, number in now.numbers.items()}
                now = _Planned(now.number + 1, numbers, state=now.state)
            first = last
        skipped += int(read_json(job.file(piece, "json"), "note of a piece")["skipped"])
    now.state = now.state.override(skipped=skipped)  # bad entries after the last document count too
    yield now


def _run_of_items(items: Sequence[Item], rank: int, tasks: int) -> tuple[int, int]:
    """Items of a task, from .. to before: runs of about equal size on disk, every item in one of them."""
    sizes = np.array([item.weight + 1 for item in items], dtype=np.float64)
    middle = np.cumsum(sizes) - sizes / 2
    first, last = np.searchsorted(middle, [sizes.sum() * part / tasks for part in (rank, rank + 1)]).tolist()
    return first, last


def _whole(job: Job) -> None:
    """Raises DataError when a task of the first round has not ended, or could not do its work."""
    for number in range(job.tasks):
        if not job.file(number, "json").is_file():
            raise DataError(f"task {number} of {job.tasks} did not end; look into {job.out / 'executor'} and run again")
        if problem := read_json(job.file(number, "json"), "note of a piece")["problem"]:
            raise DataError(problem)


def _messages(job: Job) -> list[str]:
    notes = (read_json(job.file(number, "json"), "note of a piece") for number in range(job.tasks))
    return [message for note in notes for message in note["messages"]][:SHOWN]


def _table(job: Job, piece: int) -> NDArray[np.int64]:
    table: NDArray[np.int64] = np.load(job.file(piece, "npy"))
    return table


def _group_file(job: Job, number: int) -> Path:
    return job.folder / f"group-{number:05d}.json"


def _executor_class(kind: Kind, options: Mapping[str, Any]) -> Any:
    """datatrove's executor with `options` filled in. Raises ConfigError when it cannot be had, or cannot be made of them."""
    try:
        import inspect

        if kind == "slurm":
            from datatrove.executor.slurm import SlurmPipelineExecutor as Executor
        elif kind == "ray":
            import ray  # noqa: F401
            from datatrove.executor.ray import RayPipelineExecutor as Executor
        else:
            from datatrove.executor.local import LocalPipelineExecutor as Executor
    except ImportError as error:
        extra = "pip install ray" if error.name == "ray" else "pip install 'nextvec[datatrove]'"
        raise ConfigError(f"--executor {kind} needs a package that is not installed: {extra}") from None
    ours = {"pipeline", "tasks", "workers", "logging_dir", "skip_completed", "depends", "job_name"}
    known = {n: p for n, p in inspect.signature(Executor).parameters.items() if n not in ours}
    for name in options:
        if name not in known:
            raise ConfigError(f"--executor {kind} has no option {name!r}; it has {', '.join(sorted(known))}")
    if kind == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError("--executor slurm submits jobs with sbatch, which is not here: run the command where it is")
    if kind == "local" and (method := options.get("start_method", "spawn")) not in (can := get_all_start_methods()):
        raise ConfigError(f"start_method must be one of {', '.join(can)} here; got {method!r}")
    missing = [name for name, p in known.items() if p.default is p.empty and name not in options]
    if missing:
        raise ConfigError(f"--executor {kind} needs {' and '.join(f'--executor-option {n}=...' for n in missing)}")
    return partial(Executor, **options)
