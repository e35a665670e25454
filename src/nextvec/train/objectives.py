"""What is minimised, for each kind of run, as one module whose forward is the loss (so that DDP and accelerate can wrap it).

Legend: B rows, T tokens per row, P patches, K tokens per patch, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nextvec.card import model_card
from nextvec.config import AutoencoderRun, CalmRun, EnergySettings, RecipeSettings, RunConfig, TokenLMRun
from nextvec.errors import ConfigError
from nextvec.model.autoencoder import Autoencoder
from nextvec.model.calm import Calm
from nextvec.model.cross_entropy import linear_cross_entropy
from nextvec.model.heads.energy import EnergyHead
from nextvec.model.heads.interface import Metrics
from nextvec.model.init import initialise
from nextvec.model.text_states import vector_of, with_vector
from nextvec.model.token_lm import TokenLM
from nextvec.rundir import save_run
from nextvec.text.tokenizer import Tokenizer
from nextvec.train.auxiliary import NextPatchTokens, auxiliary_scale
from nextvec.train.latents import Encoded

NO_AUTOENCODER = "training CALM needs a trained autoencoder: give --autoencoder RUN, or --from RUN"
INIT_GAIN = 0.8  # standard deviation of fresh matrices times sqrt(width); 0.058 at width 192 (docs/log.md)


class AutoencoderTraining(nn.Module):
    """Reconstruction and clipped KL of every patch of a window; patches are independent of each other.

    Tokens of a factored autoencoder are independent as well, so that text teaches it nothing but which tokens are frequent:
    it trains on as many tokens as the batch has, all of the vocabulary equally often.
    """

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor, generator: torch.Generator | None, progress: float) -> tuple[Tensor, Metrics]:
        ids_BT = self._all_tokens(ids_BT, generator) if self.training and self.model.config.factored else ids_BT
        return self.model.loss(ids_BT.reshape(-1, self.model.config.patch_size), generator)

    def _all_tokens(self, like_BT: Tensor, generator: torch.Generator | None) -> Tensor:
        """Random orders of the vocabulary one after the other, (B, T)."""
        orders = [
            torch.randperm(self.model.config.vocab_size, generator=generator, device=like_BT.device)
            for _ in range(-(-like_BT.numel() // self.model.config.vocab_size))
        ]
        return torch.cat(orders)[: like_BT.numel()].view_as(like_BT)


class CalmTraining(nn.Module):
    """The head's loss of patches 2..P given the patches before; recipe `fast` adds the auxiliary cross-entropy."""

    def __init__(self, model: Calm, energy: EnergySettings, recipe: RecipeSettings) -> None:
        super().__init__()
        self.model = model
        if isinstance(model.head, EnergyHead):
            model.head.score = energy
        self.recipe = recipe
        width = model.config.backbone.width
        self.auxiliary = NextPatchTokens(model.vocab_size, model.patch_size, width) if recipe.name == "fast" else None

    def forward(
        self, batch: Tensor | Encoded, generator: torch.Generator | None, progress: float
    ) -> tuple[Tensor, Metrics]:
        """batch: ids (B, T), with or without the stored posteriors of their patches."""
        reads = self.model.config.reads_latents
        ids_BT, encoded = (batch.ids, batch) if isinstance(batch, Encoded) else (batch, None)
        ids_BPK = ids_BT.unflatten(1, (-1, self.model.patch_size))
        if reads and encoded is None:  # each patch is encoded once, as input and as target
            encoded = Encoded(ids_BT, *self.model.teacher(ids_BPK))
        latent_BPL = encoded.inputs() if reads and encoded is not None else None
        state_BPD, target_BPK = self.model.states(ids_BPK[:, :-1], latent_BPL=latent_BPL), ids_BPK[:, 1:]
        if encoded is None or not self.model.learns_from_posterior:
            loss, metrics = self.model.loss(state_BPD, target_BPK, generator)
        else:
            target: Any = encoded.targets()
            loss, metrics = self.model.head.loss(state_BPD, target, generator)
        if self.auxiliary is not None:
            scale = self.recipe.auxiliary_weight * auxiliary_scale(progress, self.recipe.auxiliary_until)
            if scale > 0.0:
                width = self.model.config.backbone.width  # what a head reads besides the state stands behind it
                auxiliary = self.auxiliary(vector_of(state_BPD)[..., :width].flatten(0, 1), target_BPK.flatten(0, 1))
                loss = loss + scale * auxiliary
                metrics["auxiliary"] = auxiliary.detach()
        return loss, metrics


class TokenLMTraining(nn.Module):
    """Next-token cross-entropy."""

    def __init__(self, model: TokenLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor, generator: torch.Generator | None, progress: float) -> tuple[Tensor, Metrics]:
        state_BTD = self.model.states(ids_BT[:, :-1, None])
        loss, accuracy = linear_cross_entropy(
            state_BTD.flatten(0, 1), self.model.output.weight, ids_BT[:, 1:].reshape(-1)
        )
        return loss, {"cross_entropy": loss.detach(), "accuracy": accuracy.detach()}


@dataclass(frozen=True)
class BrierProbe:
    """Held-out documents on which BrierLM is measured during training (protocol documents-N, as `nextvec eval`)."""

    documents: Sequence[np.ndarray]
    context_tokens: int  # N
    stride: int  # K of the comparison
    draws: int = 4
    seed: int = 0
    per_document: bool = False  # keep what each document contributes, from which curves are resampled


class Objective:
    """One run's training module, its held-out measurement and its export."""

    def __init__(
        self,
        config: RunConfig,
        module: nn.Module,
        model: nn.Module,
        tokenizer: Tokenizer,
        brier: BrierProbe | None = None,
    ) -> None:
        self.config = config
        self.brier = brier
        self.module: Any = module  # the loop may put a wrapper (DDP) here; `model` stays the bare model
        self.model = model
        self.tokenizer = tokenizer

    def loss(
        self, batch: Tensor | Encoded, generator: torch.Generator | None, progress: float
    ) -> tuple[Tensor, Metrics]:
        """Scalar loss and detached metrics, without a host synchronisation. `progress` in [0, 1) of training."""
        result: tuple[Tensor, Metrics] = self.module(batch, generator, progress)
        return result

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Tensor], generator: torch.Generator | None) -> dict[str, Any]:
        """Mean training metrics over held-out batches of ids (B, T).

        For CALM also the conditioning gap; for CALM and the baseline Brier-1..4 and BrierLM where a probe was given.
        """
        self.module.eval()
        sums: dict[str, float] = {}
        count = 0
        for ids_BT in batches:
            _, metrics = self.loss(ids_BT, generator, 0.0)
            if isinstance(self.model, Calm):
                metrics["conditioning_gap"] = self._conditioning_gap(ids_BT, metrics, generator)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            count += 1
        result: dict[str, Any] = {name: value / count for name, value in sums.items()}
        if self.brier is not None and isinstance(self.model, Calm | TokenLM):
            result |= self._brier_figures(self.brier, self.model)
        self.module.train()
        return result

    def _brier_figures(self, probe: BrierProbe, model: Calm | TokenLM) -> dict[str, Any]:
        from nextvec.evaluate.brier import evaluate_brier

        found = evaluate_brier(
            model,
            probe.documents,
            context_tokens=probe.context_tokens,
            stride=probe.stride,
            draws=probe.draws,
            generator=torch.Generator(model.device).manual_seed(probe.seed),
            tokenizer_hash=self.tokenizer.hash,
        )
        keep = (
            "brier",
            "brier_stderr",
            "brier_lm",
            "brier_lm_stderr",
            *(["per_document"] if probe.per_document else []),
        )
        return {name: value for name, value in found.to_dict().items() if name in keep}

    def _conditioning_gap(self, ids_BT: Tensor, metrics: Metrics, generator: torch.Generator | None) -> Tensor:
        """The head's loss with states moved to other positions minus the true one: 0 while it ignores its state.

        What a head with recall finds stays: the text is that of the position.
        """
        assert isinstance(self.model, Calm)
        ids_BPK = ids_BT.unflatten(1, (-1, self.model.patch_size))
        state = self.model.states(ids_BPK[:, :-1])
        vector = vector_of(state)
        moved = vector.flatten(0, 1).roll(vector.shape[1] // 2 + 1, 0).view_as(vector)
        loss, _ = self.model.loss(with_vector(state, moved), ids_BPK[:, 1:], generator)
        return loss - metrics[self.model.head.objective]

    def save(self, path: Path, trained: Mapping[str, Any]) -> None:
        """Write the run directory's model files and card, without training-only parts."""
        figures = {name: value for name, value in trained.items() if name != "per_document"}
        card = model_card(self.config, self.model, self.tokenizer.hash, figures)
        save_run(path, self.config, self.model, self.tokenizer, card)


def build_objective(
    config: RunConfig,
    tokenizer: Tokenizer,
    autoencoder: Autoencoder | None = None,
    brier: BrierProbe | None = None,
) -> Objective:
    """The objective of a run with fresh parameters from `config.train.seed`. CALM needs a trained `autoencoder`.

    Only one that neither draws nor reads latents does without: it keeps an untrained one, which nothing uses.
    """
    generator = torch.Generator().manual_seed(config.train.seed)
    model: Autoencoder | Calm | TokenLM
    module: AutoencoderTraining | CalmTraining | TokenLMTraining
    if isinstance(config, CalmRun):
        if autoencoder is None:
            if config.model.uses_autoencoder:
                raise ConfigError(NO_AUTOENCODER)
            autoencoder = Autoencoder(config.model.autoencoder)
            initialise(autoencoder, torch.Generator().manual_seed(config.train.seed))
        model = Calm(config.model, autoencoder)
        module = CalmTraining(model, config.energy, config.recipe)
    elif isinstance(config, TokenLMRun):
        model = TokenLM(config.model)
        module = TokenLMTraining(model)
    else:
        assert isinstance(config, AutoencoderRun)
        model = Autoencoder(config.model)
        module = AutoencoderTraining(model)
    width = config.model.width if isinstance(config, AutoencoderRun) else config.model.backbone.width
    initialise(module, generator, config.train.init_std or INIT_GAIN / width**0.5)
    module.train()
    return Objective(config, module, model, tokenizer, brier)
