"""`nextvec watch`: a run before its first row, while it trains, cut off, resumed and finished; and how it leaves."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nextvec.cli import main
from nextvec.config import dump_yaml
from nextvec.errors import ConfigError
from nextvec.lock import RUN_LOCK, run_lock
from nextvec.watch.screen import PLAIN, View, change, sparkline
from nextvec.watch.status import Reader, Status
from test_train_loop import Fake, config, run

STEPS = 100


def write(out: Path, rows: list[dict[str, Any]], tail: str = "") -> None:
    out.mkdir(exist_ok=True)
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def rows(count: int, seconds: float = 10.0) -> list[dict[str, Any]]:
    """A log line every five steps of `seconds` each."""
    return [
        {
            "kind": "train", "step": 5 * n, "tokens": 5000 * n, "progress": 5 * n / STEPS, "seconds": seconds * n,
            "loss": 4.0 - 0.1 * n, "cross_entropy": 4.0 - 0.1 * n, "accuracy": 0.01 * n, "lr": 1e-3, "grad_norm": 1.0,
            "tokens_per_s": 500.0, "share": 0.1, "memory_bytes": 2**30,
        }
        for n in range(1, count + 1)
    ]  # fmt: skip


def started(out: Path) -> Path:
    out.mkdir()
    (out / "config.yaml").write_text(dump_yaml(config(steps=STEPS)))
    return out


def shown(status: Status, width: int = 200, encoding: str = "utf-8") -> str:
    console = Console(width=width, highlight=False, force_terminal=False, record=True, file=open(os.devnull, "w", encoding=encoding))  # noqa: SIM115, E501  # fmt: skip
    console.print(View(status))
    console.file.close()
    return " ".join(console.export_text().split())


def command(patch: pytest.MonkeyPatch, *words: str) -> int:
    patch.setattr(sys, "argv", ["nextvec", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_one_look_at_a_run_that_nextvec_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(out, config(steps=20, log_every=2, eval_every=10))
    capsys.readouterr()
    assert command(monkeypatch, "watch", str(out), "--once") == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "run: autoencoder is finished",
        "100.0 %",
        "step 20 of 20",
        "480 tokens",
        "held out at step 20: cross_entropy",
    ):
        assert part in text, part
    for part in ("gradient norm 0.", "learning rate", "tokens/s", "memory (GiB)", "last checkpoint: step 20"):
        assert part in text, part
    assert "steps skipped: 0" in text
    assert "no anomalies" in text
    assert "ETA" not in text
    assert "loss" not in text.replace("loss or", "")  # cross_entropy is the only term and stands for it


def test_skipped_steps_and_anomalies_are_told(tmp_path: Path) -> None:
    out = started(tmp_path / "run")
    found = rows(16)
    found[12] |= {"skipped": 2, "grad_norm": 40.0}
    found[13:] = [{**row, "skipped": 2} for row in found[13:]]
    for row in found[13:15]:
        row["tokens_per_s"] = 100.0
    found[15]["tokens_per_s"] = 90.0
    write(out, found)
    text = shown(Reader(out).look())
    assert "steps skipped: 2" in text
    assert "anomaly: 2 steps were skipped, the last before step 65" in text
    assert "anomaly: the gradient's norm was 40 on average up to step 65, 40 times the usual 1" in text
    assert "anomaly: 90 tokens/s at step 80, 18% of this run's median 500" in text
    assert "(over since)" not in text
    write(out, [*found, {**rows(17)[16], "skipped": 2}])
    text = shown(Reader(out).look())
    assert text.count("(over since)") == 1
    assert "median 500 (over since)" in text


def test_before_anything_is_written_and_with_a_half_line(tmp_path: Path) -> None:
    out = tmp_path / "run"
    reader = Reader(out)
    assert shown(reader.look()) == f"{out}: run has not logged a step yet"
    started(out)
    assert shown(reader.look()) == f"{out}: autoencoder is not being trained"
    with run_lock(out):
        assert shown(reader.look()) == f"{out}: autoencoder has not logged a step yet (process {os.getpid()})"
        write(out, [], tail='{"kind": "train", "st')
        assert reader.look().train == ()
        line = json.dumps(rows(1)[0])
        write(out, [], tail=line[:40])
        assert reader.look().train == ()
        with open(out / "metrics.jsonl", "a") as handle:
            handle.write(line[40:] + "\n")
            handle.flush()
            assert [row["step"] for row in reader.look().train] == [5]
            handle.write("not json\n" + json.dumps(rows(2)[1]) + "\n" + '{"kind": "eval"')
        assert [row["step"] for row in reader.look().train] == [5, 10]
    assert "is not being trained; go on with --resume" in shown(reader.look())


def test_a_reader_follows_and_begins_again_when_a_resumed_run_has_dropped_rows(tmp_path: Path) -> None:
    out = started(tmp_path / "run")
    reader = Reader(out)
    every = rows(10)
    for count in (3, 3, 7, 10):
        temporary = out / "metrics.jsonl"
        existing = len(temporary.read_text().splitlines()) if temporary.exists() else 0
        with open(temporary, "a") as handle:
            handle.writelines(json.dumps(row) + "\n" for row in every[existing:count])
        assert [row["step"] for row in reader.look().train] == [5 * n for n in range(1, count + 1)]
    (out / "new").write_text("".join(json.dumps(row) + "\n" for row in every[:4]))
    os.replace(out / "new", out / "metrics.jsonl")
    assert len(reader.look().train) == 4


def test_the_time_to_go_is_that_of_the_last_rows(tmp_path: Path) -> None:
    out = started(tmp_path / "run")
    write(out, rows(1))
    assert Reader(out).look().eta == pytest.approx(190.0)  # 95 steps at 2 seconds
    write(out, rows(10))
    assert Reader(out).look().eta == pytest.approx(100.0)
    assert "50.0 %" in (text := shown(Reader(out).look()))
    assert "ETA 1 min 40 s" in text
    old = [{name: value for name, value in row.items() if name != "progress"} for row in rows(10)]
    write(out, old)  # metrics of before rows said their progress
    assert Reader(out).look().eta == pytest.approx(100.0)
    budget = [{**row, "progress": row["seconds"] / 1000.0} for row in rows(10)]
    write(out, budget)
    assert Reader(out).look().eta == pytest.approx(900.0)


def test_who_is_at_work(tmp_path: Path) -> None:
    out = started(tmp_path / "run")
    write(out, rows(2))
    reader = Reader(out)
    with run_lock(out):
        found = reader.look()
        assert (found.state, found.holder) == ("training", f"process {os.getpid()}")
        with pytest.raises(ConfigError, match="is being written by"), run_lock(out):  # looking took no lock
            pass
    assert reader.look().state == "stopped"
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True, text=True
    )
    (out / RUN_LOCK).write_text(f"{done.stdout.strip()} {socket.gethostname()}\n")  # as a killed process leaves it
    assert reader.look().state == "stopped"
    (out / RUN_LOCK).write_text("")  # its holder writes its name at once
    assert reader.look().holder == "another process"
    os.utime(out / RUN_LOCK, (time.time() - 3600,) * 2)
    assert reader.look().state == "stopped"
    (out / RUN_LOCK).write_text("12 elsewhere\n")
    assert reader.look().holder == "process 12 on elsewhere"
    for path in (out / RUN_LOCK, out / "metrics.jsonl"):
        os.utime(path, (time.time() - 3600,) * 2)
    assert reader.look().state == "stopped"


def test_narrow_and_ascii_terminals_still_read(tmp_path: Path) -> None:
    out = started(tmp_path / "run")
    write(out, rows(12))
    narrow = shown(Reader(out).look(), width=40)
    assert "step 60" in narrow
    plain = shown(Reader(out).look(), encoding="ascii")
    assert plain.encode("ascii")
    assert set(sparkline([1.0, 2.0, 3.0], PLAIN)) <= set(PLAIN)


def test_trends() -> None:
    assert sparkline([1.0] * 5) == "▁" * 5
    assert sparkline([]) == ""
    assert sparkline([float("nan"), 1.0, 2.0]) == "▁█"
    assert len(sparkline([float(n) for n in range(1000)])) == 24
    assert change([1.0] * 7) == ""
    assert change([2.0] * 4 + [1.0, 1.0, 0.9, 0.9]) == "-10.0 %"
    assert change([0.0] * 8) == ""


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda out: None, "run does not exist"),
        (lambda out: out.mkdir(), "run is not a run directory: it has no config.yaml"),
        (lambda out: started(out).joinpath("config.yaml").write_text("kind: x"), "kind must be one of"),
        (
            lambda out: (
                started(out)
                .joinpath("config.yaml")
                .write_text("kind: autoencoder\nmodel: {vocab_size: 9}\nimported: {source: x}")
            ),
            "run holds converted weights: there is no training of them to look at",
        ),
    ],
)
def test_what_is_no_run_is_refused_in_one_sentence(
    make: Any, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "run")
    assert command(monkeypatch, "watch", str(tmp_path / "run"), "--once") == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def look_until(terminal: int, wanted: str, seconds: float = 60.0) -> str:
    """What a terminal shows until `wanted` is among it."""
    text, end = "", time.monotonic() + seconds
    while wanted not in text and time.monotonic() < end:
        if select.select([terminal], [], [], 0.5)[0]:
            try:
                text += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # the other side has gone
                break
    assert wanted in text, text
    return text


@pytest.mark.slow
def test_on_a_terminal_it_follows_and_ctrl_c_leaves_cleanly(tmp_path: Path) -> None:
    out = started(tmp_path / "run")
    terminal, inner = pty.openpty()
    words = [sys.executable, "-c", "from nextvec.cli import main; main()", "watch", str(out), "--every", "0.1"]
    watching = subprocess.Popen(words, stdin=inner, stdout=inner, stderr=inner, env={**os.environ, "TERM": "xterm"})
    os.close(inner)
    try:
        look_until(terminal, "is not being trained")
        write(out, rows(4))
        look_until(terminal, "20.0 %")
        watching.send_signal(signal.SIGINT)
        assert watching.wait(30) == 0
        rest = ""
        while select.select([terminal], [], [], 0.2)[0]:
            try:
                rest += os.read(terminal, 65536).decode(errors="replace")
            except OSError:
                break
        assert "Traceback" not in rest
        assert "\x1b[?25h" in rest  # the cursor is back
    finally:
        watching.kill()
        os.close(terminal)


def test_watching_ends_when_the_run_does(tmp_path: Path) -> None:
    from nextvec.watch.screen import follow

    out = tmp_path / "run"
    run(out, config(steps=6, log_every=2, eval_every=0), Fake())
    with open(tmp_path / "screen", "w", encoding="utf-8") as file:
        follow(Reader(out), Console(file=file, force_terminal=True, width=120), 0.1)
    assert "is finished" in (tmp_path / "screen").read_text(encoding="utf-8")


def test_looking_loads_nothing_heavy(tmp_path: Path) -> None:
    out = started(tmp_path / "run")
    write(out, rows(3))
    script = (
        "import sys; sys.argv = ['nextvec', 'watch', sys.argv[1], '--once']\nfrom nextvec.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'accelerate'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_on_a_terminal_too_what_is_no_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nextvec.watch.screen.follow", lambda *given: pytest.fail("it waits for a run"))
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, a terminal
    assert command(monkeypatch, "watch", str(tmp_path / "typo")) == 2
    assert capsys.readouterr().err == f"nextvec: {tmp_path / 'typo'} does not exist\n"
    with pytest.raises(pytest.fail.Exception):
        command(monkeypatch, "watch", str(started(tmp_path / "run")))


def test_lines_are_whole_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = started(tmp_path / "run")
    write(out, rows(12) + [{**row, "tokens_per_s": 100.0} for row in rows(16)[12:]])
    capsys.readouterr()
    assert command(monkeypatch, "watch", str(out), "--once") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "anomaly: 100 tokens/s at step 80, 20% of this run's median 500 (then training ended)" in lines
    assert f"{out}: autoencoder is not being trained; go on with --resume" in lines
    with run_lock(out):
        assert command(monkeypatch, "watch", str(out), "--once") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "anomaly: 100 tokens/s at step 80, 20% of this run's median 500" in lines
