"""What follows a prompt that fills no whole number of patches: three ways to begin, on held-out text (docs/sampling.md).

    nextvec demo
    OMP_NUM_THREADS=1 python benchmarks/prompt_remainder.py runs/demo/calm --data runs/demo/data/shards/valid

A prompt of P whole patches and r more tokens, r = 1 .. K - 1, cut from the beginning of a held-out document, is continued by
ORDER tokens at temperature 1, SAMPLES times, and scored by Brier-1 .. ORDER against the text as it goes on:

* nextvec: of N to 4 N draws of the next patch those that begin with the r tokens; where none does, `left`.
* left: pads before the text, so that it ends at the end of a patch; every patch then holds other tokens than in training.
* middle: pads after the text, in the last patch, and new text after the pads (the authors' code).
* token: the r tokens are given and the others drawn by their laws, of a head that knows these.
* whole: the same prompts without their last r tokens, scored on the tokens from there: the same length of new text, with
  nothing left over. Not an answer to the question, but what the model is worth where it does not arise.

Standard errors are over documents; `met` is the share of prompts whose r tokens a draw began with. Last, processor milliseconds
of the first patch at T = 0.5, the reading of the prompt included, beside the same with every draw decoded whole.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nextvec.evaluate.collision import Context, contexts
from nextvec.files import check_target, write_json
from nextvec.model.autoencoder import Autoencoder
from nextvec.model.calm import Calm
from nextvec.rundir import load_run
from nextvec.sampling import draw
from nextvec.sampling.engine import Engine
from nextvec.sampling.explain import next_patch
from nextvec.sampling.settings import CANDIDATES, Method, Sampling
from nextvec.scoring.brier import brier_scores
from nextvec.scoring.clusters import cluster_ratio
from nextvec.text.shards import TokenShards

DRAWN = CANDIDATES["pool"]
ORDER = 4
SAMPLES = 16
LONGEST = 64  # patches of a prompt, fewer than
TIMED = 32  # prompts over which milliseconds are taken
WAYS = ("nextvec", "left", "middle", "whole")


def _places(shards: TokenShards, size: int, count: int, seed: int, rest: int) -> list[Context]:
    documents = [shards.document(index) for index in range(shards.documents)]
    return contexts(documents, size, count, seed, longest=LONGEST * size, after=ORDER, rest=rest, spare=2)


def continuations(model: Calm, asked: Sequence[list[int]], seed: int, pad: int, method: Method) -> Tensor:
    """Texts (prompts, SAMPLES, ORDER); end-of-text is a token like any other."""
    longest = max(map(len, asked)) // model.patch_size + 4
    engine = Engine(model, eos_id=-1, pad_id=pad, slots=64, capacity=longest, packed=True)
    for index, prompt in enumerate(asked):
        settings = Sampling(1.0, max_tokens=ORDER, seed=seed, method=method)
        engine.add(prompt, settings, samples=SAMPLES, row=index * SAMPLES)
    rows: dict[int, list[int]] = {}
    while len(engine):
        for event in engine.step():
            rows.setdefault(event.row, []).extend(event.tokens)
    return torch.tensor([rows[row] for row in sorted(rows)]).unflatten(0, (-1, SAMPLES))


def score(model: Calm, shards: TokenShards, rest: int, way: str, count: int, seed: int) -> dict[str, Any]:
    size = model.patch_size
    eos, pad = shards.manifest.eos_id, shards.manifest.pad_id
    boundary = [eos] + [pad] * (size - 1)
    places = _places(shards, size, count, seed, rest)
    asked, targets = [], []
    for prompt, after, _ in places:
        whole = prompt[: len(prompt) - rest]
        if way == "left":
            # the boundary, pads, and the text so that it ends a patch
            asked.append(boundary + [pad] * (size - rest) + prompt)
        elif way == "middle":
            asked.append(boundary + prompt + [pad] * (size - rest))
        else:
            asked.append(boundary + (whole if way == "whole" else prompt))
        targets.append(([*prompt[len(whole) :], *after])[:ORDER] if way == "whole" else list(after))
    text_NSn = continuations(model, asked, seed, pad, "token" if way == "token" else "pool")
    target_Nn = torch.tensor(targets)
    values_Nn = brier_scores(text_NSn.transpose(0, 1), target_Nn, torch.ones_like(target_Nn, dtype=torch.bool)).double()
    documents = torch.tensor([place.document for place in places])
    found = cluster_ratio(values_Nn, torch.ones_like(target_Nn, dtype=torch.bool), documents)
    assert found.covariance is not None, "one document has no spread"
    return {
        "rest": rest,
        "way": way,
        "brier": (100 * found.mean).tolist(),
        "stderr": (100 * found.covariance.diagonal().sqrt()).tolist(),
        "met": _met(model, places, seed, eos, pad) if way == "nextvec" else None,
    }


def _met(model: Calm, places: Sequence[Context], seed: int, eos: int, pad: int) -> float:
    """Share of prompts whose rest at least one of N draws begins with."""
    votes = [next_patch(model, place.ids, 1.0, DRAWN, seed, eos_id=eos, pad_id=pad) for place in places]
    rests = [len(place.ids) % model.patch_size for place in places]
    return sum(vote.matched == rest for vote, rest in zip(votes, rests, strict=True)) / len(places)


def milliseconds(model: Calm, shards: TokenShards, rest: int, seed: int) -> dict[str, float]:
    """Median processor time of the first patch of a prompt alone, by how the pool is decoded; the two ways in turn."""
    size = model.patch_size
    eos, pad = shards.manifest.eos_id, shards.manifest.pad_id
    taken: dict[str, list[float]] = {"as needed": [], "whole": []} | ({"token": []} if model.by_token else {})
    for place in _places(shards, size, TIMED, seed, rest):
        for way, times in taken.items():
            engine = Engine(model, eos_id=eos, pad_id=pad, slots=1, capacity=LONGEST + 4)
            engine.add(
                place.ids, Sampling(0.5, max_tokens=size, seed=seed, method="token" if way == "token" else "pool")
            )
            begin = time.process_time()
            if way == "whole":
                with mock.patch.object(draw, "decode_beginning", _decode_all):
                    engine.step()
            else:
                engine.step()
            times.append(1e3 * (time.process_time() - begin))
    return {way: sorted(times)[len(times) // 2] for way, times in taken.items()}


def _decode_all(decoder: Autoencoder, latent_NL: Tensor, patch_size: int, rest: Sequence[int]) -> Tensor:
    return decoder.decode_tokens(latent_NL)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="continuations of prompts that end inside a patch")
    parser.add_argument("run", type=Path, help="a CALM")
    parser.add_argument("--data", type=Path, required=True, help="held-out shards")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rests", type=int, nargs="+", help="tokens beyond whole patches; 1 to K - 1 unless given")
    chosen = parser.parse_args(arguments)
    check_target(chosen.json)
    model = load_run(chosen.run).model
    assert isinstance(model, Calm)
    shards = TokenShards.open(chosen.data)
    rests = chosen.rests or range(1, model.patch_size)
    if not all(0 < rest < model.patch_size for rest in rests):
        parser.error(f"--rests are 1 to {model.patch_size - 1}, as the model's patches have {model.patch_size} tokens")
    rows = []
    for rest in rests:
        for way in (*WAYS, "token") if model.by_token else WAYS:
            row = score(model, shards, rest, way, chosen.prompts, chosen.seed)
            rows.append(row)
            orders = "  ".join(
                f"{mean:5.2f} ± {error:.2f}" for mean, error in zip(row["brier"], row["stderr"], strict=True)
            )
            met = "" if row["met"] is None else f"  met {row['met']:.0%}"
            print(f"r = {rest}  {way:<10} Brier-1..{ORDER} x 100: {orders}{met}", flush=True)
    times = {str(rest): milliseconds(model, shards, rest, chosen.seed) for rest in (0, *rests)}
    for rest_of, each in times.items():
        print(
            f"r = {rest_of}  first patch: " + ", ".join(f"decoded {way} {value:.1f} ms" for way, value in each.items())
        )
    if chosen.json:
        settings = {"prompts": chosen.prompts, "samples": SAMPLES, "seed": chosen.seed}
        write_json(chosen.json, {**settings, "rows": rows, "milliseconds": times})


if __name__ == "__main__":
    main()
