"""The arena: settings of each arm of a comparison, and how long its autoencoder trains; for demo and bake-off alike.

Evidence for the values is in docs/log.md. Settings are plain, as `nextvec train --config` takes them, without text and steps.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from nextvec.errors import ConfigError
from nextvec.settings import unknown_name

Kind = Literal["autoencoder", "mixed-autoencoder", "calm", "energy", "token", "multi-token"]
KINDS: tuple[Kind, ...] = get_args(Kind)

AUTOENCODER_SHARE = 0.2  # of a budget in seconds
# Optimiser steps of calm's autoencoder, each over the whole vocabulary, the rate falling to 0 at the last. At V = 2048 80 give
# 100.00 % of held-out tokens, also at half a unit of noise (docs/recipe.md).
AUTOENCODER_LEAST, AUTOENCODER_MOST = 80, 150
# Of energy's, whose tokens share dimensions, 4,096 tokens of text each: 400 give 99.92 % of held-out tokens and 500 99.96 %,
# 200 only 97.3 %; with many more the latents' standard deviation outgrows what decodes at twice the noise.
MIXED_STEPS = 500
CONTEXT, ROWS = 1024, 4  # tokens of a training window, windows of a step
WARMUP = 30  # steps
# AdamW of embeddings and vocabulary, of the three arms that learn by cross-entropy: 3e-3 is slow for all of them (docs/recipe.md)
RATE = 0.02


def arena(kind: str, vocab_size: int, minutes: float) -> dict[str, Any]:
    """Settings of one arm for a vocabulary and a budget of training in minutes, on which nothing depends yet.

    calm: the mixture head on a factored autoencoder (`autoencoder`). At equal seconds it is ahead of the categorical and flow
    heads and of `energy`, the paper's head with S = 8 on the paper's autoencoder (`mixed-autoencoder`) with an auxiliary
    cross-entropy, otherwise the same (docs/recipe.md).
    multi-token: the backbone and the patches of CALM, with a causal decoder over the K tokens of a patch in the place of
    head and autoencoder. Like the token Transformer it reads embeddings of unit size, as the mixture head does.
    Raises ConfigError for an unknown kind.
    """
    shared: dict[str, Any] = {"data": {"context_tokens": CONTEXT, "rows": ROWS}, "optim": {"warmup": WARMUP}}
    fast = {**shared, "optim": {"warmup": WARMUP, "lr": RATE}}
    backbone = {"layers": 4, "width": 192, "inner": 512, "heads": 3}
    encoder = {"patch_size": 4, "width": 128, "inner": 320, "latent": 128}
    if kind == "autoencoder":
        rows = max(1, -(-vocab_size // CONTEXT))  # a step is about one look at each token
        own = {"data": {"context_tokens": CONTEXT, "rows": rows}, "optim": {"warmup": 10}}
        return {"model": {**encoder, "factored": True}, **own}
    if kind == "mixed-autoencoder":
        return {"model": encoder, **shared}
    if kind == "calm":
        head = {"kind": "mixture", "blocks": 1}
        return {"model": {"backbone": backbone, "head": head}, "recipe": {"name": "paper"}, **fast}
    if kind == "energy":
        return {
            "model": {"backbone": backbone, "head": {"kind": "energy", "blocks": 2}},
            "energy": {"draws": 8, "teacher": "exact"},
            "recipe": {"name": "fast"},
            **shared,
        }
    if kind == "multi-token":
        return {
            "model": {"backbone": backbone, "head": {"kind": "autoregressive", "blocks": 1, "embedding_norm": True}},
            "recipe": {"name": "paper"},  # its own cross-entropy is all that it learns from
            **fast,
        }
    if kind == "token":
        return {"model": {"backbone": backbone, "embedding_norm": True}, **fast}
    raise ConfigError(unknown_name("arm", kind, list(KINDS)))


def autoencoder_steps(seconds: float, step_seconds: float) -> int:
    """Steps of the autoencoder in a budget of `seconds`, at a measured rate: its share, within what is known to serve."""
    share = round(AUTOENCODER_SHARE * seconds / step_seconds)
    return max(AUTOENCODER_LEAST, min(AUTOENCODER_MOST, share))
