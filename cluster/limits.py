"""The bounds of one engine, and the rules that a request must keep to fit in them. Policy: no torch."""

import math
from dataclasses import dataclass, fields

from cluster.request import GenerationRequest
from model_shards.errors import ConfigError, InvalidRequestError

MAX_MICRO_BATCHES = 3


@dataclass(frozen=True)
class EngineLimits:
    """What bounds the work and the memory of one attention replica. Raises ConfigError, naming the rule."""

    max_model_len: int  # tokens, prompt and output together
    max_num_seqs: int  # sequences that run at once
    max_num_batched_tokens: int  # tokens of one step
    block_size: int  # tokens
    num_blocks: int
    num_micro_batches: int  # 1 to MAX_MICRO_BATCHES
    choose_micro_batches: bool = False  # what is measured to be fastest, num_micro_batches at most
    max_decode_slowdown: float | None = None  # a step with prefills against its decodes alone; None: no bound
    prefix_cache: bool = True  # blocks of computed tokens are kept, and shared by all that begin with the same tokens

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ConfigError(f"{entry.name} must be at least 1, got {value}")
        if self.max_decode_slowdown is not None and not 1 < self.max_decode_slowdown < math.inf:
            raise ConfigError(f"max_decode_slowdown must be above 1 and finite, got {self.max_decode_slowdown}")
        if self.num_micro_batches > MAX_MICRO_BATCHES:
            raise ConfigError(f"num_micro_batches must be 1 to {MAX_MICRO_BATCHES}, got {self.num_micro_batches}")
        if self.max_num_seqs > self.max_num_batched_tokens:
            # Every running sequence must be able to decode in every step, or the oldest could starve.
            raise ConfigError(
                f"max_num_seqs must not exceed max_num_batched_tokens, got {self.max_num_seqs} sequences "
                f"and {self.max_num_batched_tokens} tokens"
            )

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)


def check_request(request: GenerationRequest, limits: EngineLimits, vocab_size: int) -> None:
    """Raises InvalidRequestError, with the numbers, when the request could never be generated here."""
    prompt, output = request.prompt_token_ids, request.output_token_ids
    if not prompt:
        raise InvalidRequestError("the prompt must have at least 1 token, got 0")
    if request.max_tokens < 1:
        raise InvalidRequestError(f"max_tokens must be at least 1, got {request.max_tokens}")
    if len(output) >= request.max_tokens:
        raise InvalidRequestError(
            f"a replayed request must have tokens left: max_tokens is {request.max_tokens}, {len(output)} are generated"
        )
    for name, token_ids in (("prompt", prompt), ("output", output)):
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
            raise InvalidRequestError(f"{name} token ids must be 0 to {vocab_size - 1}, got {wrong}")
    if len(prompt) >= limits.max_model_len:
        raise InvalidRequestError(
            f"the prompt has {len(prompt)} tokens, the context holds {limits.max_model_len} "
            "with at least 1 generated token"
        )
    total = len(prompt) + request.max_tokens
    if total > limits.max_model_len:
        raise InvalidRequestError(
            f"the prompt has {len(prompt)} tokens and max_tokens is {request.max_tokens}, together {total}; "
            f"the context holds {limits.max_model_len}"
        )
    if limits.blocks_for(total) > limits.num_blocks:
        raise InvalidRequestError(
            f"the prompt has {len(prompt)} tokens and max_tokens is {request.max_tokens}, which needs "
            f"{limits.blocks_for(total)} cache blocks of {limits.block_size} tokens; there are {limits.num_blocks}"
        )
