"""The demo against stand-ins for `shoal serve`: it works, or it says what did not, and leaves no process behind."""

import os
import sys

import psutil
import pytest

from deploy.cli import demo
from model_shards.errors import ShoalError, UnavailableError

SERVICE = """
import signal, sys, threading
from tests.scripted_service import Script, scripted_service
stopped = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stopped.set())
with scripted_service(Script()) as address:
    print("some line of a library", flush=True)
    print(f"shoal: ready grpc={address} http=127.0.0.1:1 model=tiny", flush=True)
    while not stopped.wait(0.1):
        pass
sys.exit(STATUS)
"""


def command(code):
    return (sys.executable, "-c", code)


@pytest.fixture(autouse=True)
def nothing_left():
    before = {child.pid for child in psutil.Process(os.getpid()).children(recursive=True)}
    yield
    after = [c for c in psutil.Process(os.getpid()).children(recursive=True) if c.pid not in before]
    assert after == []


def test_the_demo_asks_one_question_and_stops_the_service(capfd):
    demo.run_demo(command(SERVICE.replace("STATUS", "0")), start_s=30.0, stop_s=30.0)
    out, err = capfd.readouterr()
    assert out == "Whales are large.\n"
    assert "3 tokens (stop), first after" in err
    assert "started in" in err
    assert "stopped cleanly in" in err


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise SystemExit(3)", "ended before it was ready, with exit status 3"),
        ("import time; time.sleep(60)", "not ready within 1 s"),
        (SERVICE.replace("STATUS", "5"), "exit status 5 instead of 0"),
        (SERVICE.replace("stopped.set()", "None"), "did not stop within 1 s"),
        ("print('shoal: ready grpc=127.0.0.1:1 http=x model=y', flush=True); input()", "nothing answers at"),
    ],
)
def test_what_did_not_work_is_told_and_nothing_stays_behind(monkeypatch, code, told):
    monkeypatch.setattr(demo, "_KILL_AFTER_S", 1.0)
    # Only the stand-in that is never ready may spend its whole start.
    start_s = 1.0 if "sleep" in code else 30.0
    with pytest.raises(ShoalError, match=told):
        demo.run_demo(command(code), start_s=start_s, stop_s=1.0)


def test_grandchildren_of_a_stubborn_service_are_killed_too(monkeypatch):
    monkeypatch.setattr(demo, "_KILL_AFTER_S", 0.5)
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    )
    with pytest.raises(UnavailableError, match="not ready"):
        demo.run_demo(command(code), start_s=1.0, stop_s=1.0)


def test_the_demo_starts_what_the_readme_promises():
    text = " ".join(demo.SERVE)
    assert "serve --attention-replicas 1 --expert-shards 2 --grpc-port 0 --http-port 0" in text
