"""One request on its way through the engine. Policy: no torch.

    token_ids   [ prompt ............ | output ....... ]
                [ computed: in the cache ..... | rest  ]
                  0                    ^ num_computed_tokens

In decode the rest is the one token that was sampled last; at first, and after a preemption, it is everything that the
prefix cache does not know.
"""

from array import array
from enum import Enum
from hashlib import blake2b

from cluster.request import FinishReason, GenerationRequest


class SequenceStatus(Enum):
    """Where a sequence is; the scheduler moves it."""

    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"  # holds the blocks of all its tokens
    ENDED = "ended"  # holds no blocks


class Sequence:
    """Mutable, compared by identity. Only a commit adds tokens or advances `num_computed_tokens`.

    An admission sets the latter to the known prefix, a preemption to 0.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.status = SequenceStatus.WAITING
        self.token_ids: list[int] = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_computed_tokens = 0
        self.num_lost_steps = 0  # steps in a row that were lost with this sequence in them
        self.num_cached_tokens: int | None = None  # of the prompt, known when it was first admitted
        self.block_hashes: list[bytes] = []  # of its first full blocks, as far as the block manager needed them
        # int64 in one piece of memory: the batch builder copies it as bytes.
        self.block_table: array[int] = array("q")
        self.seed = _seed_of(request)

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens, those of an earlier life included."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that still have to pass through the model before the next one can be sampled; at least 1."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether only the last token is not in the cache yet."""
        return self.num_computed_tokens > 0 and self.num_uncomputed_tokens == 1

    @property
    def ends_with_next(self) -> bool:
        """Whether the next token is the last, whichever it is."""
        return self.num_output_tokens + 1 >= self.request.max_tokens

    def append(self, token_id: int) -> FinishReason | None:
        """Adds a sampled token; the reason when the sequence ends with it."""
        self.token_ids.append(token_id)
        if token_id in self.request.eos_token_ids and not self.request.ignore_eos:
            return FinishReason.STOP
        if self.num_output_tokens >= self.request.max_tokens:
            return FinishReason.LENGTH
        return None


def _seed_of(request: GenerationRequest) -> int:
    """The request's seed; without one its id decides, so that a replay under the same id draws the same tokens."""
    if request.sampling.seed is not None:
        return request.sampling.seed
    return int.from_bytes(blake2b(request.request_id.encode(), digest_size=8).digest(), "big")
