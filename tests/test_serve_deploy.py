"""The server's container and its neighbours: files that exist, a command line of ours, the same replicas everywhere."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from test_deploy import DEPLOY, accepts
from test_readme import ROOT


def services() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "serve" / "compose.yaml").read_text())["services"])


def test_the_containers_start_a_command_of_ours() -> None:
    text = (DEPLOY / "serve" / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split()), sources
    start = json.loads(re.findall(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)[0])
    replicas = [each for name, each in services().items() if name.startswith("nextvec")]
    assert len(replicas) == 2
    for each in replicas:
        accepts([*start[1:], *each["command"]])
        assert (ROOT / each["build"]["dockerfile"]).is_file()
    doors = {name: each["ports"] for name, each in services().items() if "ports" in each}
    assert doors == {"nginx": ["127.0.0.1:8000:8000"], "prometheus": ["127.0.0.1:9090:9090"]}


def test_the_balancer_and_prometheus_know_the_replicas() -> None:
    names = [name for name in services() if name.startswith("nextvec")]
    for neighbour in ("nginx", "prometheus"):
        file = services()[neighbour]["volumes"][0].split(":")[0]
        text = (DEPLOY / "serve" / file).read_text()
        assert sorted(re.findall(r"nextvec-\d:8000", text)) == [f"{name}:8000" for name in names]
        assert set(services()[neighbour]["depends_on"]) == set(names)
    config = yaml.safe_load((DEPLOY / "serve" / "prometheus.yaml").read_text())
    assert len(config["scrape_configs"][0]["static_configs"][0]["targets"]) == 2


def test_nginx_holds_no_stream_back() -> None:
    text = re.sub(r"#.*", "", (DEPLOY / "serve" / "nginx.conf").read_text())
    assert text.count("{") == text.count("}")
    for directive in ("least_conn", "proxy_buffering off", "proxy_next_upstream error timeout http_503 non_idempotent"):
        assert f"{directive};" in text
    assert set(re.findall(r"/[a-z_]+/[a-z.]+", text)) == {
        f"/tmp/{name}" for name in ("nginx.pid", "body", "proxy", "fastcgi", "uwsgi", "scgi")
    }, "a read-only file system suffices"
