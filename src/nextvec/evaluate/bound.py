"""Bits per byte over whole documents: an upper bound for the soft-decoded CALM, the exact value of models of tokens.

The positions are those of the protocol `documents-N` (`evaluate.windows`): every patch from the second of a document on,
once, with the same context for both models. The tokens of a patch that lie beyond the document's end are padding and
count nowhere; its end-of-text token is a real token and costs bits, without adding bytes. Bytes are those of the
scored tokens' decoded text, in UTF-8.

Every fourth document, from the first, is for fitting the decoder's temperature; the figures are of the others, also
where nothing is fitted, so that all of them compare.

Legend: S draws, B windows in a batch, Q starts, N scored patches, K tokens per patch, D width, C points of the curve, G decoder
temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from nextvec.errors import ConfigError, DataError
from nextvec.evaluate.windows import (
    BASELINE_STRIDE,
    Batch,
    Document,
    Plan,
    Window,
    batches,
    hash_documents,
    plan,
    tensors,
)
from nextvec.model.calm import Calm
from nextvec.model.heads.autoregressive import AutoregressiveHead
from nextvec.model.heads.mixture import MixtureHead
from nextvec.model.text_states import States
from nextvec.model.token_lm import TokenLM
from nextvec.scoring.clusters import cluster_ratio
from nextvec.scoring.likelihood import Bound, Exact, Likelihood, Text, nested_bounds, patch_log_probability
from nextvec.text.tokenizer import Tokenizer

FIT_EVERY = 4  # of so many documents one is for the temperature
GRIDS = (  # name, temperatures as factors of the best so far, patches of the fit's documents, most draws
    ("temperature", tuple(2.0**i for i in range(-1, 6)), 256, 16),  # 0.5 .. 32
    ("temperature, finer", tuple(2.0 ** (i / 4) for i in range(-3, 4)), 512, 64),
)
LATENTS = 8192  # decoded in one pass
BEFORE = 16  # tokens decoded with a patch, so that a character cut by its start is counted once

Progress = Callable[[str, int, int], None]  # what, windows done, windows in all


@torch.no_grad()
def evaluate_likelihood(
    calm: Calm | None,
    baseline: TokenLM | Calm | None,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    context_tokens: int,
    generator: torch.Generator,
    patch_size: int = BASELINE_STRIDE,
    draws: int = 64,
    temperature: float | None = None,
    patches: int | None = None,
    batch_rows: int = 8,
    progress: Progress | None = None,
) -> Likelihood:
    """Bits per byte of a CALM, a baseline, or both, over the second and later patches of documents.

    The baseline is a token Transformer, or a CALM whose head draws tokens and knows their probabilities.

    Args: documents: token ids of each, its end-of-text token included; generator: on the models' device, and with batch_rows
    all that the bound depends on beside the arguments; patch_size: K where there is no CALM to say it; draws: the
    largest S, a power of two; temperature: of the decoder, fitted when None; patches: score only so many, evenly spread
    over all; batch_rows: windows per pass.

    Raises ConfigError for draws, temperature, context or patches that cannot work, DataError for fewer than two documents
    that can be scored, or a model whose probabilities are not finite numbers.
    """
    if draws < 1 or draws & (draws - 1):
        best = 2 ** max(0, round(math.log2(max(1, draws))))
        raise ConfigError(f"draws must be a power of two, since the curve doubles them; got {draws}, nearest {best}")
    if temperature is not None and not 0 < temperature < math.inf:
        raise ConfigError(f"the decoder's temperature must be a positive number; got {temperature}")
    if patches is not None and patches < 1:
        raise ConfigError(f"the number of patches must be at least 1; got {patches}")
    own = next((model.patch_size for model in (calm, baseline) if isinstance(model, Calm)), None)
    K = patch_size if own is None else own
    if isinstance(baseline, Calm) and baseline.patch_size != K:
        raise ConfigError(f"both models must have the same K to be scored together; got {K} and {baseline.patch_size}")
    if K < 1:
        raise ConfigError(f"the patch size must be at least 1; got {K}")
    layout = plan(documents, "documents", context_tokens, K, "patch_starts")
    owners = sorted({window.document for window in layout.windows})
    fit, scored = set(owners[::FIT_EVERY]), [owner for i, owner in enumerate(owners) if i % FIT_EVERY]
    if not scored:
        raise DataError(
            f"figures are of other documents than the temperature is fitted on, so at least 2 documents must be longer "
            f"than their first patch of {K} tokens; got {len(owners)}: give more documents"
        )
    fitted, fit_draws, fit_patches = temperature is None, 0, 0
    if calm is not None and temperature is None:
        windows = [w for w in layout.windows if w.document in fit]
        temperature, fit_patches, fit_draws = _fit(calm, layout, windows, draws, generator, batch_rows, progress)

    windows = [w for w in layout.windows if w.document not in fit]
    report = _reporter(progress, "scored text", windows)
    columns_N: list[list[Tensor]] = []
    tokens, sizes, owner = [], [], []
    for group, batch, chosen_BQ in _positions(layout, windows, K, patches, batch_rows):
        columns = []
        if calm is not None:
            assert temperature is not None
            log_p_GSN = _log_p(calm, batch, chosen_BQ, draws, (temperature, 1.0), generator)
            columns += [*nested_bounds(log_p_GSN[0]).cpu(), nested_bounds(log_p_GSN[1])[-1].cpu()]
        if baseline is not None:
            columns.append(-_exact_log_p(baseline, batch, chosen_BQ).cpu())
        columns_N.append(columns)
        tokens.append(batch.valid[chosen_BQ].sum(dim=-1))
        row_N, start_N = chosen_BQ.nonzero(as_tuple=True)
        at = [(group[row], int(batch.starts[q])) for row, q in zip(row_N.tolist(), start_N.tolist(), strict=True)]
        sizes += [patch_bytes(tokenizer, layout.texts[w.document], w.start + start, K) for w, start in at]
        owner += [w.document for w, _ in at]
        report(len(group))
    nats_NC = torch.stack([torch.cat(column) for column in zip(*columns_N, strict=True)], dim=-1).double()
    if not bool(nats_NC.isfinite().all()):
        raise DataError(
            "the model gives probabilities that are not finite numbers: its training diverged, use another run"
        )
    text = Text(
        protocol=layout.name,
        tokenizer_hash=tokenizer.hash,
        documents=len(documents),
        documents_hash=hash_documents(documents),
        patch_size=K,
        scored_documents=len(set(owner)),
        fit_documents=len(fit),
        patches=len(owner),
        tokens=int(torch.cat(tokens).sum()),
        bytes=sum(sizes),
    )
    if text.bytes == 0:
        raise DataError("the scored tokens decode to no text at all; give documents with text after their first patch")
    models = [model for model in (calm, baseline) if model is not None]
    both = calm is not None and baseline is not None
    if both:  # the excess, as a column of its own: its error is that of paired positions
        nats_NC = torch.cat([nats_NC, nats_NC[:, -3:-2] - nats_NC[:, -1:]], dim=-1)
    ratio = cluster_ratio(
        nats_NC / math.log(2),
        torch.ones_like(nats_NC, dtype=torch.bool),
        torch.tensor(owner),
        torch.tensor(sizes, dtype=torch.float64),
    )
    bits = ratio.mean.tolist()
    errors = None if ratio.covariance is None else ratio.covariance.diagonal().clamp_min(0).sqrt().tolist()
    nats = [value * math.log(2) * text.bytes / text.tokens for value in bits]
    bound = exact = None
    if calm is not None:
        assert temperature is not None
        points = draws.bit_length()
        bound = Bound(
            draws=tuple(2**i for i in range(points)),
            bits_per_byte=tuple(bits[:points]),
            stderr=None if errors is None else tuple(errors[:points]),
            nats_per_token=tuple(nats[:points]),
            temperature=temperature,
            fitted=fitted,
            fit_draws=fit_draws,
            fit_patches=fit_patches,
            bits_per_byte_unscaled=bits[points],
        )
    if baseline is not None:
        at_exact = -2 if both else -1
        exact = Exact(bits[at_exact], None if errors is None else errors[at_exact], nats[at_exact])
    return Likelihood(
        text=text,
        bound=bound,
        exact=exact,
        excess=bits[-1] if both else None,
        excess_stderr=errors[-1] if both and errors is not None else None,
        uniform_bits_per_byte=math.log2(models[0].vocab_size) * text.tokens / text.bytes,
        seed=generator.initial_seed(),
    )


def patch_bytes(tokenizer: Tokenizer, ids: Document, start: int, length: int) -> int:
    """UTF-8 bytes that ids[start : start + length] add to the decoded text; special tokens add none.

    A character that a patch only begins is shown as U+FFFD, three bytes, until the next one completes it: over
    patches that follow each other the differences cancel, and the sum is the length of the whole text.
    """
    begin = max(0, start - BEFORE)
    before = [int(i) for i in ids[begin:start]]
    patch = [int(i) for i in ids[start : start + length]]
    with_patch, without = (tokenizer.decode(part, skip_special=True) for part in (before + patch, before))
    return len(with_patch.encode()) - len(without.encode())


def _fit(
    calm: Calm,
    layout: Plan,
    windows: Sequence[Window],
    draws: int,
    generator: torch.Generator,
    batch_rows: int,
    progress: Progress | None,
) -> tuple[float, int, int]:
    """The decoder temperature with the lowest bound at `draws` or the grid's most, on a coarse grid and a finer one.

    Also returns the patches and draws of the second. It is a factor 2^(1/4) apart; near its lowest point the bound is flat.
    """
    best, count, fit_draws = 1.0, 0, 1
    for name, grid, patches, most in GRIDS:
        temperatures = [best * factor for factor in grid]
        total_G = torch.zeros(len(grid), dtype=torch.float64)
        count, fit_draws = 0, min(draws, most)
        report = _reporter(progress, name, windows)
        for group, batch, chosen_BQ in _positions(layout, windows, calm.patch_size, patches, batch_rows):
            log_p_GSN = _log_p(calm, batch, chosen_BQ, fit_draws, temperatures, generator)
            total_G += torch.stack([nested_bounds(log_p_SN)[-1].double().sum() for log_p_SN in log_p_GSN]).cpu()
            count += log_p_GSN.shape[-1]
            report(len(group))
        best = temperatures[int(total_G.nan_to_num(nan=math.inf).argmin())]
    return best, count, fit_draws


def _positions(
    layout: Plan, windows: Sequence[Window], K: int, limit: int | None, batch_rows: int
) -> Iterator[tuple[list[Window], Batch, Tensor]]:
    """Batches of windows with the patches to score as a mask (B, Q): all, or `limit` of them evenly spread."""
    counts = [(window.last - window.first) // K + 1 for window in windows]
    total = sum(counts)
    kept = total if limit is None else min(limit, total)
    offset = dict(zip(windows, accumulate(counts[:-1], initial=0), strict=True))
    for group in batches(windows, batch_rows):
        batch = tensors(layout, group, K, K)
        index_BQ = torch.tensor([offset[window] for window in group])[:, None] + torch.arange(len(batch.starts))
        inside_BQ = batch.starts <= torch.tensor([window.last for window in group])[:, None]
        chosen_BQ = inside_BQ & ((index_BQ + 1) * kept // total > index_BQ * kept // total)
        if bool(chosen_BQ.any()):
            yield group, batch, chosen_BQ


def _log_p(
    calm: Calm,
    batch: Batch,
    chosen_BQ: Tensor,
    draws: int,
    temperatures: Sequence[float],
    generator: torch.Generator,
) -> Tensor:
    """log prod_k p_k(y_k | z) under S drawn latents z of each chosen patch, (G, S, N)."""
    device, K = calm.device, calm.patch_size
    state_BPD = calm.states(batch.context.to(device).unflatten(1, (-1, K)))
    chosen_BQ, at_Q = chosen_BQ.to(device), batch.starts.to(device) // K - 1
    state_ND = state_BPD[:, at_Q][chosen_BQ]
    target_NK, valid_NK = batch.target.to(device)[chosen_BQ], batch.valid.to(device)[chosen_BQ]
    parts = []
    left = draws
    known: Tensor | float = 0.0
    mixture = calm.head if isinstance(calm.head, MixtureHead) else None
    if mixture is not None:
        # of all Gaussians only the patch's own is looked at, with its probability: a lower bound of p with nearly all of it
        log_NK = _of_chosen(mixture, state_BPD, at_Q, batch.target.to(device), chosen_BQ)
        known = log_NK.masked_fill(~valid_NK, 0.0).sum(-1)
    while left:
        now = min(left, max(1, LATENTS // len(state_ND)))
        latents = (
            calm.draw_latents(state_ND, now, generator)
            if mixture is None
            else mixture.latents_of(target_NK, now, generator)
        )
        hidden_MKD = calm.autoencoder.decode_hidden(latents).flatten(0, 1)
        log_p_GM = patch_log_probability(
            hidden_MKD,
            calm.autoencoder.embedding.weight,
            target_NK.repeat(now, 1),
            valid_NK.repeat(now, 1),
            temperatures,
        )
        parts.append(log_p_GM.unflatten(1, (now, -1)) + known)
        left -= now
    return torch.cat(parts, dim=1)


def _of_chosen(
    head: MixtureHead | AutoregressiveHead, state_BPD: States, at_Q: Tensor, target_BQK: Tensor, chosen_BQ: Tensor
) -> Tensor:
    """log p of each token of the chosen patches, (N, K), row by row: states of one text look it up together."""
    parts = []
    for row, chosen_Q in enumerate(chosen_BQ):
        picked = chosen_Q.nonzero()[:, 0]
        if len(picked):
            one = slice(row, row + 1)
            parts.append(head.log_probabilities(state_BPD[one][:, at_Q[picked]], target_BQK[one][:, picked])[0])
    return torch.cat(parts)


def _exact_log_p(baseline: TokenLM | Calm, batch: Batch, chosen_BQ: Tensor) -> Tensor:
    """log probability of each chosen patch, every token given all before it in the window, (N,)."""
    device = baseline.device
    if isinstance(baseline, Calm):
        head = baseline.head
        assert isinstance(head, AutoregressiveHead), "the other heads have no likelihood"
        state_BPD = baseline.states(batch.context.to(device).unflatten(1, (-1, baseline.patch_size)))
        at_Q, chosen_BQ = batch.starts.to(device) // baseline.patch_size - 1, chosen_BQ.to(device)
        log_p_NK = _of_chosen(head, state_BPD, at_Q, batch.target.to(device), chosen_BQ)
        return log_p_NK.masked_fill(~batch.valid.to(device)[chosen_BQ], 0.0).sum(-1)
    state_BTD = baseline.states(batch.ids.to(device)[..., None])
    at_QK = batch.starts[:, None] - 1 + torch.arange(batch.target.shape[-1])
    chosen_BQ = chosen_BQ.to(device)
    return patch_log_probability(
        state_BTD[:, at_QK.to(device)][chosen_BQ],
        baseline.output.weight,
        batch.target.to(device)[chosen_BQ],
        batch.valid.to(device)[chosen_BQ],
    )[0]


def _reporter(progress: Progress | None, what: str, windows: Sequence[Window]) -> Callable[[int], None]:
    done = 0

    def report(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(what, done, len(windows))

    return report
