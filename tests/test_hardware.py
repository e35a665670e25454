"""Devices, precision and compilation: what is chosen, and the sentence when something is missing."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nextvec import hardware, process
from nextvec.errors import ConfigError
from nextvec.train.compile import compile_blocks, compile_regions_of
from nextvec.train.flops import count_flops

CPU = torch.device("cpu")
pytestmark = [  # torch 2.13 warns of itself: importing its compiler (torch/utils/mkldnn.py), and tracing activations
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    hardware.choose_precision.cache_clear()
    yield
    hardware.choose_precision.cache_clear()
    torch._dynamo.reset()


def test_device_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware.choose_device("cpu") == CPU
    monkeypatch.setattr(hardware, "available_devices", lambda: ["cpu", "cuda"])
    assert hardware.choose_device("auto").type == "cuda"
    monkeypatch.setattr(hardware, "available_devices", lambda: ["cpu"])
    assert hardware.choose_device("auto") == CPU
    with pytest.raises(ConfigError, match="device cuda is not available here; this machine and this torch offer cpu"):
        hardware.choose_device("cuda")
    with pytest.raises(ConfigError, match="device must be one of auto, cpu, cuda, mps; got 'tpu'"):
        hardware.choose_device("tpu")


@pytest.mark.parametrize(
    ("has", "fp32", "bf16", "chosen", "reason"),
    [
        (True, 100e9, 300e9, "bf16", "bf16: measured 300 GFLOP/s in bf16 and 100 in fp32"),
        (True, 100e9, 110e9, "fp32", "fp32: measured 110 GFLOP/s in bf16 and 100 in fp32, which is no gain"),
        (False, 100e9, 300e9, "fp32", "fp32: this processor has no bf16 matrix instructions"),
    ],
)
def test_precision_needs_instructions_and_a_measured_gain(
    monkeypatch: pytest.MonkeyPatch, has: bool, fp32: float, bf16: float, chosen: str, reason: str
) -> None:
    monkeypatch.setattr(hardware, "has_bf16", lambda device: has)
    monkeypatch.setattr(hardware, "matmul_rates", lambda device: {"fp32": fp32, "bf16": bf16})
    precision, line = hardware.choose_precision(CPU)
    assert precision == chosen
    assert line.startswith(reason)


def test_rates_are_measured_once_and_plausible() -> None:
    rates = hardware.matmul_rates(CPU)
    assert rates is hardware.matmul_rates(CPU)
    assert set(rates) == {"fp32", "bf16"}
    assert all(1e8 < rate < 1e16 for rate in rates.values())
    assert 1e8 < hardware.memory_rate(CPU) < 1e14
    assert hardware.memory_in_use(CPU) > 1 << 20


def test_env_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from nextvec.cli import main

    def output(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["nextvec", "env", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code in (0, None)
        return capsys.readouterr().out

    found = json.loads(output("--json"))
    assert found["cores"] >= 1
    assert found["device"] in ("cpu", "cuda", "mps")
    assert found["matmul_rate"].keys() == {"fp32", "bf16"}
    text = output()
    assert [line.split()[0] for line in text.splitlines()] == [
        "nextvec", "processor", "features", "gpu", "device", "matmul", "memory", "precision", "compile",
    ]  # fmt: skip
    assert found["precision_reason"] in text


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.nn.functional.silu(self.linear(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def compile_regions(self) -> list[nn.Module]:
        return list(self.blocks)


class Whole(nn.Module):
    """As an objective's module: the model is a part, and is offered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    def compile_regions(self) -> list[nn.Module]:
        return self.model.compile_regions()


def trial_of(whole: Whole) -> Callable[[], Tensor]:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def trial() -> Tensor:
        out: Tensor = whole.model(x)
        out.sum().backward()
        return out.detach()

    return trial


def test_regions_are_found_once_each() -> None:
    whole = Whole()
    assert compile_regions_of(whole) == list(whole.model.blocks)
    whole.model.blocks[1].requires_grad_(False)
    assert compile_regions_of(whole) == [whole.model.blocks[0], whole.model.blocks[2]]  # a frozen one is not worth it


def test_kernels_are_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("nextvec.train.compile.compiler_problem", lambda device: None)
    for given, expected in (("", tmp_path / "nextvec" / "compiled"), (str(tmp_path / "own"), tmp_path / "own")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
        if not given:
            monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        whole = Whole()
        assert compile_blocks(whole, CPU, trial_of(whole), [].append, "eager")
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(expected)


def test_compiled_blocks_equal_eager_ones_and_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextvec.train.compile.compiler_problem", lambda device: None)
    whole = Whole()
    names = list(whole.state_dict())
    eager = trial_of(whole)()
    lines: list[str] = []
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    assert compile_blocks(whole, CPU, trial_of(whole), lines.append, backend)
    assert graphs == 1  # the repeated block is compiled once, not three times
    torch.testing.assert_close(trial_of(whole)(), eager)
    assert list(whole.state_dict()) == names
    assert len(lines) == 1
    assert lines[0].startswith("compiled 3 blocks in ")


def test_no_compiler_is_one_line_and_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    whole, lines = Whole(), list[str]()
    assert not compile_blocks(whole, CPU, trial_of(whole), lines.append)
    assert lines == [
        "torch.compile needs a C++ compiler and no-such-compiler was not found (set CXX, or install one); "
        "training runs eagerly"
    ]
    assert all(block._compiled_call_impl is None for block in whole.model.blocks)
    assert hardware.compiler_problem(CPU) is not None


def test_a_failing_compiler_falls_back_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextvec.train.compile.compiler_problem", lambda device: None)

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        raise RuntimeError("internal\ncompiler error")

    whole, lines = Whole(), list[str]()
    eager = trial_of(whole)()
    assert not compile_blocks(whole, CPU, trial_of(whole), lines.append, backend)
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert "internal compiler error" in lines[0]
    assert lines[0].endswith("training runs eagerly")
    assert torch.equal(trial_of(whole)(), eager)


def test_a_model_without_blocks_runs_eagerly() -> None:
    lines: list[str] = []
    assert not compile_blocks(nn.Linear(2, 2), CPU, lambda: None, lines.append)
    assert "no blocks to compile" in lines[0]


@pytest.mark.slow
def test_the_machines_own_compiler_gives_the_same_numbers() -> None:
    whole, lines = Whole(), list[str]()
    eager = trial_of(whole)()
    compiled = compile_blocks(whole, CPU, trial_of(whole), lines.append)
    assert compiled is (hardware.compiler_problem(CPU) is None)
    torch.testing.assert_close(trial_of(whole)(), eager)


def test_operations_by_hand() -> None:
    """A linear layer costs 2 N in out forward and twice that backward; attention 4 T^2 D forward, 2.5 times backward."""
    layer, x = nn.Linear(8, 16), torch.randn(4, 8)
    assert count_flops(lambda: layer(x)) == 2 * 4 * 8 * 16
    assert count_flops(lambda: layer(x.requires_grad_()).sum().backward()) == 3 * 2 * 4 * 8 * 16
    query = torch.randn(1, 2, 64, 16, requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    forward = count_flops(lambda: attend(query, query, query, is_causal=True).detach())
    assert forward == 4 * 64 * 64 * 2 * 16
    assert count_flops(lambda: attend(query, query, query, is_causal=True).sum().backward()) == 3.5 * forward


@pytest.mark.parametrize(
    ("running", "cores", "spin"), [((1,), 2, "3000"), ((2,), 2, "300"), ((2, 1), 2, "3000"), ((3,), 16, "3000")]
)
def test_waiting_threads_spin_longer_on_an_idle_machine(
    monkeypatch: pytest.MonkeyPatch, running: tuple[int, ...], cores: int, spin: str
) -> None:
    seen = itertools.cycle(running)  # processes that want to run, this one among them, at one moment after the other
    monkeypatch.setattr(
        process, "open", lambda *_, **__: io.StringIO(f"9.50 9.10 8.75 {next(seen)}/94 3313\n"), raising=False
    )
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    process.yield_waiting_threads()
    assert os.environ["GOMP_SPINCOUNT"] == spin


def test_waiting_threads_spin_as_the_user_says_and_briefly_where_the_system_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    process.yield_waiting_threads()
    assert os.environ["GOMP_SPINCOUNT"] == "77"
    monkeypatch.setattr(process, "open", _missing, raising=False)
    assert process.busy()


def _missing(*_: object, **__: object) -> io.StringIO:
    raise FileNotFoundError


def test_bf16_where_it_is_emulated_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_bf16", lambda device: False)
    found = hardware.slow_precision("bf16", torch.device("cpu"))
    assert found is not None
    assert "no bf16 instructions" in found
    assert "fp32" in found
    assert hardware.slow_precision("fp32", torch.device("cpu")) is None
    monkeypatch.setattr(hardware, "has_bf16", lambda device: True)
    assert hardware.slow_precision("bf16", torch.device("cpu")) is None


@pytest.mark.parametrize("beside", [False, True])
def test_a_process_beside_others_leaves_at_once_with_its_status_and_all_it_said(beside: bool) -> None:
    """Python's own end would run what is registered for it, and wait for threads."""
    words = "import atexit; atexit.register(print, 'ended'); from nextvec import process; print('said'); "
    words += "process.run_beside_others(); process.leave(3)" if beside else "process.leave(3)"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 3
    assert done.stdout.split() == (["said"] if beside else ["said", "ended"])
