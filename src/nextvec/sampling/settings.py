"""What a user chooses about drawing, checked: temperature, pool, length, seed, and cuts of known probabilities."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

from nextvec.errors import UserError
from nextvec.sampling.temperature import check_pool, check_temperature

Finish = Literal["eos", "length", "stop"]  # the model ended the text, max_tokens was reached, a stop string appeared

Method = Literal["pool", "centre"]  # the batch sampler; decode the mean of the candidates' latents (approximate.py)
MOST = {"candidates": 100_000, "max_tokens": 1_000_000}  # all of a pool, and all keys and values, are in memory at once
CANDIDATES: dict[Method, int] = {"pool": 200, "centre": 8}  # where none are given [P; docs/sampling.md]


class Law(NamedTuple):
    """What the next patch is drawn by; rows of one law are drawn together."""

    temperature: float
    candidates: int
    top_k: int | None
    top_p: float | None
    method: Method = "pool"

    @property
    def single(self) -> bool:
        """A patch is the model's first draw: there is no pool."""
        return self.temperature == 1 and self.method == "pool"


@dataclass(frozen=True)
class Sampling:
    """How patches are drawn. Raises UserError for values out of range."""

    temperature: float = 0.5  # in (0, 1]; 1 is the model's own law [P: fluent text needs at most 0.5]
    candidates: int = CANDIDATES["pool"]  # N, draws in a pool; unused where the model has likelihoods
    max_tokens: int = 256  # new tokens per row at most
    seed: int = 0  # row i draws from a generator seeded by (seed, i)
    top_k: int | None = None  # keep the k most likely tokens; models with likelihoods alone
    top_p: float | None = None  # keep the fewest most likely tokens that have this probability; likewise
    method: Method = "pool"  # "centre" is an approximation: `candidates` are the temperature, which is not used

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        for name in ("candidates", "max_tokens", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1; got {value}")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                given = getattr(self, name)
                raise UserError(f"{name} must be at most {most:,}; got {given:,}: memory holds all at once, take fewer")
        if self.method not in get_args(Method):
            raise UserError(f"method must be one of {', '.join(get_args(Method))}; got {self.method!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1]; got {self.top_p:g}: 1 keeps every token")

    @property
    def law(self) -> Law:
        return Law(self.temperature, self.candidates, self.top_k, self.top_p, self.method)

    def check_model(self, has_likelihoods: bool, has_latents: bool) -> None:
        """Raise UserError where a model of this kind cannot be drawn from so."""
        if self.method == "centre" and not has_latents:
            raise UserError(
                "method centre averages latents, which this model does not draw: leave it out, or take a CALM whose head "
                "draws latents"
            )
        if has_likelihoods:
            return
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"{name} cuts the probabilities of the next token, which a CALM does not have: leave it out and take a "
                    "lower temperature, or use the token baseline"
                )
        if self.method == "pool":
            check_pool(self.temperature, self.candidates)


def row_generator(seed: int, row: int, device: torch.device) -> torch.Generator:
    """A row's own generator: a hash of (seed, row), so that neighbouring seeds and rows are unrelated."""
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big", signed=True))
