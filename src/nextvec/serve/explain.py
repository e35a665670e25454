"""Why a patch was chosen, for the page: its candidates with votes, its latent, and the draws projected to two dimensions.

Legend: N draws, L latent, K tokens per patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nextvec.model.interface import LanguageModel
from nextvec.sampling.approximate import centre
from nextvec.sampling.draw import HasLatents
from nextvec.sampling.engine import Pool
from nextvec.sampling.explain import Candidate, hold_vote
from nextvec.sampling.settings import Sampling

SHOWN = 12  # candidates that are told one by one
POINTS = 400  # draws that are projected at most


class PatchDetail(NamedTuple):
    """patch: the ids chosen; draws, kept: as in `sampling.explain.Vote`; candidates: the SHOWN most
    likely, or in place of the last of them the one chosen; others: candidates, votes
    and probability of the rest together; latent: of a draw that decodes to the patch, None where the head draws tokens.

    points: latents of up to POINTS draws as (x, y, candidate), the projection that keeps most of their variance, `share` of it;
    candidate is its place in `candidates`, -1 for another, -2 for a draw that does not agree with the prompt's rest.
    point: the place in `points` of the draw whose latent is told.

    Of a centre nothing was chosen by votes: candidates are the patches that its latents decode to one by one, and the one
    told, with probability 1 and perhaps no votes; the latent is the mean, which is the last of the points.
    """

    patch: tuple[int, ...]
    draws: int
    kept: int
    candidates: tuple[Candidate, ...]
    others: tuple[int, int, float]
    latent: tuple[float, ...] | None
    points: tuple[tuple[float, float, int], ...]
    point: int
    share: float


@torch.inference_mode()
def explain_patch(model: LanguageModel, pool: Pool, rest: Sequence[int], settings: Sampling) -> PatchDetail | None:
    """The vote that chose a patch, from the draws it was chosen from, also from a single one; None of a token model.

    rest: ids of the prompt that the patch begins with.
    """
    tokens_NK = pool.tokens
    if pool.latents is not None and isinstance(model, HasLatents):
        tokens_NK = model.autoencoder.decode_tokens(pool.latents)
    if tokens_NK is None:
        return None
    centred = settings.method == "centre"
    vote = hold_vote(tokens_NK, rest, 1.0 if centred or len(tokens_NK) == 1 else settings.temperature)
    size, winner = len(rest), pool.patch[len(rest) :]
    ordered = list(vote.candidates)
    if centred:
        ordered = [Candidate(each.ids, each.votes, float(each.ids == winner)) for each in ordered]
        if not any(each.ids == winner for each in ordered):
            ordered.append(Candidate(winner, 0, 1.0))
    late = next((index for index, each in enumerate(ordered) if index >= SHOWN and each.ids == winner), None)
    if late is not None:
        ordered.insert(SHOWN - 1, ordered.pop(late))
    shown, others = tuple(ordered[:SHOWN]), ordered[SHOWN:]
    place = {candidate.ids: index for index, candidate in enumerate(shown)}
    drawn = tokens_NK.tolist()
    kept = [ids[: vote.matched] == list(rest[: vote.matched]) for ids in drawn]
    of_draw = [place.get(tuple(ids[size:]), -1) if keep else -2 for ids, keep in zip(drawn, kept, strict=True)]
    latent: tuple[float, ...] | None = None
    points: list[tuple[float, float]] = []
    share, point = 0.0, 0
    if pool.latents is not None:
        latent_NL = pool.latents
        told = sorted(range(len(drawn)), key=lambda index: not kept[index])  # those that count before the others
        if centred:
            latent_NL = torch.cat((latent_NL, centre(latent_NL[None])))
            chosen = len(drawn)
            of_draw.append(place[winner])
        else:
            chosen = next((i for i, ids in enumerate(drawn) if kept[i] and tuple(ids[size:]) == winner), 0)
            told.remove(chosen)
        told = [*told[: POINTS - 1], chosen]
        latent = tuple(round(value, 3) for value in latent_NL[chosen].tolist())
        points, share = project(latent_NL[told])
        of_draw = [of_draw[index] for index in told]
        point = len(told) - 1
    summed = (len(others), sum(each.votes for each in others), sum(each.probability for each in others))
    marked = tuple((x, y, where) for (x, y), where in zip(points, of_draw, strict=bool(points)))
    return PatchDetail(pool.patch, vote.draws, vote.kept, shown, summed, latent, marked, point, share)


def project(latent_NL: Tensor) -> tuple[list[tuple[float, float]], float]:
    """Each draw's first two principal coordinates, and their share of the variance; all zero for fewer than two draws."""
    if len(latent_NL) < 2:
        return [(0.0, 0.0)] * len(latent_NL), 0.0
    centred_NL = latent_NL.double() - latent_NL.double().mean(0)
    left_NN, scale_N, right_NL = torch.linalg.svd(centred_NL, full_matrices=False)
    # an axis may point either way: its largest weight is made positive, so that the same draws give the same picture
    largest = right_NL[:2].abs().argmax(1)
    sign = right_NL[:2].gather(1, largest[:, None])[:, 0].sign()
    flat_N2 = F.pad(left_NN[:, :2] * scale_N[:2] * sign, (0, 2))[:, :2]  # a single latent dimension has one axis
    share = float(scale_N[:2].square().sum() / scale_N.square().sum().clamp(min=1e-30))
    return [(round(x, 3), round(y, 3)) for x, y in flat_N2.tolist()], round(share, 3)
