"""`nextvec sweep`: rows of settings at an equal budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nextvec.cli import app

if TYPE_CHECKING:
    from nextvec.sweep.plan import Job
    from nextvec.sweep.spec import SweepSpec

FOLDER = Path("runs/sweeps")


@app.command()
def sweep(
    specs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SPEC]...", help="Spec files, names of shipped ones, or a set: small, paper."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the sweep; of several, the folder of their folders. Default: runs/sweeps/NAME.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Only rows of this name (* and ? allowed); repeatable.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed of the spec's; repeatable.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print rows, steps and machine time; run nothing.")
    ] = False,
    rate: Annotated[
        float | None,
        typer.Option(min=1, help="With --dry-run: plan for a machine of so many operations a second, not this one."),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Print the shipped specs.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Run a grid or list of settings times seeds at an equal budget; what is done is skipped, what was cut off goes on.

    Start the same command again, in as many processes as the machine carries: each takes rows that nobody else works at.
    """
    import shlex

    from nextvec.errors import ConfigError
    from nextvec.sweep.spec import named, read_spec, shipped

    if show:
        for name in shipped():
            spec = read_spec(name)
            print(f"{name:<26}{len(spec.points()):>3} rows x {len(spec.seeds)} seeds  {spec.about}")
        return
    if not specs:
        raise ConfigError("sweep needs a SPEC: a file, or a name that `nextvec sweep --list` prints")
    found = [read_spec(name) for name in named(specs)]
    folders = [out if out is not None and len(found) == 1 else (out or FOLDER) / spec.name for spec in found]
    wanted = _wanted(found, only or [], seed or [])
    if dry_run:
        from nextvec.hardware import choose_device

        _dry_run(found, folders, wanted, choose_device(device).type, rate)
        return
    if rate is not None:
        raise ConfigError("--rate plans, and only --dry-run does that: leave it out")
    from nextvec.sweep.run import run_sweep

    for source, spec, folder in zip(named(specs), found, folders, strict=True):
        command = [
            "nextvec",
            "sweep",
            source,
            "--out",
            str(folder),
            *(["--device", device] if device != "auto" else []),
            *(part for each in only or [] for part in ("--only", each)),
            *(part for each in seed or [] for part in ("--seed", str(each))),
        ]
        done = run_sweep(spec, folder, only=wanted, device=device, command=shlex.join(command))
        busy = f", {done.busy} in the hands of another process" if done.busy else ""
        print(f"{folder}: {done.finished} rows finished now, {done.skipped} before{busy}")
        print(f"Tables: nextvec report {shlex.quote(str(folder))}")


def _wanted(specs: list[SweepSpec], only: list[str], seeds: list[int]) -> Callable[[Job], bool]:
    """A test for jobs. Raises ConfigError for a pattern or seed that no row has."""
    from fnmatch import fnmatchcase

    from nextvec.errors import ConfigError
    from nextvec.settings import unknown_name

    names = [row.name for spec in specs for row in spec.points()]
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"--only: {unknown_name('row', pattern, names)}")
    for seed in seeds:
        if not any(seed in spec.seeds for spec in specs):
            raise ConfigError(f"--seed {seed} is none of the spec's seeds: {', '.join(map(str, specs[0].seeds))}")

    def test(job: Job) -> bool:
        named = not only or any(fnmatchcase(job.row.name, pattern) for pattern in only)
        return named and (not seeds or job.seed in seeds)

    return test


def _dry_run(
    specs: list[SweepSpec], folders: list[Path], wanted: Callable[[Job], bool], device: str, rate: float | None
) -> None:
    """Rows, steps and machine time, finished rows marked; nothing is written."""
    import torch

    from nextvec.report.words import count, duration
    from nextvec.sweep.estimate import Rates, busy, estimate
    from nextvec.sweep.folder import RATES, RESULT, check_folder
    from nextvec.sweep.plan import assumed_vocabulary, make_jobs, tokens_per_step

    total = longest = 0.0
    rows = finished = 0
    for spec, folder in zip(specs, folders, strict=True):
        check_folder(folder)
        rates = Rates(folder / RATES, torch.device(device), keep=False, flops=rate)
        vocabulary, note = assumed_vocabulary(spec)
        jobs = [job for job in make_jobs(spec, rates, vocabulary) if wanted(job)]
        found, encoders = estimate(spec, jobs, rates)
        print(f"{spec.name}: {spec.about}" + (f" ({note})" if note else ""))
        for item in found:
            if item.job.seed == found[0].job.seed:
                run = item.job.run
                tokens = count(run.train.steps * tokens_per_step(run))
                print(
                    f"  {item.job.row.stage:<12}{item.job.row.name:<34}{run.train.steps:>8,} steps {tokens:>7} tokens  "
                    f"{duration(item.total):>12} {item.how}"
                )
        done = [item for item in found if (folder / item.job.folder / RESULT).is_file()]
        left = sum(item.total for item in found if item not in done)
        left += sum(
            seconds for name, seconds in encoders.items() if not (folder / name / "reconstruction.json").is_file()
        )
        all_of = sum(item.total for item in found) + sum(encoders.values())
        seeds = len({job.seed for job in jobs})
        print(
            f"  {len(found)} rows ({seeds} seeds), {len(encoders)} autoencoders: {duration(all_of)}"
            + (f", of which {duration(left)} are left ({len(done)} rows are finished)" if done else "")
        )
        total, rows, finished = total + left, rows + len(found), finished + len(done)
        longest = max([longest, *(item.total for item in found), *encoders.values()])
    if device == "cpu" and rate is None and busy():
        print("The machine is busy: times are those of an idle one, from the processor time of a step.")
    where = f"on {device}" if rate is None else f"at {rate:.3g} operations a second"
    print(
        f"{rows - finished} rows to run: {duration(total)} of machine time {where}, the longest piece {duration(longest)}"
    )
