"""`nextvec show`: what a model makes of a text, the picture that explains the method."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nextvec.cli import app

if TYPE_CHECKING:
    from nextvec.sampling.explain import LatentPatch, Vote
    from nextvec.text.tokenizer import Tokenizer


@app.command()
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory of a CALM or an autoencoder.")],
    text: Annotated[str, typer.Option(help="The text to look at.")],
    temperature: Annotated[float, typer.Option(help="In (0, 1], of the choice among candidates.")] = 0.5,
    candidates: Annotated[int, typer.Option(help="Draws of the next patch.")] = 200,
    top: Annotated[int, typer.Option(help="Candidates to print.")] = 8,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed draws the same candidates.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Print a text's patches, the sigma of their latents, what they decode back to, and the vote on the next patch."""
    from nextvec.config import TokenLMConfig
    from nextvec.errors import ConfigError
    from nextvec.hardware import choose_device
    from nextvec.model.calm import Calm
    from nextvec.model.token_lm import TokenLM
    from nextvec.rundir import load_run, read_config
    from nextvec.sampling.explain import latent_patches, next_patch
    from nextvec.sampling.temperature import check_pool

    check_pool(temperature, candidates)
    if top < 1:
        raise ConfigError(f"top must be at least 1; got {top}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError("the text must be valid Unicode; it holds bytes that are not UTF-8: encode it as UTF-8")
    if isinstance(read_config(run).model, TokenLMConfig):
        raise ConfigError(f"{run} is a token baseline, which has no latents: give the run of a calm or an autoencoder")
    loaded = load_run(run, choose_device(device))
    model, tokenizer = loaded.model, loaded.text_tokenizer
    assert not isinstance(model, TokenLM)
    ids = tokenizer.encode(text)
    autoencoder = model.autoencoder if isinstance(model, Calm) else model
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    for line in _patch_lines(latent_patches(autoencoder, ids), tokenizer):
        print(line)
    size = autoencoder.config.patch_size
    rest = ids[len(ids) // size * size :]
    if rest:
        print(f"{'rest':>5}  {_quote(tokenizer.decode(rest))}: {len(rest)} of the {size} tokens of the next patch")
    if isinstance(model, Calm):
        vote = next_patch(model, ids, temperature, candidates, seed, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        for line in _vote_lines(vote, tokenizer, rest, top, temperature):
            print(line)
        if model.by_token:
            print("generate draws this model token by token; this is the vote of its --method pool")


def _patch_lines(patches: Sequence[LatentPatch], tokenizer: Tokenizer) -> Iterator[str]:
    if not patches:
        return
    texts = [_quote(tokenizer.decode(patch.ids)) for patch in patches]
    width = max(map(len, (*texts, "patch")))
    yield f"{'':>5}  {'patch':<{width}}  sigma  decodes to"
    for number, (text, patch) in enumerate(zip(texts, patches, strict=True), 1):
        same = patch.ids == patch.decoded
        back = "the same" if same else _quote(tokenizer.decode(patch.decoded))
        yield f"{number:>5}  {text:<{width}}  {patch.sigma:5.3f}  {back}"
    right = sum(a == b for patch in patches for a, b in zip(patch.ids, patch.decoded, strict=True))
    total = sum(len(patch.ids) for patch in patches)
    yield f"{right} of {total} tokens come back from the mean of their latent"


def _vote_lines(vote: Vote, tokenizer: Tokenizer, rest: Sequence[int], top: int, temperature: float) -> Iterator[str]:
    words = f"next patch: {vote.draws} draws"
    if rest and vote.matched == len(rest):
        words += f", {vote.kept} of them begin with the rest"
    elif rest:
        words += " after the text with pads on its left, since no draw begins with the rest"
    yield f"{words}, {len(vote.candidates)} different"
    yield f"{'votes':>5}  {'chosen':>6}  at T = {temperature:g}"
    for candidate in vote.candidates[:top]:
        yield f"{candidate.votes:>5}  {candidate.probability:>6.1%}  {_quote(tokenizer.decode(candidate.ids))}"
    others = vote.candidates[top:]
    if others:
        chance = sum(each.probability for each in others)
        yield f"{sum(each.votes for each in others):>5}  {chance:>6.1%}  {len(others)} others"


def _quote(text: str) -> str:
    """On one line, with its ends to be seen."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return f"│{shown}│"
