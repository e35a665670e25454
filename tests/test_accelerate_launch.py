"""`accelerate launch` starts several processes on a machine without a GPU, and they share the work of one run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import distributed_runs as runs
from test_distributed import assert_close
from test_train_loop import Fake

SCRIPT = """
import os, sys
from pathlib import Path
import distributed_runs as runs
from test_train_loop import Fake
folder, objective = Path(sys.argv[1]), Fake()
runs.run(folder / "two", objective)
(folder / ("calls-" + os.environ["RANK"])).write_text(str(objective.calls))
"""


@pytest.mark.slow
def test_accelerate_launch_trains_as_one_process_does(tmp_path: Path) -> None:
    """--multi_gpu is what makes accelerate start processes by itself; on processors they talk by gloo."""
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    launcher += ["--main_process_port", "0", str(tmp_path / "script.py"), str(tmp_path)]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(launcher, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = runs.STEPS * runs.ACCUMULATE // 2 + 1  # and one that counts operations
    assert [(tmp_path / f"calls-{rank}").read_text() for rank in (0, 1)] == [str(shared)] * 2
    runs.run(tmp_path / "one", Fake())
    assert_close(tmp_path / "one", tmp_path / "two")
