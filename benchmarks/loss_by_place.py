"""Nats per token by place in the patch, of a CALM with the mixture head and of a token Transformer at the same places.

    python benchmarks/loss_by_place.py CALM --beside TOKEN --data SHARDS/valid

Read are the first `--tokens` tokens of as many held-out documents as have them, at most `--documents`. The same for a CALM
whose state is replaced by the mean of all states, or by that of another document: what is left without it comes from the tokens
that the head reads itself (docs/recipe-history.md).
Legend: N documents, T tokens, P patches, K tokens per patch, D width.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nextvec.errors import ConfigError, DataError
from nextvec.model.calm import Calm
from nextvec.model.heads.mixture import MixtureHead
from nextvec.model.text_states import vector_of, with_vector
from nextvec.model.token_lm import TokenLM
from nextvec.rundir import load_run
from nextvec.text.shards import TokenShards


def read(shards: TokenShards, tokens: int, most: int) -> Tensor:
    """Ids (N, T). Raises DataError where no document is long enough."""
    documents = (shards.document(index)[:tokens] for index in range(shards.documents))
    found = [torch.as_tensor(document.astype("int64")) for document in documents if len(document) == tokens][:most]
    if not found:
        raise DataError(f"no held-out document has {tokens} tokens: give fewer with --tokens")
    return torch.stack(found)


def of_calm(model: Calm, ids_NT: Tensor) -> dict[str, list[float]]:
    """Nats by place: as it is, without its state, with the state of the next document."""
    head = model.head
    if not isinstance(head, MixtureHead):
        raise ConfigError("the loss by place is that of a mixture head: give the run of one")
    ids_NPK = ids_NT.unflatten(1, (-1, model.patch_size))
    state_NPD = model.states(ids_NPK[:, :-1])
    vector = vector_of(state_NPD)
    own, context = vector.split((head.width, vector.shape[-1] - head.width), dim=-1)
    states = {"as it is": own, "mean state": own.mean((0, 1), keepdim=True).expand_as(own)}
    if len(ids_NT) > 1:
        states["state of another document"] = own.roll(1, 0)
    found = {}
    for name, state in states.items():
        log = head.log_probabilities(with_vector(state_NPD, torch.cat((state, context), dim=-1)), ids_NPK[:, 1:])
        found[name] = (-log.mean((0, 1))).tolist()
    return found


def of_tokens(model: TokenLM, ids_NT: Tensor, patch_size: int) -> list[float]:
    """Nats at the same places."""
    losses = []
    for ids_T in ids_NT:
        log_TV = model.log_probabilities(model.states(ids_T[None, :-1, None])[0])
        losses.append(-log_TV.gather(-1, ids_T[1:, None])[patch_size - 1 :, 0])
    return torch.stack(losses).unflatten(1, (-1, patch_size)).mean((0, 1)).tolist()


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="nats per token by place in the patch")
    parser.add_argument("run", type=Path, help="a CALM with the mixture head")
    parser.add_argument("--beside", type=Path, help="a token Transformer")
    parser.add_argument("--data", type=Path, required=True, help="held-out shards")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--documents", type=int, default=40)
    chosen = parser.parse_args(arguments)
    calm = load_run(chosen.run).model
    assert isinstance(calm, Calm)
    size = calm.patch_size
    ids_NT = read(TokenShards.open(chosen.data), chosen.tokens // size * size, chosen.documents)
    rows = {f"CALM, {name}": values for name, values in of_calm(calm, ids_NT).items()}
    if chosen.beside is not None:
        token = load_run(chosen.beside).model
        assert isinstance(token, TokenLM)
        rows["token Transformer"] = of_tokens(token, ids_NT, size)
    print(f"{len(ids_NT)} documents of {ids_NT.shape[1]} tokens; nats per token at places 1 to {size}, and of all")
    for name, values in rows.items():
        print(f"{name:<32}" + "".join(f"{value:8.3f}" for value in [*values, sum(values) / size]))


if __name__ == "__main__":
    main()
