"""Row-wise Adagrad: by hand, sparse as dense, and in a training that is stopped and gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nextvec.card import model_card
from nextvec.config import CalmConfig, OptimSettings, parse_run
from nextvec.model.calm import Calm
from nextvec.model.grams import Grams
from nextvec.train import checkpoint, parallel
from nextvec.train.muon import Muon
from nextvec.train.optim import Combined, clipped, gated, make_optimizer, parameter_groups
from nextvec.train.rows import EPS, RowAdagrad
from nextvec.train.world import World
from test_checkpoint import state

TOKENS = {"vocab_size": 40, "backbone": {"layers": 1, "width": 8, "inner": 8, "heads": 1}}
ROWS = OptimSettings.parse({"rows_lr": 0.5})


class Net(nn.Module):
    """N-grams and a read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.grams, self.output = Grams(8, 256), nn.Linear(8, 5)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)

    def loss(self, ids_N3: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.output(self.grams(ids_N3))
        return logits.logsumexp(-1).sum() - logits[:, 0].sum()


def ids(seed: int) -> torch.Tensor:
    return torch.randint(0, 40, (6, 3), generator=torch.Generator().manual_seed(seed))


def test_steps_by_hand() -> None:
    table = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    optimizer = RowAdagrad([{"params": [table], "lr": 0.1}])
    table.grad = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-1.0, 1.0]])
    optimizer.step()
    first = 12.5  # (9 + 16) / 2
    wanted = torch.tensor([[1 - 0.3 / first**0.5, 2 - 0.4 / first**0.5], [3.0, 4.0], [5.1, 5.9]])
    torch.testing.assert_close(table.detach(), wanted)
    assert torch.equal(table[1].detach(), torch.tensor([3.0, 4.0]))
    table.grad = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    optimizer.step()
    wanted[0] -= 0.1 / 13.5**0.5
    torch.testing.assert_close(table.detach(), wanted)
    assert optimizer.state[table]["sum"].flatten().tolist() == [13.5, 0.0, 1.0]
    assert EPS < 1e-6


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_sparse_gradients_give_what_dense_ones_give(name: str) -> None:
    nets = [Net(), Net()]
    settings = OptimSettings.parse({"name": name, "rows_lr": 0.5})
    optimizers = [make_optimizer(net, settings, alone) for net, alone in zip(nets, (True, False), strict=True)]
    for step in range(5):
        for net, optimizer in zip(nets, optimizers, strict=True):
            for part in range(2):  # accumulated
                net.loss(ids(2 * step + part)).backward()
            gradient = net.grams.embedding.weight.grad
            assert gradient is not None
            assert gradient.is_sparse == (net is nets[0])
            nn.utils.clip_grad_norm_(clipped(optimizer), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    ours, theirs = (dict(net.named_parameters()) for net in nets)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-6)
    touched = torch.cat([nets[0].grams.rows(ids(seed)).flatten() for seed in range(10)]).unique()
    same = (nets[0].grams.embedding.weight == Net().grams.embedding.weight).all(-1)
    assert not same[touched].any()
    assert same.sum() == len(same) - len(touched) > 0


@pytest.mark.parametrize("sparse", [False, True])
def test_a_gated_step_is_the_step_or_nothing(sparse: bool) -> None:
    nets = [Net(), Net()]
    optimizers = [make_optimizer(net, ROWS, sparse) for net in nets]
    for step, good in enumerate((False, True, False, True)):
        for net in nets:
            net.loss(ids(step)).backward()
        if not good:
            nets[0].grams.embedding.weight.grad = nets[0].grams.embedding.weight.grad * float("nan")  # type: ignore[operator]
        with gated(optimizers[0], torch.tensor(good)):
            optimizers[0].step()
        if good:
            optimizers[1].step()
        for net in nets:
            net.zero_grad()
    for mine, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_who_gets_which_parameters() -> None:
    config = CalmConfig.parse(
        {
            "autoencoder": {"vocab_size": 11, "width": 8, "inner": 8, "latent": 8, "factored": True},
            "backbone": {"layers": 1, "width": 8, "inner": 8, "heads": 2},
            "head": {"kind": "mixture", "blocks": 1, "recall": 1, "grams": 16},
        }
    )
    model = Calm(config)
    _, adamw, rows = parameter_groups(model.named_parameters(), ROWS)
    assert [(group["param_names"], group["peak_lr"]) for group in rows] == [(["head.grams.embedding.weight"], 0.5)]
    _, adamw, rows = parameter_groups(model.named_parameters(), OptimSettings())
    assert rows == []
    assert "head.grams.embedding.weight" in adamw[0]["param_names"]
    optimizer = make_optimizer(model, ROWS)
    assert isinstance(optimizer, Combined)
    assert [type(part) for part in optimizer.parts] == [RowAdagrad, Muon, torch.optim.AdamW]
    trained = sum(p.requires_grad for p in model.parameters())
    assert len(clipped(optimizer)) == trained - 1
    assert len(clipped(make_optimizer(model, OptimSettings()))) == trained


def test_gradients_are_dense_again_for_whom_row_wise_adagrad_is_not(tmp_path: Path) -> None:
    net = Net()
    assert make_optimizer(net, ROWS, True) is not None
    assert net.grams.embedding.sparse
    optimizer = make_optimizer(net, OptimSettings(), True)
    net.loss(ids(0)).backward()
    optimizer.step()
    make_optimizer(net, ROWS, True)
    config = parse_run({"kind": "token_lm", "data": {"path": "x"}, "model": TOKENS, "optim": {"rows_lr": 0.5}}, "test")
    whole = parallel.Whole(net, config, World(), torch.device("cpu"), "fp32", 1, None)
    assert net.grams.embedding.sparse
    whole.close()
    assert not net.grams.embedding.sparse


def test_a_card_names_it_where_there_are_n_grams() -> None:
    for grams, named in ((16, True), (0, False)):
        model = TOKENS | {"recall": 1, "grams": grams}
        config = parse_run({"kind": "token_lm", "data": {"path": "x"}, "model": model, "optim": {"rows_lr": 0.25}}, "t")
        trained = {"step": 1, "tokens": 2, "seconds": 3.0}
        card = model_card(config, nn.Linear(2, 2), "hash", trained)
        assert ("row-wise Adagrad for n-grams, rate 0.25" in card) is named


def test_a_checkpoint_brings_the_sums_back(tmp_path: Path) -> None:
    net, other = Net(), Net()
    optimizer, again = make_optimizer(net, ROWS, True), make_optimizer(other, ROWS, True)
    for step in range(3):
        net.loss(ids(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint.write(tmp_path, checkpoint.snapshot(state(3), net, optimizer, {}))
    found = checkpoint.latest(tmp_path)
    assert found is not None
    checkpoint.restore(found, other, again)
    for each, made_by in ((net, optimizer), (other, again)):
        each.loss(ids(7)).backward()
        made_by.step()
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
