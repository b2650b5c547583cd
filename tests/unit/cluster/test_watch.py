"""Tasks that must run for ever."""

import asyncio
import logging

import pytest

from cluster.actors.watch import run_for_ever


async def fails():
    raise ValueError("something unforeseen")


async def returns():
    return


@pytest.mark.parametrize("work", [fails, returns])
def test_the_process_ends_when_such_a_task_does_and_the_log_says_why(work, caplog):
    async def scenario():
        statuses = asyncio.Queue()
        run_for_ever(work(), "form epochs", statuses.put_nowait)
        return await asyncio.wait_for(statuses.get(), 5.0)

    # The package's loggers do not propagate once a test before this one has configured them.
    logger = logging.getLogger("cluster.actors.watch")
    logger.addHandler(caplog.handler)
    try:
        assert asyncio.run(scenario()) == 1
    finally:
        logger.removeHandler(caplog.handler)
    record = caplog.records[0]
    assert record.fields["task"] == "form epochs"
    if work is fails:
        assert "something unforeseen" in str(record.exc_info[1])


def test_cancelling_it_is_no_failure():
    async def scenario():
        statuses = asyncio.Queue()
        task = run_for_ever(asyncio.sleep(60.0), "form epochs", statuses.put_nowait)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return statuses.empty()

    assert asyncio.run(scenario())
