"""What `shoal serve` shows: one line on stdout for programs, the rest on stderr for people."""

import io

import pytest
from rich.console import Console

from deploy.cli.progress import PlainServeUi, TerminalServeUi


def drive(ui):
    ui.stage("starting Ray")
    ui.stage("starting the cell")
    for done in (0, 10, 30, 60, 61, 100, 100):
        ui.loading("E0", done * 10**6, 100 * 10**6)
    ui.loading("A0", 5, 0)
    ui.ready("127.0.0.1:9000", "127.0.0.1:8000", "tiny")
    ui.draining()


def test_without_a_terminal_there_are_plain_lines_and_no_bars(capsys):
    times = iter([0.0, 0.0, 1.5, 4.0, 4.0])
    with PlainServeUi(lambda: next(times)) as ui:
        drive(ui)
    out, err = capsys.readouterr()
    assert out == "shoal: ready grpc=127.0.0.1:9000 http=127.0.0.1:8000 model=tiny\n"
    lines = err.splitlines()
    assert [line for line in lines if "E0" in line] == [
        "shoal: loading E0: 30.0 of 100.0 MB",
        "shoal: loading E0: 60.0 of 100.0 MB",
        "shoal: loading E0: 100.0 of 100.0 MB",
    ]
    assert "shoal: started in 4.0 s: starting Ray 1.5 s, starting the cell 2.5 s" in lines
    assert all(line.startswith("shoal: ") for line in lines)
    assert "\x1b" not in err


def test_on_a_terminal_bars_stay_off_stdout(capsys):
    screen = io.StringIO()
    with TerminalServeUi(Console(file=screen, force_terminal=True, width=100)) as ui:
        drive(ui)
    assert capsys.readouterr().out == "shoal: ready grpc=127.0.0.1:9000 http=127.0.0.1:8000 model=tiny\n"
    assert "loading E0" in screen.getvalue()
    assert "starting Ray" in screen.getvalue()


def test_a_start_that_fails_shows_the_cursor_again():
    screen = io.StringIO()

    def fail_while_starting():
        with TerminalServeUi(Console(file=screen, force_terminal=True, width=100)) as ui:
            ui.stage("starting Ray")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail_while_starting()
    assert screen.getvalue().rindex("\x1b[?25h") > screen.getvalue().rindex("\x1b[?25l")
