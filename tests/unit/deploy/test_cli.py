"""The command line as a user meets it."""

import subprocess
import sys
import threading
import time

import grpc
import pytest
import yaml
from click.testing import CliRunner

from deploy.cli.conversation import Conversation, printable
from deploy.cli.failure import failure_of
from deploy.cli.main import shoal
from deploy.cli.serve import parse_setting
from deploy.client import CallError, Message, Sampling, ShoalClient
from model_shards import errors
from tests.scripted_service import Refusal, Script, scripted_service

HEAVY = ("torch", "ray", "grpc", "pydantic", "rich", "yaml", "google.protobuf")


def run(*arguments, stdin=None):
    return CliRunner().invoke(shoal, list(arguments), input=stdin)


@pytest.fixture
def dead_address():
    with scripted_service(Script()) as address:
        pass
    return address


def test_help_and_version_load_nothing_heavy():
    code = "import sys, deploy.cli.main; print([name for name in sys.argv[1:] if name in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True, timeout=30
    )
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["serve", "chat", "bench", "status", "check-config"])
def test_every_command_explains_itself_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"\n  shoal {command}" in result.output


def test_version_is_one_line():
    result = run("version")
    assert result.exit_code == 0
    assert result.output.startswith("shoal")
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (errors.ConfigError("a"), 2),
        (errors.CheckpointError("a"), 2),
        (errors.CapacityError("a"), 2),
        (errors.InvalidRequestError("a"), 2),
        (errors.UnavailableError("a"), 1),
        (errors.EpochAbortedError("a"), 1),
        (errors.OverloadedError("a"), 1),
        (CallError("INVALID_ARGUMENT", "a"), 2),
        (CallError("NOT_FOUND", "a"), 2),
        (CallError("UNAVAILABLE", "a"), 1),
        (CallError("INTERNAL", "a"), 1),
    ],
)
def test_exit_status_2_is_for_what_the_user_can_mend(error, exit_code):
    assert failure_of(error).exit_code == exit_code


def test_a_remote_error_is_told_like_a_local_one(monkeypatch):
    class RemoteError(Exception):
        cause = errors.CheckpointError("model.safetensors is cut short")

    def load(path, overrides):
        raise RemoteError("a long remote traceback")

    monkeypatch.setattr("deploy.config.ShoalConfig.load", load)
    result = run("check-config", "shoal.yaml")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0] == "shoal: error: model.safetensors is cut short"


def test_check_config_prints_what_is_in_effect(tmp_path):
    path = tmp_path / "shoal.yaml"
    path.write_text("model: {path: /models/lite}\ncell: {device: cuda}\n")
    result = run("check-config", str(path))
    assert result.exit_code == 0
    settings = yaml.safe_load(result.stdout)
    assert settings["model"] == {"path": "/models/lite", "name": "lite"}
    assert settings["cell"]["dtype"] == "bfloat16"


def test_check_config_tells_the_error_and_what_to_do(tmp_path):
    path = tmp_path / "shoal.yaml"
    path.write_text("cell: {expert_shard: 2}\n")
    result = run("check-config", str(path))
    assert result.exit_code == 2
    first, second = result.stderr.splitlines()
    assert first == f"shoal: error: {path}: cell.expert_shard is not a setting; did you mean expert_shards?"
    assert second.startswith("shoal: next: ")
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("engine.max_num_seqs=8", ("engine.max_num_seqs", 8)),
        ("cell.join_timeout_s=1.5", ("cell.join_timeout_s", 1.5)),
        ("log.level=DEBUG", ("log.level", "DEBUG")),
        ("ray.address=", ("ray.address", None)),
        ("model.name=a=b", ("model.name", "a=b")),
    ],
)
def test_set_reads_a_value_as_the_file_would(text, setting):
    assert parse_setting(text) == setting


@pytest.mark.parametrize("text", ["level=DEBUG", "log.level", "log.level=[1]", "log.level={"])
def test_set_refuses_what_is_not_a_plain_setting(text):
    with pytest.raises(errors.ConfigError, match="--set"):
        parse_setting(text)


def test_serve_refuses_a_wrong_flag_before_anything_starts():
    result = run("serve", "--device", "tpu")
    assert result.exit_code == 2
    assert "the command line: cell.device should be 'cpu' or 'cuda', got 'tpu'" in result.stderr


def test_status_shows_health_and_models():
    with scripted_service(Script()) as address:
        result = run("status", "--address", address)
    assert result.exit_code == 0
    assert "SERVING" in result.stdout
    assert "tiny: context 256 tokens, vocabulary 100" in result.stdout


def test_status_of_a_draining_service_exits_1():
    with scripted_service(Script(serving=False)) as address:
        result = run("status", "--address", address)
    assert result.exit_code == 1
    assert "NOT_SERVING" in result.stdout


@pytest.mark.parametrize("command", ["status", "bench", "chat"])
def test_where_nothing_answers_the_address_and_the_remedy_are_told(dead_address, command):
    arguments = ["hello"] if command == "chat" else []
    result = run(command, "--address", dead_address, *arguments)
    assert result.exit_code == 1
    assert f"shoal: error: UNAVAILABLE: nothing answers at {dead_address}" in result.stderr
    assert "shoal serve" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("address", ["9000", "localhost", "host:port", "host:0", "host:65536", ""])
def test_an_address_must_be_host_and_port(address):
    result = run("status", "--address", address)
    assert result.exit_code == 2
    assert "HOST:PORT" in result.stderr


def test_chat_streams_the_answer_to_stdout_and_timings_to_stderr():
    script = Script()
    with scripted_service(script) as address:
        result = run(
            "chat",
            "--address",
            address,
            "--temperature",
            "0",
            "--seed",
            "7",
            "--max-tokens",
            "9",
            "--system",
            "Be brief.",
            "What is a whale?",
        )
    assert result.exit_code == 0, result.output
    assert result.stdout == "Whales are large.\n"
    assert "3 tokens (stop), first after" in result.stderr
    (request,) = script.requests
    assert [(message.role, message.content) for message in request.messages] == [
        ("system", "Be brief."),
        ("user", "What is a whale?"),
    ]
    assert (request.temperature, request.seed, request.max_tokens) == (0.0, 7, 9)


def test_chat_leaves_to_the_server_what_was_not_asked_for():
    script = Script()
    with scripted_service(script) as address:
        run("chat", "--address", address, "Hello")
    (request,) = script.requests
    assert not request.HasField("temperature")
    assert not request.HasField("max_tokens")
    assert not request.HasField("seed")


def test_what_is_piped_in_is_one_prompt():
    script = Script()
    with scripted_service(script) as address:
        result = run("chat", "--address", address, stdin="first line\nsecond line\n")
    assert result.exit_code == 0
    assert [message.content for message in script.requests[0].messages] == ["first line\nsecond line\n"]


@pytest.mark.parametrize(
    ("arguments", "stdin", "told"),
    [
        (["\udcff"], None, "prompt must be UTF-8: byte 0 is 0xff"),
        (["what \u00e9\udc80"], None, "prompt must be UTF-8: byte 7 is 0x80"),
        ([], b"a whale \xc3(", "prompt must be UTF-8: byte 8 is 0xc3"),
        (["--system", "\udcfe", "hello"], None, "--system must be UTF-8: byte 0 is 0xfe"),
        (["--model", "\udcfe", "hello"], None, "--model must be UTF-8: byte 0 is 0xfe"),
        (["--address", "\udcfe:1", "hello"], None, "--address must be UTF-8: byte 0 is 0xfe"),
    ],
)
def test_what_is_not_utf_8_is_refused_by_its_byte_and_never_sent(arguments, stdin, told):
    script = Script()
    with scripted_service(script) as address:
        result = run("chat", "--address", address, *arguments, stdin=stdin)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [f"shoal: error: {told}"]
    assert script.requests == []


def test_bytes_that_are_not_utf_8_reach_the_check_from_a_real_command_line():
    ended = subprocess.run(
        [sys.executable, "-m", "deploy.cli.main", "chat", b"\xff"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr == "shoal: error: prompt must be UTF-8: byte 0 is 0xff\n"


def test_a_refused_question_is_one_clear_line():
    refusal = Refusal(grpc.StatusCode.INVALID_ARGUMENT, "temperature must be 0 to 2, got -1")
    with scripted_service(Script(refuse=lambda _: refusal)) as address:
        result = run("chat", "--address", address, "--temperature", "-1", "Hello")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == ["shoal: error: INVALID_ARGUMENT: temperature must be 0 to 2, got -1"]


def converse(monkeypatch, script, lines):
    """Types `lines` at the prompt; an exception in place of a line is what the keyboard does."""
    typed = iter([*lines, EOFError()])

    def read(_):
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    with scripted_service(script) as address, ShoalClient(address) as client:
        conversation = Conversation(client, "", "Be brief.", Sampling())
        conversation.hold()
    return conversation


def test_a_conversation_sends_all_turns_and_starts_over_when_asked(monkeypatch):
    script = Script()
    converse(monkeypatch, script, ["one", "", "two", KeyboardInterrupt(), "/new", "three", "/exit", "four"])
    sent = [[(message.role, message.content) for message in request.messages] for request in script.requests]
    answer = ("assistant", "Whales are large.")
    system = ("system", "Be brief.")
    assert sent == [
        [system, ("user", "one")],
        [system, ("user", "one"), answer, ("user", "two")],
        [system, ("user", "three")],
    ]


def test_a_failed_turn_is_told_and_forgotten(monkeypatch, capsys):
    refusal = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    script = Script(refuse=lambda number: refusal if number == 0 else None)
    conversation = converse(monkeypatch, script, ["one", "two"])
    assert "shoal: error: RESOURCE_EXHAUSTED: full" in capsys.readouterr().err
    assert conversation.turns == [Message("user", "two"), Message("assistant", "Whales are large.")]


def test_a_question_that_is_not_utf_8_is_told_and_the_conversation_goes_on(monkeypatch, capsys):
    script = Script()
    converse(monkeypatch, script, ["\udcff", "two"])
    assert "shoal: error: the question must be UTF-8: byte 0 is 0xff" in capsys.readouterr().err
    assert [request.messages[-1].content for request in script.requests] == ["two"]


def test_ctrl_c_cancels_the_running_answer_on_the_server(monkeypatch, capsys):
    script = Script(pieces=["word "] * 1000, delay_s=0.02)

    def interrupt_the_third(text):
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt
        return text

    shown = []
    monkeypatch.setattr("deploy.cli.conversation.printable", interrupt_the_third)
    with scripted_service(script) as address, ShoalClient(address) as client:
        conversation = Conversation(client, "", None, Sampling())
        assert conversation.ask("Count") is False
        assert script.cancelled.wait(5.0)
    assert conversation.turns == []
    assert "(cancelled)" in capsys.readouterr().err


def test_closing_the_stream_early_cancels_the_call():
    script = Script(delay_s=0.05)
    with scripted_service(script) as address, ShoalClient(address) as client:
        pieces = client.complete([1, 2], Sampling(max_tokens=200))
        next(pieces)
        pieces.close()
        assert script.cancelled.wait(5.0)


def test_closing_the_client_ends_its_calls_by_name():
    with scripted_service(Script(delay_s=0.05)) as address:
        client = ShoalClient(address)
        threading.Timer(0.2, client.close).start()
        began = time.monotonic()
        with pytest.raises(CallError) as caught:
            list(client.complete([1, 2], Sampling(max_tokens=200)))
        assert caught.value.code == "CANCELLED"
        assert time.monotonic() - began < 5.0


def test_control_characters_of_a_model_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\x9b\x07\tc\nd\u00e9") == "a\ufffd[2Jb\ufffd\ufffd\tc\nd\u00e9"
