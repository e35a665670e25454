"""What a training reads, how it learns and how long: data, optimiser, loop, recipe. Reached through `nextvec.config`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nextvec.settings import Config, Count, Positive, Rate, Seed


class EnergySettings(Config):
    """Energy loss (docs/method.md)."""

    draws: Annotated[int, Field(ge=2)] = 8  # S, model draws per position [P]
    teacher: Literal["exact", "sampled"] = "exact"  # exact: closed form over the posterior [D]; sampled: the paper's
    teacher_draws: Positive = 100  # M, used by teacher="sampled" [P]
    alpha: Annotated[float, Field(gt=0, lt=2)] = 1.0  # exponent; strictly proper in (0, 2) [P]

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.teacher == "exact" and self.alpha != 1.0:
            raise ValueError(
                f'teacher "exact" is derived for alpha = 1; got alpha = {self.alpha}: use teacher "sampled"'
            )
        return self


class RecipeSettings(Config):
    """How CALM learns. `paper`: the energy loss alone. `fast`: with an auxiliary cross-entropy in training only."""

    name: Literal["paper", "fast"] = "fast"
    auxiliary_weight: Annotated[float, Field(ge=0)] = 1.0  # weight of the cross-entropy of the next K tokens, `fast`
    auxiliary_until: Annotated[float, Field(ge=0, le=1)] = 1.0  # fraction of training after which the weight is 0


class CorpusPart(Config):
    """One corpus of a mixture."""

    path: str  # shard directory written by `nextvec prepare`
    weight: Annotated[float, Field(gt=0)] = 1.0  # share of the windows, relative to the other weights


class DataSettings(Config):
    """Where the tokens come from and how they are laid out."""

    path: str | None = None  # shard directory written by `nextvec prepare`; required without `mixture`
    mixture: tuple[CorpusPart, ...] = ()  # several of them, mixed by weight, instead of `path`
    packing: Literal["aligned", "packed"] | None = None  # None: as the manifest says
    context_tokens: Positive = 1024  # context length in tokens, a multiple of K
    rows: Positive = 4  # windows per batch; a step has train.accumulate batches, however many processes share them
    latents: bool = False  # training reads the teacher that `nextvec prepare --latents` stored, instead of encoding

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.path is None and not self.mixture:
            raise ValueError("path is required: a shard directory; or mixture, several of them with weights")
        if self.path and self.mixture:
            raise ValueError("give either path or mixture, not both")
        return self

    @property
    def corpora(self) -> tuple[CorpusPart, ...]:
        """The shard directories, one or several."""
        return self.mixture or (CorpusPart(path=self.path or ""),)


class OptimSettings(Config):
    """AdamW, or Muon for the hidden matrices with AdamW for the rest; and the rate schedule (docs/method.md)."""

    name: Literal["adamw", "muon"] = "muon"  # [D]: leaves the energy loss's plateau, docs/log.md; the paper: adamw
    lr: Annotated[float, Field(gt=0)] = 3e-3  # peak rate of AdamW [D]; the paper, with adamw for everything: 3e-4
    matrix_lr: Annotated[float, Field(gt=0)] = 0.02  # peak rate of Muon, used by name="muon"
    momentum: Rate = 0.95  # Nesterov momentum of Muon
    rows_lr: Annotated[float, Field(gt=0)] | None = None  # peak rate of Adagrad by row for n-grams; None: AdamW
    beta1: Rate = 0.9
    beta2: Rate = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1  # on matrices only
    clip: Annotated[float, Field(gt=0)] = 1.0  # global gradient norm
    warmup: Count = 100  # steps of linear warmup
    schedule: Literal["constant", "linear"] = "linear"  # linear: decay to zero at the last step [D]; constant: [P]


class TrainSettings(Config):
    """The loop."""

    init_std: Annotated[float, Field(gt=0)] | None = None  # of fresh matrices; None: 0.8 / sqrt(width) [D]; 0.02 [C]
    steps: Positive = 1000  # optimiser steps
    accumulate: Positive = 1  # batches per optimiser step, dealt out among the processes
    seed: Seed = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where measured faster
    compile: bool = False  # torch.compile of the repeated blocks
    activation_checkpointing: bool = False  # compute the blocks again in the backward pass: less memory, more time
    sharding: Literal["none", "full"] = "none"  # full: several processes hold a part of the model each, not all of it
    log_every: Positive = 10  # steps
    eval_every: Count = 0  # steps; 0: only at the end
    save_every: Count = 0  # steps; 0: by the clock alone, at the end and on Ctrl-C
    save_minutes: Annotated[float, Field(gt=0)] = 10.0  # of wall-clock time, at most, between two checkpoints
    keep_last: Positive = 2  # newest checkpoints that are kept; with one, a damaged file loses the run
    keep_every: Count = 0  # steps; checkpoints of these steps are kept as well; 0: none
    skip_limit: Count = 10  # steps in a row without a finite loss and gradient, skipped, before training stops

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.compile and self.sharding == "full":
            raise ValueError(
                "compile is for blocks that are whole in a process, and sharding is full: leave one of them out"
            )
        return self
