"""Accuracy against collision: the batch sampler, its approximations and the token baseline's temperature (docs/sampling.md).

    nextvec demo
    OMP_NUM_THREADS=1 python benchmarks/sampling_curves.py runs/demo --svg docs/figures/sampling_curves.svg --json curves.json

For the patch that follows a held-out context: accuracy is the chance that a method draws the true text, collision the chance
that it draws the same twice; both for the first token and for the first two (the whole patch is hardly ever right). A method
is better where it has more of the first at equal collision. Contexts are whole patches from the start of a document, 8 of
them or more.

* batch sampler: from 4 pools of N = 200 draws per context; the law of its choice from a pool is known, so that only the pools are
  random.
* medoid, centre, shrunk: of n of these draws. noise: 32 draws with scaled noise.
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
from typing import Any

import torch
from torch import Tensor

from nextvec.files import atomic_path, check_target, write_json
from nextvec.model.calm import Calm
from nextvec.model.token_lm import TokenLM
from nextvec.rundir import load_run
from nextvec.sampling.approximate import adaptive_patch, centre, medoid, scaled_noise, shrunk
from nextvec.sampling.generate import generate
from nextvec.sampling.pools import choose_patch
from nextvec.sampling.settings import Sampling, row_generator
from nextvec.sampling.temperature import pool_probabilities
from nextvec.scoring.clusters import cluster_ratio
from nextvec.text.shards import TokenShards

POOLS, CANDIDATES = 4, 200
TEMPERATURES = (1.0, 0.75, 0.6, 0.5, 0.4, 1 / 3, 0.25)
SIZES = (2, 4, 8, 16, 50, 200)
NOISES = (0.0, 0.1, 0.25, 0.5, 0.75)
SHRINKS = (0.25, 0.5, 0.75)
ERRORS = (0.05, 0.2, 0.5)
DRAWS, PAIR = 32, 2
TIMED = 12  # contexts over which seconds are taken
CPU = torch.device("cpu")
Points = list[dict[str, Any]]


class Context:
    """Tokens read, the true patch after them, the document's number."""

    def __init__(self, ids: list[int], target: tuple[int, ...], document: int) -> None:
        self.ids, self.target, self.document = ids, target, document


def contexts(shards: TokenShards, patch_size: int, count: int, longest: int, seed: int) -> list[Context]:
    """`count` places in as many documents as there are, at whole patches, after 8 patches or more."""
    generator = torch.Generator().manual_seed(seed)
    usable = [d for d in range(shards.documents) if len(shards.document(d)) > 10 * patch_size]
    found = []
    for turn in range(count):
        document = usable[turn % len(usable)]
        ids = shards.document(document).tolist()
        most = min(len(ids), longest) // patch_size
        end = int(torch.randint(8, most, (), generator=generator)) * patch_size
        found.append(Context(ids[:end], tuple(ids[end : end + patch_size]), document))
    return found


class Tally:
    """Means over contexts of accuracy and collision, with standard errors clustered by document."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, float], list[tuple[int, float, float, float, float]]] = {}

    def add(self, method: str, strength: float, document: int, figures: Sequence[float]) -> None:
        first, together, pair, same = figures
        self.rows.setdefault((method, strength), []).append((document, first, together, pair, same))

    def points(self) -> Points:
        return [
            {"method": method, "strength": strength, **_summary(rows)} for (method, strength), rows in self.rows.items()
        ]


def _summary(rows: list[tuple[int, float, float, float, float]]) -> dict[str, float]:
    values = torch.tensor([row[1:] for row in rows], dtype=torch.float64)
    found = cluster_ratio(values, torch.ones_like(values, dtype=torch.bool), torch.tensor([row[0] for row in rows]))
    assert found.covariance is not None, "one document has no spread"
    mean, error = found.mean, found.covariance.diagonal().sqrt()
    names = ("token_accuracy", "token_collision", "pair_accuracy", "pair_collision")
    return dict(zip(names, mean.tolist(), strict=True)) | {
        f"{name}_stderr": value for name, value in zip(names, error.tolist(), strict=True)
    }


def law_figures(laws: list[dict[tuple[int, ...], float]], target: tuple[int, ...]) -> list[float]:
    """Accuracy and collision from independent laws of the patch (each the law given one pool)."""
    found = []
    for length in (1, PAIR):
        short: list[dict[tuple[int, ...], float]] = []
        for law in laws:
            short.append({})
            for patch, chance in law.items():
                short[-1][patch[:length]] = short[-1].get(patch[:length], 0.0) + chance
        pairs = list(itertools.combinations(short, 2))
        found.append(sum(law.get(target[:length], 0.0) for law in short) / len(short))
        found.append(sum(sum(c * right.get(x, 0.0) for x, c in left.items()) for left, right in pairs) / len(pairs))
    return found


def draw_figures(draws: Sequence[tuple[int, ...]], target: tuple[int, ...]) -> list[float]:
    """The same from independent draws."""
    return law_figures([{draw: 1.0} for draw in draws], target)


def tuples(ids_NK: Tensor) -> list[tuple[int, ...]]:
    return [tuple(patch) for patch in ids_NK.tolist()]


def state_of(model: Calm, context: Context, eos: int, pad: int) -> Tensor:
    size = model.patch_size
    ids = [eos] + [pad] * (size - 1) + context.ids
    return model.states(torch.tensor(ids).view(1, -1, size))[0, -1]


def measure_calm(model: Calm, places: list[Context], eos: int, pad: int, seed: int, tally: Tally) -> None:
    for index, context in enumerate(places):
        generator, state_D = row_generator(seed, index, CPU), state_of(model, context, eos, pad)
        latent_NL = model.draw_latents(state_D, POOLS * CANDIDATES, generator)
        token_NK = model.autoencoder.decode_tokens(latent_NL)

        def add(method: str, strength: float, figures: list[float], document: int = context.document) -> None:
            tally.add(method, strength, document, figures)

        for temperature in TEMPERATURES:
            if temperature == 1:
                add("batch sampler", 1.0, draw_figures(tuples(token_NK[: 4 * DRAWS]), context.target))
                continue
            laws = []
            for pool_NK in token_NK.split(CANDIDATES):
                law: dict[tuple[int, ...], float] = {}
                chances = pool_probabilities(pool_NK[None], temperature)[0].tolist()
                for patch, chance in zip(tuples(pool_NK), chances, strict=True):
                    law[patch] = law.get(patch, 0.0) + chance
                laws.append(law)
            add("batch sampler", temperature, law_figures(laws, context.target))
        decode = model.autoencoder.decode_tokens
        for size in SIZES:
            group_GNL = latent_NL.unflatten(0, (-1, size))[:DRAWS]
            add("medoid", size, draw_figures(tuples(decode(medoid(group_GNL))), context.target))
            add("centre", size, draw_figures(tuples(decode(centre(group_GNL))), context.target))
        for scale in SHRINKS:
            near_GL = shrunk(latent_NL.unflatten(0, (-1, 25)), scale)
            add("shrunk", scale, draw_figures(tuples(decode(near_GL)), context.target))
        for scale in NOISES:
            quiet_NL = scaled_noise(model.head, state_D, DRAWS, generator, scale)  # type: ignore[arg-type]
            add("noise", scale, draw_figures(tuples(decode(quiet_NL)), context.target))
        for error in ERRORS:
            picked = [
                adaptive_patch(_Served(pool_NK), 0.5, CANDIDATES, error, generator)
                for pool_NK in token_NK.split(CANDIDATES)
            ]
            add("adaptive pool", error, draw_figures([tuple(p.tolist()) for p, _ in picked], context.target))
            tally.rows.setdefault(("draws of the adaptive pool", error), []).append(
                (context.document, *(sum(used for _, used in picked) / len(picked),) * 4)
            )
        if index % 20 == 0:
            print(f"{index} of {len(places)} contexts", flush=True)


class _Served:
    """The draws of a pool, one after the other."""

    def __init__(self, token_NK: Tensor) -> None:
        self._left = token_NK

    def __call__(self, count: int) -> Tensor:
        given, self._left = self._left[:count], self._left[count:]
        return given


def measure_baseline(model: TokenLM, places: list[Context], eos: int, pad: int, seed: int, tally: Tally) -> None:
    size = PAIR
    for temperature in TEMPERATURES:
        settings = Sampling(temperature, max_tokens=size, seed=seed)
        rows: list[list[int]] = [[] for _ in range(DRAWS * len(places))]
        # end-of-text is a token like any other here, as it is in the other arms
        for step in generate(
            model, [c.ids for c in places], settings, eos_id=eos, pad_id=pad, samples=DRAWS, slots=128
        ):
            for row, tokens in enumerate(step.tokens):
                rows[row] += tokens
        for index, context in enumerate(places):
            ids = torch.tensor([eos, *context.ids]).view(1, -1, 1)
            law_V = (model.log_probabilities(model.states(ids)[0, -1]) / temperature).softmax(-1)
            texts = [tuple(row + [eos] * (size - len(row))) for row in rows[index * DRAWS : (index + 1) * DRAWS]]
            pair = draw_figures(texts, context.target)[2:]
            token = [float(law_V[context.target[0]]), float(law_V.square().sum())]
            tally.add("baseline", temperature, context.document, [*token, *pair])


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
        "noise": lambda s, g: decode(scaled_noise(model.head, s, 1, g, 0.5)),  # type: ignore[arg-type]
        "one draw": lambda s, g: model.draw_tokens(s, 1, g),
    }
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
        "noise": ("C5", "X", "scaled noise, scale"),
    }  # fmt: skip
    for axes, unit in zip(figure.subplots(1, 2), ("token", "pair"), strict=True):
        for method, (colour, marker, label) in looks.items():
            mine = sorted((p for p in points if p["method"] == method), key=lambda p: p[f"{unit}_collision"])
            across, up = ([p[f"{unit}_{what}"] for p in mine] for what in ("collision", "accuracy"))
            errors = [p[f"{unit}_accuracy_stderr"] for p in mine]
            axes.errorbar(
                across, up, errors, color=colour, marker=marker, markersize=4, linewidth=1, elinewidth=0.4, label=label
            )
            if method in ("baseline", "batch sampler"):
                for p in mine[:: max(1, len(mine) - 1)]:
                    spot = (p[f"{unit}_collision"], p[f"{unit}_accuracy"])
                    axes.annotate(f"T = {p['strength']:.3g}", spot, (4, -10), textcoords="offset points", fontsize=7)
        axes.set_title("first token" if unit == "token" else "first two tokens", fontsize=9)
        axes.set_xlabel("collision: chance that two draws are equal", fontsize=8)
        axes.set_ylabel("accuracy: chance of the true text", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.set_xlim(0, 0.7)  # all noise taken away: one patch alone, at collision 1
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
    places = contexts(shards, calm.patch_size, chosen.contexts, chosen.longest, chosen.seed)
    tally = Tally()
    measure_calm(calm, places, eos, pad, chosen.seed, tally)
    measure_baseline(baseline, places, eos, pad, chosen.seed, tally)
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
