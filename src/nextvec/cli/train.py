"""`nextvec train autoencoder|lm|baseline`: shards to a run directory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nextvec.cli import app
from nextvec.train import VERBS

if TYPE_CHECKING:
    from nextvec.model.autoencoder import Autoencoder

train_app = typer.Typer(
    help="Train an autoencoder, a CALM language model, or the token baseline.", no_args_is_help=True
)
app.add_typer(train_app, name="train")

Out = Annotated[Path, typer.Option(metavar="RUN", help="Run directory to write.")]
DataPath = Annotated[
    Path | None, typer.Option("--data", metavar="SHARDS", help="What `nextvec prepare` wrote, or one shard directory.")
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE|NAME",
        help="Settings as YAML, or the name of a shipped file (paper/calm-m); with --resume the run's own by default.",
    ),
]
Valid = Annotated[
    Path | None, typer.Option(metavar="SHARDS", help="Held-out shards; default: valid/ beside the training shards.")
]
From = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="RUN|CHECKPOINT",
        help="Begin with the weights and settings of a run (unfinished: of its newest checkpoint), or of RUN/checkpoints/step-N.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in RUN.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Write RUN/tensorboard as well (extra `tensorboard`).")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Single settings, for instance optim.lr=1e-3.")
]


@train_app.command("autoencoder")
def train_autoencoder(
    out: Out,
    overrides: Overrides = None,
    data: DataPath = None,
    config: ConfigFile = None,
    valid: Valid = None,
    source: From = None,
    resume: Resume = False,
    device: Device = "auto",
    tensorboard: TensorBoard = False,
) -> None:
    """Train the patch autoencoder (stage 1)."""
    _train("autoencoder", out, overrides or [], data, config, valid, resume, device, tensorboard, None, source)


@train_app.command("lm")
def train_lm(
    out: Out,
    autoencoder: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Run of the trained autoencoder, or a CALM run that holds one. With --from: its own; with the autoregressive "
            "head: none; with --resume: the run's own.",
        ),
    ] = None,
    overrides: Overrides = None,
    data: DataPath = None,
    config: ConfigFile = None,
    valid: Valid = None,
    source: From = None,
    resume: Resume = False,
    device: Device = "auto",
    tensorboard: TensorBoard = False,
) -> None:
    """Train a CALM language model on a trained autoencoder (stage 2)."""
    _train("lm", out, overrides or [], data, config, valid, resume, device, tensorboard, autoencoder, source)


@train_app.command("baseline")
def train_baseline(
    out: Out,
    overrides: Overrides = None,
    data: DataPath = None,
    config: ConfigFile = None,
    valid: Valid = None,
    source: From = None,
    resume: Resume = False,
    device: Device = "auto",
    tensorboard: TensorBoard = False,
) -> None:
    """Train the token-Transformer baseline."""
    _train("baseline", out, overrides or [], data, config, valid, resume, device, tensorboard, None, source)


def _train(verb: str, out: Path, *asked: Any) -> None:
    """`_train_once`, with its arguments; what a launcher's first attempt was refused, its others are as well."""
    from nextvec.train.launch import refused_once

    with refused_once(out):
        _train_once(verb, out, *asked)


def _train_once(
    verb: str,
    out: Path,
    overrides: list[str],
    data: Path | None,
    config_file: Path | None,
    valid: Path | None,
    resume: bool,
    device: str,
    tensorboard: bool,
    autoencoder_run: Path | None,
    source: Path | None,
) -> None:
    import shlex

    from nextvec.config import apply_overrides
    from nextvec.errors import ConfigError
    from nextvec.model.calm import Calm
    from nextvec.rundir import load_autoencoder, read_config
    from nextvec.text.shards import TokenShards
    from nextvec.train.checkpoint import begun
    from nextvec.train.data import data_folders
    from nextvec.train.launch import goes_on
    from nextvec.train.loop import check_out, train
    from nextvec.train.objectives import build_objective
    from nextvec.train.progress import duration, terms
    from nextvec.train.settings import complete_run
    from nextvec.train.start import begin_with, holder, load_start, settings_from
    from nextvec.train.world import rank

    resume = resume or goes_on(out)  # torchrun gives the same command again
    if rank() == 0:
        check_out(out, resume)
    settings = _settings(VERBS[verb], out, config_file, resume)
    kept = _kept(out, autoencoder_run) if resume and verb == "lm" else None
    autoencoder_run = autoencoder_run if kept is None else None
    if resume and begun(out) and (kept is not None or autoencoder_run is not None or verb != "lm"):
        if source is not None:  # all that it gave is in `out` by now, and it may be gone
            own = read_config(out)
            settings = settings_from(getattr(own, "start", None) or source, own, settings)
        source = None
    elif resume and source is None and settings.get("start"):
        source = Path(settings["start"])  # nothing of it is in a checkpoint yet
    own_autoencoder = kept is None and autoencoder_run is None
    start = load_start(source, needs_autoencoder=own_autoencoder) if source is not None else None
    if start is not None:
        settings = settings_from(start.path, start.config, settings)
    if data is not None:
        settings = {**settings, "data": {**(settings.get("data") or {}), "path": str(data)}}
    settings = apply_overrides(settings, overrides)
    if settings["kind"] != VERBS[verb]:
        raise ConfigError(f"nextvec train {verb} trains the kind {VERBS[verb]!r}: leave kind={settings['kind']} out")
    shards = TokenShards.open(data_folders(_first_corpus(settings))[0])
    settings["data"] = {"packing": shards.manifest.packing, **settings["data"]}  # a run says how its text was laid out
    if start is not None:
        shards.check_tokenizer(start.text_tokenizer, holder(start.path))
    autoencoder: Autoencoder | None = (
        start.model.autoencoder if start is not None and isinstance(start.model, Calm) else None
    )
    autoencoder = kept or autoencoder
    if autoencoder_run is not None:
        autoencoder, tokenizer = load_autoencoder(autoencoder_run)
        shards.check_tokenizer(tokenizer, autoencoder_run)
    of = autoencoder.config if autoencoder is not None else None
    run = complete_run(settings, shards.tokenizer, of, str(config_file or f"train {verb}"))
    objective = build_objective(run, shards.tokenizer, autoencoder)
    if start is not None:
        begin_with(objective, start, keep_autoencoder=not own_autoencoder)

    options = ["--valid", str(valid)] if valid is not None else []
    options += ["--device", device] if device != "auto" else []
    options += ["--tensorboard"] if tensorboard else []
    result = train(
        run,
        objective,
        out,
        resume=resume,
        device=device,
        valid=valid,
        tensorboard=tensorboard,
        command=shlex.join(["nextvec", "train", verb, "--out", str(out), "--resume", *options]),
    )
    if result.interrupted:
        raise typer.Exit(130)
    if rank() != 0:
        return
    print(f"{out}: {result.step:,} steps, {result.tokens:,} tokens in {duration(result.seconds)} of training")
    if result.evaluation is not None:
        print(f"held out: {terms(result.evaluation)}")


def _kept(out: Path, named: Path | None) -> Autoencoder | None:
    """The autoencoder that the run to go on with keeps, where no other is named, or the one named is gone."""
    from nextvec.train.kept import kept_autoencoder
    from nextvec.train.world import rank

    if named is not None and (named / "config.yaml").is_file():
        return None
    kept = kept_autoencoder(out)
    if kept is not None and named is not None and rank() == 0:
        print(f"{named} is gone: going on with the autoencoder kept in {out}", file=sys.stderr)
    return kept


def _settings(kind: str, out: Path, config_file: Path | None, resume: bool) -> dict[str, Any]:
    """Settings of the file, of the run to resume, or none; for `kind`. Raises ConfigError when they are for another."""
    from nextvec.configs.read import read_settings
    from nextvec.errors import ConfigError

    source = config_file or (out / "config.yaml" if resume else None)
    settings = read_settings(str(source)) if source is not None else {}
    found = settings.get("kind", kind)
    if found != kind:
        verb = next((verb for verb, of in VERBS.items() if of == found), None)
        hint = f"; use: nextvec train {verb}" if verb else ""
        raise ConfigError(f"{source} has kind {found!r}, and this verb trains {kind!r}{hint}")
    return {**settings, "kind": kind}


def _first_corpus(settings: dict[str, Any]) -> str:
    """The first shard directory of the settings. Raises ConfigError where they name none."""
    from nextvec.config import DataSettings
    from nextvec.errors import ConfigError

    data = settings.get("data")
    if not isinstance(data, dict) or not (data.get("path") or data.get("mixture")):
        raise ConfigError("training needs shards: give --data SHARDS, as written by `nextvec prepare`")
    if not data.get("mixture"):
        return str(data["path"])
    return DataSettings.parse(data, "data").mixture[0].path
