"""What crosses between the gateway and an attention replica. Plain frozen data, no torch."""

from dataclasses import dataclass, field
from enum import Enum

from model_shards.sampling import SamplingParams


class FinishReason(Enum):
    """Why a request ended; a request ends exactly once."""

    STOP = "stop"  # end-of-sequence token, or a stop string (decided by the gateway)
    LENGTH = "length"  # max_tokens or the context is full
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    # Tokens already generated elsewhere before a replay: count as output, not as prompt.
    output_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenLogprob:
    """Log probabilities at one position, natural log."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class StepOutput:
    """What one step produced for one request: tokens in order, and the end, if it ended."""

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None  # set with FinishReason.ERROR
    num_cached_tokens: int = 0  # of the prompt, that the prefix cache had when the request was first admitted


@dataclass(frozen=True)
class StepTimes:
    """Of all steps since the start whose parts are known, as they are with CPU ranks once the next step begins."""

    num_steps: int
    step_s: float
    waited_s: float  # of these, for what the experts sent back
    experts_s: float  # that the slowest expert rank computed in each

    def after(self, step_s: float, waited_s: float, experts_s: float) -> "StepTimes":
        """With one step more."""
        return StepTimes(self.num_steps + 1, self.step_s + step_s, self.waited_s + waited_s, self.experts_s + experts_s)

    def since(self, earlier: "StepTimes") -> "StepTimes":
        """Of the steps between."""
        return StepTimes(
            self.num_steps - earlier.num_steps,
            self.step_s - earlier.step_s,
            self.waited_s - earlier.waited_s,
            self.experts_s - earlier.experts_s,
        )


NO_STEPS = StepTimes(0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class ReplicaLoad:
    """What a router or autoscaler asks of a replica."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int  # that no request holds; those that only the prefix cache keeps are among them
    num_preemptions: int
    num_steps: int
    num_cached_tokens: int  # prompt tokens that were taken from the prefix cache since the start
    times: StepTimes = NO_STEPS
