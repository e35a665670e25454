"""Checkpoints: whole or absent, checked, the newest two kept, a damaged one passed over in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nextvec.config import BackboneConfig, DataSettings, OptimSettings, TokenLMConfig, TokenLMRun
from nextvec.errors import ConfigError, DataError
from nextvec.train import checkpoint
from nextvec.train.checkpoint import TrainState
from nextvec.train.optim import make_optimizer


class Tied(nn.Module):
    """A tied pair, a buffer of each kind, a frozen part and a scalar."""

    def __init__(self, seed: int, width: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(width, 5, bias=False)
        self.second = nn.Linear(width, 5, bias=False)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def state(step: int) -> TrainState:
    return TrainState(
        step=step,
        tokens=step * 7,
        seconds=0.1 + step,
        logged_step=step - 1,
        logged_seconds=0.1,
        counts={"loss": 2},
        precision="fp32",
        config={"optim": {"lr": 0.1}},
        data="data",
        frozen="frozen",
    )


def trained(seed: int = 0) -> tuple[Tied, torch.optim.AdamW]:
    module = Tied(seed)
    optimizer = make_optimizer(module, OptimSettings())
    for _ in range(2):
        (module.first.weight.square().sum() * module.scale).backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def save(run: Path, step: int, seed: int = 0, **keep: int) -> Path:
    return checkpoint.write(
        run, checkpoint.snapshot(state(step), *trained(seed), {"loss": torch.tensor(1 / 3)}), **keep
    )


def test_round_trip_is_exact(tmp_path: Path) -> None:
    module, optimizer = trained()
    module.kept.fill_(3.0)
    sums = {"loss": torch.tensor(1 / 3), "inf": torch.tensor(float("inf"))}
    path = checkpoint.write(tmp_path, checkpoint.snapshot(state(4), module, optimizer, sums))
    assert sorted(p.name for p in path.iterdir()) == ["module.safetensors", "optimizer.safetensors", "state.json"]
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.state == state(4)

    other = Tied(1)
    frozen = other.frozen.weight.clone()
    again = make_optimizer(other, OptimSettings())
    restored = checkpoint.restore(found, other, again)
    assert torch.equal(other.first.weight, module.first.weight)
    assert other.second.weight is other.first.weight
    assert torch.equal(other.scale, module.scale)
    assert torch.equal(other.kept, module.kept)
    assert torch.equal(other.frozen.weight, frozen)
    for a, b in ((module.first.weight, other.first.weight), (module.scale, other.scale)):
        assert optimizer.state[a].keys() == again.state[b].keys()
        for slot, value in optimizer.state[a].items():
            assert torch.equal(value, again.state[b][slot])
            assert value.dtype == again.state[b][slot].dtype
    assert {name: float(value) for name, value in restored.items()} == {n: float(v) for n, v in sums.items()}


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "missing") is None


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        save(tmp_path, step)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000009", "step-00000010"]
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.state.step == 10


def test_every_so_many_steps_are_kept_as_well(tmp_path: Path) -> None:
    for step in range(1, 9):
        save(tmp_path, step, keep_last=1, keep_every=3)
    assert sorted(p.name[-1] for p in (tmp_path / "checkpoints").iterdir()) == ["3", "6", "8"]


def test_training_may_go_on_while_a_snapshot_is_written(tmp_path: Path) -> None:
    module, optimizer = trained()
    taken = checkpoint.snapshot(state(1), module, optimizer, {})
    weight = module.first.weight.detach().clone()
    moments = {slot: value.clone() for slot, value in optimizer.state[module.first.weight].items()}
    (module.first.weight.square().sum()).backward()
    optimizer.step()
    checkpoint.write(tmp_path, taken)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    other, again = trained(2)
    checkpoint.restore(found, other, again)
    assert torch.equal(other.first.weight, weight)
    assert moments
    assert all(torch.equal(again.state[other.first.weight][slot], value) for slot, value in moments.items())
    assert not torch.equal(module.first.weight, weight)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    path = save(tmp_path, 3, seed=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [path.name]
    found = checkpoint.latest(tmp_path)
    assert found is not None
    other, again = trained(2)
    checkpoint.restore(found, other, again)
    assert torch.equal(other.first.weight, trained(1)[0].first.weight)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("harm", [cut_in_half, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["module.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_newest_is_passed_over_in_one_line(tmp_path: Path, name: str, harm: object) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    assert callable(harm)
    harm(newest / name)
    lines: list[str] = []
    found = checkpoint.latest(tmp_path, lines.append)
    assert found is not None
    assert found.state.step == 1
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert str(newest / name) in lines[0]
    assert lines[0].endswith(f"going on from the older checkpoint {found.path}")
    checkpoint.drop_newer(tmp_path, 1)
    again = checkpoint.latest(tmp_path, lines.append)
    assert again is not None
    assert len(lines) == 1
    assert (tmp_path / "checkpoints" / "damaged-step-00000002").is_dir()


@pytest.mark.parametrize("harm", [cut_in_half, flip_a_bit])
@pytest.mark.parametrize("name", ["module.safetensors", "state.json"])
def test_only_a_damaged_one_is_an_error_naming_the_file(tmp_path: Path, name: str, harm: object) -> None:
    path = save(tmp_path, 2)
    assert callable(harm)
    harm(path / name)
    with pytest.raises(DataError, match="no older checkpoint is whole; train again into a new directory") as error:
        checkpoint.latest(tmp_path)
    assert str(path / name) in str(error.value)


def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    content = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(content | {"format": 3}))
    with pytest.raises(ConfigError, match=r"has format 3, newer than this nextvec reads \(2\)"):
        checkpoint.latest(tmp_path)


def test_a_folder_left_by_a_crash_is_ignored_and_cleared(tmp_path: Path) -> None:
    partial = tmp_path / "checkpoints" / ".step-00000009.tmp"
    partial.mkdir(parents=True)
    (partial / "module.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) is None
    save(tmp_path, 1)
    assert not partial.exists()


def test_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    wide = Tied(0, width=8)
    with pytest.raises(DataError, match=r"does not fit this model: first\.weight differ"):
        checkpoint.restore(found, wide, make_optimizer(wide, OptimSettings()))


def test_frozen_digest_sees_frozen_values_only() -> None:
    module = Tied(0)
    before = checkpoint.frozen_digest(module)
    with torch.no_grad():
        module.first.weight.add_(1)
    assert checkpoint.frozen_digest(module) == before
    with torch.no_grad():
        module.frozen.bias[0].add_(1e-6)
    assert checkpoint.frozen_digest(module) != before


@pytest.mark.parametrize(
    ("key", "free"),
    [("steps", True), ("log_every", True), ("keep_last", True), ("seed", False), ("accumulate", False)],
)
def test_which_settings_may_change(tmp_path: Path, key: str, free: bool) -> None:
    save(tmp_path, 1)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    config = {"optim": {"lr": 0.1}, "train": {key: 5}}
    if free:
        checkpoint.check_same_run(found, config, "data", "frozen")
    else:
        with pytest.raises(DataError, match=rf"train\.{key} was None and is now 5"):
            checkpoint.check_same_run(found, config, "data", "frozen")


def test_all_settings_that_may_not_change_are_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    several = {"optim": {"lr": 0.1}, "train": {"seed": 5, "accumulate": 2, "steps": 9}}
    with pytest.raises(DataError, match=r"train\.accumulate was None and is now 2, train\.seed .* 5; set them back"):
        checkpoint.check_same_run(found, several, "data", "frozen")


def test_a_setting_that_an_older_checkpoint_does_not_know_counts_as_its_default(tmp_path: Path) -> None:
    run = TokenLMRun(
        data=DataSettings(path="shards"), model=TokenLMConfig(vocab_size=9, backbone=BackboneConfig(width=16, heads=2))
    )
    settings = run.model_dump(mode="json")
    older = {**settings, "train": {name: value for name, value in settings["train"].items() if name != "accumulate"}}
    before = state(1).model_copy(update={"config": older})
    checkpoint.write(tmp_path, checkpoint.snapshot(before, *trained(), {}))
    found = checkpoint.latest(tmp_path)
    assert found is not None
    checkpoint.check_same_run(found, settings, "data", "frozen")
    changed = {**settings, "train": {**settings["train"], "accumulate": 2}}
    with pytest.raises(DataError, match=r"train\.accumulate was 1 and is now 2"):
        checkpoint.check_same_run(found, changed, "data", "frozen")


def test_nothing_is_pickled() -> None:
    source = Path(checkpoint.__file__).parent
    for path in source.glob("*.py"):
        text = path.read_text()
        assert "torch.save" not in text
        assert "torch.load" not in text
        assert "pickle" not in text.replace("nothing pickled", "")


def test_unused_parameters_have_no_state(tmp_path: Path) -> None:
    """A parameter that never had a gradient has no optimiser state, and gets none by resuming."""
    module = Tied(0)
    optimizer = make_optimizer(module, OptimSettings())
    module.first.weight.sum().backward()
    optimizer.step()
    checkpoint.write(tmp_path, checkpoint.snapshot(state(1), module, optimizer, {}))
    found = checkpoint.latest(tmp_path)
    assert found is not None
    again = make_optimizer(module, OptimSettings())
    assert checkpoint.restore(found, module, again) == {}
    kept: list[Tensor] = list(again.state)
    assert kept[0] is module.first.weight
    assert len(kept) == 1
