"""The coordinator against simulated ranks: it must form, mend and adopt epochs, and name what is missing."""

import asyncio

import pytest

from cluster import backoff as backoff_module
from cluster import coordinator as coordinator_module
from cluster import rank_agent as rank_agent_module
from cluster.control import CellState, Join, Leave, LoadingStatus, OpenRendezvous, Registration
from cluster.membership import Rendezvous
from cluster.topology import Role, Topology
from model_shards.errors import UnavailableError
from tests.fake_ranks import WAIT_S, FakeRank, make_coordinator, next_running, running, start_cell

A0 = Registration("a0", Role.ATTENTION, None)
E0 = Registration("e0", Role.EXPERT, 0)


async def form_by_hand(coordinator):
    """Registers A0 and E0 and answers for them until both hold a Join of epoch 1; the Join of A0."""
    await coordinator.register(A0)
    await coordinator.register(E0)
    assert await coordinator.next_command("a0", 1.0) == OpenRendezvous(1)
    await coordinator.rendezvous_opened("a0", 1, Rendezvous("127.0.0.1", 1))
    join = await coordinator.next_command("a0", 1.0)
    assert isinstance(join, Join)
    return join


# --- forming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_attention", "num_expert"), [(1, 1), (1, 3), (2, 4), (3, 2)])
def test_an_epoch_forms_when_every_rank_has_registered_and_each_gets_its_own_rank(num_attention, num_expert):
    async def scenario():
        coordinator = make_coordinator(num_attention, num_expert)
        async with running(coordinator):
            ranks = start_cell(coordinator, num_attention, num_expert)
            status = await coordinator.wait_running(WAIT_S)
            assert status.epoch == 1
            assert status.missing == ()
            taken = sorted(rank.memberships[-1][1] for rank in ranks)
            assert taken == list(range(num_attention + num_expert))
            for ep_rank, rank in enumerate(ranks[num_attention:]):
                assert rank.memberships[-1][1] == num_attention + ep_rank
                assert rank.names == [f"E{ep_rank}"]
            for rank in ranks:
                await rank.die()

    asyncio.run(scenario())


def test_waiting_for_a_cell_that_lacks_a_rank_names_it():
    async def scenario():
        coordinator = make_coordinator(1, 2)
        async with running(coordinator):
            FakeRank(coordinator, "a0", Role.ATTENTION).start()
            FakeRank(coordinator, "e1", Role.EXPERT, 1).start()
            with pytest.raises(UnavailableError, match="missing ranks: E0"):
                await coordinator.wait_running(0.2)

    asyncio.run(scenario())


def test_commands_come_in_the_order_rendezvous_join_leave():
    async def scenario():
        coordinator = make_coordinator(1, 1)
        async with running(coordinator):
            join = await form_by_hand(coordinator)
            assert join.membership.topology == Topology(1, 1)
            assert isinstance(await coordinator.next_command("e0", 1.0), Join)
            await coordinator.joined("a0", 1)
            await coordinator.joined("e0", 1)
            await coordinator.wait_running(1.0)
            await coordinator.epoch_ended("e0", 1, "peer lost", is_fault=False)
            assert await coordinator.next_command("a0", 1.0) == Leave(1)

    asyncio.run(scenario())


def test_a_rank_that_is_replaced_while_the_epoch_forms_fails_it_at_once():
    async def scenario():
        coordinator = make_coordinator(1, 2)
        ranks = start_cell(coordinator, 1, 2)
        for rank in ranks:
            rank.stuck = True  # each waits for all the others, and E1 dies
        async with running(coordinator):
            a0, e0, e1 = ranks
            await e1.told_to_join(0)
            await e1.die()
            a0.stuck = e0.stuck = False
            replacement = FakeRank(coordinator, "e1-again", Role.EXPERT, 1).start()
            assert await next_running(coordinator, replacement, 0) == 2
            assert a0.epochs == e0.epochs == [1, 2]

    asyncio.run(scenario())


def test_a_rank_that_cannot_join_fails_the_epoch_at_once_and_the_others_cut_their_joins_short():
    async def scenario():
        coordinator = make_coordinator(1, 1)
        ranks = start_cell(coordinator, 1, 1)
        for rank in ranks:
            rank.stuck = True
        async with running(coordinator):
            a0, e0 = ranks
            await e0.told_to_join(0)
            await a0.told_to_join(0)
            a0.stuck = e0.stuck = False
            e0.end("no route to A0")
            assert await next_running(coordinator, e0, 1) == 2
            assert a0.told_to_leave.is_set()

    asyncio.run(scenario())


def test_a_rank_that_falls_silent_while_the_epoch_forms_fails_it_before_the_join_deadline(monkeypatch):
    monkeypatch.setattr(coordinator_module, "SILENCE_S", 1.5)
    monkeypatch.setattr(coordinator_module, "POLL_S", 0.1)
    monkeypatch.setattr(rank_agent_module, "POLL_S", 0.05)

    async def scenario():
        coordinator = make_coordinator(1, 1)
        a0, e0 = start_cell(coordinator, 1, 1)
        a0.stuck = e0.stuck = True
        async with running(coordinator):
            await e0.told_to_join(0)
            await e0.die()
            async with asyncio.timeout(WAIT_S):
                await a0.told_to_leave.wait()
            assert coordinator.status().missing == ("E0",)

    asyncio.run(scenario())


# --- mending ------------------------------------------------------------------------------------------------------


def test_an_aborted_epoch_is_followed_by_the_next_with_the_replacement_in_the_dead_ranks_place():
    async def scenario():
        coordinator = make_coordinator(1, 2)
        async with running(coordinator):
            a0, e0, e1 = start_cell(coordinator, 1, 2)
            await coordinator.wait_running(WAIT_S)
            await e1.die()
            replacement = FakeRank(coordinator, "e1-again", Role.EXPERT, 1).start()
            epoch = await next_running(coordinator, replacement, 0)
            assert replacement.memberships[-1][1] == 2
            assert a0.epochs[-1] == e0.epochs[-1] == epoch >= 2
            assert {status.uid for status in coordinator.status().ranks} == {"a0", "e0", "e1-again"}

    asyncio.run(scenario())


def test_a_rank_that_left_the_running_epoch_unheard_says_so_when_it_registers_again():
    async def scenario():
        coordinator = make_coordinator(1, 1)
        async with running(coordinator):
            a0, _ = start_cell(coordinator, 1, 1)
            await coordinator.wait_running(WAIT_S)
            epoch = a0.epochs[-1]
            told = Registration("e0", Role.EXPERT, 0, highest_epoch=epoch, ended_epoch=epoch)
            await coordinator.register(told)
            assert coordinator.status().state is CellState.ENDING
            await a0.told_to_join(above=epoch)

    asyncio.run(scenario())


def test_a_replacement_that_comes_in_the_middle_of_the_roll_call_ends_the_wait_for_the_dead():
    async def scenario():
        coordinator = make_coordinator(1, 2)
        async with running(coordinator):
            a0, e0, e1 = start_cell(coordinator, 1, 2)
            await coordinator.wait_running(WAIT_S)
            await e1.die()
            a0.end("peer lost")
            async with asyncio.timeout(WAIT_S):
                await e0.told_to_leave.wait()  # by the roll call, which now waits for E1
            assert coordinator.status().state is CellState.ENDING
            replacement = FakeRank(coordinator, "e1-again", Role.EXPERT, 1).start()
            assert await next_running(coordinator, replacement, 0) == 2

    asyncio.run(scenario())


def test_a_member_that_does_not_answer_the_roll_call_loses_its_place_to_a_standby(monkeypatch):
    monkeypatch.setattr(coordinator_module, "_ROLL_CALL_S", 0.5)

    async def scenario():
        coordinator = make_coordinator(2, 1)
        async with running(coordinator):
            a0, dead, e0 = start_cell(coordinator, 2, 1)
            await coordinator.wait_running(WAIT_S)
            standby = FakeRank(coordinator, "a2", Role.ATTENTION).start()
            await dead.die()
            a0.end("peer lost")
            e0.end("peer lost")
            await next_running(coordinator, standby, 0)
            assert "a1" not in {status.uid for status in coordinator.status().ranks}

    asyncio.run(scenario())


def test_a_rank_that_unregisters_is_not_part_of_the_next_epoch_and_a_standby_has_its_place():
    async def scenario():
        coordinator = make_coordinator(2, 1)
        async with running(coordinator):
            a0, leaver, e0 = start_cell(coordinator, 2, 1)
            await coordinator.wait_running(WAIT_S)
            standby = FakeRank(coordinator, "a2", Role.ATTENTION).start()
            await leaver.die()
            await leaver.agent.unregister()
            leaver.end(None)  # it leaves the epoch after that, and all others with it
            assert await next_running(coordinator, standby, 0) == 2
            assert a0.epochs == e0.epochs == [1, 2]
            assert leaver.epochs == [1]

    asyncio.run(scenario())


def test_without_a_standby_the_others_leave_the_epoch_of_a_rank_that_unregisters_and_wait_for_the_next_one():
    async def scenario():
        coordinator = make_coordinator(2, 1)
        async with running(coordinator):
            a0, leaver, e0 = start_cell(coordinator, 2, 1)
            await coordinator.wait_running(WAIT_S)
            await leaver.die()
            await leaver.agent.unregister()
            async with asyncio.timeout(WAIT_S):
                await a0.told_to_leave.wait()
                await e0.told_to_leave.wait()
            assert coordinator.status().missing == ("A1",)
            successor = FakeRank(coordinator, "a2", Role.ATTENTION).start()
            assert await next_running(coordinator, successor, 0) == 2

    asyncio.run(scenario())


def test_a_rank_that_leaves_while_the_epoch_forms_fails_it_at_once():
    async def scenario():
        coordinator = make_coordinator(1, 1)
        a0, e0 = start_cell(coordinator, 1, 1)
        a0.stuck = e0.stuck = True
        async with running(coordinator):
            await e0.told_to_join(0)
            await a0.die()
            await a0.agent.unregister()
            e0.stuck = False
            successor = FakeRank(coordinator, "a1", Role.ATTENTION).start()
            assert await next_running(coordinator, successor, 0) == 2

    asyncio.run(scenario())


# --- an error that comes again ------------------------------------------------------------------------------------


def test_after_a_rank_failed_by_itself_the_next_epoch_has_to_wait_and_after_a_lost_peer_it_has_not(monkeypatch):
    monkeypatch.setattr(backoff_module, "_FIRST_S", 1000.0)
    monkeypatch.setattr(backoff_module, "_LONGEST_S", 1000.0)

    async def scenario():
        coordinator = make_coordinator(1, 1)
        async with running(coordinator):
            a0, e0 = start_cell(coordinator, 1, 1)
            await coordinator.wait_running(WAIT_S)
            a0.end("peer lost")
            assert await next_running(coordinator, a0, 1) == 2
            e0.end("RuntimeError: out of memory", is_fault=True)
            async with asyncio.timeout(WAIT_S):
                a0.told_to_leave.clear()
                await a0.told_to_leave.wait()
            with pytest.raises(UnavailableError, match="last error: E0: RuntimeError: out of memory"):
                await coordinator.wait_running(0.3)
            assert coordinator.status().epoch == 2

    asyncio.run(scenario())


# --- a coordinator that was away ----------------------------------------------------------------------------------


def test_a_restarted_coordinator_adopts_the_epoch_that_still_runs_without_a_new_join():
    async def scenario():
        first = make_coordinator(1, 1)
        async with running(first):
            a0, e0 = start_cell(first, 1, 1)
            await first.wait_running(WAIT_S)
            membership, _ = a0.memberships[-1]
            await a0.die()
            await e0.die()
        second = make_coordinator(1, 1)
        async with running(second):
            await second.register(Registration("a0", Role.ATTENTION, None, membership, 0, highest_epoch=1))
            await second.register(Registration("e0", Role.EXPERT, 0, membership, 1, highest_epoch=1))
            status = await second.wait_running(1.0)
            assert status.epoch == membership.epoch
            assert await second.next_command("a0", 0.05) is None

    asyncio.run(scenario())


def test_a_restarted_coordinator_gives_a_running_attention_rank_its_place_back():
    async def scenario():
        first = make_coordinator(2, 1)
        async with running(first):
            _, a1, _ = start_cell(first, 2, 1)
            await first.wait_running(WAIT_S)
            membership, _ = a1.memberships[-1]
        second = make_coordinator(2, 1)
        await second.register(Registration("new", Role.ATTENTION, None))
        await second.register(Registration("a1", Role.ATTENTION, None, membership, 0, highest_epoch=1))
        names = {status.uid: status.name for status in second.status().ranks}
        assert names == {"new": "A1", "a1": "A0"}

    asyncio.run(scenario())


def test_epochs_go_on_above_the_highest_that_any_rank_heard_of():
    async def scenario():
        coordinator = make_coordinator(1, 1)
        async with running(coordinator):
            await coordinator.register(Registration("a0", Role.ATTENTION, None, highest_epoch=6, ended_epoch=6))
            await coordinator.register(Registration("e0", Role.EXPERT, 0, highest_epoch=7, ended_epoch=7))
            assert await coordinator.next_command("a0", 1.0) == OpenRendezvous(8)

    asyncio.run(scenario())


def test_a_rank_that_still_joins_an_epoch_of_before_is_told_to_leave_it_first():
    async def scenario():
        coordinator = make_coordinator(1, 1)
        async with running(coordinator):
            await coordinator.register(Registration("a0", Role.ATTENTION, None, highest_epoch=5, ended_epoch=5))
            await coordinator.register(Registration("e0", Role.EXPERT, 0, highest_epoch=6, ended_epoch=5))
            assert await coordinator.next_command("e0", 1.0) == Leave(6)
            await coordinator.epoch_ended("e0", 6, "told to leave", is_fault=False)
            assert await coordinator.next_command("a0", 1.0) == OpenRendezvous(7)

    asyncio.run(scenario())


def test_a_rank_that_is_not_registered_is_told_to_register_again():
    async def scenario():
        coordinator = make_coordinator(1, 1)
        with pytest.raises(UnavailableError, match="ghost is not registered"):
            await coordinator.next_command("ghost", 0.1)

    asyncio.run(scenario())


def test_a_rank_that_registers_again_while_the_epoch_forms_is_still_part_of_it_and_finds_its_commands():
    async def scenario():
        coordinator = make_coordinator(1, 1)
        async with running(coordinator):
            await form_by_hand(coordinator)
            await coordinator.register(E0)
            join = await coordinator.next_command("e0", 1.0)
            assert isinstance(join, Join)
            await coordinator.joined("e0", 1)
            await coordinator.register(Registration("a0", Role.ATTENTION, None, join.membership, 0, highest_epoch=1))
            assert (await coordinator.wait_running(WAIT_S)).epoch == 1

    asyncio.run(scenario())


def test_a_question_of_before_a_rank_registered_again_gets_no_command():
    async def scenario():
        coordinator = make_coordinator(1, 1)
        await coordinator.register(E0)
        nobody_waits_for_it = asyncio.create_task(coordinator.next_command("e0", 60.0))
        await asyncio.sleep(0)
        await coordinator.register(E0)
        async with running(coordinator):
            await form_by_hand(coordinator)
            assert isinstance(await coordinator.next_command("e0", 1.0), Join)
            assert not nobody_waits_for_it.done()
            nobody_waits_for_it.cancel()

    asyncio.run(scenario())


def test_an_epoch_fails_at_once_when_a_join_was_lost_on_the_way():
    async def scenario():
        coordinator = make_coordinator(1, 1)
        async with running(coordinator):
            await form_by_hand(coordinator)
            assert isinstance(await coordinator.next_command("e0", 1.0), Join)  # it never arrives
            await coordinator.register(E0)
            assert await coordinator.next_command("a0", 1.0) == Leave(1)
            await coordinator.epoch_ended("a0", 1, "told to leave", is_fault=False)
            assert await coordinator.next_command("a0", WAIT_S) == OpenRendezvous(2)

    asyncio.run(scenario())


def test_damage_is_told_until_the_rank_has_started_or_fails_otherwise():
    async def scenario():
        coordinator = make_coordinator(1, 2)
        coordinator.report_failure("E0", "file a is damaged", is_damage=True)
        coordinator.report_failure("E1", "file b is damaged", is_damage=True)
        assert coordinator.status().damage == ("file a is damaged", "file b is damaged")
        coordinator.report_failure("E1", "no memory")
        assert coordinator.status().damage == ("file a is damaged",)
        assert coordinator.status().last_error == "E1: no memory"
        await coordinator.register(E0)
        assert coordinator.status().damage == ()

    asyncio.run(scenario())


# --- loading ------------------------------------------------------------------------------------------------------


def test_loading_ranks_are_told_apart_by_uid_and_forgotten_once_they_register():
    async def scenario():
        coordinator = make_coordinator(2, 1)
        for uid in ("a0", "a1"):
            coordinator.report_loading(LoadingStatus(uid, f"attention-{uid}", 1, 10))
        assert [loading.name for loading in coordinator.status().loading] == ["attention-a0", "attention-a1"]
        await coordinator.register(A0)
        coordinator.report_loading(LoadingStatus("a0", "attention-a0", 10, 10))  # overtaken by its registration
        assert [loading.name for loading in coordinator.status().loading] == ["attention-a1"]

    asyncio.run(scenario())


def test_an_expert_that_starts_anew_while_it_loads_shows_once():
    async def scenario():
        coordinator = make_coordinator(1, 1)
        coordinator.report_loading(LoadingStatus("first life", "E0", 9, 10))
        coordinator.report_loading(LoadingStatus("second life", "E0", 1, 10))
        assert coordinator.status().loading == (LoadingStatus("second life", "E0", 1, 10),)

    asyncio.run(scenario())


def test_what_died_while_it_loaded_is_forgotten_when_the_cell_runs():
    async def scenario():
        coordinator = make_coordinator(1, 1)
        coordinator.report_loading(LoadingStatus("dead", "attention-dead", 1, 10))
        async with running(coordinator):
            start_cell(coordinator, 1, 1)
            assert (await coordinator.wait_running(WAIT_S)).loading == ()

    asyncio.run(scenario())
