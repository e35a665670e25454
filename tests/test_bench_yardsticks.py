"""What `nextvec bench` measures with: the training step itself, all of its products, its parts, its memory."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench_runs import CPU, PARTS, RUNS, TOKENIZER, VOCAB
from nextvec.bench import limits, memory, parts
from nextvec.bench.limits import Layout, Product, Stopwatch, collect
from nextvec.bench.steps import TrainStep, training_module, write_text
from nextvec.bench.work import Spec
from nextvec.config import (
    CalmRun,
)
from nextvec.text.shards import TokenShards
from nextvec.train.data import Data
from nextvec.train.flops import count_flops
from nextvec.train.loop import train
from nextvec.train.objectives import build_objective


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short readings."""
    monkeypatch.setattr(limits, "BURST", 1e-5)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_text(tmp_path / "text", VOCAB, 3000)
    return tmp_path / "text"


# --- the step


@pytest.mark.parametrize("what", RUNS)
def test_three_steps_are_those_of_the_training_loop(tmp_path: Path, text: Path, what: str) -> None:
    """Bit for bit: batches, noise, accumulation, clipping, rate, update."""
    config = RUNS[what]
    step = TrainStep(config, "ours", text, CPU, "fp32")
    start = {name: value.clone() for name, value in step.module.state_dict().items()}
    for _ in range(3):
        step()
    model = training_module(config)
    objective = build_objective(
        config,
        TOKENIZER,
        model.model.autoencoder if isinstance(config, CalmRun) else None,  # type: ignore[union-attr,arg-type]
    )
    train(config, objective, tmp_path / "run", device="cpu", data=Data(step.batches, "digest"), show=False)
    trained = objective.module.state_dict()
    assert any(not torch.equal(start[name], value) for name, value in trained.items())
    for name, value in step.module.state_dict().items():
        assert torch.equal(value, trained[name]), name


def test_both_arms_start_alike_and_read_the_same_text(text: Path) -> None:
    ours, plain = (TrainStep(RUNS["baseline"], arm, text, CPU, "fp32") for arm in ("ours", "plain"))  # type: ignore[arg-type]
    assert ours.tokens == plain.tokens == 2 * 16 * 2
    assert torch.equal(ours.module.model.output.weight, plain.module.model.output.weight)  # type: ignore[union-attr,arg-type]
    assert torch.equal(ours.batches.batch(5), plain.batches.batch(5))
    assert ours.optimizer.defaults["fused"]
    assert not plain.optimizer.defaults["fused"]


def test_synthetic_text_follows_zipf_and_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_text(tmp_path / name, 50, 40_000)
    shards = TokenShards.open(tmp_path / "a", verify=False)
    ids = torch.from_numpy(shards.read(0, shards.tokens))
    assert torch.equal(ids, torch.from_numpy(TokenShards.open(tmp_path / "b").read(0, shards.tokens)))
    assert 40_000 <= shards.tokens < 42_000
    counts = ids.bincount(minlength=50)
    assert counts[49] == shards.documents
    law = 1.0 / torch.arange(1, 50)
    expected = (shards.tokens - shards.documents) * law / law.sum()
    z = (counts[:49] - expected) / expected.sqrt()
    assert z.abs().max() < 5


# --- products and limits


def test_collect_counts_products_by_operation_shape_and_layout() -> None:
    layer = nn.Linear(5, 7)
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = collect(lambda: [layer(x).sum().backward() for _ in range(2)])
    names = Counter({(product.name, *map(tuple, product.shapes)): count for product, count in found.items()})
    assert names == {
        ("addmm", (7,), (6, 5), (5, 7)): 2,  # forward
        ("mm", (6, 7), (7, 5)): 2,  # gradient of x
        ("mm", (7, 6), (6, 5)): 2,  # gradient of the weight
    }
    forward = next(product for product in found if product.name == "addmm")
    assert forward.arguments[2].stride == (1, 5)  # the weight is transposed in place, and will be when timed alone
    assert forward.dtype == "float32"


def test_collect_sees_through_inference_mode() -> None:
    """Where linear and attention arrive whole, as in generation."""
    layer = nn.Linear(4, 4, bias=False)

    def work() -> None:
        with torch.inference_mode():
            y = layer(torch.ones(2, 3, 4))
            nn.functional.scaled_dot_product_attention(y[None], y[None], y[None])

    assert sorted(product.name.split("_for_")[0] for product in collect(work)) == [
        "_scaled_dot_product_flash_attention", "mm",
    ]  # fmt: skip


@pytest.mark.parametrize("what", RUNS)
@pytest.mark.parametrize("arm", ["ours", "plain"])
def test_the_products_of_a_step_have_all_its_operations(text: Path, what: str, arm: str) -> None:
    """By torch's own counter, which knows nothing of our list; and each can run alone."""
    step = TrainStep(RUNS[what], arm, text, CPU, "fp32")  # type: ignore[arg-type]
    step.warm()
    counted = count_flops(step)
    found = collect(step)
    with torch.no_grad():
        assert sum(count * count_flops(product.call()) for product, count in found.items()) == counted > 0
    watch = Stopwatch(found, CPU)
    watch.read()
    table = watch.table(found)
    assert sum(row["seconds"] for row in table) == pytest.approx(watch.limit(found))
    assert sum(row["seconds"] * row["flops_per_s"] for row in table) == pytest.approx(counted)
    assert [row["seconds"] for row in table] == sorted((row["seconds"] for row in table), reverse=True)
    if what != "autoencoder":
        assert {row["operation"] for row in table} >= {
            "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
        }  # fmt: skip


def test_a_layout_keeps_shape_strides_and_dtype() -> None:
    for tensor in (
        torch.zeros(3, 4).T,
        torch.zeros(1, 5).expand(3, 5),
        torch.zeros(2, 6, dtype=torch.bfloat16)[:, ::2],
        torch.zeros(0, 4),
        torch.zeros(3, dtype=torch.int64),
    ):
        made = Layout.of(tensor).tensor()
        assert (made.shape, made.stride(), made.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
        assert made.isfinite().all()
    assert Layout.of(2.5) == 2.5


def test_the_median_reading_counts() -> None:
    product = Product(torch.ops.aten.mm.default, (Layout.of(torch.zeros(2, 2)),) * 2, ())
    watch = Stopwatch([product], CPU)
    watch._readings[product] = [9.0, 1.0, 2.0]
    assert watch.seconds(product) == 2.0
    assert watch.limit(Counter({product: 3})) == 6.0


def test_square_rates_leave_out_what_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = limits.square_rates(CPU, (16, 32))
    assert {row["side"] for row in rates} == {16, 32}
    assert all(row["flops_per_s"] > 0 for row in rates)
    monkeypatch.setattr(limits, "LONGEST", 0.0)
    assert [row["flops_per_s"] is None for row in limits.square_rates(CPU, (16, 32)) if row["dtype"] == "fp32"] == [
        False, True,
    ]  # fmt: skip


# --- parts


class _Slow(torch.autograd.Function):
    """Identity that sleeps in each direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        time.sleep(ctx.backward_seconds)
        return gradient, None, None


class Sleeper:
    """outer(inner(x)), then a tail; every piece sleeps a known time forward and backward."""

    tokens = 1

    def __init__(self) -> None:
        self.mark: Any = lambda part: None
        self.x = torch.ones(3, requires_grad=True)

    def inner(self, x: Tensor) -> Tensor:
        return _Slow.apply(x, 0.02, 0.04)

    def outer(self, x: Tensor) -> tuple[Tensor, str]:
        return _Slow.apply(self.inner(_Slow.apply(x, 0.01, 0.03)), 0.01, 0.01), "beside"

    def warm(self) -> None: ...

    def __call__(self) -> None:
        self.mark("data")
        time.sleep(0.02)
        self.mark("other")
        y, beside = self.outer(_Slow.apply(self.x, 0.0, 0.02))
        assert beside == "beside"
        _Slow.apply(y, 0.0, 0.03).sum().backward()
        self.mark("optimiser")


def test_each_part_has_its_own_time_in_both_passes() -> None:
    """Lower bounds only: sleeping never ends early."""
    work = Sleeper()
    places = [(work, "outer", "backbone"), (work, "inner", "head")]
    found = parts.breakdown(work, places, CPU, 1)
    assert found["data"]["seconds"] >= 0.02
    for part in ("head", "backbone"):
        assert found[part]["forward"] >= 0.02
        assert found[part]["backward"] >= 0.04
    assert found["other"]["backward"] >= 0.02  # before the outer part
    assert found["other"]["forward"] >= 0.03  # the start of backward belongs to where forward ended
    assert sum(row["share"] for row in found.values()) == pytest.approx(1.0)
    assert "outer" not in vars(work)
    assert "inner" not in vars(work)


@pytest.mark.parametrize("what", RUNS)
@pytest.mark.parametrize("arm", ["ours", "plain"])
def test_boundaries_leave_the_step_as_it_is(text: Path, what: str, arm: str) -> None:
    """The same parameters after broken-down steps as after plain ones, every part present, nothing left behind."""
    plain_steps, broken = (TrainStep(RUNS[what], arm, text, CPU, "fp32") for _ in range(2))  # type: ignore[arg-type]
    for _ in range(2):
        plain_steps()
    places = parts.places_of(broken)
    before = [getattr(owner, name) for owner, name, _ in places]
    found = parts.breakdown(broken, places, CPU, 2)
    assert [getattr(owner, name) for owner, name, _ in places] == before
    assert set(found) == PARTS[what]
    assert set(found) <= set(parts.MEANING)
    for part in set(found) - {"optimiser", "data", "other"}:
        trained = not (what == "train" and part == "autoencoder")
        assert ("backward" in found[part]) is trained, part
    for name, value in plain_steps.module.state_dict().items():
        assert torch.equal(value, broken.module.state_dict()[name]), name


# --- memory


def spec(text: Path, arm: str = "ours") -> Spec:
    config = RUNS["baseline"].model_dump(mode="json")
    return Spec.parse(
        {"kind": "training", "arm": arm, "config": config, "text": str(text), "device": "cpu", "precision": "fp32",
         "threads": 1}
    )  # fmt: skip


def test_the_high_water_mark_is_of_this_process() -> None:
    before = memory.resident_peak()
    held = torch.ones(1 << 25)  # 128 MiB
    assert memory.resident_peak() >= held.nbytes
    assert memory.resident_peak() >= before
    del held
    assert memory.resident_peak() >= 1 << 27  # a mark stays


@pytest.mark.slow
def test_a_large_parent_does_not_hide_a_small_child(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # a real process
    held = torch.ones(1 << 27)  # 512 MiB
    found = memory.peak_bytes(spec(text))
    assert found is not None
    assert 0 <= found < held.nbytes / 2
    with pytest.raises(RuntimeError, match=r"(?s)measures memory failed: .*holds no manifest"):
        memory.peak_bytes(spec(text.parent))
