"""Messages through shared memory: between threads of this process, and to a process that is killed."""

import mmap
import multiprocessing
import os
import resource
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from cluster.membership import Membership, Rendezvous
from cluster.shm.calls import RING
from cluster.shm.mesh import Address, Mesh, PeerLostError, address_of, host_identity, supported
from cluster.shm.messages import Sender
from cluster.shm.outbox import Inbox, Outbox
from cluster.shm.semaphore import Semaphore
from cluster.shm.watch import ProcessWatch
from cluster.step_header import HeaderExchange, StepHeader
from cluster.topology import Topology
from cluster.waiting import WaitTally
from model_shards.errors import EpochAbortedError
from model_shards.placement import contiguous_placement
from tests.meshes import meshes

SPAWN = multiprocessing.get_context("spawn")


def soon(seconds=10.0):
    return time.monotonic() + seconds


def message(*values):
    return torch.tensor(values, dtype=torch.uint8)


def send(outbox, reader, content):
    outbox.reserve(reader, content.shape[0])
    Sender(outbox, [(reader, content)], WaitTally()).send()


def receive(mesh, rank, out, deadline):
    receiver = mesh.receiver([(rank, out)])
    receiver.expect(deadline)
    receiver.receive()


def inbox_of(outbox, reader=1, world_size=2):
    return Inbox(os.getpid(), outbox.file, outbox.token, world_size, reader)


def test_this_system_has_what_the_tests_below_need():
    assert supported()


def test_a_semaphore_counts_and_a_wait_ends_at_its_deadline():
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    semaphore = Semaphore(memory, 64, create=True)
    for _ in range(3):
        semaphore.post()
    assert [semaphore.wait(soon()) for _ in range(3)] == [True] * 3
    begun = time.monotonic()
    assert not semaphore.wait(begun + 0.2)
    assert 0.2 <= time.monotonic() - begun < 5.0
    assert not semaphore.wait(begun - 100.0)


def test_a_semaphore_wakes_a_thread_that_waits():
    semaphore = Semaphore(mmap.mmap(-1, mmap.PAGESIZE), 0, create=True)
    woken = []
    waiter = threading.Thread(target=lambda: woken.append(semaphore.wait(soon())))
    waiter.start()
    time.sleep(0.1)
    semaphore.post()
    waiter.join(10.0)
    assert woken == [True]


def test_messages_come_in_order_whole_and_of_any_size_while_the_memory_grows():
    outbox = Outbox(2)
    inbox = inbox_of(outbox)
    draw = torch.Generator().manual_seed(5)
    sizes = [1, 7, 4096, 4097, 3, 1_000_000, 5, 2_000_000, 64, 1_000_001]
    for begin in range(0, len(sizes), 3):
        sent = [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=draw) for size in sizes[begin : begin + 3]]
        for each in sent:
            send(outbox, 1, each)
        for each in sent:
            assert inbox.wait_data(soon())
            out = torch.empty_like(each)
            assert inbox.take(out)
            assert torch.equal(out, each)
    assert not inbox.take(torch.empty(1, dtype=torch.uint8))
    outbox.close()
    inbox.close()


def test_regions_are_used_again_so_the_memory_does_not_grow_with_the_messages():
    outbox = Outbox(2)
    inbox = inbox_of(outbox)
    grown = []
    for _ in range(50 * RING):
        send(outbox, 1, torch.ones(10_000, dtype=torch.uint8))
        assert inbox.take(torch.empty(10_000, dtype=torch.uint8))
        grown.append(os.fstat(outbox.file).st_size)
    assert grown[RING] == grown[-1]
    outbox.close()
    inbox.close()


def test_a_message_of_another_size_than_due_is_refused():
    outbox = Outbox(2)
    inbox = inbox_of(outbox)
    send(outbox, 1, message(1, 2, 3))
    with pytest.raises(ValueError, match="a message of 3 bytes came where 4 were due"):
        inbox.take(torch.empty(4, dtype=torch.uint8))
    outbox.close()
    inbox.close()


def test_a_peer_that_left_in_order_and_then_ended_ends_no_wait_for_another():
    with meshes(3) as (first, second, third):
        first.close()
        third._exited(0)
        threading.Timer(0.2, second.sender([(2, message(7))]).send).start()
        out = torch.empty(1, dtype=torch.uint8)
        receive(third, 1, out, soon())
        assert out.tolist() == [7]
        with pytest.raises(PeerLostError, match="rank R0 left the epoch"):
            receive(third, 0, out, soon())
        third._exited(1)
        with pytest.raises(PeerLostError, match="the process of rank R1 is gone"):
            receive(third, 1, out, soon())


def test_a_replica_without_tokens_waits_at_the_header_for_the_whole_step_and_others_for_one_exchange():
    timeout_s = 0.4
    topology = Topology(2, 1)
    membership = Membership(
        1, topology, contiguous_placement(4, 1), Rendezvous("127.0.0.1", 1), "shm", timeout_s, timeout_s
    )
    ended = {}

    def run(rank, mesh):
        headers = HeaderExchange(SimpleNamespace(mesh=mesh), membership, rank, 1, num_moe_layers=3)
        headers.exchange(StepHeader(1, (5 if rank == 0 else 0,), ends=False))
        if rank == 0:
            time.sleep(3 * timeout_s)  # a step of six exchanges, none of them late
        begun = time.monotonic()
        try:
            headers.exchange(StepHeader(1, (0,), ends=False))
            ended[rank] = "agreed"
        except EpochAbortedError as error:
            ended[rank] = (str(error), time.monotonic() - begun)

    with meshes(3) as made:
        threads = [threading.Thread(target=run, args=each) for each in enumerate(made)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30.0)
    # E0 took part in the step, so it does not wait longer than for one exchange; A1, without tokens, does.
    message_, waited_s = ended[2]
    assert "rank R0 sent nothing in time" in message_
    assert waited_s < 3 * timeout_s
    assert ended[1] == "agreed"


def test_what_is_no_outbox_or_another_one_is_refused(tmp_path):
    outbox = Outbox(2)
    with pytest.raises(ValueError, match="another outbox"):
        Inbox(os.getpid(), outbox.file, bytes(16), 2, 1)
    with (tmp_path / "file").open("wb+") as other, pytest.raises(ValueError, match="is no outbox"):
        Inbox(os.getpid(), other.fileno(), outbox.token, 2, 1)
    file = outbox.file
    outbox.close()
    with pytest.raises(OSError, match="No such file"):
        Inbox(os.getpid(), file, outbox.token, 2, 1)


def _send_beyond_the_limit(answers):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    outbox = Outbox(2)
    send(outbox, 1, torch.ones(1000, dtype=torch.uint8))
    try:
        send(outbox, 1, torch.ones(1 << 21, dtype=torch.uint8))
    except OSError as error:
        answers.put(str(error))


def test_memory_that_cannot_be_had_is_an_error_and_not_a_signal():
    answers = SPAWN.SimpleQueue()
    process = SPAWN.Process(target=_send_beyond_the_limit, args=(answers,))
    process.start()
    process.join(60.0)
    assert process.exitcode == 0
    assert "File too large" in answers.get()


def test_a_gather_has_everyones_row_in_the_order_of_the_ranks():
    with meshes(3) as made:
        results = {}

        def run(rank):
            results[rank] = [made[rank].gather([rank, step, rank * step], soon()) for step in range(20)]

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30.0)
    expected = [[[rank, step, rank * step] for rank in range(3)] for step in range(20)]
    assert results == {0: expected, 1: expected, 2: expected}


def test_the_peer_after_ones_own_number_is_woken_first():
    with meshes(5) as made:
        sender = made[1].sender([(rank, message(rank)) for rank in (2, 3, 4)])
        assert [rank for rank, _ in sender._messages] == [4, 2, 3]
        sender.send()
        for rank in (2, 3, 4):
            out = torch.empty(1, dtype=torch.uint8)
            receive(made[rank], 1, out, soon())
            assert out.tolist() == [rank]
        made[1].sender([]).send()


def test_nobody_is_woken_before_all_messages_are_written():
    """The first that is woken finds what another is to read, though it takes a while to write."""
    outbox = Outbox(3)
    first, last = inbox_of(outbox, 1, 3), inbox_of(outbox, 2, 3)
    large = torch.ones(8_000_000, dtype=torch.uint8)
    for rank, content in ((1, message(7)), (2, large)):
        outbox.reserve(rank, content.shape[0])
    sender = Sender(outbox, [(1, message(7)), (2, large)], WaitTally())
    found = []

    def look(number):
        first.wait_data(soon())
        # Only the descriptor: to copy would give the sender time.
        found.append(int(last._box.descriptors[number % RING, 0]) == number)

    for number in range(1, 21):
        reader = threading.Thread(target=look, args=(number,))
        reader.start()
        sender.send()
        reader.join(10.0)
        assert first.take(torch.empty(1, dtype=torch.uint8))
        assert last.wait_data(soon())
        assert last.take(torch.empty_like(large))
    assert found == [True] * 20
    outbox.close()
    first.close()
    last.close()


def test_without_memory_for_one_message_none_is_sent(monkeypatch):
    with meshes(3) as made:
        reserve = Outbox.reserve

        def scarce(self, rank, size):
            if rank == 2:
                raise OSError("no memory")
            reserve(self, rank, size)

        monkeypatch.setattr(Outbox, "reserve", scarce)
        with pytest.raises(OSError, match="no memory"):
            made[0].sender([(1, message(1)), (2, message(2))])
        assert made[0].messages_sent == 0
        made[0].close()
        for rank in (1, 2):
            with pytest.raises(PeerLostError, match="rank R0 left the epoch"):
                receive(made[rank], 0, torch.empty(1, dtype=torch.uint8), soon())


def test_messages_are_received_whole_whatever_order_their_peers_send_in_and_however_often_one_is_woken():
    with meshes(3) as made:
        outs = [torch.empty(5000, dtype=torch.uint8) for _ in range(2)]
        receiver = made[0].receiver([(1, outs[0]), (2, outs[1])])
        contents = [torch.zeros(5000, dtype=torch.uint8) for _ in range(2)]
        senders = [made[rank].sender([(0, content)]) for rank, content in zip((1, 2), contents, strict=True)]
        for step in range(1, 20):
            for content in contents:
                content += 1
            order = (0, 1) if step % 2 else (1, 0)
            made[0]._inboxes[1 + step % 2].wake()  # for another reason than a message
            timers = [threading.Timer(0.01 * place, senders[which].send) for place, which in enumerate(order)]
            for timer in timers:
                timer.start()
            receiver.expect(soon())
            receiver.receive()
            assert all(bool((out == step).all()) for out in outs)
            for timer in timers:
                timer.join(10.0)
        assert made[1].messages_sent == made[2].messages_sent == 19


def test_messages_on_their_way_stay_where_they_are_while_room_is_made_for_larger_ones():
    outbox = Outbox(2)
    inbox = inbox_of(outbox)
    send(outbox, 1, message(1, 2, 3))
    send(outbox, 1, torch.full((100_000,), 9, dtype=torch.uint8))
    small, large = torch.empty(3, dtype=torch.uint8), torch.empty(100_000, dtype=torch.uint8)
    assert inbox.take(small)
    assert inbox.take(large)
    assert small.tolist() == [1, 2, 3]
    assert bool((large == 9).all())
    outbox.close()
    inbox.close()


def test_a_rank_that_has_left_sends_nothing_more():
    with meshes(2) as (first, second):
        sender = first.sender([(1, message(1))])
        first.close()
        with pytest.raises(RuntimeError, match="this rank has left the epoch"):
            sender.send()
        with pytest.raises(PeerLostError, match="rank R0 left the epoch"):
            receive(second, 0, torch.empty(1, dtype=torch.uint8), soon())


def test_a_peer_that_leaves_ends_waits_for_it_but_what_it_sent_before_is_read():
    with meshes(2) as (first, second):
        first.sender([(1, message(1, 2))]).send()
        first.close()
        out = torch.empty(2, dtype=torch.uint8)
        receive(second, 0, out, soon())
        assert out.tolist() == [1, 2]
        with pytest.raises(PeerLostError, match="rank R0 left the epoch"):
            receive(second, 0, out, soon())
        with pytest.raises(PeerLostError, match="rank R0 left the epoch"):
            second.gather([1], soon())


def test_a_peer_that_sends_nothing_is_named_when_the_deadline_passes():
    with meshes(2) as (_, second), pytest.raises(PeerLostError, match="rank R0 sent nothing in time"):
        receive(second, 0, torch.empty(1, dtype=torch.uint8), soon(0.1))


def _wait_for_ever(pipe):
    outbox = Outbox(2)
    pipe.send(address_of(outbox).encode())
    address = Address.decode(pipe.recv())
    mesh = Mesh(outbox, [address, address_of(outbox)], 1, ["R0", "R1"])
    mesh.sender([(0, message(9))]).send()
    pipe.send("sent")
    receive(mesh, 0, torch.empty(1, dtype=torch.uint8), soon(100.0))


def test_a_killed_process_ends_every_wait_at_once_and_is_named():
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=_wait_for_ever, args=(there,))
    process.start()
    outbox = Outbox(2)
    address = Address.decode(here.recv())
    assert address.host == host_identity()
    here.send(address_of(outbox).encode())
    mesh = Mesh(outbox, [address_of(outbox), address], 0, ["R0", "R1"])
    assert here.recv() == "sent"
    out = torch.empty(1, dtype=torch.uint8)
    receive(mesh, 1, out, soon())
    assert out.tolist() == [9]
    threading.Timer(0.3, os.kill, (process.pid, signal.SIGKILL)).start()
    begun = time.monotonic()
    with pytest.raises(PeerLostError, match="the process of rank R1 is gone"):
        receive(mesh, 1, out, soon(60.0))
    assert time.monotonic() - begun < 10.0
    mesh.close()
    mesh.close()
    process.join(10.0)


def test_a_process_that_is_gone_already_cannot_be_watched():
    process = SPAWN.Process(target=os.getpid)
    process.start()
    process.join(60.0)
    with pytest.raises(OSError, match="No such process"):
        ProcessWatch({1: process.pid}, print)


def test_nothing_is_left_open():
    def open_files():
        return len(os.listdir("/proc/self/fd"))  # links that vanish while they are read

    with meshes(2):
        pass
    before = open_files()
    for _ in range(5):
        with meshes(3) as made:
            made[0].sender([(1, torch.ones(100_000, dtype=torch.uint8))]).send()
            receive(made[1], 0, torch.empty(100_000, dtype=torch.uint8), soon())
    assert open_files() == before
    assert not [thread for thread in threading.enumerate() if thread.name == "peer-watch"]
