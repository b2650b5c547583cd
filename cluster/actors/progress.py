"""Carries loading progress from the loading thread to the coordinator, a few times a second at most."""

import asyncio
import time

from cluster.actors.client import RayCoordinatorClient
from cluster.control import LoadingStatus
from model_shards.errors import UnavailableError

_INTERVAL_S = 0.2


class LoadingReporter:
    """A `Progress` for the weight loaders: called in a worker thread, reports on the event loop."""

    def __init__(self, client: RayCoordinatorClient, loop: asyncio.AbstractEventLoop, uid: str, name: str) -> None:
        self._client = client
        self._loop = loop
        self._uid = uid
        self._name = name
        self._last = 0.0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now - self._last < _INTERVAL_S and done_bytes < total_bytes:
            return
        self._last = now
        loading = LoadingStatus(self._uid, self._name, done_bytes, total_bytes)
        asyncio.run_coroutine_threadsafe(self._report(loading), self._loop)

    async def _report(self, loading: LoadingStatus) -> None:
        try:
            await self._client.report_loading(loading)
        except UnavailableError:
            # Progress is a courtesy: registration, which follows, reports a coordinator that is away.
            return
