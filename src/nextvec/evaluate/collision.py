"""Accuracy against collision of generated patches: what a way to draw at a lower temperature gains, and what it gives away.

For the text that follows a held-out context: accuracy is the chance that the true text is drawn, collision the chance that the
same is drawn twice; both for the first token and for the first PAIR tokens. A way of drawing is better where it has more of the
first at equal collision. Contexts are whole patches from the start of a document. Standard errors are over documents.

* A model that draws latents: the batch sampler, from POOLS pools of draws per context (the law of its choice from a pool is
  known, so that only the pools are random), and the mean of n latents, decoded.
* A model that knows the law of each token: each token at the temperature, given those before it; of a token Transformer the
  first token by exact probabilities.

Legend: P contexts, N draws, K tokens per patch, D width, L latent, V vocabulary, C documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextvec.errors import DataError
from nextvec.evaluate.windows import Document
from nextvec.model.calm import Calm
from nextvec.model.text_states import States
from nextvec.model.token_lm import TokenLM
from nextvec.sampling.approximate import centre
from nextvec.sampling.generate import generate
from nextvec.sampling.settings import Sampling, row_generator
from nextvec.sampling.temperature import pool_probabilities, sharpener
from nextvec.scoring.clusters import ClusterRatio, cluster_ratio

POOLS, CANDIDATES = 4, 200
TEMPERATURES = (1.0, 0.75, 0.6, 0.5, 0.4, 1 / 3, 0.25)
SIZES = (2, 4, 8, 16, 50, 200)  # latents whose mean is decoded
DRAWS, PAIR = 32, 2
FEWEST = 8  # whole patches before a place
BATCH, CENTRE, TOKENS = "batch sampler", "centre", "temperature"  # ways of drawing; the last token by token
FIGURES = ("token_accuracy", "token_collision", "pair_accuracy", "pair_collision")

Patch = tuple[int, ...]
Points = list[dict[str, Any]]


class Context(NamedTuple):
    """Tokens read from the document's start, the true ones after them, the document's number."""

    ids: list[int]
    target: Patch
    document: int


def contexts(
    documents: Sequence[Document],
    patch_size: int,
    count: int,
    seed: int,
    *,
    longest: int,
    after: int,
    rest: int = 0,
    spare: int = 0,
) -> list[Context]:
    """`count` places in as many documents as there are, in turn.

    Each is after FEWEST whole patches at least, fewer than `longest` tokens or the document's less `spare` patches, and
    `rest` tokens more; its target is the `after` tokens from there. Raises DataError where no document is long enough.
    """
    generator = torch.Generator().manual_seed(seed)
    shortest = (FEWEST + 2 + spare) * patch_size
    usable = [index for index, document in enumerate(documents) if len(document) > shortest]
    if not usable:
        raise DataError(f"no held-out document is longer than {shortest} tokens: give longer documents")
    found = []
    for turn in range(count):
        document = usable[turn % len(usable)]
        ids = documents[document].tolist()
        most = min(longest // patch_size, len(ids) // patch_size - spare)
        end = patch_size * int(torch.randint(FEWEST, most, (), generator=generator)) + rest
        found.append(Context(ids[:end], tuple(ids[end : end + after]), document))
    return found


class Tally:
    """Means over contexts of accuracy and collision, with standard errors clustered by document."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, float], list[tuple[int, float, float, float, float]]] = {}

    def add(self, method: str, strength: float, document: int, figures: Sequence[float]) -> None:
        first, together, pair, same = figures
        self.rows.setdefault((method, strength), []).append((document, first, together, pair, same))

    def points(self) -> Points:
        """One a method and strength: FIGURES, `.._stderr` of each, and what each document contributes to them."""
        return [
            {"method": method, "strength": strength, **_summary(rows)} for (method, strength), rows in self.rows.items()
        ]


def _summary(rows: list[tuple[int, float, float, float, float]]) -> dict[str, Any]:
    values = torch.tensor([row[1:] for row in rows], dtype=torch.float64)
    ratio = cluster_ratio(values, torch.ones_like(values, dtype=torch.bool), torch.tensor([row[0] for row in rows]))
    found: dict[str, Any] = dict(zip(FIGURES, ratio.mean.tolist(), strict=True))
    errors = standard_errors(ratio)
    found |= {f"{name}_stderr": error for name, error in zip(FIGURES, errors, strict=True)}
    sums = [[round(value, 9) for value in column] for column in ratio.sums.T.tolist()]
    found["per_document"] = {"document": ratio.label.tolist(), "contexts": ratio.counts[:, 0].tolist(), "sums": sums}
    return found


def standard_errors(ratio: ClusterRatio) -> list[float | None]:
    """Of each column; None with a single document, which has no spread."""
    if ratio.covariance is None:
        return [None] * len(ratio.mean)
    return ratio.covariance.diagonal().clamp_min(0).sqrt().tolist()


def law_figures(laws: Sequence[dict[Patch, float]], target: Patch) -> list[float]:
    """FIGURES from independent laws of the patch (each the law given one pool)."""
    found = []
    for length in (1, PAIR):
        short: list[dict[Patch, float]] = []
        for law in laws:
            short.append({})
            for patch, chance in law.items():
                short[-1][patch[:length]] = short[-1].get(patch[:length], 0.0) + chance
        pairs = list(itertools.combinations(short, 2))
        found.append(sum(law.get(target[:length], 0.0) for law in short) / len(short))
        found.append(sum(sum(c * right.get(x, 0.0) for x, c in left.items()) for left, right in pairs) / len(pairs))
    return found


def draw_figures(draws: Sequence[Patch], target: Patch) -> list[float]:
    """The same from independent draws."""
    return law_figures([{draw: 1.0} for draw in draws], target)


def patches(ids_NK: Tensor) -> list[Patch]:
    return [tuple(patch) for patch in ids_NK.tolist()]


def state_of(model: Calm, context: Context, eos_id: int, pad_id: int) -> States:
    """The state (D,) that predicts the patch after a context."""
    size = model.patch_size
    boundary = [] if model.packed else [eos_id] + [pad_id] * (size - 1)  # as `sampling.engine` lays texts out
    ids = boundary + context.ids
    return model.states(torch.tensor(ids, device=model.device).view(1, -1, size))[0, -1]


More = Callable[[Context, States, Tensor, Tensor, torch.Generator], None]  # state (D,), latents (N, L), tokens (N, K)


@torch.inference_mode()
def measure_latents(
    model: Calm,
    places: Sequence[Context],
    tally: Tally,
    *,
    eos_id: int,
    pad_id: int,
    seed: int,
    more: More | None = None,
) -> None:
    """The batch sampler and the mean of n latents, both from the same draws. `more` may add other ways to the tally."""
    for index, context in enumerate(places):
        generator, state_D = row_generator(seed, index, model.device), state_of(model, context, eos_id, pad_id)
        latent_NL = model.draw_latents(state_D, POOLS * CANDIDATES, generator)
        token_NK = model.autoencoder.decode_tokens(latent_NL)
        for temperature in TEMPERATURES:
            if temperature == 1:
                figures = draw_figures(patches(token_NK[: 4 * DRAWS]), context.target)
            else:
                figures = law_figures(
                    [_law(pool_NK, temperature) for pool_NK in token_NK.split(CANDIDATES)], context.target
                )
            tally.add(BATCH, temperature, context.document, figures)
        for size in SIZES:
            middle_GL = centre(latent_NL.unflatten(0, (-1, size))[:DRAWS])
            found = patches(model.autoencoder.decode_tokens(middle_GL))
            tally.add(CENTRE, size, context.document, draw_figures(found, context.target))
        if more is not None:
            more(context, state_D, latent_NL, token_NK, generator)


def _law(pool_NK: Tensor, temperature: float) -> dict[Patch, float]:
    """Of the batch sampler's choice from a pool."""
    law: dict[Patch, float] = {}
    chances = pool_probabilities(pool_NK[None], temperature)[0].tolist()
    for patch, chance in zip(patches(pool_NK), chances, strict=True):
        law[patch] = law.get(patch, 0.0) + chance
    return law


@torch.inference_mode()
def measure_by_token(
    model: Calm, places: Sequence[Context], tally: Tally, *, eos_id: int, pad_id: int, seed: int
) -> None:
    """Patches whose tokens are drawn one by one, each at the temperature."""
    for index, context in enumerate(places):
        generator, state_D = row_generator(seed, index, model.device), state_of(model, context, eos_id, pad_id)
        state_ND = state_D.expand(4 * DRAWS, -1)
        for temperature in TEMPERATURES:
            found = patches(model.draw_by_token(state_ND, generator, sharpener(temperature))[0])
            tally.add(TOKENS, temperature, context.document, draw_figures(found, context.target))


@torch.inference_mode()
def measure_tokens(
    model: TokenLM,
    places: Sequence[Context],
    tally: Tally,
    *,
    eos_id: int,
    pad_id: int,
    seed: int,
    method: str = TOKENS,
) -> None:
    """Texts written at each temperature; end-of-text is a token like any other here."""
    for temperature in TEMPERATURES:
        settings = Sampling(temperature, max_tokens=PAIR, seed=seed)
        rows: list[list[int]] = [[] for _ in range(DRAWS * len(places))]
        prompts = [context.ids for context in places]
        for step in generate(model, prompts, settings, eos_id=eos_id, pad_id=pad_id, samples=DRAWS, slots=128):
            for row, tokens in enumerate(step.tokens):
                rows[row] += tokens
        for index, context in enumerate(places):
            texts = [tuple((row + [eos_id] * PAIR)[:PAIR]) for row in rows[index * DRAWS : (index + 1) * DRAWS]]
            ids = torch.tensor([eos_id, *context.ids], device=model.device).view(1, -1, 1)
            law_V = (model.log_probabilities(model.states(ids)[0, -1]) / temperature).softmax(-1)
            token = [float(law_V[context.target[0]]), float(law_V.square().sum())]
            tally.add(method, temperature, context.document, [*token, *draw_figures(texts, context.target)[2:]])


def collision_curve(model: Calm | TokenLM, places: Sequence[Context], *, eos_id: int, pad_id: int, seed: int) -> Points:
    """All ways of drawing that a model of this kind has."""
    tally = Tally()
    if isinstance(model, TokenLM):
        measure_tokens(model, places, tally, eos_id=eos_id, pad_id=pad_id, seed=seed)
    else:
        if model.has_latents:
            measure_latents(model, places, tally, eos_id=eos_id, pad_id=pad_id, seed=seed)
        if model.by_token:
            measure_by_token(model, places, tally, eos_id=eos_id, pad_id=pad_id, seed=seed)
    return tally.points()
