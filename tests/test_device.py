"""The training step on a device that is not the processor, as `meta` shows it: nothing made elsewhere or read back."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from bench_runs import RUNS
from nextvec.bench.steps import training_module
from nextvec.train.data import moved
from nextvec.train.latents import Encoded
from nextvec.train.muon import Muon
from nextvec.train.optim import gated, parameter_groups

META = torch.device("meta")


@pytest.mark.parametrize("what", RUNS)
def test_a_step_neither_reads_back_nor_makes_anything_on_the_processor(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it does not know this device
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())
    config = RUNS[what]
    module = training_module(config).to(META).train()
    ids_BT = torch.zeros((config.data.rows, config.data.context_tokens), dtype=torch.int64, device=META)
    with pytest.raises(RuntimeError):
        ids_BT.sum().item()  # what this test rests on
    loss, metrics = module(ids_BT, None, 0.5)
    loss.backward()
    assert loss.device == META
    assert {name: value.device for name, value in metrics.items()} == dict.fromkeys(metrics, META)
    trained = [p for p in module.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    hidden, _, _ = parameter_groups(module.named_parameters(), config.optim.override(name="muon"))
    muon = Muon(hidden)
    with gated(muon, loss.isfinite() & norm.isfinite()):
        muon.step()
    assert len(muon.state) == len(hidden[0]["params"])


class Pinned:
    """Stands for a tensor whose memory is pinned and which is then fetched."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def pin_memory(self) -> Pinned:
        self.calls.append("pinned")
        return self

    def to(self, device: torch.device, non_blocking: bool) -> Pinned:
        self.calls.append((device.type, non_blocking))
        return self


def test_a_gpu_fetches_every_part_of_a_batch_from_pinned_memory() -> None:
    calls: list[Any] = []
    batch = Encoded(*(Pinned(calls) for _ in range(3)))  # type: ignore[arg-type]
    assert type(moved(batch, torch.device("cuda"))) is Encoded
    assert calls == 3 * ["pinned"] + 3 * [("cuda", True)]


def test_a_processor_has_its_batch_already() -> None:
    ids: Tensor = torch.zeros(2)
    assert moved(ids, torch.device("cpu")) is ids
