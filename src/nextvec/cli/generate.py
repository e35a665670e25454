"""`nextvec generate`: continue prompts with a trained run."""

from __future__ import annotations

import io
import json as json_format
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from nextvec.cli import app
from nextvec.cli.shared import Solver, Steps, change_solver

if TYPE_CHECKING:
    from nextvec.sampling.generate import Piece
    from nextvec.text.tokenizer import Tokenizer

BOUNDARY = "│"  # drawn between patches by --show-patches
STANDARD = "-"  # in the place of a file: standard input or output


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of a CALM or a token baseline.")],
    prompt: Annotated[str, typer.Option(help="Text to continue, of any length; empty starts a document.")] = "",
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE|-", help="Prompts, one per line; of .jsonl the field prompt; - is standard input."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Texts per prompt.")] = 1,
    jsonl: Annotated[
        str | None, typer.Option(metavar="OUT|-", help="Write one JSON object per text here instead of printing.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="In (0, 1]; 1 is the model's own law; 0 the likeliest token, by method token.")
    ] = 0.5,
    candidates: Annotated[
        int | None, typer.Option(help="Draws in the pool of each patch (below T = 1): 200; latents of a centre: 8.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="token: sharpen the law of each token (mixture and autoregressive heads); pool: choose among --candidates "
            "draws; centre: decode the mean of so many latents; auto: token where it can be and no --candidates are given."
        ),
    ] = "auto",
    top_k: Annotated[int | None, typer.Option(help="Method token: only the k most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Method token: only the most likely tokens of this probability together.")
    ] = None,
    presence_penalty: Annotated[
        float, typer.Option(help="Method token: off the logit of a token that the text drawn so far has; -2 to 2.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="Method token: off its logit for each time that the text has it; -2 to 2.")
    ] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Tokens to draw at most.")] = 256,
    stop: Annotated[
        list[str] | None, typer.Option(help="End a text before this string; give it again for more strings.")
    ] = None,
    solver: Solver = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same text.")] = 0,
    slide: Annotated[
        bool, typer.Option("--slide", help="Let the window slide over text beyond the context of training.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same text in any company, also in bf16; slower for many.")
    ] = False,
    show_patches: Annotated[bool, typer.Option("--show-patches", help=f"Draw {BOUNDARY} between patches.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Speed, draws and agreement, on standard error.")] = False,
    precision: Annotated[str, typer.Option(help="fp32 or bf16, the numbers in which the model runs.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Print a prompt and its continuation, patch by patch as it is drawn; or the texts of many prompts as they end."""
    from nextvec.config import AutoencoderConfig
    from nextvec.errors import ConfigError
    from nextvec.hardware import DTYPES, choose_device, slow_precision
    from nextvec.model.calm import Calm
    from nextvec.model.token_lm import TokenLM
    from nextvec.rundir import load_run, read_config
    from nextvec.sampling.draw import abilities_of
    from nextvec.sampling.generate import stream_pieces
    from nextvec.sampling.settings import Sampling, check_samples
    from nextvec.sampling.stats import Stats

    # a bad value is told before a large model loads
    known = cast(Any, method)  # `Sampling` refuses another
    penalties = presence_penalty, frequency_penalty
    settings = Sampling(temperature, candidates, max_tokens, seed, top_k, top_p, known, *penalties)
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision must be fp32 or bf16; got {precision!r}")
    check_samples(samples)
    many = prompts is not None or samples > 1 or jsonl is not None
    if many and show_patches:
        raise ConfigError("--show-patches is for one text: leave --prompts, --samples and --jsonl out")
    texts = [prompt] if prompts is None else _read_prompts(prompts, prompt)
    kind = read_config(run).model
    if isinstance(kind, AutoencoderConfig):
        raise ConfigError(
            f"{run} is an autoencoder, which has no next patch to draw: give the run of a calm or token_lm"
        )
    settings = settings.for_model(abilities_of(kind))
    place = choose_device(device)
    if (slow := slow_precision(precision, place)) is not None:
        print(slow, file=sys.stderr)
    with _target(jsonl) as write:
        loaded = load_run(run, place, DTYPES["bf16" if precision == "bf16" else "fp32"])
        change_solver(loaded, solver, steps)
        model = loaded.model
        assert isinstance(model, Calm | TokenLM)
        tokenizer = loaded.text_tokenizer
        clock = Stats()
        pieces = clock.watch(
            stream_pieces(
                model, texts, settings, samples=samples, stop=stop or (), slide=slide, deterministic=deterministic
            )
        )
        longest = max(len(ids) for ids in tokenizer.encode_batch(texts))
        if model.context_tokens is not None and longest + max_tokens > model.context_tokens and not slide:
            print(
                f"prompt and --max-tokens make {longest + max_tokens:,} tokens; the model was trained on "
                f"{model.context_tokens:,}, and beyond them its text may decay: --slide keeps to them",
                file=sys.stderr,
            )
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows ?, it does not end the text
        if many:
            _many(pieces, texts, samples, seed, write)
        else:
            _one(pieces, prompt, tokenizer, model.patch_size, BOUNDARY if show_patches else "")
    if stats:
        print(clock, file=sys.stderr)


def _read_prompts(source: str, prompt: str) -> list[str]:
    """Lines of a file or of standard input. Raises ConfigError or DataError."""
    from nextvec.errors import ConfigError, DataError

    if prompt:
        raise ConfigError("give --prompt or --prompts, not both")
    name = "standard input" if source == STANDARD else source
    try:
        raw = sys.stdin.buffer.read() if source == STANDARD else Path(source).read_bytes()
        lines = [line.rstrip("\r") for line in raw.decode("utf-8").split("\n")]
    except FileNotFoundError:
        raise DataError(f"{name} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name} cannot be read: {error}") from None
    found = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{name} holds no prompts: write one on each line")
    if not source.endswith(".jsonl"):
        return [line for _, line in found]
    return [_field(line, f"{name} line {number}") for number, line in found]


def _field(line: str, where: str) -> str:
    from nextvec.errors import DataError

    try:
        value = json_format.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise DataError(f'{where} must be an object with a text "prompt"')
    return str(value["prompt"])


@contextmanager
def _target(jsonl: str | None) -> Iterator[Callable[[str], None] | None]:
    """Where JSON lines go; a file is written whole or not at all."""
    from nextvec.files import atomic_open, check_target

    if jsonl is None or jsonl == STANDARD:
        yield None if jsonl is None else _print_line
        return
    check_target(Path(jsonl))
    with atomic_open(Path(jsonl)) as handle:
        yield lambda line: print(line, file=handle)


def _print_line(line: str) -> None:
    print(line, flush=True)


def _one(pieces: Iterable[Piece], prompt: str, tokenizer: Tokenizer, patch_size: int, mark: str) -> None:
    """A text as it is drawn, with `mark` between patches."""
    from nextvec.sampling.stream import patch_texts

    ids = tokenizer.encode(prompt)
    shown = patch_texts(tokenizer, ids, patch_size)
    if len(ids) % patch_size == 0:
        shown.append("")  # the prompt ends at a boundary; otherwise its last patch goes on with the first one drawn
    print(mark.join(shown) if mark else prompt, end="", flush=True)
    for number, piece in enumerate(pieces):
        print((mark if number else "") + piece.text, end="", flush=True)
    print()


def _many(
    pieces: Iterable[Piece], prompts: list[str], samples: int, seed: int, write: Callable[[str], None] | None
) -> None:
    """Texts in the order of the prompts, each as soon as it and those before it have ended."""
    texts: dict[int, str] = {}
    tokens: dict[int, int] = {}
    ended: dict[int, str] = {}
    following = 0
    for piece in pieces:
        texts[piece.row] = texts.get(piece.row, "") + piece.text
        tokens[piece.row] = tokens.get(piece.row, 0) + piece.tokens
        if piece.finished is not None:
            ended[piece.row] = piece.finished
        while following in ended:
            index, sample = divmod(following, samples)
            text, count, finish = texts.pop(following), tokens[following], ended[following]
            if write is not None:
                record = {
                    "prompt": prompts[index], "text": text, "finish": finish, "tokens": count,
                    "index": index, "sample": sample, "seed": seed,
                }  # fmt: skip
                write(json_format.dumps(record, ensure_ascii=False))
            else:
                number = f"{index + 1}" if samples == 1 else f"{index + 1}.{sample + 1}"
                print(f"[{number}, {finish}] {prompts[index]}{text}", flush=True)
            following += 1
