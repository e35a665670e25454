"""metrics.jsonl: rows are whole, none is doubled by a resume; TensorBoard through its extra."""

from __future__ import annotations

import builtins
import errno
import sys
from pathlib import Path
from typing import Any

import pytest

from nextvec.errors import ConfigError
from nextvec.train.metrics import MetricsLog, _line, check_tensorboard, read_metrics


def row(step: int, kind: str = "train", **more: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, "loss": 1.5, **more}


def test_rows_beyond_the_step_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(row(step))
    log.write(row(3, "eval"))
    log.write(row(4, "eval"))
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"kind": "train", "step": 5')
    again = MetricsLog(tmp_path, 3)
    assert again.evaluation == row(3, "eval")
    again.write(row(4))
    again.sync()
    again.close()
    assert [(r["kind"], r["step"]) for r in read_metrics(tmp_path)] == [
        ("train", 1), ("train", 2), ("train", 3), ("eval", 3), ("train", 4),
    ]  # fmt: skip


def test_rows_are_on_disk_at_once_and_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(row(1, worst=float("nan"), brier=[0.5, float("inf")]))
    assert read_metrics(tmp_path / "metrics.jsonl") == [row(1, worst=None, brier=[0.5, None])]
    log.close()
    assert read_metrics(tmp_path / "missing") == []


def test_a_row_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(row(1))
    real = log._file

    class Full:
        def fileno(self) -> int:
            return real.fileno()

        def write(self, data: bytes) -> int:
            real.write(data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

    log._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        log.write(row(2))
    log._file = real
    log.write(row(3))
    log.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 3]


def test_tensorboard_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith(("torch.utils.tensorboard", "tensorboard")):
            raise ImportError(name)
        return original(name, *arguments, **more)

    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'nextvec\[tensorboard\]'"):
        check_tensorboard()


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    check_tensorboard()
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log.write(row(1))
    log.write(row(2, loss=0.5))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.5), (2, 0.5)]


def test_only_a_line_that_is_no_row_is_left_out(tmp_path: Path) -> None:
    told: list[str] = []
    good = [_line(row(step)) for step in range(1, 10)]
    bad = ["5\n", "[]\n", '{"kind": "train"}\n', '{"kind": "train", "step": "6"}\n', "\n", '{"kind": "train", "st\n']
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join([good[0], *bad, *good[1:]]) + good[0][:9])
    assert [r["step"] for r in read_metrics(tmp_path, told.append)] == list(range(1, 10))
    assert told == [f"{path}: damaged and left out: line 2, 3, 4 and 2 more; all other rows are kept"]
    path.write_text("".join(good) + good[0][:9])  # what a crash leaves behind is nothing to tell
    assert len(read_metrics(tmp_path, told.append)) == 9
    assert len(told) == 1
