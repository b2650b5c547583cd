"""What the gateway needs of an engine, wherever it runs."""

from collections.abc import AsyncIterator
from typing import Protocol

from cluster.request import GenerationRequest, StepOutput


class EngineClient(Protocol):
    """One attention replica or many behind a router."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[StepOutput]:
        """Streams outputs up to the one with a finish reason; leaving the iterator early cancels the request."""
        ...
