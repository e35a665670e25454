"""`nextvec flops`: what a model costs, and the paper's table of costs beside ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nextvec.cli import app

if TYPE_CHECKING:
    from nextvec.evaluate.paper import Row


@app.command()
def flops(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[PRESET|CONFIG|RUN]", help="A preset, a settings file or its shipped name, or a run directory."
        ),
    ] = None,
    table1: Annotated[bool, typer.Option("--table1", help="The paper's six models beside its figures.")] = False,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="CALM: patches drawn and decoded per step; the pool of a low temperature.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Positions attended. Default: that of training; presets 2048.")
    ] = None,
    draws: Annotated[
        int | None, typer.Option(min=1, help="CALM: S in training. Default: the run's; presets 8.")
    ] = None,
    auxiliary: Annotated[
        bool | None,
        typer.Option(
            "--auxiliary/--no-auxiliary", help="CALM: count the cross-entropy of the recipe `fast`. Default: the run's."
        ),
    ] = None,
    tokens: Annotated[
        float | None,
        typer.Option(min=1, help="Tokens of the whole training. Default: the run's; presets: the paper's."),
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="Flow, diffusion and categorical heads: another solver than the settings'.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Flow, diffusion and categorical heads: solver steps per draw.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=1, help="Operations a second, of all devices: say how long the whole training takes at it."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="The same at what this machine's matrix products reach, measured now: the least that one device takes.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
) -> None:
    """Floating-point operations per token of text, part by part, and parameters, counted as the paper counts them."""
    import json

    from nextvec.errors import ConfigError
    from nextvec.evaluate import paper

    given: dict[str, Any] = {
        "candidates": candidates,
        "context": context,
        "draws": draws,
        "auxiliary": auxiliary,
        "tokens": tokens,
    }
    given |= {"solver": solver, "steps": steps}
    settings = {name: value for name, value in given.items() if value is not None}
    if (model is None) is not table1:
        raise ConfigError("flops takes either a preset, settings file or run directory, or --table1 alone")
    if model is None:
        if rate is not None or measure:
            raise ConfigError(f"--{'rate' if rate else 'measure'} is for one model; leave it out of --table1")
        if settings:
            raise ConfigError(f"--table1 has the paper's settings; leave out --{next(iter(settings))}")
        rows = paper.table1()
        print(json.dumps([row.to_dict() for row in rows], indent=2) if as_json else paper.table1_text())
        return
    if rate is not None and measure:
        raise ConfigError("give either --rate, as measured elsewhere, or --measure")
    row = _row(model, settings)
    how = "operations a second"
    if measure:
        rate, how = _measured()
    seconds = None if rate is None else row.train_flops_split / rate
    if as_json:
        timed = {} if seconds is None else {"train_seconds": seconds, "rate": rate}
        print(json.dumps([row.to_dict() | timed], indent=2))
        return
    print(row.cost)
    print(
        f"training on {row.train_tokens:.3g} tokens: {row.train_flops:.4g} operations"
        + (f", {row.train_flops_split:.4g} with the split head" if row.cost.draws else "")
    )
    if seconds is not None:
        print(f"at {rate:.3g} {how}: {'at least ' if measure else ''}{_time(seconds)} of training")
    if row.paper is not None:
        print(
            f"the paper says: {row.paper.params / 1e6:,.0f}M parameters, {row.paper.train_flops:.3g} operations of "
            f"training, {row.paper.inference_flops_per_token:.2g} per token at inference"
        )


def _measured() -> tuple[float, str]:
    """What square products reach on this machine's device, in the precision in which it is faster, and in words."""
    from nextvec.hardware import choose_device, matmul_rates

    device = choose_device("auto")
    rates = matmul_rates(device)
    precision = max(rates, key=lambda name: rates[name])
    return rates[precision], f"operations a second, as measured here ({precision}, one {device.type})"


def _row(model: str, settings: dict[str, Any]) -> Row:
    """The cost of a preset, settings file or run directory; `settings` replace what it says itself."""
    from pathlib import Path

    from nextvec.config import AutoencoderConfig, CalmConfig, CalmRun, ModelRun, RunConfig, parse_any_run
    from nextvec.configs.read import is_settings, read_settings
    from nextvec.errors import ConfigError
    from nextvec.evaluate import paper
    from nextvec.evaluate.cost import cost
    from nextvec.presets import PRESETS, preset
    from nextvec.rundir import read_config
    from nextvec.train.metrics import read_metrics

    run: ModelRun | None = None
    trained: float | None = None
    published = None
    if model in PRESETS:
        config = preset(model)
        published = next((row for row in paper.TABLE if row.preset == model), None)
    elif Path(model).is_dir():
        run = read_config(model)
        trained = next((row["tokens"] for row in reversed(read_metrics(Path(model))) if "tokens" in row), None)
    elif is_settings(model):
        run = parse_any_run(_without_command_line(read_settings(model)), model)
    else:
        hint = "" if Path(model).suffix or "/" in model else f"; presets are {', '.join(PRESETS)}"
        raise ConfigError(f"{model} is no preset, settings file or run directory{hint}")
    known: dict[str, Any] = {}
    if run is not None:
        config = run.model
        if isinstance(run, RunConfig):
            known["context"] = run.data.context_tokens // config.patch_size
            # a run that has begun says how far it came: steps are only the most where a time budget ends it
            known["tokens"] = (
                trained or run.train.steps * run.train.accumulate * run.data.rows * run.data.context_tokens
            )
        if isinstance(run, CalmRun):
            known |= {"draws": run.draws, "auxiliary": run.recipe.name == "fast"}
    if isinstance(config, CalmConfig):
        config = config.with_solver(settings.pop("solver", None), settings.pop("steps", None))
    allowed = {"tokens"}
    if not isinstance(config, AutoencoderConfig):
        allowed.add("context")
    if isinstance(config, CalmConfig):
        allowed |= {"candidates", "draws", "auxiliary"}
    for name in settings:
        if name not in allowed:
            raise ConfigError(f"--{name} does not apply to {model}, which holds no {_owner(name)}; leave it out")
    if isinstance(config, CalmConfig) and config.head.kind == "autoregressive" and "draws" in settings:
        raise ConfigError(
            f"--draws does not apply to {model}, whose autoregressive head learns without draws; leave it out"
        )
    known = {name: value for name, value in {**known, **settings}.items() if name in allowed}
    usual = paper.AUTOENCODER_TOKENS if isinstance(config, AutoencoderConfig) else paper.PAPER_TOKENS
    tokens = float(known.pop("tokens", usual))
    return paper.Row(cost(config, model, **known), tokens, None if settings else published)


def _without_command_line(data: dict[str, Any]) -> dict[str, Any]:
    """Settings with what `nextvec train` gets from its shards and autoencoder, as the paper has it where they do not say."""
    from nextvec.presets import LLAMA3_VOCAB
    from nextvec.settings import layered

    model = data.get("model") or {}
    if "imported" in data or not isinstance(model, dict):
        return data
    brought = {"vocab_size": LLAMA3_VOCAB}
    model = layered({"autoencoder": brought} if data.get("kind") == "calm" else brought, model)
    return layered({"data": {"path": ""}}, {**data, "model": model})


def _time(seconds: float) -> str:
    """Hours, or days from two on."""
    hours = seconds / 3600
    return f"{hours:.3g} hours" if hours < 48 else f"{hours / 24:.3g} days"


def _owner(name: str) -> str:
    return "language model" if name == "context" else "CALM"
