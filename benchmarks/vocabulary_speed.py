"""The most likely token of drawn rows: by bounds against all float32 logits, processor time, in turn, on a trained run.

    OMP_NUM_THREADS=1 python benchmarks/vocabulary_speed.py runs/reference/calm

The rows are hidden states of the decoder's first place, of latents that the head draws after 64 tokens of a text.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from nextvec.model.calm import Calm
from nextvec.model.vocabulary import Vocabulary

TEXT = "import os\n\n\ndef read_config(path, default=None):\n    '''Return the settings of a file, or the default.'''\n"
ROWS = (4, 50, 200)  # a patch at T = 1, a later place of a pool, a pool's first place


@torch.inference_mode()
def hidden_states(model: Calm, rows: int) -> Tensor:
    """(N, D) of draws after a text, a few states in turn."""
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(TEXT * 4)[: 16 * model.patch_size]
    state_PD = model.states(torch.tensor(ids).view(1, -1, model.patch_size))[0, -4:]
    latents = model.draw_latents(state_PD, -(-rows // 4), torch.Generator().manual_seed(0))
    return model.autoencoder.decode_hidden(latents.flatten(0, 1))[:rows, 0].contiguous()


@torch.inference_mode()
def times(arms: dict[str, Vocabulary], x_ND: Tensor, repeats: int) -> dict[str, float]:
    """Median milliseconds of processor time of each arm. Raises where their answers differ."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        found = []
        for name, arm in arms.items():
            begin = time.process_time()
            found.append(arm.argmax(x_ND))
            taken[name].append(1e3 * (time.process_time() - begin))
        assert all(torch.equal(found[0], each) for each in found), "the arms differ"
    return {name: sorted(each)[len(each) // 2] for name, each in taken.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of a trained CALM whose head draws latents")
    parser.add_argument("--repeats", type=int, default=25)
    chosen = parser.parse_args(arguments)
    model = Calm.from_pretrained(chosen.run)
    weight = model.autoencoder.embedding.weight
    arms = {"bounds": Vocabulary(weight), "all logits": Vocabulary(weight, quick=False)}
    print(f"V = {weight.shape[0]}, width {weight.shape[1]}; by bounds: {'yes' if arms['bounds'].quick else 'no'}")
    for rows in ROWS:
        found = times(arms, hidden_states(model, rows), chosen.repeats)
        print(f"{rows:>4} rows: " + ", ".join(f"{name} {each:.2f} ms" for name, each in found.items()))


if __name__ == "__main__":
    main()
