"""The work that Shoal and its peers are compared on, and the line that each prints of it."""

import json
import random
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Workload:
    """`num_sequences` prompts of `prompt_tokens` random tokens, all at once, `output_tokens` from each, greedy."""

    num_sequences: int
    prompt_tokens: int
    output_tokens: int

    def prompts(self, vocab_size: int) -> list[tuple[int, ...]]:
        """The same for everyone: seed 0."""
        draw = random.Random(0)
        return [
            tuple(draw.randrange(3, vocab_size - 1) for _ in range(self.prompt_tokens))
            for _ in range(self.num_sequences)
        ]

    @staticmethod
    def parse(text: str) -> "Workload":
        """From `32,128,64`. Raises ValueError."""
        return Workload(*(int(part) for part in text.split(",")))


WORKLOADS = (Workload(1, 32, 64), Workload(8, 128, 64), Workload(32, 128, 64), Workload(1, 1024, 1))


@dataclass(frozen=True)
class Timing:
    """One run of a workload."""

    seconds: float
    prefill_seconds: float  # until every sequence had its first token

    def line(self, system: str, workload: Workload) -> str:
        """One line of JSON."""
        total = workload.num_sequences * workload.output_tokens
        row: dict[str, object] = {
            "system": system,
            **asdict(workload),
            "seconds": round(self.seconds, 3),
            "output_tok_s": round(total / self.seconds, 2),
            "prefill_tok_s": round(workload.num_sequences * workload.prompt_tokens / self.prefill_seconds, 2),
        }
        decoded = total - workload.num_sequences
        if decoded:
            row["decode_tok_s"] = round(decoded / (self.seconds - self.prefill_seconds), 2)
        return json.dumps(row)
