"""What a quantized latent cache costs: logits at answers, and the loss on text that training never showed.

Usage: python -m tests.kv_cache_quality WORK [DIRECTORY]      WORK keeps what training/sources.py fetches

Everything is computed in float32, so that nothing but the cache differs. Every token reads its whole context, itself
included, from the cache.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

from deploy.models import default_model_directory
from model_shards.config import load_model_config
from model_shards.kv_cache import LatentKVCache, bytes_per_block
from model_shards.quantization import Quantization
from model_shards.weights import load_attention_model, load_expert_shard
from tests.quantization_quality import answer_logits, passages, quality
from tests.reference import CPU, Chunk, ShardExperts, build_batch, run_steps
from training.batch import Batch
from training.corpus import held_out_stream, pretraining_batches, read_corpus
from training.recipe import Recipe

_BLOCK = 16
_WINDOWS_AT_ONCE = 16


def held_out_text(work: Path, directory: Path) -> Batch:
    """All windows of the held-out text, as `training.evaluate` takes them. Raises SourceError."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    stream = held_out_stream(read_corpus(work), tokenizer)
    window = Recipe().window
    return pretraining_batches(stream, (len(stream) - 1) // window, window, seed=0)(0)


def nats(directory: Path, text: Batch, quantization: Quantization | None) -> float:
    """Mean loss a token."""
    config = load_model_config(directory)
    model = load_attention_model(directory, config, torch.float32, CPU)
    experts = tuple(range(config.n_routed_experts or 0))
    routed = ShardExperts(load_expert_shard(directory, config, experts, torch.float32, CPU))
    blocks = -(-text.input_ids.shape[1] // _BLOCK)
    total = 0.0
    for first in range(0, text.input_ids.shape[0], _WINDOWS_AT_ONCE):
        rows = slice(first, first + _WINDOWS_AT_ONCE)
        windows = text.input_ids[rows].tolist()
        chunks = [Chunk(tokens, 0, range(i * blocks, (i + 1) * blocks)) for i, tokens in enumerate(windows)]
        cache = LatentKVCache(config, blocks * len(windows), _BLOCK, torch.float32, CPU, quantization)
        logits = run_steps(model, build_batch(chunks, _BLOCK), cache, routed)
        total += float(torch.nn.functional.cross_entropy(logits, text.labels[rows].flatten(), reduction="sum"))
    return total / text.labels.numel()


def main(work: Path, directory: Path) -> None:
    """Prints a row of docs/latent_cache.md for each way to store latents."""
    texts, text = passages(directory, 200), held_out_text(work, directory)
    config = load_model_config(directory)
    reference = answer_logits(directory, texts)
    print(f"{sum(len(logits) for logits in reference)} tokens of answers, {text.labels.numel()} of text")
    for kind in (None, *Quantization):
        measured = quality(reference, answer_logits(directory, texts, kind), texts)
        size = bytes_per_block(config, 1, torch.float32, kind)
        print(
            f"| {kind or 'auto'} | {size} | {measured.logit_error:.2%} | {measured.largest_error:.2%} "
            f"| {measured.same_choice:.2%} | {measured.perplexity:.4f} | {nats(directory, text, kind):.4f} |"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else default_model_directory())
