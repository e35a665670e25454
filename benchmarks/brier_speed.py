"""How long BrierLM takes: our evaluator against plain Python loops over positions (docs/brierlm.md).

    OMP_NUM_THREADS=1 python benchmarks/brier_speed.py --json brier_speed.json

Arms, all on one text, one model and n-grams of up to four tokens:

ours      `evaluate_brier`: the text is read once, and the chains of all positions grow together. Two draws of the CALM, one
          of the baseline, since `exact_tail` has an estimate from every single chain.
loop      one position after the other: a forward pass over its own context, then over the context and each drawn patch.
          Only every --loop-every-th position is run, evenly spread, and its seconds count that many times.
authors   the way of the authors' code: the text is read once; one position after the other, its part of the key/value
          cache is copied, the chain goes on from the first draw, and stops where the two draws have parted.

`loop` and `authors` take two draws. The cases are a CALM at K = 2 (`two_draws`, every second token) and the token
baseline (`exact_tail`, every token). Their weights are random, with the last layer scaled so that two draws agree as
often as --agree says: of that depends how soon `authors` stops. Arms take turns, and medians of the process's own CPU
time count, which other work on the machine lengthens little. --noise N adds what the estimates are worth: their
standard deviation over N seeds.

Legend: S draws, T tokens, P patches, K tokens per patch, n order.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextvec.config import AutoencoderConfig, BackboneConfig, CalmConfig, EnergyHeadConfig, TokenLMConfig
from nextvec.evaluate.brier import evaluate_brier
from nextvec.files import write_json
from nextvec.hardware import environment
from nextvec.model.cache import KVCache
from nextvec.model.calm import Calm
from nextvec.model.init import initialise
from nextvec.model.token_lm import TokenLM
from nextvec.scoring.brier import brier_scores

ORDER, DRAWS, PATCH = 4, 2, 2
VOCAB = 2048
Arm = Callable[[torch.Generator], Sequence[float]]  # -> Brier-1..4


def build(width: int, layers: int, agree: float) -> tuple[Calm, TokenLM]:
    """A CALM (K = 2) and a baseline with random weights, whose two draws agree at about this share of positions."""
    backbone = BackboneConfig(layers=layers, width=width, inner=8 * width // 3, heads=4)
    autoencoder = AutoencoderConfig(vocab_size=VOCAB, patch_size=PATCH, width=width, inner=2 * width, latent=32)
    calm = Calm(CalmConfig(autoencoder=autoencoder, backbone=backbone, head=EnergyHeadConfig(blocks=1)))
    baseline = TokenLM(TokenLMConfig(vocab_size=VOCAB, backbone=backbone))
    g = torch.Generator().manual_seed(0)
    for model in (calm, baseline):
        model.requires_grad_(True)  # or the autoencoder's weights would be left as they are
        initialise(model, g, 1 / width**0.5)
        model.requires_grad_(False).eval()
    with torch.no_grad():
        calm.head.out.weight.normal_(0.0, 1 / width**0.5, generator=g)
        calm.head.out.bias.normal_(0.0, 1.0, generator=g)
        for model, weight, wider in ((calm, calm.head.out.weight, True), (baseline, baseline.output.weight, False)):
            _scale(weight, lambda model=model: _agreement(model) > agree, wider)
    return calm, baseline


def _scale(weight: Tensor, agree_more: Callable[[], bool], wider: bool) -> None:
    """Bisects the scale of a weight; `wider`: a larger one makes draws agree less (noise), or more (logits)."""
    fresh, low, high = weight.clone(), 1e-3, 1e3
    for _ in range(20):
        middle = (low * high) ** 0.5
        weight.copy_(fresh * middle)
        low, high = (middle, high) if agree_more() == wider else (low, middle)


def _agreement(model: Calm | TokenLM) -> float:
    """How often two draws are the same patch, over random contexts."""
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCAB, (4, 32, model.patch_size), generator=g)
    draws = model.draw_tokens(model.states(ids), 8, g)
    return float((draws[:4] == draws[4:]).all(-1).float().mean())


def ours(model: Calm | TokenLM, text_T: Tensor, stride: int) -> Arm:
    def run(g: torch.Generator) -> Sequence[float]:
        return evaluate_brier(
            model,
            [text_T.numpy()],
            context_tokens=2 * (len(text_T) // stride + 1) * stride,  # one window
            stride=stride,
            draws=1 if isinstance(model, TokenLM) else DRAWS,
            generator=g,
            tokenizer_hash="benchmark",
            estimator="exact_tail" if isinstance(model, TokenLM) else "two_draws",
        ).brier

    return run


def starts(text_T: Tensor, stride: int) -> range:
    """Tokens before each n-gram of four that is scored."""
    return range(stride, len(text_T) - ORDER + 1, stride)


def loop_calm(model: Calm, text_T: Tensor, every: int) -> Arm:
    """Every position by its own: its context, and after it each drawn patch."""

    def run(g: torch.Generator) -> Sequence[float]:
        grams = []
        for start in starts(text_T, PATCH)[every // 2 :: every]:
            read_ST = text_T[:start].expand(1, -1)
            drawn = []
            while PATCH * len(drawn) < ORDER:
                state_SD = model.states(read_ST.unflatten(1, (-1, PATCH)))[:, -1]
                patch_SK = model.draw_tokens(state_SD, DRAWS if not drawn else 1, g).reshape(DRAWS, PATCH)
                read_ST = torch.cat([read_ST.expand(DRAWS, -1), patch_SK], dim=1)
                drawn.append(patch_SK)
            grams.append(torch.cat(drawn, dim=1))
        target = torch.stack([text_T[start : start + ORDER] for start in starts(text_T, PATCH)[every // 2 :: every]])
        valid = torch.ones_like(target, dtype=torch.bool)
        return brier_scores(torch.stack(grams, dim=1), target, valid, "two_draws").mean(0).tolist()

    return run


def loop_baseline(model: TokenLM, text_T: Tensor, every: int) -> Arm:
    """Every position by its own: exact P(y) and last token, prefixes drawn."""

    def run(g: torch.Generator) -> Sequence[float]:
        total_n = torch.zeros(ORDER)
        for start in starts(text_T, 1)[every // 2 :: every]:
            p_V = model.log_probabilities(model.states(text_T[: start + ORDER, None][None])[0]).exp()
            right_n = p_V[start - 1 : start - 1 + ORDER].gather(1, text_T[start : start + ORDER, None])[:, 0].cumprod(0)
            read_ST = text_T[:start].expand(DRAWS, -1)
            same_n, together = torch.zeros(ORDER), 1.0
            for k in range(ORDER):
                p_SV = model.log_probabilities(model.states(read_ST.unsqueeze(-1))[:, -1]).exp()
                same_n[k] = together * p_SV[0].square().sum()
                token_S1 = torch.multinomial(p_SV, 1, generator=g)
                together *= float(token_S1[0] == token_S1[1])
                read_ST = torch.cat([read_ST, token_S1], dim=1)
            total_n += 2 * right_n - same_n
        return (total_n / len(starts(text_T, 1)[every // 2 :: every])).tolist()

    return run


def part_of(model: Calm | TokenLM, cache: KVCache, patches: int, more: int) -> KVCache:
    """The first patches of a cache, copied, with room for more."""
    part = model.new_cache(1, patches + more)
    part.store[..., :patches, :] = cache.store[..., :patches, :]
    part.text[:, :patches] = cache.text[:, :patches]
    part.lengths[:] = patches
    return part


def authors_calm(model: Calm, text_T: Tensor) -> Arm:
    """`eval_brier` of the authors' models/modeling_calm.py at a patch size below 4."""

    def run(g: torch.Generator) -> Sequence[float]:
        ids_PK = text_T[: len(text_T) // PATCH * PATCH].view(-1, PATCH)
        links = ORDER // PATCH
        cache = model.new_cache(1, len(ids_PK))
        state_PD = model.states(ids_PK[None], cache)[0, : len(ids_PK) - 1]
        drawn_SPK = model.draw_tokens(state_PD, DRAWS, g)
        target_PK = ids_PK[1:]
        count = len(target_PK) - links + 1
        hit_SPn = torch.cat([(drawn_SPK == target_PK)[:, j : j + count] for j in range(links)], dim=-1)
        right_Pn = hit_SPn.cumprod(-1).sum(0)  # the later patches given the true ones
        total_n = torch.zeros(ORDER)
        for p in range(count):
            same_n = torch.zeros(ORDER)
            next_SK = drawn_SPK[:, p]
            part = part_of(model, cache, p + 1, links)
            for j in range(links):
                if j:
                    state_D = model.states(next_SK[:1][None], part)[0, -1]
                    next_SK = model.draw_tokens(state_D, DRAWS, g)
                same_n[j * PATCH : (j + 1) * PATCH] = (next_SK[0] == next_SK[1]).float()
                if not bool((next_SK[0] == next_SK[1]).all()):
                    break
            total_n += right_Pn[p] - same_n.cumprod(0)
        return (total_n / count).tolist()

    return run


def authors_baseline(model: TokenLM, text_T: Tensor) -> Arm:
    """`compute_loss` of the authors' train/train_ar.py in evaluation."""

    def run(g: torch.Generator) -> Sequence[float]:
        cache = model.new_cache(1, len(text_T))
        p_TV = model.log_probabilities(model.states(text_T[None, :, None], cache)[0]).exp()
        next_T = p_TV[:-1].gather(1, text_T[1:, None])[:, 0]
        total_n = torch.zeros(ORDER)
        for start in starts(text_T, 1):
            right_n = next_T[start - 1 : start - 1 + ORDER].cumprod(0)
            same_n, p_V, token_S = torch.zeros(ORDER), p_TV[start - 1], text_T[:0]
            part = part_of(model, cache, start, ORDER)
            for k in range(ORDER):
                if k:
                    p_V = model.log_probabilities(model.states(token_S[:1].view(1, 1, 1), part)[0, -1]).exp()
                same_n[k] = p_V.square().sum()
                token_S = torch.multinomial(p_V, DRAWS, replacement=True, generator=g)
                if token_S[0] != token_S[1]:
                    break
            total_n += 2 * right_n - same_n
        return (total_n / len(starts(text_T, 1))).tolist()

    return run


@torch.no_grad()
def measure(
    positions: int, width: int, layers: int, agree: float, repeats: int, every: int, noise: int = 0
) -> dict[str, Any]:
    """Median CPU seconds of each arm, the figures that it found, and their standard deviation over `noise` seeds."""
    calm, baseline = build(width, layers, agree)
    result: dict[str, Any] = {}
    for name, stride in (("calm, K = 2", PATCH), ("baseline", 1)):
        text_T = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, positions * stride + ORDER))
        model: Calm | TokenLM = calm if stride == PATCH else baseline
        arms: dict[str, Arm] = {"ours": ours(model, text_T, stride)}
        if isinstance(model, Calm):
            arms |= {"loop": loop_calm(model, text_T, every), "authors": authors_calm(model, text_T)}
        else:
            arms |= {"loop": loop_baseline(model, text_T, every), "authors": authors_baseline(model, text_T)}
        for arm in (arms["ours"], arms["authors"]):
            arm(torch.Generator().manual_seed(1))  # warm-up
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        found: dict[str, Sequence[float]] = {}
        for repeat in range(repeats):
            for arm, work in arms.items():
                g = torch.Generator().manual_seed(repeat)
                begin = time.process_time()
                found[arm] = work(g)
                seconds[arm].append((time.process_time() - begin) * (every if arm == "loop" else 1))
            print(
                f"{name}, {repeat + 1} of {repeats}: { {a: round(s[-1], 3) for a, s in seconds.items()} }",
                file=sys.stderr,
            )
        median = {arm: statistics.median(times) for arm, times in seconds.items()}
        result[name] = {
            "positions": len(starts(text_T, stride)),
            "seconds": median,
            "spread": {arm: [min(times), max(times)] for arm, times in seconds.items()},
            "ratio": {arm: median[arm] / median["ours"] for arm in arms if arm != "ours"},
            "agreement": _agreement(model),
            "brier": {arm: list(values) for arm, values in found.items()},
            "deviation": {arm: _deviation(arms[arm], noise) for arm in ("ours", "authors") if noise},
        }
    return result


def _deviation(arm: Arm, seeds: int) -> list[float]:
    """Standard deviation of Brier-1..4 over seeds: the part of the error that comes from the draws."""
    values = torch.tensor(
        [list(arm(torch.Generator().manual_seed(seed))) for seed in range(seeds)], dtype=torch.float64
    )
    return values.std(dim=0).tolist()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speed of the BrierLM evaluator against loops over positions")
    parser.add_argument("--positions", type=int, default=1000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--agree", type=float, default=0.25, help="share of positions where two draws agree")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--loop-every", type=int, default=10, metavar="N", help="of the plain loop, run one in N positions"
    )
    parser.add_argument("--noise", type=int, default=0, metavar="N", help="seeds for the spread of the estimates")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    machine = environment()
    found = measure(
        chosen.positions, chosen.width, chosen.layers, chosen.agree, chosen.repeats, chosen.loop_every, chosen.noise
    )
    print("\n".join(machine.lines()))
    for name, case in found.items():
        print(f"\n{name}, {case['positions']} positions, width {chosen.width}, {chosen.layers} layers")
        for arm, value in case["seconds"].items():
            low, high = case["spread"][arm]
            ratio = "" if arm == "ours" else f"   ours is {case['ratio'][arm]:.1f} times as fast"
            print(f"  {arm:8} {value:9.3f} s  ({low:.3f} to {high:.3f}){ratio}")
        for arm, values in case["deviation"].items():
            print(f"  {arm:8} standard deviation of Brier-1..4: {', '.join(f'{value:.5f}' for value in values)}")
    if chosen.json is not None:
        write_json(
            chosen.json, {"machine": machine.to_dict(), **vars(chosen) | {"json": str(chosen.json)}, "found": found}
        )


if __name__ == "__main__":
    main()
