"""Runs a bake-off: text, the sweep of its arms, figures of each row, speeds in turn, verdict. What is done is skipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nextvec.bakeoff.curve import Curve, break_even, curve_of
from nextvec.bakeoff.depth import begun_layers, choose_depths
from nextvec.bakeoff.measure import FIGURES, Planned, load_model, measure, planned
from nextvec.bakeoff.settings import NAME, Bakeoff, patch_size_of, spec_of
from nextvec.bakeoff.speed import measure_speeds
from nextvec.bakeoff.verdict import Duel, matched, quality
from nextvec.errors import ConfigError, DataError
from nextvec.evaluate.collision import FEWEST
from nextvec.files import read_json, write_json
from nextvec.hardware import choose_device
from nextvec.lock import held
from nextvec.recipes import autoencoder_steps
from nextvec.sweep.estimate import Rates
from nextvec.sweep.folder import JOB, LOCK, RATES, RESULT, SWEEP, check_folder, open_folder, read_sweep
from nextvec.sweep.plan import MODEL_SHARE, Job, Rate, Vocabulary, expected_vocabulary, make_jobs, tokens_per_step
from nextvec.sweep.run import Corpus, open_corpus, run_sweep
from nextvec.sweep.spec import SweepSpec
from nextvec.sweep.tables import Sweep, read_sweep_results
from nextvec.text.readers import expand

SPEEDS, VERDICT = "generation.json", "verdict.json"
LEAST_DOCUMENTS = 4  # held out and long enough: with fewer, an error over documents means nothing
Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """A finished bake-off. `figures`: by arm, of each seed; `speeds`: of the first seed's models, by arm and sampler."""

    asked: Bakeoff
    sweep: Sweep
    planned: Mapping[str, Planned]  # by arm, of the first seed
    figures: Mapping[str, Sequence[Mapping[str, Any]]]
    speeds: Mapping[str, Mapping[str, Mapping[str, Any]]]
    curves: Mapping[str, Curve | None]
    duels: tuple[Duel, ...]


def run_bakeoff(
    asked: Bakeoff, *, command: str = "", say: Say = print, show: bool = True, rate: Rate | None = None
) -> Outcome | None:
    """All that is not done yet; several processes may share the folder. None while another one still works at a row.

    command: what goes on with this bake-off; rate: seconds of a step, instead of measuring them. Raises ConfigError and
    DataError in one sentence for what cannot be, before any training, and KeyboardInterrupt after an interrupted row has saved
    itself.
    """
    out, place = Path(asked.out), choose_device(asked.device)
    if asked.data:
        expand(asked.data)  # a source that is not there shows before anything is written
    check_folder(out)
    _check_same(out, asked)
    draft = _draft(asked)
    with held(out / LOCK, wait=True):
        open_folder(out, draft)
        corpus = open_corpus(draft, out, say)
        vocabulary = Vocabulary(corpus.tokenizer.vocab_size, corpus.tokenizer.mask_id)
        _check_enough(asked, corpus, make_jobs(draft, _no_rate, vocabulary))
        asked = _with_depths(out, asked, corpus, vocabulary, rate, place, say)
        jobs = make_jobs(_draft(asked), _no_rate, vocabulary)
        rates = rate or Rates(out / RATES, place)
        encoder = next((job.autoencoder for job in jobs if job.autoencoder is not None), None)
        if isinstance(rates, Rates):
            rates.in_turn(jobs)
        steps = 1 if encoder is None else _autoencoder_steps(asked, rates(encoder), vocabulary)
        spec = spec_of(asked, vocabulary.vocab_size, steps)
        jobs = make_jobs(spec, rates, vocabulary)
    _say_plan(asked, jobs, rates, say)
    run_sweep(spec, out, device=asked.device, command=command, say=say, show=show, rate=rate)
    busy = [job for job in jobs if not (out / job.folder / RESULT).is_file()]
    if busy:
        say(f"{len(busy)} rows are in the hands of another process; the same command, given again, goes on from there")
        return None
    stride = jobs[0].identity["evaluate"]["stride"]
    for job in jobs:
        folder = out / job.folder
        if read_json(folder / RESULT, "result")["failed"] is None:
            with held(folder / LOCK, wait=True):
                measure(folder, stride, spec.evaluate.context_tokens, corpus, place, say)
    with held(out / LOCK, wait=True):
        speeds = _speeds(out, jobs, corpus, place, say)
        outcome = judge(asked, jobs, rates, speeds)
        write_json(out / VERDICT, {"asked": {**asdict(asked), "out": str(asked.out)}, **summary(outcome)})
    return outcome


def judge(
    asked: Bakeoff,
    jobs: Sequence[Job],
    rate: Rate,
    speeds: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> Outcome:
    """From what lies in the folder of a bake-off whose rows are all finished."""
    out = Path(asked.out)
    sweep = read_sweep_results(out)
    plans: dict[str, list[Planned]] = {arm: [] for arm in asked.arms}
    figures: dict[str, list[Mapping[str, Any]]] = {arm: [] for arm in asked.arms}
    for job in jobs:
        plans[job.row.name].append(planned(job, rate))
        path = out / job.folder / FIGURES
        figures[job.row.name] += [read_json(path, "figures")] if path.is_file() else []
    rows = {row.name: row for row in sweep.rows}
    curves = {
        arm: None if rows[arm].failed else curve_of(list(rows[arm].results.values()), plans[arm]) for arm in asked.arms
    }
    duels = []
    for rival in [arm for arm in asked.arms if arm != "calm" and "calm" in asked.arms]:
        pair = [[each["collision"] for each in figures[arm]] for arm in ("calm", rival)]
        known = len(pair[0]) == len(pair[1]) and {"calm", rival} <= speeds.keys()
        duels.append(
            Duel(
                rival,
                quality(rows["calm"], rows[rival]),
                matched(pair[0], pair[1], speeds["calm"], speeds[rival]) if known else None,
                break_even(curves["calm"], curves[rival], asked.seconds, torch.Generator().manual_seed(0)),
            )
        )
    first = {arm: each[0] for arm, each in plans.items()}
    return Outcome(asked, sweep, first, figures, speeds, curves, tuple(duels))


def summary(outcome: Outcome) -> dict[str, Any]:
    """Plain values of plans and verdicts, for JSON."""
    return {
        "planned": {arm: asdict(plan) for arm, plan in outcome.planned.items()},
        "duels": [{**asdict(duel), "use_calm": duel.use} for duel in outcome.duels],
    }


def _check_same(out: Path, asked: Bakeoff) -> None:
    """Raises ConfigError for a folder whose rows were begun for something else."""
    if not (out / SWEEP).is_file() or not any(out.glob("rows/*/*/*/" + JOB)):
        return
    before = read_sweep(out)["spec"]
    if before["name"] != NAME:
        raise ConfigError(f"{out} holds the sweep {before['name']}, not a bake-off; give another folder with --out")
    seconds = (before.get("budget") or {}).get("seconds", 0.0)
    if seconds != asked.seconds:
        raise ConfigError(
            f"{out} holds a bake-off of {seconds / 60:g} minutes, begun before; give --minutes {seconds / 60:g}, or another "
            "folder with --out"
        )
    size = int(before["base"]["autoencoder"]["model"]["patch_size"])
    wanted = patch_size_of(_draft(asked))
    if size != wanted:
        raise ConfigError(
            f"{out} holds a bake-off of {size} tokens per patch, begun before, and {wanted} are asked for; give "
            f"--patch-size {size}, or another folder with --out"
        )


def _with_depths(
    out: Path, asked: Bakeoff, corpus: Corpus, vocabulary: Vocabulary, rate: Rate | None, place: torch.device, say: Say
) -> Bakeoff:
    """Every arm with a depth: the one asked for, the one of its rows that are begun, or the one that its budget feeds."""
    asked = replace(asked, layers={**begun_layers(out, asked.arms), **asked.layers})
    trial = rate or Rates(out / RATES, place, keep=False)  # the depths chosen are timed in turn among themselves

    def in_turn(jobs: Sequence[Job]) -> None:
        if isinstance(trial, Rates):
            trial.in_turn(jobs)

    def encoder_seconds(step: float) -> float:
        return _autoencoder_steps(asked, step, vocabulary) * step

    found = choose_depths(out, asked, vocabulary, corpus.shards.tokens, trial, in_turn, encoder_seconds)
    for arm, depth in found.items():
        say(
            f"{arm}: {depth.layers} {'layer' if depth.layers == 1 else 'layers'} of {depth.parameters / 1e6:.2g} million "
            f"parameters; {asked.minutes:g} minutes and this text feed {depth.fed / 1e6:.2g} million"
        )
    if found:
        say("--layers asks for other depths, of all arms or of some: calm=2,token=3")
    return replace(asked, layers={**{arm: depth.layers for arm, depth in found.items()}, **asked.layers})


def _autoencoder_steps(asked: Bakeoff, step_seconds: float, vocabulary: Vocabulary) -> int:
    """Raises ConfigError for a budget of which they leave too little."""
    steps = autoencoder_steps(asked.seconds, step_seconds, vocabulary.vocab_size)
    if steps * step_seconds > (1 - MODEL_SHARE) * asked.seconds:
        least = math.ceil(10 * steps * step_seconds / (1 - MODEL_SHARE) / 60) / 10
        raise ConfigError(
            f"{asked.minutes:g} minutes are too few on this machine: {steps} steps of CALM's autoencoder take "
            f"{steps * step_seconds:.0f} s, and at least {MODEL_SHARE:.0%} are for the model; give --minutes {least:g} or more"
        )
    return steps


def _draft(asked: Bakeoff) -> SweepSpec:
    """The sweep before anything is measured: its text and rows, without a budget."""
    size = expected_vocabulary(spec_of(asked, asked.vocab_size, 1)).vocab_size
    return spec_of(asked, size, 1).override(budget=None)


def _no_rate(run: object) -> float:
    raise AssertionError("without a budget nothing is asked for a rate")


def _check_enough(asked: Bakeoff, corpus: Corpus, jobs: Sequence[Job]) -> None:
    """Raises DataError for text too small to train on or to score."""
    stride = jobs[0].identity["evaluate"]["stride"]
    shortest = (FEWEST + 2) * stride
    fit = sum(len(document) > shortest for document in corpus.held_out)
    if fit < LEAST_DOCUMENTS:
        raise DataError(
            f"{asked.source} is too little text to score: {fit} of its held-out documents are longer than {shortest} tokens, and "
            f"{LEAST_DOCUMENTS} at least are needed; give more documents, or a larger --valid-fraction"
        )
    step = max(tokens_per_step(run) for job in jobs for run in (job.run, job.autoencoder) if run is not None)
    if corpus.shards.tokens < step:
        raise DataError(
            f"{asked.source} is too little text to train on: {corpus.shards.tokens:,} tokens, and one step reads {step:,}"
        )


def _say_plan(asked: Bakeoff, jobs: Sequence[Job], rate: Rate, say: Say) -> None:
    for job in jobs[: len(asked.arms)]:
        plan = planned(job, rate)
        encoder = f" after {plan.autoencoder_steps:,} of its autoencoder in {plan.autoencoder_seconds:.0f} s"
        say(
            f"{job.row.name}: {plan.steps:,} steps of {plan.tokens_per_step:,} tokens in {plan.seconds:.0f} s"
            + (encoder if plan.autoencoder_steps else "")
        )


def _speeds(out: Path, jobs: Sequence[Job], corpus: Corpus, device: torch.device, say: Say) -> dict[str, Any]:
    """Of the first seed's models, all in turn; measured once for the arms that there are."""
    first = [
        job
        for job in jobs
        if job.seed == jobs[0].seed and read_json(out / job.folder / RESULT, "result")["failed"] is None
    ]
    arms = [job.row.name for job in first]
    path = out / SPEEDS
    if path.is_file() and set(arms) <= (kept := read_json(path, "speeds")).keys():
        return {arm: kept[arm] for arm in arms}
    if not first:
        return {}
    say("speed of generation, all arms in turn")
    models = {job.row.name: load_model(out / job.folder, device) for job in first}
    found = measure_speeds(models, corpus.held_out, corpus.tokenizer, first[0].run.data.context_tokens)
    write_json(path, found)
    return found
