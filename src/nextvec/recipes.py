"""The arena: settings of each arm of a comparison, and how long its autoencoder trains; for demo and bake-off alike.

Evidence for the values is in docs/log.md. Settings are plain, as `nextvec train --config` takes them, without text and steps.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from nextvec.configs.read import read_settings
from nextvec.errors import ConfigError
from nextvec.settings import unknown_name

Kind = Literal["autoencoder", "mixed-autoencoder", "calm", "energy", "token", "multi-token"]
KINDS: tuple[Kind, ...] = get_args(Kind)

AUTOENCODER_SHARE = 0.2  # of a budget in seconds
# Optimiser steps of calm's autoencoder at V = 2048, each over 2,048 tokens of the vocabulary, the rate falling to 0 at the last.
# 80 give 100.00 % of held-out tokens, also at half a unit of noise; so do 126 at V = 4096 and 200 at 8192 (docs/recipe.md).
AUTOENCODER_LEAST, AUTOENCODER_MOST = 80, 150
AUTOENCODER_VOCABULARY, AUTOENCODER_POWER = 2048, 2 / 3
# Of energy's, whose tokens share dimensions, 4,096 tokens of text each: 400 give 99.92 % of held-out tokens and 500 99.96 %,
# 200 only 97.3 %; with many more the latents' standard deviation outgrows what decodes at twice the noise.
MIXED_STEPS = 500
SHIPPED = {  # arms that are shipped settings files as well (`nextvec train --config fast/calm`)
    "autoencoder": "fast/autoencoder",
    "calm": "fast/calm",
    "token": "fast/transformer",
    "multi-token": "fast/multi-token",
}


def arena(kind: str, vocab_size: int, minutes: float) -> dict[str, Any]:
    """Settings of one arm for a vocabulary and a budget of training in minutes, on which nothing depends yet.

    calm: the mixture head on a factored autoencoder (`autoencoder`). At equal seconds, with four layers each, it is ahead of
    the categorical and flow heads and of `energy`, the paper's head with S = 8 on the paper's autoencoder
    (`mixed-autoencoder`) with an auxiliary cross-entropy, otherwise the same (docs/recipe-history.md).
    multi-token: the backbone and the patches of CALM, with a causal decoder over the K tokens of a patch in the place of
    head and autoencoder. Like the token Transformer it reads embeddings of unit size, as the mixture head does.
    Raises ConfigError for an unknown kind.
    """
    if kind in SHIPPED:
        settings = {
            name: value for name, value in read_settings(SHIPPED[kind]).items() if name not in ("kind", "train")
        }
        if kind == "autoencoder":  # a step is at most about one look at each token
            data = settings["data"]
            data["rows"] = min(data["rows"], max(1, -(-vocab_size // data["context_tokens"])))
        return settings
    calm = read_settings(SHIPPED["calm"])
    shared = {"data": calm["data"], "optim": {"warmup": calm["optim"]["warmup"]}}
    if kind == "mixed-autoencoder":
        return {"model": {"patch_size": 4, "width": 128, "inner": 320, "latent": 128}, **shared}
    if kind == "energy":
        return {
            "model": {"backbone": calm["model"]["backbone"], "head": {"kind": "energy", "blocks": 2}},
            "energy": {"draws": 8, "teacher": "exact"},
            "recipe": {"name": "fast"},
            **shared,
        }
    raise ConfigError(unknown_name("arm", kind, list(KINDS)))


def autoencoder_bounds(vocab_size: int) -> tuple[int, int]:
    """The fewest steps of calm's autoencoder that serve, and the most that are of use; tried at V = 2048 to 8192."""
    least = round(AUTOENCODER_LEAST * max(1.0, vocab_size / AUTOENCODER_VOCABULARY) ** AUTOENCODER_POWER)
    return least, max(least, AUTOENCODER_MOST)


def autoencoder_steps(seconds: float, step_seconds: float, vocab_size: int) -> int:
    """Steps of the autoencoder in a budget of `seconds`, at a measured rate: its share, within what is known to serve."""
    least, most = autoencoder_bounds(vocab_size)
    return max(least, min(most, round(AUTOENCODER_SHARE * seconds / step_seconds)))
