"""What a user chooses about drawing, checked: temperature, pool, length, seed, and cuts of known probabilities."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch

from nextvec.errors import UserError
from nextvec.sampling.temperature import check_pool, check_temperature

Finish = Literal["eos", "length", "stop"]  # the model ended the text, max_tokens was reached, a stop string appeared

# the batch sampler; decode the mean of the candidates' latents (approximate.py); sharpen the law of each token; "auto" is
# "token" for a model that has these laws, unless candidates are asked for, and "pool" for others
Method = Literal["auto", "pool", "centre", "token"]
MOST = {"candidates": 100_000, "max_tokens": 1_000_000}  # all of a pool, and all keys and values, are in memory at once
PENALTIES = ("presence_penalty", "frequency_penalty")
MOST_PENALTY = 2  # OpenAI's range
SAMPLES = 100_000  # texts of one prompt: all wait in memory
CANDIDATES: dict[Method, int] = {"pool": 200, "centre": 8}  # where none are given [P; docs/sampling.md]


class Abilities(NamedTuple):
    """What a model can be drawn by. tokens: it is a token model, whose patch is one token; latents: its head draws latents;
    by_token: the law of each token given those before it is known."""

    tokens: bool
    latents: bool
    by_token: bool


class Law(NamedTuple):
    """What the next patch is drawn by; rows of one law are drawn together."""

    temperature: float
    candidates: int
    top_k: int | None
    top_p: float | None
    method: Method = "pool"  # not "auto"
    presence: float = 0.0
    frequency: float = 0.0

    @property
    def penalised(self) -> bool:
        """It depends on what a row's text has already."""
        return self.presence != 0 or self.frequency != 0

    @property
    def single(self) -> bool:
        """A patch is one draw of the model: there is no pool."""
        return self.method == "token" or (self.temperature == 1 and self.method == "pool")


@dataclass(frozen=True)
class Sampling:
    """How patches are drawn. Raises UserError for values out of range."""

    # in (0, 1]; 1 is the model's own law [P: fluent text needs at most 0.5]; 0, of method token alone: the likeliest token
    temperature: float = 0.5
    candidates: int | None = None  # N, draws in a pool, or latents of a centre; None: CANDIDATES of the method
    max_tokens: int = 256  # new tokens per row at most
    seed: int = 0  # row i draws from a generator seeded by (seed, i)
    top_k: int | None = None  # keep the k most likely tokens; method token alone
    top_p: float | None = None  # keep the fewest most likely tokens that have this probability; likewise
    method: Method = "auto"  # of "centre", an approximation, the `candidates` are the temperature, which is not used
    presence_penalty: float = 0.0  # off the logit of a token that the text drawn so far has; method token alone
    frequency_penalty: float = 0.0  # off it for each time that the text has it (penalties.py); likewise

    def __post_init__(self) -> None:
        if self.temperature != 0:  # whether there is a greedy limit only `for_model` knows
            check_temperature(self.temperature)
        for name in ("candidates", "max_tokens", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1; got {value}")
        for name, most in MOST.items():
            if (given := getattr(self, name)) is not None and given > most:
                raise UserError(f"{name} must be at most {most:,}; got {given:,}: memory holds all at once, take fewer")
        for name in PENALTIES:
            if not -MOST_PENALTY <= (value := getattr(self, name)) <= MOST_PENALTY:
                raise UserError(f"{name} must be from -{MOST_PENALTY} to {MOST_PENALTY}; got {value:g}: 0 is none")
        if self.method not in get_args(Method):
            raise UserError(f"method must be one of {', '.join(get_args(Method))}; got {self.method!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1]; got {self.top_p:g}: 1 keeps every token")

    @property
    def law(self) -> Law:
        """Of settings `for_model`."""
        assert self.method != "auto", "settings are made fit for a model first"
        assert self.candidates is not None
        penalties = self.presence_penalty, self.frequency_penalty
        return Law(self.temperature, self.candidates, self.top_k, self.top_p, self.method, *penalties)

    def for_model(self, model: Abilities) -> Sampling:
        """These settings with method and candidates filled in. Raises UserError where such a model cannot be drawn from so."""
        method = self.method
        if method == "auto":
            method = "token" if model.by_token and (model.tokens or self.candidates is None) else "pool"
        if method == "centre" and not model.latents:
            raise UserError(
                "method centre averages latents, which this model does not draw: leave it out, or take a CALM whose head "
                "draws latents"
            )
        if method == "token" and not model.by_token:
            raise UserError(
                "method token sharpens the law of each token, which this model's head does not have: take method pool, or a "
                "mixture or autoregressive head"
            )
        if model.tokens and method == "pool":
            method = "token"  # a pool of single tokens would only be a worse estimate of what is known
        for name in ("top_k", "top_p", *PENALTIES):
            if getattr(self, name) not in (None, 0.0) and method != "token":
                fix = (
                    "leave the candidates out, or take method token"
                    if model.by_token
                    else "leave it out, or use a mixture or autoregressive head, or the token baseline"
                )
                raise UserError(
                    f"{name} changes the law of the next token, which method {method} does not look at: {fix}"
                )
        if self.method == "token" and self.candidates not in (None, 1) and not model.tokens:
            raise UserError(
                f"method token draws a patch once, and got {self.candidates:,} candidates: leave them out, or take method pool"
            )
        candidates = self.candidates
        if method == "token":
            candidates = 1
        elif candidates is None:
            candidates = CANDIDATES[method]
        if method == "token" and self.temperature == 0:
            return replace(self, method=method, candidates=candidates, temperature=1.0, top_k=1)
        if self.temperature == 0 and model.by_token:
            raise UserError(
                f"temperature 0 takes the likeliest token, which method {method} does not look at: leave the candidates out, or "
                "take method token"
            )
        check_temperature(self.temperature)
        if method == "pool":
            check_pool(self.temperature, candidates)
        return replace(self, method=method, candidates=candidates)


def check_samples(samples: int) -> None:
    """Raises UserError for a number of texts per prompt that is none, or more than memory should hold at once."""
    if not 1 <= samples <= SAMPLES:
        fix = ": for more, ask again with another seed" if samples > 0 else ""
        raise UserError(f"samples must be between 1 and {SAMPLES:,}; got {samples:,}{fix}")


def row_generator(seed: int, row: int, device: torch.device) -> torch.Generator:
    """A row's own generator: a hash of (seed, row), so that neighbouring seeds and rows are unrelated."""
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))
