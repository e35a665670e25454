"""Generation and evaluation of a trained run, as units of work whose speed is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nextvec.bench.plain_generation import plain_calm, plain_text
from nextvec.bench.steps import OTHER
from nextvec.config import RunConfig
from nextvec.errors import ConfigError, DataError
from nextvec.evaluate.brier import Document, evaluate_brier, plan_windows
from nextvec.evaluate.documents import read_documents
from nextvec.evaluate.windows import BASELINE_STRIDE
from nextvec.hardware import DTYPES, Precision
from nextvec.model.autoencoder import Autoencoder
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.rundir import Run, load_run
from nextvec.sampling.draw import abilities
from nextvec.sampling.engine import Engine, Pool
from nextvec.sampling.generate import generate
from nextvec.sampling.settings import Sampling, row_generator
from nextvec.train.data import data_folders

MOST_TEXTS = 16  # texts of one unit, where the model ends them early
WARM_TOKENS = 8


class Generation:
    """Texts from one prompt at batch 1 through the generation loop, seeds 0, 1, .. until `tokens` are drawn.

    Of the prompt its whole patches: the plain arm knows no others.
    """

    def __init__(self, run: Run, prompt: str, sampling: Sampling) -> None:
        self.mark: Callable[[str], None] = lambda part: None
        assert isinstance(run.model, Calm | TokenLM)
        self.model = run.model
        self._sampling = sampling.for_model(abilities(run.model))
        self._tokenizer = run.text_tokenizer
        ids = self._tokenizer.encode(prompt)
        self._prompt = ids[: len(ids) // run.model.patch_size * run.model.patch_size]
        counts: list[int] = []
        while sum(counts) < sampling.max_tokens and len(counts) < MOST_TEXTS:
            counts.append(self._text(len(counts), sampling.max_tokens))
        self.texts, self.tokens = len(counts), sum(counts)
        if not self.tokens:
            raise DataError("the model ends every text at once, so there is no speed to measure: give another --prompt")

    def warm(self) -> None:
        self._text(0, WARM_TOKENS)

    def __call__(self) -> None:
        for seed in range(self.texts):
            self._text(seed, self._sampling.max_tokens)

    def _text(self, seed: int, tokens: int) -> int:
        """Tokens drawn."""
        self.mark(OTHER)
        settings = replace(self._sampling, max_tokens=tokens, seed=seed)
        tokenizer = self._tokenizer
        steps = generate(self.model, [self._prompt], settings, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        return sum(len(step.tokens[0]) for step in steps)

    def pools(self) -> dict[str, float] | None:
        """Of the pools of all patches: candidates, the mean share that is unique, the share that is unanimous."""
        found: list[Pool] = []
        for seed in range(self.texts):
            engine = Engine(
                self.model,
                eos_id=self._tokenizer.eos_id,
                pad_id=self._tokenizer.pad_id,
                slots=1,
                capacity=2 + len(self._prompt) + self._sampling.max_tokens,
            )
            engine.add(self._prompt, replace(self._sampling, seed=seed))
            while len(engine):
                found += [event.pool for event in engine.step() if event.pool.copies is not None]
        if not found:
            return None
        return {
            "candidates": self._sampling.law.candidates,
            "unique": sum(pool.unique / pool.draws for pool in found) / len(found),
            "unanimous": sum(pool.unanimous for pool in found) / len(found),
        }


class PlainGeneration(Generation):
    """The same by the authors' algorithm, for a CALM."""

    def __init__(self, run: Run, prompt: str, sampling: Sampling) -> None:
        assert isinstance(run.model, Calm)
        self.plain = plain_calm(run.model)
        super().__init__(run, prompt, sampling)

    def _text(self, seed: int, tokens: int) -> int:
        self.mark(OTHER)
        chosen, tokenizer = self._sampling.law, self._tokenizer
        ids = plain_text(
            self.plain, self._prompt, chosen.temperature, chosen.candidates, tokens,
            row_generator(seed, 0, self.model.device), eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id,
        )  # fmt: skip
        return len(ids)


class Evaluation:
    """BrierLM over the first documents of a source, through the evaluator of `nextvec eval` with its defaults.

    tokens: of the documents, each counted once. context_tokens: of all windows, which overlap by half.
    """

    def __init__(self, run: Run, documents: list[Document], draws: int) -> None:
        self.mark: Callable[[str], None] = lambda part: None
        assert isinstance(run.model, Calm | TokenLM)
        if not isinstance(run.config, RunConfig):
            raise ConfigError(f"{run.path} holds converted weights, which have no context length to evaluate at")
        self.model = run.model
        self._documents, self._draws, self._hash = documents, draws, run.text_tokenizer.hash
        self._context = run.config.data.context_tokens
        self._stride = run.model.patch_size if isinstance(run.model, Calm) else BASELINE_STRIDE
        self.tokens = sum(len(document) for document in documents)
        windows = plan_windows([len(document) for document in documents], self._context, self._stride)
        self.context_tokens = sum(window.last for window in windows)

    def warm(self) -> None:
        self._evaluate([document[:64] for document in self._documents[:1]])

    def __call__(self) -> None:
        self._evaluate(self._documents)

    def _evaluate(self, documents: list[Document]) -> None:
        self.mark(OTHER)
        evaluate_brier(
            self.model,
            documents,
            context_tokens=self._context,
            stride=self._stride,
            draws=self._draws,
            generator=torch.Generator(self.model.device).manual_seed(0),
            tokenizer_hash=self._hash,
        )


def load_trained(path: Path, device: torch.device, precision: Precision) -> Run:
    """A CALM or baseline that has been trained. Raises ConfigError or DataError in one sentence, also for one that was not:
    its draws would coincide, and its speed would say nothing of a trained model's."""
    run = load_run(path, device, DTYPES[precision])
    if isinstance(run.model, Autoencoder):
        raise ConfigError(f"{path} is an autoencoder, which has no next patch to draw: give a run of calm or token_lm")
    for name, part in _parts(run.model).items():
        norms = [m.weight for m in part.modules() if isinstance(m, nn.RMSNorm | nn.LayerNorm) and m.weight is not None]
        if all(bool((weight == 1).all()) for weight in norms):
            raise DataError(
                f"{path} is not trained: the {name} is as it was initialised, and the speed of an untrained model says "
                "nothing, since all its draws are alike; train it first"
            )
    return run


def held_out(run: Run, source: str | None, tokens: int) -> list[Document]:
    """Documents of `source`, or held-out ones beside the run's training shards, until `tokens` are together.

    Raises DataError where there are none.
    """
    if source is None:
        folder = Path(run.config.data.corpora[0].path) if isinstance(run.config, RunConfig) else None
        if folder is not None and folder.name == "train":
            folder = folder.parent  # the run names the split itself
        beside = data_folders(folder)[1] if folder is not None and folder.exists() else None
        if beside is None:
            raise DataError(f"the held-out text of {run.path} is not where its training was: give --data")
        source = str(beside)
    documents, total = [], 0
    for document in read_documents(source, run.text_tokenizer):
        documents.append(document[: max(1, tokens - total)])
        total += len(documents[-1])
        if total >= tokens:
            break
    return documents


def training_tokens(run: Path) -> int | None:
    """Tokens that the run has seen, by its metrics; None where it has none."""
    from nextvec.train.metrics import read_metrics

    return max((int(row["tokens"]) for row in read_metrics(run)), default=None)


def _parts(model: Calm | TokenLM) -> dict[str, nn.Module]:
    if isinstance(model, TokenLM):
        return {"backbone": model.backbone}
    return {"backbone": model.backbone, "head": model.head, "autoencoder": model.autoencoder}
