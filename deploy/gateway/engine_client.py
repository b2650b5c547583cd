"""What the gateway needs of an engine, wherever it runs."""

from collections.abc import AsyncGenerator
from typing import Protocol

from cluster.request import GenerationRequest, StepOutput


class EngineClient(Protocol):
    """One attention replica or many behind a router."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[StepOutput, None]:
        """Streams outputs up to the one with a finish reason; closing the generator early cancels the request.

        Raises UnavailableError when the engine is lost.
        """
        ...
