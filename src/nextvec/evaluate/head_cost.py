"""What a head costs: operations of one position, and parameters (rules in `evaluate.cost`).

Two columns: `published`, every layer once for each draw and network pass, as the authors' code runs, and `split`, ours, where
what depends on the state alone, or on the state and the time, runs once for all draws of a position.
"""

from __future__ import annotations

from dataclasses import dataclass

from nextvec.config import (
    AutoregressiveHeadConfig,
    BackboneConfig,
    CalmConfig,
    CategoricalHeadConfig,
    EnergyHeadConfig,
    MixtureHeadConfig,
)
from nextvec.model import grams
from nextvec.model.heads.mixture import MOST_TOLD
from nextvec.model.recall import DIM

WAVES = 256  # numbers in the time embedding of the flow, diffusion and categorical heads


@dataclass(frozen=True)
class HeadCost:
    """Operations of one position. A draw at inference takes all passes of its solver, one in training takes one."""

    once: float
    per_draw: float
    trained_once: float  # forward
    trained_per_draw: float
    vocabulary_once: float = 0  # products with the head's own vocabulary matrix
    vocabulary_per_draw: float = 0
    trained_vocabulary: float = 0
    trained_vocabulary_per_draw: float = 0


def head_cost(config: CalmConfig, split: bool, context: int) -> HeadCost:
    """Of the head that `config.head` describes, after `context` patches."""
    head, D, L = config.head, config.backbone.width, config.autoencoder.latent
    square = D * D
    if isinstance(head, EnergyHeadConfig):
        once, per_draw = (
            square,
            head.noise * D + 6 * head.blocks * square + square + D * L,
        )  # the state's part is once in both
        if split:
            once, per_draw = once + head.blocks * square, per_draw - head.blocks * square
        return HeadCost(2 * once, 2 * per_draw, 2 * once, 2 * per_draw)
    if isinstance(head, AutoregressiveHeadConfig):
        attention, mlp = backbone_operations(config.backbone.override(layers=head.blocks), config.patch_size)
        asked, told = recall_operations(head.recall, D, context * config.patch_size)
        read, learnt = gram_operations(head.grams, D)
        block, logits, more = attention + mlp + asked + read, 2 * config.vocab_size * D, config.patch_size - 1
        return HeadCost(
            once=2 * square + block,
            per_draw=more * block,
            trained_once=2 * square + config.patch_size * (block + told + learnt),
            trained_per_draw=0,
            vocabulary_once=logits,
            vocabulary_per_draw=more * logits,
            trained_vocabulary=config.patch_size * logits,
        )
    if isinstance(head, MixtureHeadConfig):
        K, logits = config.patch_size, 2 * config.vocab_size * D
        asked, told = recall_operations(head.recall, D, context * K)
        read, learnt = gram_operations(head.grams, D)
        window, place = max(1, K - 1), 6 * head.blocks * D * (head.inner or D) + asked + read
        once = 2 * K * square + K * 2 * window * square  # slots, and what the tokens before the patch tell its places
        known = config.vocab_size * window * (D + head.recall * DIM) <= MOST_TOLD
        tells = 0 if known else 2 * window * (D + head.recall * DIM) * D  # by each token drawn but the last
        return HeadCost(
            once=once + place,
            per_draw=(K - 1) * (place + tells),
            trained_once=once + K * (place + told + learnt),
            trained_per_draw=0,
            vocabulary_once=logits,
            vocabulary_per_draw=(K - 1) * logits,
            trained_vocabulary=K * logits,
        )
    time, modulation = WAVES * D + square, 3 * head.blocks * square + 2 * square
    body = L * D + 2 * head.blocks * square + D * _outputs(config)
    if isinstance(head, CategoricalHeadConfig):
        return _categorical_cost(config, head, split, time + modulation, body)
    if not split:
        one = 2 * (square + time + modulation + body)
        return HeadCost(0, head.evaluations * one, 0, one)
    once, per_draw = square + head.evaluations * (time + modulation), head.evaluations * body
    return HeadCost(2 * once, 2 * per_draw, 2 * square, 2 * (time + modulation + body))


def _categorical_cost(
    config: CalmConfig, head: CategoricalHeadConfig, split: bool, signal: float, body: float
) -> HeadCost:
    """At time 0 the state alone speaks: without the network, and once for all draws of a position.

    Each pass weighs the codes with the probabilities, a second product with the vocabulary; training does not.
    """
    D, K, V, E = config.backbone.width, config.patch_size, config.vocab_size, config.autoencoder.span_latent
    state, logits = K * D * D + D * D, K * V * (D + E + 1)
    weighted, more = logits + K * V * E, head.evaluations - 1
    trained = {
        "trained_once": 2 * state,
        "trained_per_draw": 2 * (signal + body),
        "trained_vocabulary_per_draw": 2 * logits,
    }
    if not split:
        each = state + more * (signal + body)
        return HeadCost(0, 2 * each, vocabulary_per_draw=2 * head.evaluations * weighted, **trained)
    return HeadCost(
        2 * (state + more * signal),
        2 * more * body,
        vocabulary_once=2 * weighted,
        vocabulary_per_draw=2 * more * weighted,
        **trained,
    )


def head_parameters(config: CalmConfig) -> int:
    """Parameters of the head."""
    head, D, L = config.head, config.backbone.width, config.autoencoder.latent
    square, linear = D * D, D * D + D
    if isinstance(head, EnergyHeadConfig):
        block = 6 * square + (1 + 1 + 2 + 1) * D + 2 * D  # biases of l1, l2, l3, down; LayerNorm
        ends = head.noise * D + D + linear + 2 * 2 * D  # noise, state, their LayerNorms
        return head.blocks * block + ends + 2 * D + linear + D * L + L
    if isinstance(head, AutoregressiveHeadConfig):
        kv = config.backbone.key_value_heads * config.backbone.head_dim
        block = 2 * square + 2 * D * kv + 3 * D * config.backbone.inner + 2 * D
        return linear + config.vocab_size * D + head.blocks * block + D + text_parameters(head.recall, head.grams, D)
    if isinstance(head, MixtureHeadConfig):
        places = config.patch_size * linear + max(1, config.patch_size - 1) * square  # slots, before
        return (
            places
            + 2 * config.vocab_size * D
            + head.blocks * (3 * D * (head.inner or D) + D)
            + 2 * D
            + text_parameters(head.recall, head.grams, D)
        )
    outputs = _outputs(config)
    ends = (
        L * D + D + WAVES * D + D + 2 * linear + 2 * linear + D * outputs + outputs
    )  # noisy latent, time, state; output
    if isinstance(head, CategoricalHeadConfig):
        ends += D * outputs + outputs + D + config.vocab_size * D  # slots of the state, norm, vocabulary
    return head.blocks * (2 * D + 2 * linear + 3 * linear) + ends


def recall_operations(heads: int, width: int, tokens: int) -> tuple[float, float]:
    """Operations of one token of recall: to look up among so many tokens, and to make its query, key and value.

    The latter are read from a table at inference, and counted in training, where a table takes less if it is smaller than
    the batch (`model.recall`).
    """
    inner = heads * DIM
    return 2 * inner * width + 4 * inner * tokens, 2 * inner * (2 * width + 2 * width + width)


def gram_operations(buckets: int, width: int) -> tuple[float, float]:
    """Operations of one token's n-grams: at inference, and what training counts more. Of a table that is not too large for it
    the sums are made beforehand (`model.grams`)."""
    if not buckets:
        return 0, 0
    numbers = len(grams.ORDERS) * grams.DIM * width
    made = len(grams.ORDERS) * buckets * width <= grams.MOST_MADE
    return (0, 2 * numbers) if made else (2 * numbers, 0)


def text_parameters(heads: int, buckets: int, width: int) -> int:
    """Of recall: query and key of two tokens each, value, output. Of n-grams: tables, and the way up."""
    tables = len(grams.ORDERS) * grams.DIM * (buckets + width) if buckets else 0
    return 6 * heads * DIM * width + tables


def backbone_operations(config: BackboneConfig, context: int) -> tuple[float, float]:
    """Operations of one position of a Transformer that attends to `context` positions: (attention, MLP)."""
    D, kv = config.width, config.key_value_heads * config.head_dim
    projections = 2 * (2 * D * D + 2 * D * kv)
    return config.layers * (projections + 4 * D * context), config.layers * 2 * 3 * D * config.inner


def _outputs(config: CalmConfig) -> int:
    """Numbers that the network of the flow, diffusion or categorical head gives for a latent."""
    if config.head.kind == "categorical":
        return config.patch_size * config.backbone.width
    return config.autoencoder.latent * (2 if config.head.kind == "diffusion" else 1)
