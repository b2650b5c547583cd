"""What quantizing the routed experts costs: logits and perplexity of a cut checkpoint against those of its source.

Usage: python -m tests.quantization_quality [DIRECTORY]      the package's checkpoint by default

The text is questions of the exam, asked by the checkpoint's own chat template, with the answers that are expected.
The reference is computed in float32, and so is what is compared with it, so that nothing but the quantization differs;
then both again as a cell in bfloat16 computes them, with all that this CPU's layouts round.
"""

import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from deploy.models import default_model_directory
from deploy.text import ChatMessage, ChatTokenizer
from model_shards.config import load_model_config
from model_shards.cut import cut_checkpoint
from model_shards.kv_cache import LatentKVCache
from model_shards.quantization import Quantization
from model_shards.weights import load_attention_model, load_expert_shard
from tests.demo_judge import read_exam
from tests.reference import CPU, ShardExperts, run_steps, single_sequence_batch

_BLOCK = 16


@dataclass(frozen=True)
class Passage:
    """One question and its answer; only the answer's tokens are judged."""

    token_ids: list[int]
    num_prompt: int


@dataclass(frozen=True)
class Quality:
    """Of a checkpoint against a reference."""

    logit_error: float  # root mean square of the difference, over the spread of the reference's logits at a position
    largest_error: float  # the same of the worst position
    same_choice: float  # how often both prefer the same token, 0 to 1
    perplexity: float  # of the answers
    reference_perplexity: float


def passages(directory: Path, count: int) -> list[Passage]:
    """Questions spread over the exam's kinds."""
    tokenizer = ChatTokenizer.load(directory)
    questions = read_exam().taught
    chosen = questions[:: max(1, len(questions) // count)][:count]
    prompts = [tokenizer.render_chat([ChatMessage("user", question.question)]) for question in chosen]
    answers = [tokenizer.encode(question.expected) for question in chosen]
    return [Passage([*prompt, *answer], len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]


def answer_logits(
    directory: Path,
    texts: list[Passage],
    kv_quantization: Quantization | None = None,
    dtype: torch.dtype = torch.float32,
    attention_in_int8: bool = False,
) -> list[torch.Tensor]:
    """Logits [A, V] at the A positions that predict the answer's tokens, of each passage; computed as in a cell."""
    config = load_model_config(directory)
    model = load_attention_model(directory, config, dtype, CPU)
    experts = tuple(range(config.n_routed_experts or 0))
    shard = load_expert_shard(directory, config, experts, dtype, CPU)
    model.lay_out(attention_in_int8)
    shard.lay_out()
    routed = ShardExperts(shard)
    logits = []
    for text in texts:
        blocks = -(-len(text.token_ids) // _BLOCK)
        kv_cache = LatentKVCache(config, blocks, _BLOCK, dtype, CPU, kv_quantization)
        whole = run_steps(model, single_sequence_batch(text.token_ids, _BLOCK), kv_cache, routed)
        logits.append(whole[text.num_prompt - 1 : -1])
    return logits


def perplexity(logits: list[torch.Tensor], texts: list[Passage]) -> float:
    """exp of the mean negative log likelihood of the answers' tokens."""
    targets = torch.cat([torch.tensor(text.token_ids[text.num_prompt :]) for text in texts])
    return math.exp(float(torch.nn.functional.cross_entropy(torch.cat(logits), targets)))


def quality(reference: list[torch.Tensor], quantized: list[torch.Tensor], texts: list[Passage]) -> Quality:
    """Compares the logits of the same passages."""
    expected, actual = torch.cat(reference).double(), torch.cat(quantized).double()
    spread = expected.std(dim=1)
    error = (actual - expected).square().mean(dim=1).sqrt() / spread
    return Quality(
        logit_error=float(error.square().mean().sqrt()),
        largest_error=float(error.max()),
        same_choice=float((actual.argmax(1) == expected.argmax(1)).double().mean()),
        perplexity=perplexity(quantized, texts),
        reference_perplexity=perplexity(reference, texts),
    )


def main(directory: Path) -> None:
    """Prints a row of docs/checkpoints.md for each way to quantize."""
    texts = passages(directory, 200)
    reference = answer_logits(directory, texts)
    print(f"{len(texts)} answers, {sum(len(logits) for logits in reference)} tokens")
    narrow = answer_logits(directory, texts, dtype=torch.bfloat16)
    print(_row("none, in bfloat16", quality(reference, narrow, texts)))
    narrow = answer_logits(directory, texts, dtype=torch.bfloat16, attention_in_int8=True)
    print(_row("attention int8, in bfloat16", quality(reference, narrow, texts)))
    for quantization in Quantization:
        with tempfile.TemporaryDirectory() as out:
            cut_checkpoint(directory, Path(out), quantization)
            print(_row(quantization.value, quality(reference, answer_logits(Path(out), texts), texts)))
            narrow = answer_logits(Path(out), texts, dtype=torch.bfloat16)
            print(_row(f"{quantization.value}, in bfloat16", quality(reference, narrow, texts)))
            narrow = answer_logits(Path(out), texts, dtype=torch.bfloat16, attention_in_int8=True)
            print(_row(f"{quantization.value} and attention int8, in bfloat16", quality(reference, narrow, texts)))


def _row(name: str, measured: Quality) -> str:
    return (
        f"| {name} | {measured.logit_error:.2%} | {measured.largest_error:.2%} "
        f"| {measured.same_choice:.2%} | {measured.reference_perplexity:.4f} | {measured.perplexity:.4f} |"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default_model_directory())
