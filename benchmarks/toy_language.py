"""BrierLM against cross-entropy on a language whose likelihood is known (docs/brierlm.md).

    OMP_NUM_THREADS=1 python benchmarks/toy_language.py --svg docs/figures/toy_language.svg --json toy_language.json

A Markov source over 6 tokens with a memory of 2. Three kinds of models of it:

laws      the source at other temperatures, mixed with the uniform law or with another source, and with noise on its
          log-probabilities. BrierLM and cross-entropy are both exact, by enumeration.
ar        token Transformers at checkpoints of their training. Cross-entropy exact given each held-out context; BrierLM
          by `exact_tail` on held-out text.
energy    CALM models (K = 2) trained with the energy loss, at checkpoints. They have draws only: BrierLM by `all_pairs`
          on the same text; cross-entropy is a plug-in from the frequencies of many draws per context, with its error.

Legend: B rows, T tokens, N contexts, V vocabulary, S draws.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nextvec.config import (
    AutoencoderConfig,
    BackboneConfig,
    CalmConfig,
    EnergyHeadConfig,
    EnergySettings,
    OptimSettings,
    RecipeSettings,
    TokenLMConfig,
)
from nextvec.evaluate.brier import evaluate_brier
from nextvec.evaluate.toy import Markov, exact_brier, exact_cross_entropy, plug_in_cross_entropy
from nextvec.files import atomic_path, write_json
from nextvec.model.autoencoder import Autoencoder
from nextvec.model.calm import Calm
from nextvec.model.init import initialise
from nextvec.model.token_lm import TokenLM
from nextvec.scoring.brier import brier_lm_of
from nextvec.train.objectives import INIT_GAIN, AutoencoderTraining, CalmTraining, TokenLMTraining
from nextvec.train.optim import make_optimizer, rate_factor

VOCAB, MEMORY, PATCH = 6, 2, 2
ROWS, TOKENS = 32, 64  # of a training batch, fresh text each time
CONTEXT = 32  # tokens before a patch whose law is measured
KINDS = {"laws": "laws made from the source", "ar": "token Transformers", "energy": "CALM, energy loss"}


@dataclass(frozen=True)
class Point:
    """One model: cross-entropy in nats per token, BrierLM on its scale 0..100, None where an order is not positive."""

    kind: str
    family: str
    what: str
    cross_entropy: float
    brier: tuple[float, ...]
    brier_lm: float | None
    cross_entropy_stderr: float = 0.0
    brier_lm_stderr: float = 0.0
    bias: float = 0.0  # of the plug-in, measured on the source itself


@dataclass(frozen=True)
class Effort:
    """How much is measured; `shrunk` for a test."""

    checkpoints: tuple[int, ...] = (0, 25, 50, 100, 200, 400, 800, 1600)  # optimiser steps
    autoencoder_steps: int = 600
    widths: tuple[int, ...] = (16, 48)
    documents: int = 256  # held-out texts of 64 tokens and an even number more
    contexts: int = 256
    draws: int = 4096  # per context, for the plug-in
    brier_draws: int = 64


SHRUNK = Effort((0, 20), 20, (16,), 16, 8, 64, 8)


def generator(*seed: int) -> torch.Generator:
    """One stream per (seed, number, ...)."""
    words = np.random.SeedSequence(seed).generate_state(1, dtype=np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))


def laws(source: Markov, seed: int) -> Iterator[Point]:
    """Models that are laws themselves: both figures exact."""
    other = Markov.random(VOCAB, MEMORY, 1.5, generator(seed, 1))
    shares = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    families: dict[str, dict[str, Markov]] = {
        "temperature above 1": {f"T = {t}": source.at_temperature(t) for t in (1.0, 1.15, 1.4, 1.7, 2.0, 2.5, 3, 4, 6)},
        "temperature below 1": {f"T = {t}": source.at_temperature(t) for t in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)},
        "mixed with uniform": {f"{s:.0%}": source.mixed(source.uniform(), s) for s in shares},
        "mixed with another source": {f"{s:.0%}": source.mixed(other, s) for s in shares},
        "noise on log-probabilities": {
            f"{s} nats": source.noisy(s, generator(seed, 2, i))
            for i, s in enumerate((0.2, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6, 2))
        },
    }
    for family, models in families.items():
        for what, model in models.items():
            brier = exact_brier(source, model)
            lm = float(brier_lm_of(brier))
            yield Point(
                "laws",
                family,
                what,
                exact_cross_entropy(source, model),
                tuple(brier.tolist()),
                None if np.isnan(lm) else lm,
            )


def train(
    module: nn.Module, source: Markov, steps: Sequence[int], seed: int, visit: Callable[[int], None], lr: float = 3e-3
) -> None:
    """AdamW with linear decay on fresh text; `visit(step)` at each of `steps`, the last of which ends the training."""
    optim = OptimSettings(name="adamw", lr=lr, warmup=20)
    optimizer = make_optimizer(module, optim)
    last = max(steps)
    g = generator(seed, 3)
    for step in range(last + 1):
        if step in steps:
            module.eval()
            visit(step)
            module.train()
        if step == last:
            return
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate_factor(step, step / last, last, optim)
        loss, _ = module(source.text(TOKENS, g, ROWS), g, step / last)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), optim.clip)
        optimizer.step()


class HeldOut:
    """Text of the source that every trained model is measured on."""

    def __init__(self, source: Markov, effort: Effort, seed: int) -> None:
        self.source, self.effort = source, effort
        text_NT = source.text(TOKENS + PATCH, generator(seed, 4), effort.documents)
        self.documents = [row.numpy() for row in text_NT]
        self.contexts_NT = source.text(CONTEXT, generator(seed, 5), effort.contexts)

    def brier(self, model: TokenLM | Calm, seed: int) -> dict[str, Any]:
        """BrierLM of a trained model; exact_tail where it has probabilities."""
        found = evaluate_brier(
            model,
            self.documents,
            context_tokens=TOKENS * 2,  # each document in one window
            stride=PATCH,
            draws=self.effort.brier_draws,
            generator=generator(seed, 6),
            tokenizer_hash="toy",
            estimator="exact_tail" if isinstance(model, TokenLM) else "all_pairs",
            batch_rows=32,
        )
        return {"brier": found.brier, "brier_lm": found.brier_lm, "brier_lm_stderr": found.brier_lm_stderr or 0.0}

    @torch.no_grad()
    def transformer(self, model: TokenLM) -> tuple[float, float]:
        """Exact expected cross-entropy of the token after each context, and its standard error over contexts."""
        log_NV = model.log_probabilities(model.states(self.contexts_NT.unsqueeze(-1))[:, -1]).double()
        surprise_N = -(self.source.table[self.source.context_of(self.contexts_NT)] * log_NV).sum(1)
        return float(surprise_N.mean()), float(surprise_N.std() / len(surprise_N) ** 0.5)


def transformers(source: Markov, held: HeldOut, effort: Effort, seed: int) -> Iterator[Point]:
    for width in effort.widths:
        config = TokenLMConfig(
            vocab_size=VOCAB, backbone=BackboneConfig(layers=2, width=width, inner=2 * width, heads=2)
        )
        model = TokenLM(config)
        initialise(model, generator(seed, 7, width), INIT_GAIN / width**0.5)
        found: list[Point] = []

        def visit(step: int, model: TokenLM = model, width: int = width, found: list[Point] = found) -> None:
            value, error = held.transformer(model)
            found.append(
                Point(
                    "ar", f"width {width}", f"step {step}", value, cross_entropy_stderr=error, **held.brier(model, seed)
                )
            )

        train(TokenLMTraining(model), source, effort.checkpoints, seed, visit)
        yield from found


def energy_models(source: Markov, held: HeldOut, effort: Effort, seed: int) -> Iterator[Point]:
    ae_config = AutoencoderConfig(vocab_size=VOCAB, patch_size=PATCH, width=32, inner=64, latent=8, token_dropout=0.0)
    autoencoder = Autoencoder(ae_config)
    initialise(autoencoder, generator(seed, 8), INIT_GAIN / 32**0.5)
    stage_1 = AutoencoderTraining(autoencoder)
    train(stage_1, source, [effort.autoencoder_steps], seed, lambda step: None, lr=5e-3)
    patches = torch.cartesian_prod(*[torch.arange(VOCAB)] * PATCH)
    with torch.no_grad():
        right = autoencoder.decode_tokens(autoencoder.encode(patches).mean).eq(patches).all(1).float().mean()
    _say(f"autoencoder: {right:.1%} of all {len(patches)} patches decoded right at the mean")
    for width in effort.widths:
        for recipe in ("paper", "fast"):
            backbone = BackboneConfig(layers=2, width=width, inner=2 * width, heads=2)
            config = CalmConfig(autoencoder=ae_config, backbone=backbone, head=EnergyHeadConfig(noise=16, blocks=1))
            model = Calm(config, autoencoder)
            module = CalmTraining(model, EnergySettings(), RecipeSettings(name=recipe))  # type: ignore[arg-type]
            initialise(module, generator(seed, 9, width), INIT_GAIN / width**0.5)
            found: list[Point] = []

            def draw(contexts_NT: Tensor, draws: int, g: torch.Generator, model: Calm = model) -> Tensor:
                with torch.no_grad():
                    state_ND = model.states(contexts_NT.unflatten(1, (-1, PATCH)))[:, -1]
                    return torch.cat([model.draw_tokens(state_ND, 256, g) for _ in range(0, draws, 256)])[:draws]

            def visit(
                step: int,
                model: Calm = model,
                draw: Any = draw,
                found: list[Point] = found,
                family: str = f"{recipe}, width {width}",
            ) -> None:
                if step == 0:
                    return  # the head starts at zero: all draws coincide
                value = plug_in_cross_entropy(source, draw, held.contexts_NT, PATCH, effort.draws, generator(seed, 10))
                found.append(
                    Point(
                        "energy",
                        family,
                        f"step {step}",
                        value.cross_entropy,
                        cross_entropy_stderr=value.stderr,
                        bias=value.bias,
                        **held.brier(model, seed),
                    )
                )

            train(module, source, effort.checkpoints, seed, visit)
            yield from found


def correlations(points: Sequence[Point]) -> dict[str, float | int]:
    """Pearson and Spearman of BrierLM with cross-entropy, over the models that have a BrierLM."""
    both = np.array([(p.cross_entropy, p.brier_lm) for p in points if p.brier_lm is not None], dtype=float).T
    if both.size == 0 or both.shape[1] < 3:
        return {"models": both.shape[1] if both.size else 0}
    ranks = both.argsort(1).argsort(1)
    return {
        "models": both.shape[1],
        "without": len(points) - both.shape[1],
        "pearson": float(np.corrcoef(both)[0, 1]),
        "spearman": float(np.corrcoef(ranks)[0, 1]),
    }


def unsure(point: Point) -> bool:
    """A BrierLM that its own error leaves open."""
    return point.brier_lm is not None and point.brier_lm < 2 * (point.brier_lm_stderr or 0.0)


def draw_figure(points: Sequence[Point], best: Point, path: Path) -> None:
    """One panel per kind, the same axes; SVG with text as text, the same file for the same points.

    A BrierLM less than twice its error is drawn hollow and without the error, which may be many times the axis.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "nextvec"
    figure = Figure(figsize=(9.6, 3.7), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(1, len(KINDS), sharex=True, sharey=True)
    for axes, (kind, title) in zip(panels, KINDS.items(), strict=True):
        mine = [p for p in points if p.kind == kind and p.brier_lm is not None]
        for marker, family in zip("osD^vP", dict.fromkeys(p.family for p in mine), strict=False):
            some = [p for p in mine if p.family == family]
            colour = axes.errorbar(
                [p.cross_entropy for p in some if not unsure(p)],
                [p.brier_lm for p in some if not unsure(p)],
                xerr=[p.cross_entropy_stderr for p in some if not unsure(p)],
                yerr=[p.brier_lm_stderr for p in some if not unsure(p)],
                fmt=marker,
                markersize=4,
                elinewidth=0.7,
                alpha=0.8,
                label=family,
            )[0].get_color()
            hollow = [(p.cross_entropy, p.brier_lm) for p in some if unsure(p)]
            axes.plot(*np.array(hollow).reshape(-1, 2).T, marker, markersize=4, color=colour, fillstyle="none")
        axes.axvline(best.cross_entropy, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        axes.plot([best.cross_entropy], [best.brier_lm], "k*", markersize=8, label="the source")
        found = correlations([p for p in points if p.kind == kind])
        words = f"\nPearson {found['pearson']:.3f}, Spearman {found['spearman']:.3f}" if "pearson" in found else ""
        words = words.replace("-", "\N{MINUS SIGN}")
        axes.set_title(title + words, fontsize=9)
        axes.set_xlabel("cross-entropy, nats per token" + (" (plug-in)" if kind == "energy" else ""), fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7.5, loc="upper right")
    panels[0].set_ylabel("BrierLM", fontsize=8)
    panels[0].set_ylim(0, 1.1 * (best.brier_lm or 1))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def measure(effort: Effort, seed: int = 0) -> dict[str, Any]:
    """All points and their correlations, as plain values."""
    source = Markov.random(VOCAB, MEMORY, 1.5, generator(seed, 0))
    held = HeldOut(source, effort, seed)
    entropy, brier = exact_cross_entropy(source, source), exact_brier(source, source)
    best = Point("laws", "source", "source", entropy, tuple(brier.tolist()), float(brier_lm_of(brier)))
    points: list[Point] = list(laws(source, seed))
    for more in (transformers(source, held, effort, seed), energy_models(source, held, effort, seed)):
        for point in more:
            points.append(point)
            lm = "none" if point.brier_lm is None else f"{point.brier_lm:.2f} ± {point.brier_lm_stderr:.2f}"
            _say(
                f"{point.kind} {point.family} {point.what}: {point.cross_entropy:.4f} ± {point.cross_entropy_stderr:.4f} "
                f"nats per token (bias {point.bias:.4f}), BrierLM {lm}"
            )
    groups = {kind: [p for p in points if p.kind == kind] for kind in KINDS}
    families = dict.fromkeys((p.kind, p.family) for p in points)
    return {
        "source": asdict(best),
        "correlations": {kind: correlations(group) for kind, group in groups.items()},
        "families": {
            f"{kind}: {family}": correlations([p for p in points if (p.kind, p.family) == (kind, family)])
            for kind, family in families
        },
        "points": [asdict(point) for point in points],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="BrierLM against cross-entropy on a toy language")
    parser.add_argument("--svg", type=Path, help="write the figure here")
    parser.add_argument("--json", type=Path, help="write all points here")
    parser.add_argument("--points", type=Path, help="what --json wrote: draw --svg from it and measure nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shrunk", action="store_true", help="a few steps of everything, to see that it runs")
    chosen = parser.parse_args(arguments)
    begin = time.perf_counter()
    if chosen.points:
        found = json.loads(chosen.points.read_text(encoding="utf-8"))
    else:
        found = measure(SHRUNK if chosen.shrunk else Effort(), chosen.seed)
    if chosen.svg:
        points = [Point(**{**p, "brier": tuple(p["brier"])}) for p in found["points"]]
        draw_figure(points, Point(**found["source"]), chosen.svg)
    if chosen.json:
        write_json(chosen.json, found)
    print(json.dumps({name: found[name] for name in ("source", "correlations", "families")}, indent=2))
    _say(f"{time.perf_counter() - begin:.0f} s")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
