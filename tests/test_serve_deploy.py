"""The server's container and its neighbours: files that exist, a command line of ours, Prometheus at the right door."""

from __future__ import annotations

import json
import re

import yaml

from test_deploy import DEPLOY, accepts
from test_readme import ROOT


def test_the_container_starts_a_command_of_ours() -> None:
    text = (DEPLOY / "serve" / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split()), sources
    start = json.loads(re.findall(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)[0])
    compose = yaml.safe_load((DEPLOY / "serve" / "compose.yaml").read_text())
    server = compose["services"]["nextvec"]
    accepts([*start[1:], *server["command"]])
    assert (ROOT / server["build"]["dockerfile"]).is_file()
    assert all(port.startswith("127.0.0.1:") for each in compose["services"].values() for port in each["ports"])


def test_prometheus_reads_the_server() -> None:
    compose = yaml.safe_load((DEPLOY / "serve" / "compose.yaml").read_text())["services"]
    file = compose["prometheus"]["volumes"][0].split(":")[0]
    config = yaml.safe_load((DEPLOY / "serve" / file).read_text())
    (target,) = config["scrape_configs"][0]["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert name in compose
    assert compose[name]["ports"] == [f"127.0.0.1:{port}:{port}"]
