"""Sampling settings of one request."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings; ranges are checked by `deploy.gateway.validation` before one is built.

    temperature 0 is greedy. Penalties follow the OpenAI API (presence, frequency: over generated tokens)
    and the CTRL paper (repetition: over prompt and generated tokens). top_k 0 means off.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: the gateway draws one, so a request is replayable
    logprobs: int | None = None  # None: none; k: the chosen token's and the k best ones'
