"""Corpus and training of the demo. A finished stage is kept when an interrupted demo is started again."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from nextvec.config import RunConfig
from nextvec.demo import settings
from nextvec.demo.settings import Demo
from nextvec.errors import ConfigError, DataError
from nextvec.evaluate.brier import Document
from nextvec.files import read_json, write_json
from nextvec.hardware import choose_device
from nextvec.model.autoencoder import Autoencoder
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.rundir import load_autoencoder
from nextvec.text.prepare import prepare
from nextvec.text.readers import documents, expand
from nextvec.text.shards import TokenShards
from nextvec.text.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from nextvec.train.loop import train
from nextvec.train.objectives import BrierProbe, build_objective

Say = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """Shards to train on, and the held-out documents that everything is scored on."""

    shards: TokenShards
    tokenizer: TextTokenizer
    held_out: Sequence[Document]
    valid: Path


@dataclass(frozen=True)
class Models:
    """The three trained models, in evaluation mode on the demo's device."""

    autoencoder: Autoencoder
    calm: Calm
    baseline: TokenLM


def open_folder(demo: Demo, say: Say) -> None:
    """Make the folder ours: new, or an unfinished demo of the same settings to go on with. An older demo is moved aside."""
    marker = demo.out / "demo.json"
    wanted = {name: value for name, value in asdict(demo).items() if name not in ("out", "device")}
    if marker.is_file():
        same = read_json(marker, "demo settings") == wanted
        if same and not (demo.out / "report.html").is_file():
            return
        number = 1
        while (aside := demo.out.with_name(f"{demo.out.name}-{number}")).exists():
            number += 1
        demo.out.rename(aside)
        say(f"The demo that was in {demo.out} is now in {aside}")
    elif demo.out.exists() and (not demo.out.is_dir() or any(demo.out.iterdir())):
        raise ConfigError(f"{demo.out} holds something that is not a demo; give another folder with --out")
    write_json(marker, wanted)


def demo_command(demo: Demo) -> str:
    """The command line that goes on with this demo."""
    options = {"minutes": f"{demo.minutes:g}", "out": str(demo.out), "seed": str(demo.seed)}
    options |= {"recipe": demo.recipe, "device": demo.device}
    return shlex.join(["nextvec", "demo", *(part for name, value in options.items() for part in (f"--{name}", value))])


def corpus(demo: Demo, say: Say) -> Corpus:
    """The standard library of this interpreter as shards; of each held-out file the first tokens."""
    data = demo.out / "data"
    if (data / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(data)
    else:
        say(f"Training a tokenizer of {settings.VOCABULARY:,} tokens on the Python standard library")
        texts = documents(expand(["python-stdlib"]), "text", _refuse)
        tokenizer = train_tokenizer(texts, settings.VOCABULARY)
        tokenizer.save(data)
    prepared = prepare(["python-stdlib"], tokenizer, data / "shards", valid_fraction=settings.VALID_FRACTION)
    say(str(prepared))
    assert prepared.valid is not None
    valid = TokenShards.open(prepared.valid)
    held_out = [valid.document(index)[: demo.scored_length] for index in range(valid.documents)]
    return Corpus(TokenShards.open(prepared.train), tokenizer, held_out, prepared.valid)


def train_all(demo: Demo, corpus: Corpus, began: float, say: Say) -> Models:
    """Train what is not trained yet, each for its share of the time since `began` (time.monotonic)."""
    device = choose_device(demo.device)
    data, tokenizer = str(corpus.shards.path), corpus.tokenizer

    def stage(name: str, config: RunConfig, autoencoder: Autoencoder | None, brier: BrierProbe | None) -> None:
        out = demo.out / name
        if (out / "model.safetensors").is_file():
            say(f"{out} is finished")
            return
        seconds = demo.seconds_for(name, time.monotonic() - began)
        say(f"Training {name}: at most {seconds:.0f} s")
        result = train(
            config,
            build_objective(config, tokenizer, autoencoder, brier),
            out,
            resume=(out / "config.yaml").is_file(),
            device=demo.device,
            eval_batches=2,
            time_budget=seconds,
            valid=corpus.valid,
            command=demo_command(demo),
        )
        if result.interrupted:
            raise KeyboardInterrupt
        say(f"{out}: {result.step:,} steps, {result.tokens:,} tokens, {result.tokens / result.seconds:,.0f} tokens/s")

    stage(
        "autoencoder",
        settings.autoencoder_run(demo, data, tokenizer),
        None,
        None,
    )
    autoencoder = load_autoencoder(demo.out / "autoencoder")[0]
    probed = [document[: settings.PROBED_LENGTH] for document in corpus.held_out]
    probe = BrierProbe(probed, settings.SCORED_CONTEXT, autoencoder.config.patch_size, draws=2, seed=demo.seed)
    stage("calm", settings.calm_run(demo, data, tokenizer, autoencoder.config), autoencoder, probe)
    stage("baseline", settings.baseline_run(demo, data, tokenizer), None, probe)
    calm = Calm.from_pretrained(demo.out / "calm", device)
    return Models(calm.autoencoder, calm, TokenLM.from_pretrained(demo.out / "baseline", device))


def _refuse(message: str) -> NoReturn:
    raise DataError(message)
