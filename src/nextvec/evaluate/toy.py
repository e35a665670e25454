"""A toy language whose likelihood is known: a Markov source on which BrierLM and cross-entropy are exact sums.

Legend: C contexts (the last m tokens, in base V), V vocabulary, N positions or samples, n order, S draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nextvec.scoring.brier import MAX_ORDER


@dataclass(frozen=True)
class Markov:
    """A law of tokens given the `memory` last ones. `table` (C, V) float64, C = V^memory, rows sum to 1.

    Raises ValueError for a table of another shape or with rows that are not laws.
    """

    table: Tensor

    def __post_init__(self) -> None:
        if self.table.dim() != 2 or self.vocab_size < 2 or self.vocab_size**self.memory != len(self.table):
            raise ValueError(f"a table of V^m rows and V >= 2 columns is needed; got {tuple(self.table.shape)}")
        if bool((self.table < 0).any()) or not torch.allclose(self.table.sum(1), torch.ones(()).double(), atol=1e-9):
            raise ValueError("every row of a table must be a law: no entry below 0, sum 1")

    @property
    def vocab_size(self) -> int:
        return self.table.shape[1]

    @property
    def memory(self) -> int:
        """Tokens that the law depends on."""
        memory = 1
        while self.vocab_size**memory < len(self.table):
            memory += 1
        return memory

    @classmethod
    def random(cls, vocab_size: int, memory: int, concentration: float, generator: torch.Generator) -> Markov:
        """A source with rows proportional to exp(concentration * standard normal): the larger, the surer."""
        score = concentration * torch.randn(vocab_size**memory, vocab_size, generator=generator, dtype=torch.float64)
        return cls(score.softmax(1))

    def at_temperature(self, temperature: float) -> Markov:
        """Each row to the power 1 / temperature, made a law again: surer below 1, vaguer above."""
        return Markov((self.table.log() / temperature).softmax(1))

    def mixed(self, other: Markov, share: float) -> Markov:
        """(1 - share) of this law and `share` of another of the same shape."""
        return Markov((1 - share) * self.table + share * other.table)

    def uniform(self) -> Markov:
        """The law that knows nothing."""
        return Markov(torch.full_like(self.table, 1 / self.vocab_size))

    def noisy(self, scale: float, generator: torch.Generator) -> Markov:
        """Normal noise of this scale, in nats, on every log-probability."""
        noise = torch.randn(self.table.shape, generator=generator, dtype=torch.float64)
        return Markov((self.table.log() + scale * noise).softmax(1))

    def stationary(self) -> Tensor:
        """(C,) how often each context occurs in a long text."""
        law_C = torch.full((len(self.table),), 1 / len(self.table), dtype=torch.float64)
        for _ in range(10_000):
            after_C = (law_C[:, None] * self.table).view(self.vocab_size, -1).sum(0)  # the oldest token drops out
            if torch.allclose(after_C, law_C, atol=1e-15, rtol=0):
                break
            law_C = after_C
        return after_C / after_C.sum()

    def ngrams(self, order: int) -> Tensor:
        """(C, V^order) the law of the next `order` tokens given each context, the first token most significant."""
        law_CN = self.table
        context_CN = self._next(torch.arange(len(self.table))[:, None], torch.arange(self.vocab_size))
        for _ in range(order - 1):
            law_CN = (law_CN[..., None] * self.table[context_CN]).flatten(1)
            context_CN = self._next(context_CN[..., None], torch.arange(self.vocab_size)).flatten(1)
        return law_CN

    def text(self, length: int, generator: torch.Generator, rows: int = 1) -> Tensor:
        """(rows, length) int64: texts whose first context follows the stationary law, which is not part of them."""
        context_N = torch.multinomial(self.stationary(), rows, replacement=True, generator=generator)
        tokens = []
        for _ in range(length):
            token_N1 = torch.multinomial(self.table[context_N], 1, generator=generator)
            context_N = self._next(context_N, token_N1[:, 0])
            tokens.append(token_N1)
        return torch.cat(tokens, dim=1)

    def context_of(self, ids: Tensor) -> Tensor:
        """(...) index of the context that ids (..., at least `memory`) end in."""
        place = self.vocab_size ** torch.arange(self.memory - 1, -1, -1)
        return (ids[..., -self.memory :] * place).sum(-1)

    def sample(self, contexts: Sequence[Tensor], draws: int, generator: torch.Generator) -> Tensor:
        """This law as a `Sampler` (evaluate.brier): (S, contexts, 4) ids. Contexts hold at least `memory` tokens."""
        context_N = torch.stack([self.context_of(context) for context in contexts]).repeat(draws)
        tokens = []
        for _ in range(MAX_ORDER):
            token_N1 = torch.multinomial(self.table[context_N], 1, generator=generator)
            context_N = self._next(context_N, token_N1[:, 0])
            tokens.append(token_N1)
        return torch.cat(tokens, dim=1).view(draws, len(contexts), MAX_ORDER)

    def _next(self, context: Tensor, token: Tensor) -> Tensor:
        """The context after one more token."""
        return context * self.vocab_size % len(self.table) + token


def exact_brier(truth: Markov, model: Markov, order: int = MAX_ORDER) -> Tensor:
    """Brier-1..order of `model` on text of `truth`, (order,) float64: sums over all contexts and n-grams."""
    weight_C = truth.stationary()
    values = []
    for n in range(1, order + 1):
        p_CN, q_CN = truth.ngrams(n), model.ngrams(n)
        values.append((weight_C * (2 * (p_CN * q_CN).sum(1) - q_CN.square().sum(1))).sum())
    return torch.stack(values)


def exact_cross_entropy(truth: Markov, model: Markov) -> float:
    """-E log q in nats per token of text of `truth`; infinite where the model excludes what occurs."""
    surprise_C = -torch.xlogy(truth.table, model.table).sum(1)
    return float((truth.stationary() * surprise_C).sum())


@dataclass(frozen=True)
class PlugIn:
    """Cross-entropy of a law that is known by its draws only, in nats per token."""

    cross_entropy: float
    stderr: float  # over the contexts that were sampled
    bias: float  # of the same estimate on the truth itself, whose cross-entropy is known: too high by this
    floor: float  # nats per token: the surprise of a patch that no draw hit


def plug_in_cross_entropy(
    truth: Markov,
    draw: Callable[[Tensor, int, torch.Generator], Tensor],
    contexts_NT: Tensor,
    patch: int,
    draws: int,
    generator: torch.Generator,
) -> PlugIn:
    """Cross-entropy of the next patch under a black box, from the frequencies of many draws per context.

    q(y) = (c(y) + 1/2) / (S + V^K / 2) for a patch y that c of S draws hit, and -(1/K) E log q(y) with the expectation
    over y exact, from the truth's own law. The half added to each count keeps q positive where no draw hit; what that
    does to a law that has every y is `bias`, measured on the truth at the same contexts, and to one that excludes
    patches `floor` says what they cost.

    Args: draw: (contexts (N, T), S, generator) -> (S, N, K) ids; contexts (N, T) of the truth's text.
    """
    V, N = truth.vocab_size, len(contexts_NT)
    place_K = V ** torch.arange(patch - 1, -1, -1)
    p_NX = truth.ngrams(patch)[truth.context_of(contexts_NT)]

    def surprise(drawn_SNK: Tensor) -> Tensor:
        index_NS = (drawn_SNK * place_K).sum(-1).T
        count_NX = torch.zeros(N, V**patch, dtype=torch.float64)
        count_NX.scatter_add_(1, index_NS, torch.ones(index_NS.shape, dtype=torch.float64))
        q_NX = (count_NX + 0.5) / (draws + V**patch / 2)
        return -(p_NX * q_NX.log()).sum(1) / patch

    found_N = surprise(draw(contexts_NT, draws, generator))
    own_NS = torch.multinomial(p_NX, draws, replacement=True, generator=generator)
    own_SNK = own_NS.T[..., None] // place_K % V
    entropy_N = -torch.xlogy(p_NX, p_NX).sum(1) / patch
    return PlugIn(
        float(found_N.mean()),
        float(found_N.std() / N**0.5),
        float((surprise(own_SNK) - entropy_N).mean()),
        float(torch.tensor(2 * draws + V**patch).log() / patch),
    )
