"""HAProxy before the gateway: what `shoal serve` has it listen on, where its files lie, and that nothing is left."""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from deploy.config import RaySettings, ServerSettings, ShoalConfig, ShoalSettings
from deploy.launch import haproxy, haproxy_start
from deploy.launch.haproxy import haproxy_binary, haproxy_environment
from deploy.launch.haproxy_start import adapted
from model_shards.errors import ConfigError

# Of a node of Ray, below which Serve puts its files.
NODE_ID = "f" * 56
LONGEST_SOCKET = 107


def environment_of(**server: object) -> AbstractContextManager[Mapping[str, str]]:
    return haproxy_environment(ShoalSettings(server=ServerSettings(**server)))


def binds(config: str) -> list[str]:
    return [line.split()[1] for line in config.splitlines() if line.split()[:1] == ["bind"]]


def test_what_is_for_operators_is_bound_to_loopback_and_the_rest_as_it_was() -> None:
    config = HAPROXY_CONFIG_TEMPLATE
    for name, value in (
        ("metrics_port", "9101"),
        ("stats_port", "8404"),
        ("frontend_host", "*"),
        ("frontend_port", "8000"),
        ("grpc_frontend_host", "*"),
        ("grpc_frontend_port", "9000"),
    ):
        config = config.replace("{{ config." + name + " }}", value)
    # Else Serve has changed what it writes.
    assert binds(config) == [":9101", "*:8000", "*:9000", "*:8404"]
    kept = adapted(config)
    assert binds(kept) == ["127.0.0.1:9101", "*:8000", "*:9000", "127.0.0.1:8404"]
    changed = [(old, new) for old, new in zip(config.splitlines(), kept.splitlines(), strict=True) if old != new]
    # Of gRPC one with and one without the name of an application.
    assert [re.sub(r".* (bind|grpc-status|status) (\S+).*", r"\1 \2", new) for _, new in changed] == [
        *("bind 127.0.0.1:9101", "status 503", "grpc-status 14", "grpc-status 14", "bind 127.0.0.1:8404")
    ]
    assert adapted(kept) == kept


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal")
def test_it_is_serves_haproxy_that_runs_and_it_ends_with_whoever_started_it(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text("listen stats\n  bind *:8404\n")
    binary = tmp_path / "binary"
    binary.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nexec sleep 60\n')
    binary.chmod(0o700)
    starter = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)",
            *(sys.executable, "-IS", haproxy_start.__file__, str(binary), "-db", "-f", str(config), "-sf", "7"),
        ]
    )
    try:
        deadline = time.monotonic() + 20
        while not (started := [child for child in psutil.Process(starter.pid).children() if child.name() == "sleep"]):
            assert time.monotonic() < deadline, "it did not start"
            time.sleep(0.05)
        assert (tmp_path / "arguments").read_text().split() == ["-db", "-f", str(config), "-sf", "7"]
        assert config.read_text() == "listen stats\n  bind 127.0.0.1:8404\n"
        os.kill(starter.pid, signal.SIGKILL)
        assert psutil.wait_procs(started, timeout=10)[1] == []
    finally:
        starter.kill()
        starter.wait()


def test_its_files_are_ours_alone_and_gone_afterwards() -> None:
    assert haproxy_binary() is not None  # ray[serve] brings it here
    with environment_of() as first, environment_of() as second:
        start = Path(first["RAY_SERVE_HAPROXY_BINARY_PATH"])
        directory = start.parent
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert os.access(start, os.X_OK)
        # What Serve starts prints the version of the one that it brings.
        shown = subprocess.run([haproxy_binary(), "-v"], capture_output=True, text=True, check=True).stdout
        config = directory / "haproxy.cfg"
        config.write_text("")
        assert subprocess.run([start, "-v", "-f", config], capture_output=True, text=True).stdout == shown
        places = [value for value in first.values() if value.startswith("/")]
        assert len(places) == 7
        assert {Path(place).parent for place in places if Path(place) != directory} == {directory}
        for name in ("RAY_SERVE_HAPROXY_SOCKET_PATH", "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"):
            assert len(str(directory / NODE_ID / Path(first[name]).name)) <= LONGEST_SOCKET
        ports = [value for name, value in first.items() if name.endswith("_PORT") and "DIRECT_INGRESS" not in name]
        assert len(set(ports)) == 4
        http, grpc = (
            range(*(int(first[f"RAY_SERVE_DIRECT_INGRESS_{end}_{protocol}_PORT"]) for end in ("MIN", "MAX")))
            for protocol in ("HTTP", "GRPC")
        )
        assert len(http) == len(grpc) == 64
        assert http.stop == grpc.start
        assert Path(second["RAY_SERVE_HAPROXY_BINARY_PATH"]).parent != directory
    assert not directory.exists()


def test_what_a_killed_service_left_is_removed_by_the_next_and_nothing_else() -> None:
    with environment_of() as running:
        kept = Path(running["RAY_SERVE_HAPROXY_BINARY_PATH"]).parent
        left = subprocess.run(
            [
                *(sys.executable, "-c"),
                "import os\n"
                "from deploy.config import ShoalSettings\n"
                "from deploy.launch.haproxy import haproxy_environment\n"
                "with haproxy_environment(ShoalSettings()) as environment:\n"
                "    print(environment['RAY_SERVE_HAPROXY_BINARY_PATH'], flush=True)\n"
                "    os._exit(1)\n",
            ],
            capture_output=True,
            text=True,
        ).stdout.strip()
        assert Path(left).exists()
        with environment_of() as environment:
            assert environment
            assert not Path(left).parent.exists()
            assert (kept / "start").exists()


def test_streams_may_run_as_long_as_requests() -> None:
    with environment_of(request_timeout_s=7200.5) as environment:
        for name in ("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"):
            assert int(environment[name]) > 7200.5


def test_the_proxy_in_python_is_there_for_who_wants_it() -> None:
    with environment_of(proxy="python") as environment:
        assert environment == {}


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [("haproxy_binary", lambda: None, "brings no HAProxy"), ("_PARENT", Path("/proc"), "No such file")],
)
def test_it_serves_where_there_is_no_other_too(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object, why: str
) -> None:
    monkeypatch.setattr(haproxy, name, value)
    with environment_of() as environment:
        assert environment == {}
    with (
        pytest.raises(ConfigError, match=rf"server\.proxy must be auto or python here, got haproxy: .*{why}"),
        environment_of(proxy="haproxy"),
    ):
        raise AssertionError("refused before")


def test_on_a_cluster_its_own_environment_says_what_stands_before_the_gateway() -> None:
    with pytest.raises(ConfigError, match=r"server\.proxy must be auto or python with ray\.address, got haproxy"):
        ShoalConfig.load(None, {"server.proxy": "haproxy", "ray.address": "auto"})
    with haproxy_environment(ShoalSettings(ray=RaySettings(address="auto"))) as environment:
        assert environment == {}
