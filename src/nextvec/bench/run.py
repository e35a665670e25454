"""Runs a benchmark: interleaved repeats of each arm, the machine's limits between them, breakdown, memory; one JSON object."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nextvec import __version__
from nextvec.bench import memory, parts, sampling
from nextvec.bench.limits import Stopwatch, collect, square_rates
from nextvec.bench.settings import training_config
from nextvec.bench.steps import SYNTHETIC, Arm, TrainStep, Work, write_text
from nextvec.bench.work import Spec, make_work
from nextvec.config import CalmConfig, EnergyHeadConfig
from nextvec.errors import ConfigError
from nextvec.hardware import Precision, choose_device, choose_precision, environment, memory_rate, synchronize
from nextvec.rundir import read_config

FORMAT = 1
PLAIN = "plain_"  # before the name of an arm: the same by the plain path
TEXT_WINDOWS = 256  # windows of synthetic text, so that no cache holds it all
BREAKDOWNS = 5  # calls of each arm that are broken down
MOST_CALLS = 1000  # of one arm in one repeat
DEFINITIONS = {
    "tokens_per_s": "tokens of text through whole steps per second, median over the repeats; plain_tokens_per_s likewise",
    "ratio": "tokens_per_s / plain_tokens_per_s",
    "share_of_limit": "sum over the step's own matrix products, forward and backward, of the time that each takes alone at "
    "its shape, dtype and layout, warm, divided by the time of the step (medians over the repeats)",
    "flops_per_s": "operations of these products, a multiply-add counted as 2, per second of the step",
    "peak_bytes": memory.MEANING,
    "breakdown": parts.MEANING,
    "pools": "of generation below temperature 1, untimed: draws that are unique in their pool's tokens, pools of one patch alone",
    "ratios": "of generation: of each temperature, tokens_per_s against the plain arm's",
    "load_average": "processes that wanted to run, averaged over the last minute: at the start, and after the timed repeats",
}


@dataclass(frozen=True)
class Settings:
    """What the command line chooses. Raises ConfigError for values out of range."""

    device: str = "auto"
    precision: str = "auto"
    plain: bool = True
    repeats: int = 7
    seconds: float = 30.0  # of timed work, over all arms and repeats

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ConfigError(f"repeats must be at least 1; got {self.repeats}")
        if not 0 < self.seconds < math.inf:
            raise ConfigError(f"seconds must be above 0; got {self.seconds}")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ConfigError(f"precision must be one of auto, bf16, fp32; got {self.precision!r}")


Say = Callable[[str], None]


def bench_training(what: str, source: str, overrides: Sequence[str], settings: Settings, say: Say) -> dict[str, Any]:
    """Speed of the training step of a CALM (`train`), an `autoencoder` or the token `baseline`, against the plain step."""
    config = training_config(what, source, list(overrides))
    device = choose_device(settings.device)
    wanted = settings.precision if settings.precision != "auto" else config.train.precision
    precision = _precision(wanted, device)
    with TemporaryDirectory() as folder:
        tokens = TEXT_WINDOWS * config.data.context_tokens
        write_text(Path(folder), config.model.vocab_size, tokens)
        arms = ["ours", "plain"] if settings.plain else ["ours"]
        specs = {
            arm: Spec.parse(
                {
                    "kind": "training", "arm": arm, "config": config.model_dump(mode="json"), "text": folder,
                    "device": str(device), "precision": precision, "threads": torch.get_num_threads(),
                }
            )
            for arm in arms
        }  # fmt: skip
        found = _measure(specs, settings, say)
    ours, plain = found["ours"], found.get("plain")
    return {
        **_figures(ours, plain),
        **_header(what, device, precision, config.train.seed),
        "config": config.model_dump(mode="json"),
        "text": SYNTHETIC,
        "arms": found,
    }


def bench_generate(
    run: Path, prompt: str, candidates: int, tokens: int, settings: Settings, say: Say
) -> dict[str, Any]:
    """Generation by a trained run at batch 1: T = 0.5 with N candidates (the figures at the top), and T = 1.

    A CALM's with the energy head also by the authors' algorithm, in the same dtype.
    """
    device = choose_device(settings.device)
    precision = _precision("fp32" if settings.precision == "auto" else settings.precision, device)
    model = read_config(run).model
    plain = settings.plain and isinstance(model, CalmConfig) and isinstance(model.head, EnergyHeadConfig)
    arms: list[Arm] = ["ours", "plain"] if plain else ["ours"]
    specs = {
        (PLAIN if arm == "plain" else "") + name: Spec(
            kind="generate", arm=arm, run=str(run), prompt=prompt, temperature=temperature, candidates=candidates,
            tokens=tokens, device=str(device), precision=precision, threads=torch.get_num_threads(),
        )
        for name, temperature in (("t05", 0.5), ("t1", 1.0))
        for arm in arms
    }  # fmt: skip
    return _bench_run(run, "generate", specs, device, precision, settings, say)


def bench_evaluate(
    run: Path, text: str | None, draws: int, tokens: int, settings: Settings, say: Say
) -> dict[str, Any]:
    """BrierLM of a trained run on held-out text through the evaluator of `nextvec eval`."""
    device = choose_device(settings.device)
    precision = _precision("fp32" if settings.precision == "auto" else settings.precision, device)
    spec = Spec(
        kind="evaluate", run=str(run), text=text, tokens=tokens, draws=draws,
        device=str(device), precision=precision, threads=torch.get_num_threads(),
    )  # fmt: skip
    return _bench_run(run, "evaluate", {"evaluate": spec}, device, precision, settings, say)


def _bench_run(
    run: Path,
    what: str,
    specs: Mapping[str, Spec],
    device: torch.device,
    precision: Precision,
    settings: Settings,
    say: Say,
) -> dict[str, Any]:
    found = _measure(specs, settings, say)
    first = next(iter(found))
    config = read_config(run)
    ratios = {name: _ratios(found[name], found[PLAIN + name]) for name in found if PLAIN + name in found}
    return {
        **_figures(found[first], found.get(PLAIN + first)),
        "ratios": ratios,
        **_header(what, device, precision, 0),
        "run": str(run),
        "training_tokens": sampling.training_tokens(run),
        "config": config.model_dump(mode="json"),
        "arms": found,
    }


def _measure(specs: Mapping[str, Spec], settings: Settings, say: Say) -> dict[str, dict[str, Any]]:
    """Everything that is measured of each arm."""
    load = [_load()]
    device = torch.device(next(iter(specs.values())).device)
    works = {name: make_work(spec) for name, spec in specs.items()}  # first, so that a user's mistake is told at once
    say("peak memory, each arm in a process of its own")
    peaks = {name: memory.peak_bytes(spec) for name, spec in specs.items()}
    say("matrix products of each arm")
    for work in works.values():
        work.warm()
    products = {name: collect(work) for name, work in works.items()}
    watch = Stopwatch(dict.fromkeys(product for counts in products.values() for product in counts), device)
    for work in works.values():
        if isinstance(work, TrainStep):
            work.compile(say)
    say(f"{settings.repeats} repeats of {', '.join(works)}")
    times = interleave(works, settings.repeats, settings.seconds, device, watch.read)
    load.append(_load())
    say("breakdown")
    found: dict[str, dict[str, Any]] = {}
    for name, work in works.items():
        middle = median(times[name])
        table = watch.table(products[name])
        flops = sum(row["flops_per_s"] * row["seconds"] for row in table)
        found[name] = {
            "tokens_per_s": spread([work.tokens / seconds for seconds in times[name]]),
            "tokens": work.tokens,
            "seconds": spread(times[name]),
            "peak_bytes": peaks[name],
            "share_of_limit": watch.limit(products[name]) / middle,
            "flops": flops,
            "flops_per_s": flops / middle,
            "breakdown": parts.breakdown(work, parts.places_of(work), device, min(BREAKDOWNS, settings.repeats)),
            "load_average": load,
            "products": table,
        }
        if isinstance(work, sampling.Evaluation):
            found[name]["context_tokens"] = work.context_tokens
        if isinstance(work, sampling.Generation) and not isinstance(work, sampling.PlainGeneration):
            found[name]["pools"] = work.pools()
    return found


def interleave(
    works: Mapping[str, Work], repeats: int, seconds: float, device: torch.device, between: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds per call of each work in each repeat: a, b, a, b, .. with `between` after each round.

    Each burst is as many calls as make up its share of `seconds`, at least one. Two calls before are warm-up.
    """
    calls: dict[str, int] = {}
    for name, work in works.items():
        _time(work, 1, device)
        once = _time(work, 1, device)
        calls[name] = max(1, min(MOST_CALLS, round(seconds / (repeats * len(works)) / once)))
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(_time(work, calls[name], device))
        between()
    return times


def median(values: Sequence[float]) -> float:
    """The middle value; of an even number, the mean of the two in the middle."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Smallest, middle and largest of the repeats, and all of them in order."""
    return {**_ends(values), "repeats": list(values)}


def _time(work: Work, calls: int, device: torch.device) -> float:
    """Seconds per call."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return (time.perf_counter() - begin) / calls


def _figures(ours: dict[str, Any], plain: dict[str, Any] | None) -> dict[str, Any]:
    """The figures that every benchmark carries; those of the plain arm are null without one."""
    rate = ours["tokens_per_s"]["median"]
    other = None if plain is None else plain["tokens_per_s"]["median"]
    return {
        "tokens_per_s": rate,
        "plain_tokens_per_s": other,
        "ratio": None if other is None else rate / other,
        "share_of_limit": ours["share_of_limit"],
        "flops_per_s": ours["flops_per_s"],
        "peak_bytes": ours["peak_bytes"],
        "plain_peak_bytes": None if plain is None else plain["peak_bytes"],
        "breakdown": ours["breakdown"],
        "repeats": {
            "count": len(ours["tokens_per_s"]["repeats"]),
            "tokens_per_s": _ends(ours["tokens_per_s"]["repeats"]),
            "plain_tokens_per_s": None if plain is None else _ends(plain["tokens_per_s"]["repeats"]),
            "ratio": None if plain is None else _ends(pair_ratios(ours, plain)),
        },
    }


def _ratios(ours: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """Of the medians, and the ends of the single repeats'."""
    ratio = ours["tokens_per_s"]["median"] / plain["tokens_per_s"]["median"]
    return {**_ends(pair_ratios(ours, plain)), "median": ratio}


def pair_ratios(ours: dict[str, Any], plain: dict[str, Any]) -> list[float]:
    """Of each repeat, ours against the plain burst right after it."""
    pairs = zip(ours["tokens_per_s"]["repeats"], plain["tokens_per_s"]["repeats"], strict=True)
    return [mine / other for mine, other in pairs]


def _ends(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}


def _header(what: str, device: torch.device, precision: Precision, seed: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "bench": what,
        "nextvec": __version__,
        "commit": _commit(),
        "device": str(device),
        "precision": precision,
        "seed": seed,
        "limits": {"matmul": square_rates(device), "memory_bytes_per_s": memory_rate(device)},
        "machine": environment().to_dict(),
        "definitions": DEFINITIONS,
    }


def _precision(wanted: str, device: torch.device) -> Precision:
    if wanted == "auto":
        return choose_precision(device)[0]
    return "bf16" if wanted == "bf16" else "fp32"


def _load() -> float | None:
    """See DEFINITIONS; None where the system does not say."""
    return None if platform.system() == "Windows" else os.getloadavg()[0]


def _commit() -> str | None:
    """The commit of the sources, marked when they were edited; None outside a checkout."""
    folder = ["git", "-C", str(Path(__file__).parent)]
    try:
        known = subprocess.run([*folder, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True)
        if known.returncode:
            return None  # installed, perhaps inside somebody else's repository
        words = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        done = subprocess.run([*folder, *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
