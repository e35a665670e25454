"""Accuracy against collision: the batch sampler, its approximations and the token baseline's temperature (docs/sampling.md).

    nextvec demo
    OMP_NUM_THREADS=1 python benchmarks/sampling_curves.py runs/demo --svg docs/figures/sampling_curves.svg --json curves.json

For the patch that follows a held-out context: accuracy is the chance that a method draws the true text, collision the chance
that it draws the same twice; both for the first token and for the first two (the whole patch is hardly ever right). A method
is better where it has more of the first at equal collision. Contexts are whole patches from the start of a document, 8 of
them or more.

* batch sampler: from 4 pools of N = 200 draws per context; the law of its choice from a pool is known, so that only the pools are
  random.
* medoid, centre, shrunk: of n of these draws. noise: 32 draws with scaled noise, of an energy head.
* temperature: 128 draws token by token, of a head that knows the law of each token.
* adaptive pool: a choice from each of the 4 pools.
* baseline: the first token by exact probabilities, two by 32 texts.

Standard errors are over documents. Seconds are processor time of one patch at batch 1 in float32, over the same contexts.
Legend: P contexts, N draws, K tokens per patch, L latent, V vocabulary.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nextvec.evaluate.collision import (
    CANDIDATES,
    DRAWS,
    SIZES,
    TOKENS,
    Context,
    Patch,
    Points,
    Tally,
    contexts,
    draw_figures,
    measure_by_token,
    measure_latents,
    measure_tokens,
    patches,
    state_of,
)
from nextvec.files import atomic_path, check_target, write_json
from nextvec.model.calm import Calm
from nextvec.model.heads.energy import EnergyHead
from nextvec.model.token_lm import TokenLM
from nextvec.rundir import load_run
from nextvec.sampling.approximate import adaptive_patch, centre, medoid, scaled_noise, shrunk
from nextvec.sampling.pools import choose_patch
from nextvec.sampling.settings import row_generator
from nextvec.sampling.temperature import sharpener
from nextvec.text.shards import TokenShards

NOISES = (0.0, 0.1, 0.25, 0.5, 0.75)
SHRINKS = (0.25, 0.5, 0.75)
ERRORS = (0.05, 0.2, 0.5)
TIMED = 12  # contexts over which seconds are taken
CPU = torch.device("cpu")


def measure_calm(model: Calm, places: list[Context], eos: int, pad: int, seed: int, tally: Tally) -> None:
    """The batch sampler and the centre as the package measures them, and the other approximations on the same draws."""
    decode, done = model.autoencoder.decode_tokens, itertools.count()

    def more(
        context: Context, state_D: Tensor, latent_NL: Tensor, token_NK: Tensor, generator: torch.Generator
    ) -> None:
        def add(method: str, strength: float, draws: list[Patch]) -> None:
            tally.add(method, strength, context.document, draw_figures(draws, context.target))

        for size in SIZES:
            add("medoid", size, patches(decode(medoid(latent_NL.unflatten(0, (-1, size))[:DRAWS]))))
        for scale in SHRINKS:
            add("shrunk", scale, patches(decode(shrunk(latent_NL.unflatten(0, (-1, 25)), scale))))
        if isinstance(model.head, EnergyHead):
            for scale in NOISES:
                quiet_NL = scaled_noise(model.head, state_D, DRAWS, generator, scale)
                add("noise", scale, patches(decode(quiet_NL)))
        for error in ERRORS:
            picked = [
                adaptive_patch(_Served(pool_NK), 0.5, CANDIDATES, error, generator)
                for pool_NK in token_NK.split(CANDIDATES)
            ]
            add("adaptive pool", error, [tuple(p.tolist()) for p, _ in picked])
            used = sum(used for _, used in picked) / len(picked)
            tally.add("draws of the adaptive pool", error, context.document, [used] * 4)
        if (index := next(done)) % 20 == 0:
            print(f"{index} of {len(places)} contexts", flush=True)

    measure_latents(model, places, tally, eos_id=eos, pad_id=pad, seed=seed, more=more)
    if model.by_token:
        measure_by_token(model, places, tally, eos_id=eos, pad_id=pad, seed=seed)


class _Served:
    """The draws of a pool, one after the other."""

    def __init__(self, token_NK: Tensor) -> None:
        self._left = token_NK

    def __call__(self, count: int) -> Tensor:
        given, self._left = self._left[:count], self._left[count:]
        return given


def seconds(model: Calm, places: list[Context], eos: int, pad: int) -> dict[str, float]:
    """Processor milliseconds of one patch by each method, states not counted."""
    decode, size = model.autoencoder.decode_tokens, model.patch_size
    methods: dict[str, Callable[[Tensor, list[torch.Generator]], object]] = {
        "batch sampler": lambda s, g: choose_patch(
            model.autoencoder, model.draw_latents(s, CANDIDATES, g).transpose(0, 1), size, 0.5, g
        ),
        "adaptive pool": lambda s, g: adaptive_patch(
            lambda m: model.draw_tokens(s, m, g)[:, 0], 0.5, CANDIDATES, 0.2, g[0]
        ),
        "medoid of 16": lambda s, g: decode(medoid(model.draw_latents(s, 16, g).transpose(0, 1))),
        "medoid of 200": lambda s, g: decode(medoid(model.draw_latents(s, 200, g).transpose(0, 1))),
        "centre of 16": lambda s, g: decode(centre(model.draw_latents(s, 16, g).transpose(0, 1))),
        "one draw": lambda s, g: model.draw_tokens(s, 1, g),
    }
    if isinstance(head := model.head, EnergyHead):
        methods["noise"] = lambda s, g: decode(scaled_noise(head, s, 1, g, 0.5))
    if model.by_token:
        methods["token by token"] = lambda s, g: model.draw_by_token(s, g, sharpener(0.5))
    states = [state_of(model, context, eos, pad)[None] for context in places[:TIMED]]
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(4):
        for name, method in methods.items():
            begin = time.process_time()
            for index, state_1D in enumerate(states):
                method(state_1D, [row_generator(turn, index, CPU)])
            if turn:
                taken[name].append((time.process_time() - begin) / len(states))
    return {name: 1e3 * sorted(values)[len(values) // 2] for name, values in taken.items()}


def draw_figure(points: Points, path: Path) -> None:
    """One panel for the token, one for two."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "nextvec"
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    looks = {
        "baseline": ("k", "o", "token baseline, T"), "batch sampler": ("C0", "s", "batch sampler, N = 200, T"),
        "adaptive pool": ("C1", "D", "adaptive pool at T = 0.5, error"), "medoid": ("C2", "^", "medoid of n"),
        "centre": ("C3", "v", "centre of n"), "shrunk": ("C4", "P", "shrunk to the centre of 25, scale"),
        "noise": ("C5", "X", "scaled noise, scale"), TOKENS: ("C6", "*", "CALM token by token, T"),
    }  # fmt: skip
    for axes, unit in zip(figure.subplots(1, 2), ("token", "pair"), strict=True):
        for method, (colour, marker, label) in looks.items():
            mine = sorted((p for p in points if p["method"] == method), key=lambda p: p[f"{unit}_collision"])
            if not mine:
                continue
            across, up = ([p[f"{unit}_{what}"] for p in mine] for what in ("collision", "accuracy"))
            errors = [p[f"{unit}_accuracy_stderr"] for p in mine]
            axes.errorbar(
                across, up, errors, color=colour, marker=marker, markersize=4, linewidth=1, elinewidth=0.4, label=label
            )
            if method in ("baseline", "batch sampler", TOKENS):
                for p in mine[:: max(1, len(mine) - 1)]:
                    spot = (p[f"{unit}_collision"], p[f"{unit}_accuracy"])
                    axes.annotate(f"T = {p['strength']:.3g}", spot, (4, -10), textcoords="offset points", fontsize=7)
        axes.set_title("first token" if unit == "token" else "first two tokens", fontsize=9)
        axes.set_xlabel("collision: chance that two draws are equal", fontsize=8)
        axes.set_ylabel("accuracy: chance of the true text", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        # without those of scaled noise: all of it taken away is one patch alone, at collision 1
        reached = [p[f"{unit}_collision"] for p in points if p["method"] in looks and p["method"] != "noise"]
        axes.set_xlim(0.9 * min(reached), 1.1 * max(reached))
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, fontsize=7, loc="outside lower center", ncols=4)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="accuracy against collision of ways to lower the temperature")
    parser.add_argument("demo", type=Path, help="folder of a demo: calm, baseline, data/shards")
    parser.add_argument("--svg", type=Path, help="write the figure here")
    parser.add_argument("--json", type=Path, help="write all points here")
    parser.add_argument("--contexts", type=int, default=300)
    parser.add_argument("--longest", type=int, default=256, help="tokens of a context at most")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    check_target(chosen.json)
    check_target(chosen.svg)
    calm, baseline = (load_run(chosen.demo / name).model for name in ("calm", "baseline"))
    assert isinstance(calm, Calm)
    assert isinstance(baseline, TokenLM)
    shards = TokenShards.open(chosen.demo / "data" / "shards" / "valid")
    eos, pad = shards.manifest.eos_id, shards.manifest.pad_id
    documents, size = [shards.document(index) for index in range(shards.documents)], calm.patch_size
    places = contexts(documents, size, chosen.contexts, chosen.seed, longest=chosen.longest, after=size)
    tally = Tally()
    measure_calm(calm, places, eos, pad, chosen.seed, tally)
    measure_tokens(baseline, places, tally, eos_id=eos, pad_id=pad, seed=chosen.seed, method="baseline")
    points = tally.points()
    taken = seconds(calm, places, eos, pad)
    for point in points:
        print(
            f"{point['method']:<28} {point['strength']:<6.3g} token {point['token_accuracy']:.3f} at "
            f"{point['token_collision']:.3f}, two {point['pair_accuracy']:.4f} at {point['pair_collision']:.4f} "
            f"(standard errors {point['token_accuracy_stderr']:.3f}, {point['pair_accuracy_stderr']:.4f})"
        )
    for name, milliseconds in taken.items():
        print(f"{name:<14} {milliseconds:.2f} ms a patch")
    if chosen.svg:
        draw_figure(points, chosen.svg)
    if chosen.json:
        settings = {
            "contexts": len(places),
            "documents": len({place.document for place in places}),
            "seed": chosen.seed,
        }
        write_json(chosen.json, {**settings, "points": points, "milliseconds": taken})


if __name__ == "__main__":
    main()
