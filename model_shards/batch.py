"""What the attention side computes in one micro-batch: tokens of many sequences, laid end to end.

Shapes: T tokens, S sequences, B blocks in the longest block table, R rows of logits wanted.

    cu_seqlens_q   0 ........ 1 . 2 . 5 ........ T      (S + 1)
    token_ids      [ seq 0 | seq 1 | seq 2 ...   ]      decodes (one token each) come first
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionBatch:
    """One micro-batch of a replica. T may be 0: the rank still takes part in every exchange."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, position of each token in its sequence
    slot_mapping: torch.Tensor  # [T] int64, block * block_size + offset: where the latent is written
    cu_seqlens_q: tuple[int, ...]  # (S + 1) start of each sequence's tokens, last is T
    context_lens: tuple[int, ...]  # (S) tokens of the sequence in the cache after this step
    block_tables: torch.Tensor  # [S, B] int64, padded with 0
    num_decodes: int  # the first num_decodes sequences have one token each and use absorbed attention
    logits_indices: torch.Tensor  # [R] int64, tokens of this micro-batch whose logits are wanted

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.token_ids.shape[0])
