"""The templates of deploy/: their syntax, and that the commands in them are commands of ours."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from nextvec.cli import app, commands  # noqa: F401  (registers the verbs)
from nextvec.config import DataSettings, TrainSettings, apply_overrides
from nextvec.configs.read import is_settings, read_settings
from nextvec.errors import ConfigError
from nextvec.train.world import World
from test_readme import ROOT, SHELLS, blocks, documents

DEPLOY = ROOT / "deploy"


def accepts(words: list[str]) -> None:
    """Parse a `nextvec` command line without running it. Raises click's error for an unknown verb or option."""
    command = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    command.make_context("nextvec", words)


def run_slurm(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The batch script with stand-ins for Slurm's commands; `srun` prints what it is given."""
    for name, script in {"srun": 'printf "%s\\n" "$@"', "scontrol": "echo node1", "scancel": "true"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]"}
    environment |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4"}
    script = ["bash", str(DEPLOY / "slurm.sh"), *words]
    return subprocess.run(script, capture_output=True, text=True, check=False, env=environment)


def test_slurm_starts_torchrun_on_every_node_and_goes_on_with_a_run_that_exists(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    words = ["baseline", "--data", "shards", "--out", str(run), "train.steps=5"]
    done = run_slurm(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    given = done.stdout.splitlines()
    assert given[:5] == ["torchrun", "--nnodes", "2", "--nproc-per-node", "4"]
    assert "node1:29500" in given
    assert given[given.index("--no-python") + 1 :] == ["nextvec", "train", *words]
    accepts(given[given.index("nextvec") + 1 :])
    run.mkdir()
    (run / "config.yaml").touch()
    assert run_slurm(tmp_path, *words).stdout.splitlines()[-1] == "--resume"
    refused = run_slurm(tmp_path, "baseline")
    assert refused.returncode == 2
    assert "with --out RUN" in refused.stderr


def test_kubernetes_job_runs_a_command_of_ours(tmp_path: Path) -> None:
    job = yaml.safe_load((DEPLOY / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    (script,) = container["args"]
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    words = shlex.split(script[script.index("nextvec train") :].replace("$resume", "--resume"))
    accepts(words[1:])
    assert job["kind"] == "Job"
    assert pod["restartPolicy"] == "OnFailure"


def test_dockerfile_copies_files_that_exist() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY"):
            *sources, _ = shlex.split(line)[1:]
            assert all((ROOT / source).exists() for source in sources), line
    assert [line for line in lines if line.startswith("ENTRYPOINT")] == ['ENTRYPOINT ["nextvec"]']


def commands_of_several() -> Iterator[tuple[int, list[str]]]:
    """Processes and words of every command in the documents and templates that starts more than one process."""
    lines = [
        line
        for path in documents()
        for block in blocks(path.read_text(encoding="utf-8"), path.name)
        if block.language in SHELLS
        for line in block.shell().replace("\\\n", " ").splitlines()
    ]
    (script,) = yaml.safe_load((DEPLOY / "kubernetes.yaml").read_text())["spec"]["template"]["spec"]["containers"][0][
        "args"
    ]
    lines += script.replace("\\\n", " ").splitlines()
    for line in lines:
        found = re.search(r"(?:--nproc-per-node|--num_processes)[ =](\d+).*? nextvec (train .*)", line)
        if found:
            yield int(found[1]), shlex.split(found[2], comments=True)
    slurm = (DEPLOY / "slurm.sh").read_text()
    (gpus,) = re.findall(r"#SBATCH --gpus-per-node=(\d+)", slurm)
    for nodes, words in re.findall(r"sbatch --nodes (\d+) deploy/slurm.sh (.*)", slurm):
        yield int(nodes) * int(gpus), ["train", *words.split()]


def shared(processes: int, words: list[str]) -> None:
    """Raises ConfigError when a step of this command cannot be shared by so many processes."""
    name = words[words.index("--config") + 1] if "--config" in words else ""
    settings = read_settings(name) if name and is_settings(name) else {}
    settings = apply_overrides(settings, [word for word in words if re.match(r"(data|train)\.\w+=", word)])
    data = DataSettings.parse({"path": "shards", **settings.get("data", {})}, "data")
    train = TrainSettings.parse(settings.get("train", {}), "train")
    World(0, processes).part(train.accumulate, data.rows)


def test_steps_of_documented_commands_can_be_shared_by_their_processes() -> None:
    found = list(commands_of_several())
    assert sorted(processes for processes, _ in found) == [8, 8, 8, 8, 32]
    for processes, words in found:
        shared(processes, words)
    with pytest.raises(ConfigError, match="8 processes cannot share equally"):
        shared(8, ["train", "lm", "train.steps=5"])  # which is what they said once
    shared(16, ["train", "lm", "--config", "paper/calm-m"])
