"""A client that leaves ends its request, whatever the server was doing for it."""

import asyncio
import json

import pytest

from deploy.gateway.http import create_http_app
from tests.scripted_engine import ScriptedEngine, make_gateway, on_event_loop, steps_of


class Call:
    """One POST as a server makes it, with the connection in the hands of the test."""

    def __init__(self, gateway, stream, breaks_at=None, blocks_at=None):
        """Sending message number `breaks_at` fails, sending number `blocks_at` takes for ever; the head is number 0."""
        self._app = create_http_app(lambda: gateway)
        body = json.dumps({"prompt": "Hello", "stream": stream}).encode()
        self._incoming = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self._breaks_at = breaks_at
        self._blocks_at = blocks_at
        self.blocked = asyncio.Event()
        self.sent = []

    def start(self):
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "root_path": "",
            "headers": [],
        }
        return asyncio.ensure_future(self._app(scope, self._incoming.get, self._send))

    def leave(self):
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def _send(self, message):
        if len(self.sent) == self._breaks_at:
            raise OSError("the connection is gone")
        if len(self.sent) == self._blocks_at:
            self.blocked.set()
            await asyncio.Event().wait()
        self.sent.append(message)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_steps", [1, 3], ids=["before the first token", "between tokens"])
@on_event_loop
async def test_leaving_while_the_engine_works_closes_its_stream(stream, num_steps):
    engine = ScriptedEngine([(300,)] * num_steps, holds=True)
    gateway = make_gateway(engine)
    call = Call(gateway, stream)
    running = call.start()
    await engine.holding.wait()
    assert engine.num_open == 1
    call.leave()
    await running
    assert (engine.num_open, gateway.num_running) == (0, 0)


@on_event_loop
async def test_a_connection_that_breaks_while_sending_closes_the_engines_stream():
    engine = ScriptedEngine(steps_of("a long answer with many words"))
    gateway = make_gateway(engine)
    call = Call(gateway, stream=True, breaks_at=3)
    await call.start()
    assert len(call.sent) == 3
    assert (engine.num_open, gateway.num_running) == (0, 0)
    assert engine.num_steps < len(engine.steps)


@pytest.mark.parametrize("stream", [False, True])
@on_event_loop
async def test_a_server_that_cancels_the_call_closes_the_engines_stream(stream):
    engine = ScriptedEngine(holds=True)
    gateway = make_gateway(engine)
    running = Call(gateway, stream).start()
    await engine.opened.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (engine.num_open, gateway.num_running) == (0, 0)


@on_event_loop
async def test_a_client_that_reads_nothing_and_leaves_closes_the_engines_stream():
    engine = ScriptedEngine()
    gateway = make_gateway(engine)
    call = Call(gateway, stream=True, blocks_at=1)
    running = call.start()
    await call.blocked.wait()
    assert engine.num_open == 1
    call.leave()
    await running
    assert (engine.num_open, gateway.num_running) == (0, 0)


@on_event_loop
async def test_a_client_that_stays_gets_everything():
    call = Call(make_gateway(ScriptedEngine(steps_of("Yes."))), stream=True)
    await call.start()
    assert call.sent[0]["status"] == 200
    assert (b"content-type", b"text/event-stream; charset=utf-8") in call.sent[0]["headers"]
    assert call.sent[-2]["body"] == b"data: [DONE]\n\n"
    assert [message["more_body"] for message in call.sent[1:]] == [True] * (len(call.sent) - 2) + [False]
