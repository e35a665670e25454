"""One engine thread per model: requests join and leave between patches, however many clients there are.

The thread alone touches the model. Others hand it jobs and cancellations, which it takes up before each step; what it draws
goes back to the event loop once per step. Rows that a model holds, at work and waiting, are counted when a job is handed in.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from nextvec.errors import UserError
from nextvec.sampling.engine import Engine, inputs_needed
from nextvec.sampling.generate import Piece, TextModel, piece_of
from nextvec.sampling.settings import Sampling
from nextvec.sampling.stream import StopStream
from nextvec.serve.errors import ApiError, busy
from nextvec.serve.explain import PatchDetail, explain_patch
from nextvec.serve.logs import LOGGER
from nextvec.serve.metrics import Metrics
from nextvec.serve.settings import ServeSettings
from nextvec.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Update:
    """A patch of one of a job's rows. seconds: of the step that drew it; detail: where the job asked for it."""

    piece: Piece
    seconds: float
    detail: PatchDetail | None = None


@dataclass(eq=False)
class Job:
    """A request: `samples` rows for each prompt, side by side. Its updates end with a finished row each, or one ApiError."""

    prompts: Sequence[Sequence[int]]
    settings: Sampling
    samples: int = 1
    stop: tuple[str, ...] = ()
    detail: bool = False
    updates: asyncio.Queue[Update | ApiError] = field(default_factory=asyncio.Queue)
    counted: bool = False  # its rows are among those held; guarded by the worker's lock
    left: int = 0  # rows unfinished
    began: float = field(default_factory=time.perf_counter)
    last: dict[int, float] = field(default_factory=dict)  # when a row's last patch came

    @property
    def rows(self) -> int:
        return len(self.prompts) * self.samples


@dataclass(eq=False)
class _Text:
    """A row in the making. rest: ids of the prompt that its next patch begins with."""

    job: Job
    row: int
    stream: StopStream
    rest: Sequence[int]


class Worker:
    """The engine of one model in a thread of its own."""

    def __init__(
        self, name: str, model: TextModel, tokenizer: Tokenizer, settings: ServeSettings, metrics: Metrics, context: int
    ) -> None:
        self.name, self.context = name, context
        self._model, self._tokenizer, self._settings, self._metrics = model, tokenizer, settings, metrics
        self._changed = threading.Condition()
        self._inbox: list[tuple[str, Job]] = []
        self._held = 0  # rows of unfinished jobs
        self._stopping = False
        self._row_seconds = 0.0  # moving mean of how long a row takes
        self._texts: dict[int, _Text] = {}
        self._engine = self._new_engine()
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to work; updates go to queues of this loop."""
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step in hand."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def held(self) -> int:
        """Rows at work and waiting."""
        return self._held

    def submit(self, job: Job) -> None:
        """Put a job into the queue. Raises ApiError (429) where its rows do not fit now, (400) where they never will."""
        limit = self._settings.rows
        if job.rows > limit:
            raise ApiError(
                400,
                f"a request makes at most {limit} texts (prompts times n) here; got {job.rows}: split it",
                param="n",
            )
        with self._changed:
            if self._stopping or (self._thread.ident is not None and not self.alive):
                what = "the server is stopping" if self._stopping else f"the engine of {self.name} has ended"
                raise ApiError(503, f"{what}: try another replica", headers={"retry-after": "5"})
            if self._held + job.rows > limit:
                self._metrics.refused.labels(self.name).inc()
                raise busy(
                    f"{self.name} has {self._held} texts at work or waiting and takes {limit}: try again later",
                    self._wait(),
                )
            job.counted = True
            self._held += job.rows
            self._inbox.append(("begin", job))
            self._gauge()
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Take a job's rows out before the next step; no matter if it has ended or never began."""
        with self._changed:
            if job.counted and not self._stopping:
                self._inbox.append(("cancel", job))
                self._changed.notify()

    def _wait(self) -> int:
        """Seconds until there is room, by the time that rows take now: from 1 to 60."""
        rounds = self._held / self._settings.slots
        return max(1, min(60, round(rounds * self._row_seconds)))

    def _new_engine(self) -> Engine:
        return Engine(
            self._model,
            eos_id=self._tokenizer.eos_id,
            pad_id=self._tokenizer.pad_id,
            slots=self._settings.slots,
            capacity=max(
                2, inputs_needed(1, self.context - 1, self._model.patch_size)
            ),  # one token may need a padded patch
            packed=self._model.packed,
            deterministic=self._settings.deterministic,
        )

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._inbox or self._stopping or len(self._engine)):
                    self._changed.wait()
                if self._stopping:
                    return
                inbox, self._inbox = self._inbox, []
            try:
                for what, job in inbox:
                    if what == "begin":
                        self._begin(job)
                    else:
                        self._drop(job)
                self._step()
            except Exception:
                LOGGER.exception("engine failure", extra={"fields": {"model": self.name}})
                self._fail_all([each for _, each in inbox])

    def _begin(self, job: Job) -> None:
        try:
            self._add(job)
        except UserError as error:
            self._drop(job)
            self._deliver([(job, ApiError(400, str(error)))])

    def _add(self, job: Job) -> None:
        size = self._model.patch_size
        for index, prompt in enumerate(job.prompts):
            first = index * job.samples
            numbers = self._engine.add(prompt, job.settings, samples=job.samples, row=first)
            rest = prompt[len(prompt) // size * size :]
            for sample, number in enumerate(numbers):
                self._texts[number] = _Text(job, first + sample, StopStream(self._tokenizer, job.stop, prompt), rest)
        job.left = job.rows
        self._metrics.prompt_tokens.labels(self.name).inc(sum(map(len, job.prompts)))

    def _drop(self, job: Job) -> None:
        for number in [number for number, text in self._texts.items() if text.job is job]:
            self._engine.cancel(number)
            del self._texts[number]
        self._end(job)

    def _end(self, job: Job) -> None:
        """A job's rows count no more."""
        with self._changed:
            if job.counted:
                job.counted = False
                self._held -= job.rows
                self._gauge()

    def _step(self) -> None:
        begin = time.perf_counter()
        events = self._engine.step()
        seconds = time.perf_counter() - begin
        if not events:
            return
        updates: list[tuple[Job, Update | ApiError]] = []
        tokens = draws = 0
        for event in events:
            text = self._texts[event.row]
            piece = piece_of(self._engine, text.stream, event)
            detail = None
            if text.job.detail:
                rest = text.rest[: event.pool.given]  # none of it where the prompt was padded instead
                detail = explain_patch(self._model, event.pool, rest, text.job.settings)
            text.rest = ()
            tokens, draws = tokens + piece.tokens, draws + piece.pool.draws
            updates.append((text.job, Update(_renumber(piece, text.row), seconds, detail)))
            self._time(text, piece)
            if piece.finished is not None:
                del self._texts[event.row]
                text.job.left -= 1
                if not text.job.left:
                    self._end(text.job)
        for counter, value in ((self._metrics.tokens, tokens), (self._metrics.draws, draws), (self._metrics.steps, 1)):
            counter.labels(self.name).inc(value)
        self._metrics.patches.labels(self.name).inc(len(events))
        self._deliver(updates)

    def _time(self, text: _Text, piece: Piece) -> None:
        now, job = time.perf_counter(), text.job
        if text.row in job.last:
            self._metrics.per_token.labels(self.name).observe((now - job.last[text.row]) / max(1, piece.tokens))
        else:
            self._metrics.first.labels(self.name).observe(now - job.began)
        job.last[text.row] = now
        if piece.finished is not None:
            self._row_seconds += 0.1 * (now - job.began - self._row_seconds)

    def _fail_all(self, jobs: list[Job]) -> None:
        """After a failed step: every job gets an error, and a new engine starts without rows."""
        self._metrics.failures.labels(self.name).inc()
        jobs = list(dict.fromkeys([*jobs, *(text.job for text in self._texts.values())]))
        self._texts = {}
        self._engine = self._new_engine()
        sentence = "the model failed at this request or at one beside it; the server goes on, so try again"
        self._deliver([(job, ApiError(500, sentence)) for job in jobs if job.counted])
        for job in jobs:
            self._end(job)

    def _gauge(self) -> None:
        running = min(self._held, self._settings.slots)
        self._metrics.running.labels(self.name).set(running)
        self._metrics.waiting.labels(self.name).set(self._held - running)

    def _deliver(self, updates: list[tuple[Job, Update | ApiError]]) -> None:
        assert self._loop is not None, "started"
        try:
            self._loop.call_soon_threadsafe(_put, updates)
        except RuntimeError:  # the loop is closed: nobody waits any more
            LOGGER.log(logging.DEBUG, "updates after the end")


def _renumber(piece: Piece, row: int) -> Piece:
    """The row's number in its job; without the pool, whose tensors nobody needs any more."""
    return Piece(
        row, piece.text, piece.tokens, piece.finished, piece.pool._replace(copies=None, latents=None, tokens=None)
    )


def _put(updates: list[tuple[Job, Update | ApiError]]) -> None:
    for job, update in updates:
        job.updates.put_nowait(update)
