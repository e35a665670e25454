"""Head x solver steps x BrierLM x tokens/s: each head trained on the same tokens around one autoencoder (docs/heads.md).

    OMP_NUM_THREADS=1 python benchmarks/heads.py --autoencoder runs/demo/autoencoder --data runs/demo/data/shards --out runs/heads

Backbone, optimiser, rate, batches and their order are the same for all heads; only the head and its loss differ. Every run is
scored at the same positions (protocol documents-N) with the same number of draws, by each of its solvers, and set against
the energy head of the same seed with a bootstrap over documents. Speeds are tokens per second of this process's own CPU time
on one thread, which other work on the machine lengthens little. What is done is in OUT and is not done again;
`--table` prints the tables of what is there, `--heads` and `--recipe` say what to add.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nextvec.config import (
    AutoencoderConfig,
    AutoregressiveHeadConfig,
    BackboneConfig,
    CalmConfig,
    CalmRun,
    DataSettings,
    DiffusionHeadConfig,
    EnergyHeadConfig,
    FlowHeadConfig,
    HeadKind,
    OptimSettings,
    RecipeSettings,
    TrainSettings,
)
from nextvec.evaluate.brier import evaluate_brier
from nextvec.evaluate.compare import compare
from nextvec.evaluate.cost import calm_cost
from nextvec.evaluate.documents import read_documents
from nextvec.evaluate.paper import PAPER_TOKENS
from nextvec.files import write_json
from nextvec.hardware import environment
from nextvec.model.calm import Calm
from nextvec.presets import preset
from nextvec.rundir import load_autoencoder, load_run
from nextvec.sampling.generate import generate
from nextvec.sampling.settings import Sampling
from nextvec.scoring.brier import BrierResult
from nextvec.text.shards import TokenShards
from nextvec.train.loop import train
from nextvec.train.objectives import build_objective

BACKBONE = BackboneConfig(layers=4, width=192, inner=512, heads=3)  # of docs/heads.md
CONTEXT, ROWS = 1024, 4
HEADS: dict[str, HeadKind] = {
    "energy": EnergyHeadConfig(blocks=2),
    "flow": FlowHeadConfig(blocks=2),
    "diffusion": DiffusionHeadConfig(blocks=2),
    "autoregressive": AutoregressiveHeadConfig(blocks=1),
}
SOLVERS: dict[str, list[tuple[str, int]]] = {  # scored; the first of each is the published one
    "flow": [
        ("midpoint", 10), ("midpoint", 4), ("midpoint", 2), ("midpoint", 1), ("heun", 4), ("heun", 2),
        ("euler", 20), ("euler", 8), ("euler", 4), ("euler", 2), ("euler", 1),
    ],
    "diffusion": [
        ("ddpm", 100), ("ddpm", 25), ("ddpm", 10), ("ddim", 100), ("ddim", 25), ("ddim", 10), ("ddim", 5),
        ("dpm++", 25), ("dpm++", 10), ("dpm++", 5),
    ],
}  # fmt: skip
GENERATED = 128  # tokens of a speed measurement
POOL = 200  # candidates at temperature 0.5


def settings(head: str, recipe: str, seed: int, steps: int, data: str, autoencoder: AutoencoderConfig) -> CalmRun:
    """The run of one head."""
    return CalmRun(
        model=CalmConfig(autoencoder=autoencoder, backbone=BACKBONE, head=HEADS[head]),
        recipe=RecipeSettings.parse({"name": recipe}),
        data=DataSettings(path=data, context_tokens=CONTEXT, rows=ROWS),
        optim=OptimSettings(warmup=30),
        train=TrainSettings(steps=steps, seed=seed, log_every=20),
    )


def train_one(name: str, arguments: argparse.Namespace, head: str, seed: int) -> dict[str, Any]:
    """Train one head into OUT/name; its figures of training."""
    folder = arguments.out / name
    autoencoder, tokenizer = load_autoencoder(arguments.autoencoder)
    config = settings(head, arguments.recipe, seed, arguments.steps, str(arguments.data / "train"), autoencoder.config)
    valid = arguments.data / "valid"
    began = time.process_time()
    result = train(
        config, build_objective(config, tokenizer, autoencoder), folder, device="cpu", valid=valid, show=False
    )
    spent = time.process_time() - began
    cost = calm_cost(config.model, context=CONTEXT // config.model.patch_size, draws=config.draws,
                     auxiliary=arguments.recipe == "fast")  # fmt: skip
    return {
        "name": name, "head": head, "recipe": arguments.recipe, "seed": seed, "tokens": result.tokens,
        "cpu_seconds": spent, "train_tokens_per_s": result.tokens / spent, "held_out": result.evaluation,
        "parameters": cost.params, "head_parameters": int(cost.parameters.head),
        "training_flops_per_token": cost.training_split.total,
    }  # fmt: skip


def score(folder: Path, data: Path, length: int, solver: str | None, steps: int | None) -> dict[str, Any]:
    """BrierLM and the speed of generation of a run by one solver."""
    run = load_run(folder)
    model, tokenizer = run.model, run.text_tokenizer
    assert isinstance(model, Calm)
    model.set_solver(solver, steps)
    documents = [document[:length] for document in read_documents(str(data / "valid"), tokenizer)]
    began = time.process_time()
    brier = evaluate_brier(
        model,
        documents,
        context_tokens=CONTEXT,
        stride=model.patch_size,
        draws=8,
        generator=torch.Generator().manual_seed(0),
        tokenizer_hash=tokenizer.hash,
    )
    spent = time.process_time() - began
    return {
        "solver": solver, "steps": steps, "brier": brier.to_dict(), "eval_cpu_seconds": spent,
        "inference_flops_per_token": calm_cost(model.config, context=CONTEXT // model.patch_size).inference_split.total,
        "tokens_per_s": {str(t): speed(model, t) for t in (1.0, 0.5)},
    }  # fmt: skip


def speed(model: Calm, temperature: float) -> float:
    """Tokens of one text per CPU second, batch 1; texts of further seeds until enough tokens are drawn."""
    assert model.tokenizer is not None
    prompt, tokenizer = model.tokenizer.encode("def "), model.tokenizer
    tokens, spent = 0, 0.0
    for seed in range(9):
        began = time.process_time()
        sampling = Sampling(temperature, POOL, GENERATED if seed else 16, seed)
        steps = generate(model, [prompt], sampling, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        made = sum(len(step.tokens[0]) for step in steps)
        if seed:  # the first is a warm-up
            tokens, spent = tokens + made, spent + time.process_time() - began
        if tokens >= GENERATED:
            break
    return tokens / spent


def work(arguments: argparse.Namespace) -> None:
    """Train and score what is missing."""
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        for head in arguments.heads:
            name = f"{head}-{arguments.recipe}-{seed}"
            record = arguments.out / f"{name}.json"
            if not record.exists():
                write_json(record, {**train_one(name, arguments, head, seed), "scores": []})
            found = json.loads(record.read_text(encoding="utf-8"))
            done = {(row["solver"], row["steps"]) for row in found["scores"]}
            for solver, steps in SOLVERS.get(head, [(None, None)]):
                if (solver, steps) in done:
                    continue
                found["scores"].append(score(arguments.out / name, arguments.data, arguments.length, solver, steps))
                write_json(record, found)
                print(
                    f"{name} {solver or ''} {steps or ''}: BrierLM {found['scores'][-1]['brier']['brier_lm']}",
                    flush=True,
                )
    shards = TokenShards.open(arguments.data / "train")
    write_json(arguments.out / "machine.json", {**environment().to_dict(), "training_tokens": shards.tokens})


def costs() -> Iterator[str]:
    """What each head costs at the size of the paper's CALM-M: 1e20 operations of training, 1e8 per token at inference."""
    yield from _head(
        "head", "solver, passes", "head's parameters", "training", "T = 1", "pool of 200", "pool of 200, split"
    )
    model = preset("calm-m")
    assert isinstance(model, CalmConfig)
    shown: list[HeadKind] = [
        EnergyHeadConfig(blocks=4),
        *(FlowHeadConfig(blocks=4, steps=steps) for steps in (10, 4, 2)),
        DiffusionHeadConfig(blocks=4, solver="ddpm", steps=100),
        DiffusionHeadConfig(blocks=4, solver="dpm++", steps=10),
        AutoregressiveHeadConfig(),
    ]
    for head in shown:
        one, pool = (calm_cost(model.model_copy(update={"head": head}), candidates=count) for count in (1, POOL))
        how = f"{head.solver}, {head.evaluations}" if isinstance(head, FlowHeadConfig | DiffusionHeadConfig) else "-"
        yield (
            f"| {head.kind} | {how} | {one.parameters.head / 1e6:.1f}M | {one.training.total * PAPER_TOKENS / 1e20:.2f} | "
            f"{one.inference.total / 1e8:.2f} | {pool.inference.total / 1e8:.0f} | {pool.inference_split.total / 1e8:.0f} |"
        )


def records(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-*-*.json"))]
    return sorted(found, key=lambda row: (row["recipe"], row["seed"], list(HEADS).index(row["head"])))


def tables(folder: Path) -> Iterator[str]:
    """The two tables of docs/heads.md from the records of OUT."""
    found = records(folder)
    yield from _head(
        "head", "recipe", "parameters (head)", "tokens", "MFLOPs/token, training", "tokens/CPU s, training", "gap"
    )
    for row in found:
        yield (
            f"| {row['head']} | {row['recipe']} | {row['parameters'] / 1e6:.2f}M ({row['head_parameters'] / 1e6:.2f}M) | "
            f"{row['tokens'] / 1e6:.2f}M | {row['training_flops_per_token'] / 1e6:.1f} | {row['train_tokens_per_s']:,.0f} | "
            f"{row['held_out']['conditioning_gap']:.3f} |"
        )
    yield ""
    yield from _head(
        "head", "recipe", "solver", "steps", "passes", "Brier-1..4 (x100)", "BrierLM", "Brier-1 less energy", "MFLOPs/token",
        "tokens/CPU s, T = 1", "T = 0.5, N = 200",
    )  # fmt: skip
    energy = {(row["recipe"], row["seed"]): row["scores"][0]["brier"] for row in found if row["head"] == "energy"}
    for row in found:
        base = energy.get((row["recipe"], row["seed"]))
        yield from (_line(row, scored, base) for scored in row["scores"])


def _head(*names: str) -> Iterator[str]:
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"


def _line(row: dict[str, Any], scored: dict[str, Any], base: dict[str, Any] | None) -> str:
    brier = scored["brier"]
    steps = scored["steps"]
    passes = "-" if steps is None else 2 * steps if scored["solver"] in ("midpoint", "heun") else steps
    total = "none" if brier["brier_lm"] is None else f"{brier['brier_lm']:.2f} ± {brier['brier_lm_stderr']:.2f}"
    orders = " ".join(f"{100 * value:.2f}" for value in brier["brier"])
    rates = scored["tokens_per_s"]
    return (
        f"| {row['head']} | {row['recipe']} | {scored['solver'] or '-'} | {steps or '-'} | {passes} | {orders} | {total} | "
        f"{'-' if base is None or row['head'] == 'energy' else _gap(base, brier)} | "
        f"{scored['inference_flops_per_token'] / 1e6:.1f} | {rates['1.0']:,.0f} | {rates['0.5']:,.0f} |"
    )


def _gap(base: dict[str, Any], brier: dict[str, Any]) -> str:
    """Brier-1 (x100) less that of the energy head at the same positions; some resamples have no BrierLM to compare."""
    generator = torch.Generator().manual_seed(0)
    first = compare(BrierResult.from_dict(base), BrierResult.from_dict(brier), generator=generator).differences[0]
    return f"{100 * first.value:+.2f}" + ("" if first.stderr is None else f" ± {100 * first.stderr:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoder", type=Path, help="run of the trained autoencoder")
    parser.add_argument("--data", type=Path, help="folder with train/ and valid/ shards")
    parser.add_argument("--out", type=Path, help="folder of the runs and records")
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--recipe", default="fast", choices=["fast", "paper"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=240, help=f"optimiser steps of {ROWS * CONTEXT} tokens")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each held-out document that are scored")
    parser.add_argument("--table", action="store_true", help="print the tables of what OUT holds, and do nothing else")
    parser.add_argument("--costs", action="store_true", help="print what the heads cost at the paper's size, no more")
    arguments = parser.parse_args()
    if arguments.costs:
        print("\n".join(costs()))
        return
    if arguments.out is None:
        parser.error("--out is needed")
    if not arguments.table:
        if arguments.autoencoder is None or arguments.data is None:
            parser.error("--autoencoder and --data are needed to train")
        work(arguments)
    print("\n".join(tables(arguments.out)))


if __name__ == "__main__":
    main()
