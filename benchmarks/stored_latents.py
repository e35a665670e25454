"""What `nextvec prepare --latents` gains: training steps that encode their targets against steps that read them.

    OMP_NUM_THREADS=1 python benchmarks/stored_latents.py --json stored_latents.json

At the reference configuration on synthetic text, one process, steps in turn; medians of the process's own CPU time, which
other work on the machine lengthens little. Disk: bytes per token of what is stored, beside the tokens' own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from nextvec.bench.settings import REFERENCE, training_config
from nextvec.bench.steps import TrainStep, write_text
from nextvec.files import check_target, write_json
from nextvec.hardware import environment
from nextvec.model.calm import Calm
from nextvec.process import keep_freed_memory
from nextvec.train.latents import EncodedBatches, write_latents


class Stored(TrainStep):
    """A training step whose batches come with their posteriors."""

    def read_stored(self) -> Path:
        """Encode the text, and read the posteriors from now on; returns their folder."""
        model = next(part for part in self.module.modules() if isinstance(part, Calm))
        folder = write_latents(self.batches.stream, model.autoencoder)
        self.batches = EncodedBatches(self.batches, model.autoencoder)  # type: ignore[assignment]  # another kind of batch
        return folder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=REFERENCE, help="as `nextvec bench train`")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    check_target(options.json)
    keep_freed_memory()
    config = training_config("train", options.config, options.overrides)
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        write_text(text, config.model.vocab_size, 300_000)
        arms = {
            "encode": TrainStep(config, "ours", text, device, "bf16"),
            "stored": Stored(config, "ours", text, device, "bf16"),
        }
        for arm in arms.values():
            arm.warm()
        latents = arms["stored"].read_stored()  # type: ignore[attr-defined]  # it is a Stored
        stream = arms["encode"].batches.stream
        stored = sum(file.stat().st_size for file in latents.iterdir()) / stream.length
        tokens = sum(file.stat().st_size for file in text.glob("tokens-*")) / stream.length
        for arm in arms.values():
            arm()
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(options.repeats):
            for name, step in arms.items():
                begin = time.process_time()
                step()
                seconds[name].append(time.process_time() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [slow / fast for slow, fast in zip(seconds["encode"], seconds["stored"], strict=True)]
    for name, value in medians.items():
        print(f"{name:<8}{1e3 * value:8.0f} ms of CPU time a step")
    print(f"gain    {100 * (statistics.median(ratios) - 1):8.1f} % (median of {len(ratios)} pairs)")
    print(f"disk    {stored:8.0f} bytes per token, tokens {tokens:.0f}")
    if options.json:
        found = {"seconds": medians, "ratio": statistics.median(ratios), "bytes_per_token": stored}
        write_json(
            options.json,
            {
                **found,
                "token_bytes": tokens,
                "config": config.model_dump(mode="json"),
                "environment": environment().to_dict(),
            },
        )


if __name__ == "__main__":
    main()
