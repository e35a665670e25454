"""How long a sweep takes: steps are measured where the model fits this machine, else counted operations over its rate."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nextvec.bench.steps import TrainStep, write_text
from nextvec.config import AutoencoderRun, CalmRun, RunConfig
from nextvec.evaluate.cost import cost
from nextvec.files import read_json, write_json
from nextvec.hardware import choose_precision, matmul_rates, synchronize
from nextvec.sweep.plan import PROBE_DRAWS, Job, digest, flops_per_token, tokens_per_step
from nextvec.sweep.spec import SweepSpec

MEASURED_STEPS = 3  # after one for warm-up; the quickest counts: a machine has other work, too
MEASURED_SECONDS = 1.0  # or fewer steps, once so much time has been measured
SETTLED = (
    6  # rounds in turn, none of which took less than FALLEN of the least before, after which rates count as settled
)
FALLEN = 0.99
LONGEST = 90.0  # seconds of rounds, after which no other begins
AT_ONCE = 8  # models in memory: a bake-off's arms at two depths, and its autoencoder
BUSY = (
    1.2  # processes that want to run, per core, from which on a step's processor time over its threads counts instead
)
MEASURABLE = 60.0  # seconds: a model whose steps would take longer than this is counted, not run
SHARE = 0.3  # of the machine's rate of matrix products that a training step reaches, where it is not measured
DOCUMENTS, DOCUMENT_TOKENS = 40, 2048  # scored, where neither spec nor data say
# Settings that rates kept earlier do not know, and what they say where nothing is asked of them: left out then.
_LATER: dict[str, object] = {"inner": None, "grams": 0}
_FREE = {  # settings without an effect on speed
    "seed", "steps", "log_every", "eval_every", "save_every", "save_minutes", "init_std",
    "kl_weight", "kl_clip", "latent_dropout", "token_dropout", "mask_id",
}  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Seconds of one job, evaluation included, its autoencoder not."""

    job: Job
    training: float
    scoring: float
    how: str  # measured, or counted

    @property
    def total(self) -> float:
        return self.training + self.scoring


def busy() -> bool:
    """Whether the processors have more to do than they can, so that the clock on the wall says little."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY * (os.cpu_count() or 1)


class Rates:
    """Seconds of a step by settings; kept in a file, so that a budget in seconds means the same steps next time."""

    def __init__(self, path: Path, device: torch.device, keep: bool = True, flops: float | None = None) -> None:
        """keep: write what is measured to `path`; flops: plan for a machine of so many operations a second, not this one."""
        self.path, self.device, self.keep, self.flops = path, device, keep, flops
        self.found: dict[str, dict[str, Any]] = {}
        if path.is_file() and flops is None:
            self.found = read_json(path, "measured rates")

    def __call__(self, run: RunConfig) -> float:
        """Seconds of one optimiser step."""
        return float(self.entry(run)["seconds"])

    def entry(self, run: RunConfig) -> dict[str, Any]:
        key = self.key(run)
        if key not in self.found:
            self.found[key] = self._measure(run)
            if self.keep:
                write_json(self.path, self.found)
        return self.found[key]

    def key(self, run: RunConfig) -> str:
        plain = _without_free(run.model_dump(mode="json"))
        # Of the optimiser's settings only these change how long a step takes; without rows_lr the key is what it always was.
        plain["optim"] = plain["optim"]["name"] + (" and rows" if plain["optim"]["rows_lr"] is not None else "")
        return digest({**plain, "device": self.device.type})[:12]

    def _measure(self, run: RunConfig) -> dict[str, Any]:
        if self.flops is not None or not self._measurable(run):
            return {"seconds": self.counted(run), "how": "counted"}
        with TemporaryDirectory() as folder:
            timed = TimedStep(run, Path(folder), self.device)
            while len(timed.wall) < MEASURED_STEPS and sum(timed.wall) < MEASURED_SECONDS:
                timed()
        return timed.entry()

    def in_turn(self, jobs: Iterable[Job]) -> None:
        """Measure the steps of jobs and their autoencoders that are not known yet, on a CPU in turn, until each has settled.

        Models that are to be compared need that: of those measured one after the other, one that meets a busy moment of the
        machine gets fewer steps than its rival.
        """
        if self.device.type != "cpu" or self.flops is not None:
            return
        runs = (run for job in jobs for run in (job.autoencoder, job.run) if run is not None)
        new = [(key, run) for key, run in {self.key(run): run for run in runs}.items() if key not in self.found]
        new = [(key, run) for key, run in new if self._measurable(run)]
        for start in range(0, len(new), AT_ONCE):
            self.found |= _settled(new[start : start + AT_ONCE], self.device)
        if new and self.keep:
            write_json(self.path, self.found)

    def _measurable(self, run: RunConfig) -> bool:
        # on a busy machine the rate of products is the clock's, a tenth of its own or less
        limit = MEASURABLE * (10 if self.device.type == "cpu" and busy() else 1)
        return self.counted(run) * (1 + MEASURED_STEPS) <= limit

    def counted(self, run: RunConfig) -> float:
        """Seconds of a step at the rate given, or at SHARE of this machine's measured rate of matrix products."""
        rate = self.flops or SHARE * max(matmul_rates(self.device).values())
        return tokens_per_step(run) * flops_per_token(run) / rate


class TimedStep:
    """Training steps of a model on text of no meaning, timed; warm."""

    def __init__(self, run: RunConfig, folder: Path, device: torch.device) -> None:
        precision = run.train.precision if run.train.precision != "auto" else choose_precision(device)[0]
        folder.mkdir(exist_ok=True)
        write_text(folder, run.model.vocab_size, 8 * tokens_per_step(run))
        self._step, self._device = TrainStep(run, "ours", folder, device, precision), device
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._step.warm()
        self._step()

    def __call__(self) -> bool:
        """One step; whether it was the quickest so far, by more than can be chance."""
        synchronize(self._device)
        began = time.perf_counter(), time.process_time()
        self._step()
        synchronize(self._device)
        self.wall.append(time.perf_counter() - began[0])
        self.cpu.append((time.process_time() - began[1]) / torch.get_num_threads())
        taken = self.cpu if self._by_processor() else self.wall
        return taken[-1] < FALLEN * min(taken[:-1], default=math.inf)

    def entry(self) -> dict[str, Any]:
        if self._by_processor():
            return {"seconds": min(self.cpu), "how": "measured, processor time"}
        return {"seconds": min(self.wall), "how": "measured"}

    def _by_processor(self) -> bool:
        return self._device.type == "cpu" and busy()


def _settled(runs: Sequence[tuple[str, RunConfig]], device: torch.device) -> dict[str, dict[str, Any]]:
    """By key: steps in turn until, for SETTLED rounds, none was quicker than before by more than can be chance."""
    with TemporaryDirectory() as folder:
        timed = {key: TimedStep(run, Path(folder) / key, device) for key, run in runs}
        began, quiet = time.monotonic(), 0
        while quiet < SETTLED and time.monotonic() - began < LONGEST:
            fell = [step() for step in timed.values()]
            quiet = 0 if any(fell) else quiet + 1
    return {key: step.entry() for key, step in timed.items()}


def estimate(spec: SweepSpec, jobs: Sequence[Job], rates: Rates) -> tuple[list[Estimate], dict[Path, float]]:
    """Per job, and per autoencoder (by folder) its seconds of training."""
    found, encoders = [], {}
    for job in jobs:
        if job.autoencoder is not None and job.autoencoder_folder not in encoders:
            encoders[job.autoencoder_folder] = _training(job.autoencoder, spec, rates)
        entry = rates.entry(job.run)
        found.append(Estimate(job, _training(job.run, spec, rates), _scoring(spec, job, rates), str(entry["how"])))
    return found, encoders


def _training(run: RunConfig, spec: SweepSpec, rates: Rates) -> float:
    """Steps, and held-out batches on the way: a third of a step each, twice that for CALM's conditioning gap."""
    seconds, train = rates(run), run.train
    evaluations = 1 + (train.steps // train.eval_every if train.eval_every else 0)
    passes = (2 if isinstance(run, CalmRun) else 1) / 3 / train.accumulate
    return seconds * (train.steps + evaluations * spec.evaluate.batches * passes)


def _scoring(spec: SweepSpec, job: Job, rates: Rates) -> float:
    """Draws at every scored position, at the rate of operations that training reaches."""
    run, asked = job.run, spec.evaluate
    rate = tokens_per_step(run) * flops_per_token(run) / rates(run)
    documents, length = asked.documents or DOCUMENTS, asked.document_tokens or DOCUMENT_TOKENS
    tokens = documents * length
    if isinstance(run, AutoencoderRun):
        return tokens * flops_per_token(run) * 3 / rate  # decoded at seven noise levels, forward only
    K = run.model.patch_size
    stride = job.identity["evaluate"]["stride"]
    chained = -(-4 // K) * K  # tokens drawn for an n-gram of 4
    reading = cost(run.model, context=asked.context_tokens // K).inference_split.total
    # 2: windows overlap by half; on the way the beginnings of the documents are scored
    scored = 2 * tokens * (1 + asked.draws * chained / stride)
    probed = asked.curve * documents * min(length, asked.context_tokens) * (1 + PROBE_DRAWS * chained / stride)
    return (scored + probed) * reading / rate


def _without_free(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_free(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in _FREE and not (name in _LATER and value == _LATER[name])
    }
