"""BrierLM of any language model over whole documents: one evaluator, one set of positions for every model.

Protocols and positions are those of `evaluate.windows`. CALM and the token baseline come in as a `LanguageModel`;
anything else as a `Sampler`, a function from contexts to draws.

Legend: S draws, B windows in a batch, T context tokens, Q starts, N scored starts (B * Q), n order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from nextvec.errors import ConfigError, DataError
from nextvec.evaluate.ngrams import Scored, check_stride, draw_ngrams, tail_terms, with_probabilities
from nextvec.evaluate.windows import (
    Batch,
    Document,
    Layout,
    Positions,
    batches,
    hash_documents,
    plan,
    plan_windows,
    tensors,
)
from nextvec.model.interface import LanguageModel
from nextvec.scoring.brier import (
    MAX_ORDER,
    BrierResult,
    DrawEstimator,
    Estimator,
    Protocol,
    brier_scores,
    exact_tail_scores,
    summarise,
)

Progress = Callable[[int, int], None]  # (windows done, windows in all)

# Contexts (1-D int64 ids, of any lengths), S, generator -> ids (S, contexts, at least `order`) of independent
# continuations of each context, all randomness from the generator.
Sampler = Callable[[Sequence[Tensor], int, torch.Generator], Tensor]

__all__ = ["Document", "Sampler", "evaluate_brier", "evaluate_sampler", "hash_documents", "plan_windows"]


def evaluate_brier(
    model: LanguageModel,
    documents: Sequence[Document],
    *,
    context_tokens: int,
    stride: int,
    draws: int,
    generator: torch.Generator,
    tokenizer_hash: str,
    layout: Layout = "documents",
    positions: Positions = "patch_starts",
    estimator: Estimator = "all_pairs",
    order: int = MAX_ORDER,
    batch_rows: int = 8,
    progress: Progress | None = None,
) -> BrierResult:
    """Brier-1..order and BrierLM under the protocol `documents-N` or `wikitext103-N`, N = context_tokens.

    Args: documents: token ids of each document, its end-of-text token included (wikitext103: with the tokenizer's own
    special tokens instead); stride: the K of the comparison, a multiple of the model's own patch size; positions: see
    `evaluate.windows`; draws: S per position; estimator: exact_tail needs a model with token probabilities, and one
    draw is enough; generator: on the model's device, and with batch_rows all that the result depends on beside the
    arguments; order: longest n-gram, 1..4; batch_rows: windows per pass; progress: called with (windows done, windows
    in all).

    The model is put in evaluation mode for the call. Raises ConfigError for a context, stride, order, estimator or
    number of draws that cannot work, DataError when the text is too short to score.
    """
    check_stride(stride, model.patch_size)
    if estimator not in get_args(Estimator):
        raise ConfigError(f"estimator must be one of {', '.join(get_args(Estimator))}; got {estimator!r}")
    if estimator == "exact_tail":
        with_probabilities(model)
    asked = _Asked(
        layout, context_tokens, positions, stride, draws, estimator, order, generator.initial_seed(), tokenizer_hash
    )
    device = model.device

    def score(batch: Batch) -> Tensor:
        valid_Nn = batch.valid.flatten(0, 1)
        if estimator == "exact_tail":
            terms = tail_terms(model, batch.ids.to(device), batch.starts, draws, order, generator)
            return exact_tail_scores(
                terms.target_log.flatten(0, 1).cpu(),
                terms.drawn_log.flatten(1, 2).cpu(),
                terms.collision.flatten(1, 2).cpu(),
                valid_Nn,
            )
        first = int(batch.starts[0])
        context_BT = batch.context.to(device)
        scored = Scored(batch.target, batch.valid)
        draws_SBQn = draw_ngrams(model, context_BT, draws, order, generator, stride=stride, first=first, scored=scored)
        target_Nn = batch.target.flatten(0, 1).to(device)
        return brier_scores(draws_SBQn.flatten(1, 2), target_Nn, valid_Nn.to(device), estimator)

    with _evaluation_mode(model):
        return _evaluate(score, documents, asked, batch_rows, progress)


def evaluate_sampler(
    sampler: Sampler,
    documents: Sequence[Document],
    *,
    context_tokens: int,
    stride: int,
    draws: int,
    generator: torch.Generator,
    tokenizer_hash: str,
    layout: Layout = "documents",
    positions: Positions = "patch_starts",
    estimator: DrawEstimator = "all_pairs",
    order: int = MAX_ORDER,
    batch_rows: int = 8,
    decode: str = "argmax",
    deterministic: bool = False,
    progress: Progress | None = None,
) -> BrierResult:
    """Brier-1..order and BrierLM of a black box, at the positions and with the stamp of `evaluate_brier`.

    Args: sampler: (contexts, draws, generator) -> ids; contexts are the 1-D int64 ids before each scored start of
    `batch_rows` windows, and the answer is (S, contexts, at least `order`) ids, independent given the context, on any
    device; decode: how latents become tokens, for the stamp; deterministic: allow a sampler that ignores its generator. The
    rest as `evaluate_brier`.

    A sampler whose draws are all the same at every position, also under another seed, is refused unless
    `deterministic`: its Brier-n is 2 * accuracy - 1, which is a fair score of a model that is always sure and a trap
    for one whose generator was forgotten. Raises ConfigError, DataError as `evaluate_brier`, and for a sampler whose
    answer has another form.
    """
    if estimator not in get_args(DrawEstimator):
        raise ConfigError(
            f"estimator of a sampler must be one of {', '.join(get_args(DrawEstimator))}; got {estimator!r}"
        )
    asked = _Asked(
        layout,
        context_tokens,
        positions,
        stride,
        draws,
        estimator,
        order,
        generator.initial_seed(),
        tokenizer_hash,
        decode,
    )
    watch = _Watch(sampler, order, generator.initial_seed() + 1)

    def score(batch: Batch) -> Tensor:
        asked_BQ = batch.valid[..., 0]
        rows, at = asked_BQ.nonzero(as_tuple=True)
        contexts = [batch.ids[row, : int(batch.starts[q])] for row, q in zip(rows.tolist(), at.tolist(), strict=True)]
        draws_SBQn = torch.zeros(draws, *asked_BQ.shape, order, dtype=torch.int64)
        draws_SBQn[:, rows, at] = watch.draw(contexts, draws, generator)
        flat = batch.target.flatten(0, 1), batch.valid.flatten(0, 1)
        return brier_scores(draws_SBQn.flatten(1, 2), *flat, estimator)

    result = _evaluate(score, documents, asked, batch_rows, progress)
    if watch.always_same and not deterministic:
        raise DataError(
            f"the sampler ignores its generator: all {draws} draws are the same at each of {result.positions[0]} "
            "positions, also under another seed; draw from the generator that it is given, or say deterministic=True "
            "(Brier-n is then 2 * accuracy - 1)"
        )
    return result


@dataclass
class _Watch:
    """Asks a sampler, checks what it answers, and notices one that gives the same whatever its generator."""

    sampler: Sampler
    order: int
    other_seed: int
    always_same: bool = True

    def draw(self, contexts: Sequence[Tensor], draws: int, generator: torch.Generator) -> Tensor:
        """Draws (S, N, order) int64 on the CPU."""
        found_SNn = self._ask(contexts, draws, generator)
        if self.always_same:
            self.always_same = bool((found_SNn == found_SNn[0]).all())
        if self.always_same:  # asked again only as long as no two draws have differed
            other = torch.Generator(generator.device).manual_seed(self.other_seed)
            self.always_same = self._ask(contexts, draws, other).equal(found_SNn)
        return found_SNn

    def _ask(self, contexts: Sequence[Tensor], draws: int, generator: torch.Generator) -> Tensor:
        found = torch.as_tensor(self.sampler(contexts, draws, generator)).cpu()
        wanted = (draws, len(contexts), self.order)
        if found.dim() != 3 or found.shape[:2] != wanted[:2] or found.shape[2] < self.order:
            raise DataError(
                f"a sampler answers with ids of shape (draws, contexts, tokens), here {wanted} or more tokens; "
                f"got {tuple(found.shape)}"
            )
        if found.is_floating_point() or found.is_complex() or bool((found < 0).any()):
            raise DataError(
                f"a sampler answers with token ids, integers from 0 on; got {found.dtype} from {found.min()}"
            )
        return found[..., : self.order].long()


@dataclass(frozen=True)
class _Asked:
    """What to score and how: a stamp in the making."""

    layout: Layout
    context_tokens: int
    positions: Positions
    stride: int
    draws: int
    estimator: Estimator
    order: int
    seed: int
    tokenizer_hash: str
    decode: str = "argmax"

    def __post_init__(self) -> None:
        least = 1 if self.estimator == "exact_tail" else 2
        if self.draws < least:
            raise ConfigError(f"draws must be at least {least} per position; got {self.draws}")
        if not 1 <= self.order <= MAX_ORDER:
            raise ConfigError(f"order must be between 1 and {MAX_ORDER}; got {self.order}")
        if self.stride < 1:
            raise ConfigError(f"stride must be at least 1; got {self.stride}")


def _evaluate(
    score: Callable[[Batch], Tensor],
    documents: Sequence[Document],
    asked: _Asked,
    batch_rows: int,
    progress: Progress | None,
) -> BrierResult:
    """Windows of the protocol through `score`, a batch's values (N, n), to the figures and their stamp."""
    planned = plan(documents, asked.layout, asked.context_tokens, asked.stride, asked.positions)
    values, valid, owner = [], [], []
    done = 0
    for windows in batches(planned.windows, batch_rows):
        batch = tensors(planned, windows, asked.stride, asked.order)
        values.append(score(batch).cpu())
        valid.append(batch.valid.flatten(0, 1))
        owner.append(batch.owner)
        done += len(windows)
        if progress is not None:
            progress(done, len(planned.windows))
    valid_Nn = torch.cat(valid)
    if not bool(valid_Nn[:, -1].any()):
        raise DataError(
            f"nothing can be scored at order {asked.order}: no document has {asked.order} tokens after its first patch "
            f"of {asked.stride}; give longer documents or a smaller order"
        )
    protocol = Protocol(
        name=planned.name,
        tokenizer_hash=asked.tokenizer_hash,
        context_tokens=asked.context_tokens,
        positions=asked.positions,
        stride=asked.stride,
        draws=asked.draws,
        estimator=asked.estimator,
        decode=asked.decode,
        documents=len(documents),
        documents_hash=hash_documents(documents),
        seed=asked.seed,
    )
    return summarise(torch.cat(values), valid_Nn, torch.cat(owner), protocol)


@contextmanager
def _evaluation_mode(model: object) -> Iterator[None]:
    """Puts a module in evaluation mode and takes it back to what it was."""
    if not isinstance(model, nn.Module):
        yield
        return
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
