"""A host that reads each step's figures later, as on a GPU, counts and leaves out the same steps, and ends in the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nextvec.config import OptimSettings
from nextvec.errors import UserError
from nextvec.train import parallel
from nextvec.train.optim import gated, make_optimizer
from nextvec.train.outcomes import BEHIND, Outcomes, steps_behind
from nextvec.train.world import World
from test_train_loop import Fake, assert_same, config, rows, run

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding, self.hidden = nn.Embedding(5, 4), nn.Linear(4, 6)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_gated_step_is_the_step_or_nothing(name: str) -> None:
    nets = [Net(), Net()]
    optimizers = [make_optimizer(net, OptimSettings.parse({"name": name, "weight_decay": 0.1})) for net in nets]
    generator = torch.Generator().manual_seed(1)
    for good in (False, True, True, False, True):
        for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            value = torch.randn(ours.shape, generator=generator) if good else torch.full(ours.shape, float("nan"))
            ours.grad, theirs.grad = value.clone(), value.clone()
        with gated(optimizers[0], torch.tensor(good)):
            optimizers[0].step()
        if good:
            optimizers[1].step()
        for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(ours, theirs)
            mine = optimizers[0].state[ours]
            assert all(torch.equal(mine[slot], value) for slot, value in optimizers[1].state[theirs].items())
    assert not hasattr(optimizers[0], "found_inf")


def test_outcomes_come_in_order_and_late() -> None:
    outcomes = Outcomes(World(), CPU, 2)
    seen: list[tuple[int, bool]] = []
    for step in range(1, 5):
        loss = torch.tensor(float("inf") if step == 2 else step)
        take = outcomes.add(step, {"energy": torch.tensor(0.5), "loss": loss}, torch.tensor(float(step)), ())
        assert isinstance(take, torch.Tensor)
        assert bool(take) == (step != 2)
        seen += [(outcome.step, outcome.good) for outcome in outcomes.read()]
    assert seen == [(1, True), (2, False)]
    last = list(outcomes.read(all_of_them=True))
    assert [(outcome.step, outcome.sums, outcome.norm) for outcome in last] == [
        (3, {"energy": 0.5, "loss": 3.0}, 3.0),
        (4, {"energy": 0.5, "loss": 4.0}, 4.0),
    ]


def test_only_on_a_gpu_the_host_is_ahead() -> None:
    assert steps_behind(CPU) == 0
    assert steps_behind(torch.device("cuda")) == BEHIND


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "steps_behind", lambda device: BEHIND)


def test_the_same_run_whether_the_host_waits_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for late in (False, True):
        if late:
            monkeypatch.setattr(parallel, "steps_behind", lambda device: BEHIND)
        objective = Fake()
        objective.break_at = (5, 6, 10)
        run(tmp_path / str(late), config(save_every=4), objective)
        said.append([line for line in capsys.readouterr().err.splitlines() if "skipped" in line])
    assert_same(tmp_path / "False", tmp_path / "True", 10)
    assert len(said[0]) == 3
    assert said[0] == said[1]
    losses = [[row.get("loss") for row in rows(tmp_path / name)] for name in ("False", "True")]
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("behind")
def test_resumed_equals_uninterrupted_when_the_host_is_ahead(tmp_path: Path) -> None:
    whole, first = Fake(), Fake()
    whole.break_at = first.break_at = (4, 5, 6)
    run(tmp_path / "whole", config(), whole)
    first.signal_at = 5
    assert run(tmp_path / "part", config(), first).step == 5
    rest = Fake()
    rest.break_at = (1,)
    run(tmp_path / "part", config(), rest, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "part", 10)


@pytest.mark.usefixtures("behind")
def test_too_many_skipped_steps_stop_a_host_that_is_ahead(tmp_path: Path) -> None:
    objective = Fake()
    objective.break_at = (5, 6, 7, 8, 9)
    with pytest.raises(UserError, match=r"training stopped at step 7: .* in 3 steps in a row"):
        run(tmp_path / "run", config(save_every=2, skip_limit=2), objective)
