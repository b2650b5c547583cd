"""The bell: nobody sleeps through a ring, and sleeping burns no CPU."""

import threading
import time

from cluster.rendezvous import connect_rendezvous, serve_rendezvous
from cluster.wake import WakeBell


def bells(count):
    server = serve_rendezvous("127.0.0.1")
    made = [
        WakeBell(connect_rendezvous(server.rendezvous, 10.0), connect_rendezvous(server.rendezvous, 10.0))
        for _ in range(count)
    ]
    return server, made


def sleep_all(sleepers, news):
    threads = [threading.Thread(target=bell.sleep, args=(news,), daemon=True) for bell in sleepers]
    for thread in threads:
        thread.start()
    return threads


def test_one_ring_wakes_every_rank_and_the_next_sleep_needs_a_new_ring():
    server, made = bells(3)
    for ringer in made:
        threads = sleep_all(made, lambda: False)
        time.sleep(0.2)
        assert all(thread.is_alive() for thread in threads)
        ringer.ring()
        for thread in threads:
            thread.join(5.0)
            assert not thread.is_alive()
    assert server.rendezvous.port > 0


def test_news_that_came_before_the_sleep_is_not_slept_through():
    server, (first, second) = bells(2)
    waiting = sleep_all([first], lambda: False)
    second.sleep(lambda: True)
    waiting[0].join(5.0)
    assert not waiting[0].is_alive()
    assert server.rendezvous.port > 0


def test_ringing_a_bell_that_is_not_asleep_leaves_nothing_behind():
    server, (only,) = bells(1)
    only.ring()
    (thread,) = sleep_all([only], lambda: False)
    thread.join(0.3)
    assert thread.is_alive()
    only.ring()
    thread.join(5.0)
    assert not thread.is_alive()
    assert server.rendezvous.port > 0


def test_a_sleeping_rank_uses_no_cpu():
    server, made = bells(2)
    threads = sleep_all(made, lambda: False)
    time.sleep(0.2)
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.05
    made[0].ring()
    for thread in threads:
        thread.join(5.0)
    assert server.rendezvous.port > 0


def test_the_store_does_not_grow_with_the_number_of_sleeps():
    server, made = bells(2)
    sizes = []
    for turn in range(12):
        threads = sleep_all(made, lambda: False)
        deadline = time.monotonic() + 10.0
        while any(thread.is_alive() for thread in threads):
            assert time.monotonic() < deadline
            made[turn % 2].ring()  # nothing to a bell that is not asleep yet
            threads[turn % 2].join(0.05)
        sizes.append(server.store.num_keys())
    assert sizes[-1] == sizes[3]
