"""Outputs cross from a replica to a gateway in one message a step; each request ends exactly once."""

import asyncio
import dataclasses
from contextlib import aclosing

import pytest
import uvloop

from cluster.link import link_pb2 as pb
from cluster.link import receiver
from cluster.link.hub import OutputHub
from cluster.link.pace import MAX_CHUNKS_PER_S, MAX_INTERVAL_S, chunk_interval_s
from cluster.link.receiver import OutputLink, OutputStream
from cluster.link.wire import LinkAddress, StreamAddress
from cluster.outputs import MAX_JOINED
from cluster.request import FinishReason
from model_shards.errors import InvalidRequestError, UnavailableError
from tests.linked import LAST, FakeReplica, linked, output, request_of
from tests.scripted_engine import TEST_S, on_event_loop


async def rest(stream, call):
    async with aclosing(stream.outputs(call)) as outputs:
        return [entry async for entry in outputs]


@on_event_loop
async def test_the_outputs_of_a_step_cross_in_one_message_and_reach_their_streams(monkeypatch):
    batches = []
    deal = OutputLink.deal

    def count(link: OutputLink, replica: object, batch: pb.OutputBatch) -> None:
        # The first output of a stream is empty, and comes when it begins.
        if any(output.token_ids for output in batch.outputs):
            batches.append(len(batch.outputs))
        deal(link, replica, batch)

    monkeypatch.setattr(OutputLink, "deal", count)
    async with linked() as ends, ends.call("a") as (first, first_call), ends.call("b") as (second, second_call):
        await ends.replica.until_running("a", "b")
        async with aclosing(first.outputs(first_call)) as a, aclosing(second.outputs(second_call)) as b:
            for token in (3, 4):
                ends.replica.step(output("a", token), output("b", token + 10))
                assert await anext(a) == output("a", token)
                assert await anext(b) == output("b", token + 10)
            ends.replica.step(output("a", 5, reason=LAST), output("b", 15))
            assert [entry async for entry in a] == [output("a", 5, reason=LAST)]
            assert await anext(b) == output("b", 15)
            await first_call
            assert not second_call.done()
        assert batches == [2, 2, 2]


@on_event_loop
async def test_two_streams_of_one_request_id_are_two():
    """A request that is sent again must not get what a lost replica sent for it before."""
    async with linked() as ends, ends.call("a") as (old, _):
        await ends.replica.until_running("a")
        with ends.link.open_stream("a") as new:
            assert new.address.stream != old.address.stream
            ends.replica.step(output("a", 3, reason=LAST))
            [only] = await rest(old, asyncio.get_running_loop().create_future())
            assert only.token_ids == (3,)
            assert new._queue.empty()


@pytest.mark.parametrize("end", [output("a", 7, reason=LAST), InvalidRequestError("no")])
@on_event_loop
async def test_outputs_gather_after_the_first_and_the_end_does_not_wait(end):
    stream = OutputStream("a", StreamAddress(LinkAddress("h", 1, "t"), 1), lambda: 3600.0)
    stream.put(output("a", 3))
    async with aclosing(stream.outputs(asyncio.get_running_loop().create_future())) as outputs:
        assert await anext(outputs) == output("a", 3)
        for token in (4, 5, 6):
            stream.put(output("a", token))
        following = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0.05)
        assert not following.done()
        stream.put(end)
        if isinstance(end, Exception):
            with pytest.raises(InvalidRequestError):
                await following
        else:
            assert await following == output("a", 4, 5, 6, 7, reason=LAST)


@on_event_loop
async def test_outputs_that_gathered_come_when_their_time_is_over():
    stream = OutputStream("a", StreamAddress(LinkAddress("h", 1, "t"), 1), lambda: 0.02)
    stream.put(output("a", 3))
    async with aclosing(stream.outputs(asyncio.get_running_loop().create_future())) as outputs:
        assert await anext(outputs) == output("a", 3)
        stream.put(output("a", 4))
        assert await anext(outputs) == output("a", 4)


@on_event_loop
async def test_what_a_slow_reader_missed_comes_as_one_output_and_the_others_do_not_wait():
    async with linked() as ends, ends.call("slow") as (slow, slow_call), ends.call("b") as (other, other_call):
        await ends.replica.until_running("slow", "b")
        async with aclosing(other.outputs(other_call)) as outputs:
            for token in range(100):
                ends.replica.step(output("slow", token), output("b", token))
                assert await anext(outputs) == output("b", token)
        ends.replica.step(output("slow", 100, reason=LAST))
        await slow_call
        await asyncio.sleep(0.05)
        assert await rest(slow, slow_call) == [output("slow", *range(101), reason=LAST)]


@on_event_loop
async def test_a_gateway_that_does_not_read_holds_up_its_own_streams_alone():
    """Outputs for it wait in the replica, joined, and come when it reads again."""
    async with linked() as ends, ends.call("b") as (other, other_call):
        stuck: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        server = await asyncio.start_server(lambda reader, writer: stuck.put_nowait(writer), "127.0.0.1", 0, limit=1)
        port = server.sockets[0].getsockname()[1]
        call = asyncio.create_task(
            ends.hub.run(request_of("stuck"), StreamAddress(LinkAddress("127.0.0.1", port, "x"), 1))
        )
        reading = await stuck.get()
        await ends.replica.until_running("b", "stuck")
        step = tuple(range(50_000))
        async with aclosing(other.outputs(other_call)) as outputs:
            for token in range(200):
                ends.replica.step(output("stuck", *step), output("b", token))
                assert await anext(outputs) == output("b", token)
        [gateway] = [kept for kept in ends.hub._gateways.values() if kept.address.port == port]
        assert not gateway._takes_more, "the test must fill the connection's buffers"
        assert len(gateway._waiting) == 1
        ends.replica.step(output("stuck", 1, reason=LAST))
        await asyncio.sleep(0.05)
        assert not call.done(), "its last output has not left"
        call.cancel()
        await asyncio.wait([call])
        reading.transport.abort()
        server.close()


@pytest.mark.parametrize("error", [InvalidRequestError("too long"), UnavailableError("shutting down")])
@on_event_loop
async def test_what_the_replica_refuses_is_raised_as_its_class_at_the_door_and_later(error):
    async with linked() as ends:
        async with ends.call("a") as (stream, call):
            await ends.replica.until_running("a")
            ends.replica.running["a"](output("a", 3))
            ends.replica.running["a"](error)
            with pytest.raises(type(error)) as raised:
                await rest(stream, call)
            assert raised.value is error
        ends.replica.error = error
        async with ends.call("b") as (stream, call):
            with pytest.raises(type(error)):
                await rest(stream, call)


@on_event_loop
async def test_a_call_that_is_cancelled_cancels_the_request_and_leaves_the_link_to_others():
    async with linked() as ends, ends.call("a") as (stream, call), ends.call("b") as (other, other_call):
        await ends.replica.until_running("a", "b")
        call.cancel()
        await ends.replica.until_running("b")
        with pytest.raises(UnavailableError, match="request a failed: its call was cancelled"):
            await rest(stream, call)
        ends.replica.step(output("b", 7, reason=LAST))
        assert await rest(other, other_call) == [output("b", 7, reason=LAST)]


@on_event_loop
async def test_outputs_of_a_stream_that_was_left_are_dropped():
    async with linked() as ends, ends.call("b") as (other, other_call):
        with ends.link.open_stream("a") as left:
            call = asyncio.ensure_future(ends.hub.run(request_of("a"), left.address))
            await ends.replica.until_running("a", "b")
        # The gateway knows nothing of it any more, and the replica has not heard.
        ends.replica.step(output("a", 1), output("b", 2))
        ends.replica.step(output("a", 3, reason=LAST), output("b", 3, reason=LAST))
        await call
        assert await rest(other, other_call) == [output("b", 2, 3, reason=LAST)]


@on_event_loop
async def test_a_link_that_breaks_fails_its_streams_and_the_next_request_opens_another():
    async with linked() as ends:
        async with ends.call("a") as (stream, call):
            await ends.replica.until_running("a")
            async with aclosing(stream.outputs(call)) as outputs:
                ends.replica.step(output("a", 3))
                assert await anext(outputs) == output("a", 3)
                [connection] = ends.link._replicas
                connection.abort()
                with pytest.raises(UnavailableError, match=r"the link to the gateway at 127\.0\.0\.1:\d+ was lost"):
                    await anext(outputs)
        assert ends.replica.running == {}, "it is cancelled in the replica"
        async with ends.call("b") as (stream, call):
            await ends.replica.until_running("b")
            ends.replica.step(output("b", 4, reason=LAST))
            assert await rest(stream, call) == [output("b", 4, reason=LAST)]


@on_event_loop
async def test_a_replica_that_goes_fails_its_streams_and_a_gateway_that_goes_too():
    async with linked() as ends, ends.call("a") as (_, call):
        await ends.replica.until_running("a")
        ends.hub.close()
        with pytest.raises(UnavailableError):
            await call
    async with linked() as ends, ends.call("a") as (_, call):
        await ends.replica.until_running("a")
        await asyncio.sleep(0.05)
        await ends.link.close()
        with pytest.raises(UnavailableError, match="was lost"):
            await call


@on_event_loop
async def test_a_gateway_that_cannot_be_reached_fails_the_request():
    closed = await OutputLink.open("127.0.0.1")
    address = closed.address
    await closed.close()
    with pytest.raises(UnavailableError, match=rf"the link to the gateway at 127\.0\.0\.1:{address.port} was lost"):
        await OutputHub(FakeReplica()).run(request_of("a"), StreamAddress(address, 1))


@on_event_loop
async def test_a_call_that_ends_before_its_last_output_waits_for_it_and_not_for_ever(monkeypatch):
    async with linked() as ends:
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        with ends.link.open_stream("a") as stream:
            asyncio.get_running_loop().call_later(0.05, stream.put, output("a", 3, reason=LAST))
            assert await rest(stream, done) == [output("a", 3, reason=LAST)]
        monkeypatch.setattr(receiver, "LAST_OUTPUT_S", 0.05)
        with ends.link.open_stream("b") as stream:
            stream.put(output("b", 3))
            async with aclosing(stream.outputs(done)) as outputs:
                assert await anext(outputs) == output("b", 3)
                with pytest.raises(UnavailableError, match="request b failed: its last output was lost"):
                    await anext(outputs)


@on_event_loop
async def test_a_stranger_is_cut_off():
    async with linked() as ends, ends.call("a") as (stream, call):
        await ends.replica.until_running("a")
        wrong = StreamAddress(dataclasses.replace(ends.link.address, token="guessed"), stream.address.stream)
        stranger = FakeReplica()
        hub = OutputHub(stranger)
        intruding = asyncio.create_task(hub.run(request_of("a"), wrong))
        await stranger.until_running("a")
        stranger.step(output("a", 666, reason=LAST))
        await asyncio.wait([intruding])
        for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x02\xff\xff", b"\xff\xff\xff\xff"):
            reader, writer = await asyncio.open_connection(ends.link.address.host, ends.link.address.port)
            writer.write(junk)
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
            writer.close()
        ends.replica.step(output("a", 3, reason=LAST))
        assert await rest(stream, call) == [output("a", 3, reason=LAST)]
        hub.close()


@on_event_loop
async def test_a_connection_that_says_nothing_is_closed(monkeypatch):
    monkeypatch.setattr(receiver, "_HELLO_S", 0.05)
    async with linked() as ends:
        reader, writer = await asyncio.open_connection(ends.link.address.host, ends.link.address.port)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()


@on_event_loop
async def test_every_finish_reason_reaches_the_gateway():
    async with linked() as ends:
        for reason in FinishReason:
            error = "why" if reason is FinishReason.ERROR else None
            last = dataclasses.replace(output("a", 3, reason=reason), error=error)
            async with ends.call("a") as (stream, call):
                await ends.replica.until_running("a")
                ends.replica.step(last)
                assert await rest(stream, call) == [last]
                await call


def test_many_streams_are_told_less_often_and_never_too_seldom():
    counts = [1, 8, 32, 50, 1000]
    intervals = [chunk_interval_s(count) for count in counts]
    assert intervals == sorted(intervals)
    assert intervals[-1] == MAX_INTERVAL_S
    for count, interval in zip(counts, intervals, strict=True):
        assert interval == MAX_INTERVAL_S or count / interval == pytest.approx(MAX_CHUNKS_PER_S)


def test_both_ends_run_on_rays_event_loop():
    async def scenario():
        async with linked() as ends, ends.call("a") as (stream, call):
            await ends.replica.until_running("a")
            ends.replica.step(output("a", 3))
            ends.replica.step(output("a", 4, reason=LAST))
            assert await rest(stream, call) == [output("a", 3, 4, reason=LAST)]
            await call

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(scenario(), TEST_S))


def test_the_token_is_in_no_log():
    assert "secret" not in repr(StreamAddress(LinkAddress("h", 1, "secret"), 1))


@on_event_loop
async def test_a_replica_that_is_gone_with_its_machine_ends_its_streams_though_no_call_tells(monkeypatch):
    """The call of a machine that is gone stays open for minutes; the connection does not."""
    monkeypatch.setattr(receiver, "LAST_OUTPUT_S", 0.05)
    async with linked() as ends, ends.call("a") as (stream, _):
        await ends.replica.until_running("a")
        silent = asyncio.get_running_loop().create_future()
        ends.replica.step(output("a", 1))
        outputs = stream.outputs(silent)
        assert await anext(outputs) == output("a", 1)
        [connection] = ends.link._replicas
        connection.abort()
        with pytest.raises(UnavailableError, match="request a failed: the connection from its replica was lost"):
            await anext(outputs)


@on_event_loop
async def test_a_stream_is_fed_by_one_replica_or_fails():
    async with linked() as ends, ends.call("a") as (stream, call):
        await ends.replica.until_running("a")
        other = OutputHub(FakeReplica())
        twice = asyncio.create_task(other.run(request_of("a"), stream.address))
        with pytest.raises(UnavailableError, match="request a failed: it ran on two replicas"):
            await rest(stream, call)
        twice.cancel()
        await asyncio.wait([twice])
        other.close()


@on_event_loop
async def test_a_request_that_is_routed_twice_to_one_replica_is_refused_the_second_time_and_runs_on():
    async with linked() as ends, ends.call("a") as (stream, call):
        await ends.replica.until_running("a")
        with pytest.raises(UnavailableError, match="runs already"):
            await ends.hub.run(request_of("a"), stream.address)
        ends.replica.step(output("a", 5, reason=LAST))
        assert await rest(stream, call) == [output("a", 5, reason=LAST)]


@on_event_loop
async def test_what_waits_is_joined_a_bounded_number_at_a_time():
    stream = OutputStream("a", StreamAddress(LinkAddress("h", 1, "t"), 1), lambda: 0.0)
    for token in range(2 * MAX_JOINED + 10):
        stream.put(output("a", token))
    stream.put(output("a", 7, reason=LAST))
    told = await rest(stream, asyncio.get_running_loop().create_future())
    assert [len(entry.token_ids) for entry in told] == [MAX_JOINED, MAX_JOINED, 11]
    assert [token for entry in told for token in entry.token_ids] == [*range(2 * MAX_JOINED + 10), 7]
