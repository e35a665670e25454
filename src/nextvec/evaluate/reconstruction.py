"""How well a trained autoencoder reads its patches back, and how much its latent carries (docs/method.md).

Legend: N patches, K tokens per patch, L latent dimensions, Q accuracies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextvec.errors import DataError
from nextvec.evaluate.brier import Document, hash_documents
from nextvec.model.autoencoder import Autoencoder, gaussian_kl
from nextvec.model.posterior import COLLAPSED
from nextvec.scoring.clusters import cluster_ratio

NOISES = (0.1, 0.3, 0.5, 1.0)  # c of mean + c * eps, latent units


@dataclass(frozen=True)
class Accuracy:
    """Shares in [0, 1] with standard errors clustered by document (None with a single document)."""

    token: float
    token_stderr: float | None
    patch: float  # all K tokens right
    patch_stderr: float | None


@dataclass(frozen=True)
class ReconstructionResult:
    """All figures of one autoencoder over the whole patches of some documents."""

    accuracy: Mapping[str, Accuracy]  # at: mean, draw, doubled (mean + 2 std eps), noise-c (mean + c eps)
    sigma: float  # mean posterior standard deviation, latent units
    kl: float  # nats per patch
    collapsed_dimensions: int  # dimensions with KL below 0.01 nats
    sigma_per_dimension: tuple[float, ...]
    kl_per_dimension: tuple[float, ...]  # nats
    patches: int
    patch_size: int  # K
    documents: int  # documents with a whole patch
    documents_hash: str  # sha256 of the token ids given
    tokenizer_hash: str
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'decoded from':<22}{'tokens right':>24}{'patches right':>24}"]
        for name, at in self.accuracy.items():
            lines.append(
                f"{_WORDS.get(name, name.replace('noise-', 'mean + ') + ' eps'):<22}"
                f"{_share(at.token, at.token_stderr):>24}{_share(at.patch, at.patch_stderr):>24}"
            )
        L = len(self.kl_per_dimension)
        return "\n".join(
            [
                *lines,
                f"posterior: mean std {self.sigma:.3f}, KL {self.kl:.1f} nats per patch, "
                f"{self.collapsed_dimensions} of {L} dimensions collapsed (KL < {COLLAPSED} nats)",
                f"over {self.patches:,} whole patches of {self.patch_size} tokens in {self.documents:,} documents, seed "
                f"{self.seed}, tokenizer {self.tokenizer_hash[:12]}, text {self.documents_hash[:12]}",
            ]
        )


_WORDS = {"mean": "mean", "draw": "posterior draw", "doubled": "posterior, std x 2"}


@torch.no_grad()
def evaluate_reconstruction(
    autoencoder: Autoencoder,
    documents: Sequence[Document],
    *,
    generator: torch.Generator,
    tokenizer_hash: str,
    batch_rows: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> ReconstructionResult:
    """Token and patch accuracy at the mean, at a posterior draw and under noise; std and KL of the posterior.

    Decoding is by the most likely token. All noisy figures use the same eps of a patch, so that they compare. Only
    whole patches are read: K real tokens from the start of a document; a last, shorter piece is left out.

    Args: documents: token ids of each, its end-of-text token included; generator: on the autoencoder's device;
    batch_rows: patches per pass; progress: called with (patches done, patches in all).
    Raises DataError when no document holds a whole patch.
    """
    K = autoencoder.config.patch_size
    counts = np.array([len(document) // K for document in documents], dtype=np.int64)
    if counts.sum() == 0:
        longest = max((len(document) for document in documents), default=0)
        raise DataError(
            f"nothing to reconstruct: no document holds a patch of {K} tokens; got {len(documents)} documents of at "
            f"most {longest} tokens: give longer ones"
        )
    pieces = [document[: K * n].astype(np.int64) for document, n in zip(documents, counts, strict=True)]
    ids_NK = torch.from_numpy(np.concatenate(pieces)).view(-1, K)
    device = autoencoder.embedding.weight.device
    right = []
    sigma_L = torch.zeros(autoencoder.config.latent, dtype=torch.float64)
    kl_L = torch.zeros_like(sigma_L)
    done = 0
    for chunk_NK in ids_NK.split(batch_rows):
        chunk_NK = chunk_NK.to(device)
        posterior = autoencoder.encode(chunk_NK)
        mean_NL, std_NL = posterior.mean, posterior.log_std.exp()
        eps_NL = torch.randn(mean_NL.shape, generator=generator, device=device, dtype=mean_NL.dtype)
        spreads: list[Tensor | float] = [0.0, std_NL, 2 * std_NL, *NOISES]
        hits = [autoencoder.decode_tokens(mean_NL + spread * eps_NL) == chunk_NK for spread in spreads]
        shares = [share for hit in hits for share in (hit.float().mean(dim=-1), hit.all(dim=-1).float())]
        right.append(torch.stack(shares, dim=-1).cpu())
        sigma_L += std_NL.sum(dim=0).cpu()
        kl_L += gaussian_kl(posterior).sum(dim=0).cpu()
        done += len(chunk_NK)
        if progress is not None:
            progress(done, len(ids_NK))
    right_NQ = torch.cat(right)
    owner_N = torch.from_numpy(np.repeat(np.arange(len(documents)), counts))
    ratio = cluster_ratio(right_NQ, torch.ones_like(right_NQ, dtype=torch.bool), owner_N)
    shares_Q = ratio.mean.tolist()
    errors_Q = [None] * len(shares_Q) if ratio.covariance is None else ratio.covariance.diagonal().sqrt().tolist()
    names = ["mean", "draw", "doubled", *(f"noise-{c}" for c in NOISES)]
    kl = kl_L / len(ids_NK)
    sigma = sigma_L / len(ids_NK)
    return ReconstructionResult(
        accuracy={
            name: Accuracy(shares_Q[2 * i], errors_Q[2 * i], shares_Q[2 * i + 1], errors_Q[2 * i + 1])
            for i, name in enumerate(names)
        },
        sigma=float(sigma.mean()),
        kl=float(kl.sum()),
        collapsed_dimensions=int((kl < COLLAPSED).sum()),
        sigma_per_dimension=tuple(sigma.tolist()),
        kl_per_dimension=tuple(kl.tolist()),
        patches=len(ids_NK),
        patch_size=K,
        documents=ratio.clusters,
        documents_hash=hash_documents(documents),
        tokenizer_hash=tokenizer_hash,
        seed=generator.initial_seed(),
    )


def _share(value: float, error: float | None) -> str:
    return f"{100 * value:.3f} %" + ("" if error is None else f" ± {100 * error:.3f}")
