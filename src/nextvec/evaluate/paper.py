"""The paper's table of parameters, operations and BrierLM (its table 1, docs/cost.md) beside our own count of the same models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nextvec.config import CalmConfig
from nextvec.evaluate.cost import PAPER_DRAWS, TRAINED, Cost, calm_cost, cost
from nextvec.presets import preset

PAPER_TOKENS = 250_000 * 2.0e6  # of a language model: steps times tokens per step
AUTOENCODER_TOKENS = 30_000 * 512e3
LAST_PLACE = 0.1  # both columns of operations are given to one decimal, in 1e20 and in 1e8


@dataclass(frozen=True)
class Published:
    """One row of the paper's table."""

    name: str
    preset: str
    params: float  # the language model with its input embedding, without the autoencoder
    train_flops: float
    inference_flops_per_token: float
    brier_lm: float  # WikiText-103

    def to_dict(self) -> dict[str, float]:
        return {
            "params": self.params,
            "train_flops": self.train_flops,
            "inference_flops_per_token": self.inference_flops_per_token,
            "brier_lm": self.brier_lm,
        }


TABLE = (
    Published("Transformer-S", "transformer-s", 281e6, 6.6e20, 4.4e8, 6.05),
    Published("Transformer-M", "transformer-m", 465e6, 11.9e20, 7.9e8, 7.07),
    Published("Transformer-L", "transformer-l", 849e6, 22.5e20, 15.0e8, 8.98),
    Published("CALM-M", "calm-m", 371e6, 3.7e20, 2.9e8, 5.72),
    Published("CALM-L", "calm-l", 735e6, 7.7e20, 4.6e8, 6.58),
    Published("CALM-XL", "calm-xl", 1.82e9, 19.5e20, 9.4e8, 8.53),
)


@dataclass(frozen=True)
class Row:
    """A model, its cost over a number of training tokens, and what the paper says of it."""

    cost: Cost
    train_tokens: float
    paper: Published | None = None

    @property
    def train_flops(self) -> float:
        """Of the whole training, the head as published."""
        return self.cost.training.total * self.train_tokens

    @property
    def train_flops_split(self) -> float:
        return self.cost.training_split.total * self.train_tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. `parts` is operations per token of text, and parameters, part by part."""
        return {
            "name": self.cost.name,
            "params": self.cost.params,
            "train_flops": self.train_flops,
            "inference_flops_per_token": self.cost.inference.total,
            "paper": None if self.paper is None else self.paper.to_dict(),
            "train_flops_split": self.train_flops_split,
            "inference_flops_per_token_split": self.cost.inference_split.total,
            "train_tokens": self.train_tokens,
            "parts": self.cost.to_dict(),
        }


@dataclass(frozen=True)
class Saving:
    """A CALM against a Transformer of the same BrierLM; shares of the Transformer's operations that it saves."""

    name: str
    brier_lm: float
    train_flops: float  # of that Transformer, by the paper's figures
    inference_flops_per_token: float
    train: float
    inference: float
    train_counted: float  # both models by our count, the head as published
    train_counted_split: float
    inference_counted: float
    extrapolated: bool  # the CALM scores below the smallest or above the largest Transformer


def table1() -> list[Row]:
    """Our count of all six rows, with the paper's settings: S = 8, 2048 positions attended."""
    return [Row(cost(preset(row.preset), row.name), PAPER_TOKENS, row) for row in TABLE]


def savings(rows: Sequence[Row]) -> list[Saving]:
    """Savings at equal BrierLM: the Transformers' operations interpolated log-linearly in BrierLM.

    The interpolation is piecewise linear of log(operations) over BrierLM between neighbouring Transformers; outside of
    them the nearest piece goes on.
    """
    known = [(row, row.paper) for row in rows if row.paper is not None]
    baselines = sorted(((row, p) for row, p in known if row.cost.patch_size == 1), key=lambda pair: pair[1].brier_lm)

    def matched(brier_lm: float, figure: Callable[[Row, Published], float]) -> float:
        upper = next((i for i, (_, p) in enumerate(baselines) if p.brier_lm >= brier_lm), len(baselines) - 1)
        (row0, p0), (row1, p1) = baselines[max(1, upper) - 1], baselines[max(1, upper)]
        low, high = math.log(figure(row0, p0)), math.log(figure(row1, p1))
        return math.exp(low + (high - low) * (brier_lm - p0.brier_lm) / (p1.brier_lm - p0.brier_lm))

    found = []
    for row, p in known:
        if row.cost.patch_size == 1:
            continue
        train = matched(p.brier_lm, lambda _, p: p.train_flops)
        inference = matched(p.brier_lm, lambda _, p: p.inference_flops_per_token)
        counted = matched(p.brier_lm, lambda row, _: row.train_flops)
        found.append(
            Saving(
                name=p.name,
                brier_lm=p.brier_lm,
                train_flops=train,
                inference_flops_per_token=inference,
                train=1 - p.train_flops / train,
                inference=1 - p.inference_flops_per_token / inference,
                train_counted=1 - row.train_flops / counted,
                train_counted_split=1 - row.train_flops_split / counted,
                inference_counted=1
                - row.cost.inference.total / matched(p.brier_lm, lambda row, _: row.cost.inference.total),
                extrapolated=not baselines[0][1].brier_lm <= p.brier_lm <= baselines[-1][1].brier_lm,
            )
        )
    return found


def draw_of_paper(row: Published) -> tuple[float, float]:
    """What one draw of the head costs by the paper's own figures: (multiply-adds / D^2, half width from rounding).

    In training - 3 x inference the embedding, compressor, backbone and the first draw cancel, whatever they cost:

        training - 3 inference = (3 (S - 1) draw + encoder - 3 decoder) / K    per token of text

    with the autoencoder (decoder with its vocabulary product) counted as in `evaluate.cost`, which is the same for all
    rows. Raises ValueError for a row that is no CALM.
    """
    config = preset(row.preset)
    if not isinstance(config, CalmConfig):
        raise ValueError(f"{row.name} has no head")
    count = calm_cost(config)
    decoder = count.inference.autoencoder + count.inference.vocabulary
    excess = row.train_flops / PAPER_TOKENS - TRAINED * (row.inference_flops_per_token - decoder)
    draw = (excess - count.training.autoencoder) / (TRAINED * (PAPER_DRAWS - 1))
    rounding = LAST_PLACE / 2 * (1e20 / PAPER_TOKENS + TRAINED * 1e8) / (TRAINED * (PAPER_DRAWS - 1))
    unit = 2 * config.backbone.width**2 / config.patch_size
    return draw / unit, rounding / unit


def table1_text() -> str:
    """The three tables in Markdown: counts side by side, savings at equal BrierLM, and the head that the paper implies."""
    rows = table1()
    sides = [
        [
            row.cost.name,
            *_beside(row.cost.params, paper.params, 1e6, 1, 0),
            *_beside(row.train_flops, paper.train_flops, 1e20, 2, 1),
            f"{row.train_flops_split / 1e20:.2f}",
            *_beside(row.cost.inference.total, paper.inference_flops_per_token, 1e8, 2, 1),
        ]
        for row in rows
        if (paper := row.paper) is not None
    ]
    found = savings(rows)
    saved = [
        [
            f"{s.name}{' (extrapolated)' if s.extrapolated else ''}",
            f"{s.brier_lm:.2f}",
            f"{s.train_flops / 1e20:.1f}",
            *(_percent(x) for x in (s.train, s.train_counted, s.train_counted_split)),
            f"{s.inference_flops_per_token / 1e8:.1f}",
            *(_percent(x) for x in (s.inference, s.inference_counted)),
        ]
        for s in found
    ]
    heads = []
    for paper in TABLE:
        config = preset(paper.preset)
        if isinstance(config, CalmConfig):
            value, half = draw_of_paper(paper)
            unit = 2 * config.backbone.width**2 / config.patch_size * (PAPER_DRAWS - 1) * TRAINED
            one, many = (calm_cost(config, draws=draws) for draws in (1, PAPER_DRAWS))
            ours = (many.training.head - one.training.head) / unit
            split = (many.training_split.head - one.training_split.head) / unit
            heads.append([paper.name, f"{value:.1f} ± {half:.1f}", f"{ours:.1f}", f"{split:.1f}"])
    return "\n\n".join(
        [
            "Table 1 of the paper beside this count: parameters in millions, training in 1e20 FLOPs, inference in 1e8\n"
            "FLOPs per token of text; difference of this count from the paper in per cent. `split`: our head.",
            _markdown(
                ["model", "params", "paper", "%", "training", "paper", "%", "split", "inference", "paper", "%"], sides
            ),
            "Savings against a Transformer of the same BrierLM, its operations interpolated log-linearly between the\n"
            "paper's Transformers: by the paper's operations, and by this count, the head as published and split.",
            _markdown(
                [
                    "model",
                    "BrierLM",
                    "training, 1e20",
                    "saved, paper",
                    "counted",
                    "split",
                    "inference, 1e8",
                    "saved, paper",
                    "counted",
                ],
                saved,
            ),
            "One draw of the head in training, in multiply-adds / D²: by the paper's own figures (training less 3 times\n"
            "inference; ± is their rounding), as published, and split.",
            _markdown(["model", "by the paper's figures", "as published", "split"], heads),
        ]
    )


def _beside(ours: float, paper: float, unit: float, digits: int, paper_digits: int) -> list[str]:
    return [f"{ours / unit:.{digits}f}", f"{paper / unit:.{paper_digits}f}", f"{100 * (ours / paper - 1):+.1f}"]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in [head, rule, *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
