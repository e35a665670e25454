"""What a head of latents takes from a state: heads alone, on the frozen states of a multi-token model (docs/recipe-history.md).

    nextvec train lm --data SHARDS --out MULTI model.head.kind=autoregressive model.autoencoder.patch_size=4 recipe.name=paper ...
    OMP_NUM_THREADS=1 python benchmarks/heads_on_states.py --run MULTI --autoencoder AUTOENCODER --data SHARDS --seconds 60 240

MULTI's own head, a causal decoder over tokens, says what the states know. Each other head sees the same states, those of --steps
batches of training text, for --seconds of this process's CPU time, its rate falling to 0, and is scored on the same
documents. The backbone learns nothing from it, so that a difference between rows is the head's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from nextvec.config import AutoregressiveHeadConfig, CalmConfig, FlowHeadConfig, OptimSettings
from nextvec.evaluate.brier import evaluate_brier
from nextvec.evaluate.documents import read_documents
from nextvec.hardware import has_bf16
from nextvec.model.calm import Calm
from nextvec.model.init import initialise
from nextvec.model.text_states import vector_of
from nextvec.rundir import load_autoencoder, load_run
from nextvec.scoring.brier import BrierResult
from nextvec.text.batches import Batches
from nextvec.text.layout import Stream
from nextvec.text.shards import TokenShards
from nextvec.train.optim import make_optimizer

CONTEXT, ROWS = 1024, 4  # tokens of a window, windows of a batch
POSITIONS = 1024  # of a step of a head
BF16 = has_bf16(torch.device("cpu"))  # products in bf16 where the processor has them
WARMUP, DECAY = 30, 0.95  # steps; share of the time over which the rate falls
DRAW = {"teacher_draws": 2, "solver": "euler", "steps": 4}
HEADS: dict[str, FlowHeadConfig] = {
    "velocity": FlowHeadConfig(blocks=2, predicts="velocity", **DRAW),
    "latent": FlowHeadConfig(blocks=2, predicts="latent", **DRAW),
    "latent, 4 blocks": FlowHeadConfig(blocks=4, predicts="latent", **DRAW),
}


def teach(model: Calm, state_ND: Tensor, ids_NK: Tensor, seconds: float, seed: int) -> int:
    """Train the head of `model` alone; the number of its steps."""
    generator = torch.Generator().manual_seed(seed)
    initialise(model.head, generator, 0.8 / model.config.backbone.width**0.5)
    optimizer = make_optimizer(model.head, OptimSettings())
    peaks = [group["lr"] for group in optimizer.param_groups]
    began, steps = time.process_time(), 0
    while (share := (time.process_time() - began) / seconds) < 1:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, (steps + 1) / WARMUP, (1 - share) / DECAY)
        some = torch.randint(len(state_ND), (POSITIONS,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
            loss, _ = model.loss(state_ND[some].float(), ids_NK[some], generator)
        loss.backward()
        nn.utils.clip_grad_norm_(model.head.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps


@torch.no_grad()
def states(model: Calm, shards: TokenShards, batches: int) -> tuple[Tensor, Tensor]:
    """States (N, D) in bf16 and the patches that follow them, (N, K)."""
    size = model.patch_size
    text = Batches(Stream(shards, size, "aligned"), ROWS, CONTEXT, 1)
    found = []
    with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
        for step in range(batches):
            ids = text.batch(step).unflatten(1, (-1, size))
            found.append((vector_of(model.states(ids[:, :-1])).bfloat16().flatten(0, 1), ids[:, 1:].flatten(0, 1)))
    return torch.cat([state for state, _ in found]), torch.cat([ids for _, ids in found])


def around(trained: Calm, head: FlowHeadConfig, autoencoder_run: Path) -> Calm:
    """A CALM with the compressor and the backbone of another, all frozen but the head."""
    autoencoder, _ = load_autoencoder(autoencoder_run)
    config = CalmConfig(autoencoder=autoencoder.config, backbone=trained.config.backbone, head=head)
    model = Calm(config, autoencoder)
    model.compressor.load_state_dict(trained.compressor.state_dict())
    model.backbone.load_state_dict(trained.backbone.state_dict())
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return model


def rows(arguments: argparse.Namespace) -> Iterator[str]:
    run = load_run(arguments.run)
    trained, tokenizer = run.model, run.text_tokenizer
    if not isinstance(trained, Calm) or not isinstance(trained.config.head, AutoregressiveHeadConfig):
        raise SystemExit(f"{arguments.run} is no CALM with the autoregressive head")
    valid = read_documents(str(arguments.data / "valid"), tokenizer)[: arguments.documents]

    def score(model: Calm) -> str:
        result: BrierResult = evaluate_brier(
            model.eval(),
            [document[:CONTEXT] for document in valid],
            context_tokens=CONTEXT // 2,
            stride=model.patch_size,
            draws=4,
            generator=torch.Generator().manual_seed(0),
            tokenizer_hash=tokenizer.hash,
        )
        brier = " ".join(f"{100 * value:.2f}" for value in result.brier)
        lm = "none" if result.brier_lm is None else f"{result.brier_lm:.2f}"
        return f"{brier} | {lm}"

    yield "| head | CPU s | steps | Brier-1..4 (x100) | BrierLM |"
    yield "|---|---|---|---|---|"
    yield f"| autoregressive, trained with the backbone | | | {score(trained)} |"
    state_ND, ids_NK = states(trained.eval(), TokenShards.open(arguments.data / "train"), arguments.steps)
    for seconds in arguments.seconds:
        for name in arguments.heads:
            model = around(trained, HEADS[name], arguments.autoencoder)
            steps = teach(model, state_ND, ids_NK, seconds, arguments.seed)
            yield f"| flow, predicts {name} | {seconds:g} | {steps:,} | {score(model)} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, nargs="+", default=[60.0])
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=["velocity", "latent"])
    parser.add_argument("--steps", type=int, default=360, help="batches of training text whose states are kept")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    torch.set_num_threads(1)
    for row in rows(parser.parse_args(argv)):
        print(row, flush=True)


if __name__ == "__main__":
    main()
