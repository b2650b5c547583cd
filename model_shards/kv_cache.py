"""The paged latent cache: what attention keeps of a token, for all layers.

row of one token and layer   [ kv_a_layernorm(kv_c) : kv_lora_rank | rope(k_pe) : qk_rope_head_dim ]
slot of a token              block * block_size + offset within the block
"""

import torch

from model_shards.config import ModelConfig
from model_shards.scratch import Scratch


class LatentKVCache:
    """One tensor [num_hidden_layers, num_blocks, block_size, latent_dim]; the owner decides who holds which block."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (config.num_hidden_layers, num_blocks, block_size, config.latent_dim)
        # Zeros and not empty memory: a NaN in a slot that nobody wrote must not reach anyone.
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self._gathered, self._wide = Scratch(dtype, device), Scratch(torch.float32, device)

    @property
    def scratch_bytes(self) -> int:
        """Bytes beside `data`: room for the largest read yet, whose size the caller bounds."""
        return self._gathered.nbytes + self._wide.nbytes

    def layer(self, index: int) -> torch.Tensor:
        """View of one layer, [num_blocks, block_size, latent_dim]."""
        return self.data[index]

    def write(self, layer: int, slot_mapping: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor) -> None:
        """Stores normalised kv_c [T, kv_lora_rank] and rotated k_pe [T, qk_rope_head_dim] at slots [T] int64."""
        rows = torch.cat((kv_c, k_pe), dim=-1).to(self.data.dtype)
        self.data[layer].flatten(0, 1).index_copy_(0, slot_mapping, rows)

    def gather(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """Copies the rows of `slots` [...] int64; [..., latent_dim]."""
        rows = self.data[layer].flatten(0, 1).index_select(0, slots.flatten())
        return rows.view(*slots.shape, rows.shape[-1])

    def read(self, layer: int, slots: torch.Tensor, run: int | None = None) -> torch.Tensor:
        """The rows of `slots` [...] in float32, [..., latent_dim]: to be read only, and valid until the next `read`.

        `run` is the first slot when the slots lie together: then nothing is gathered, and a cache of float32 is read
        where it lies.
        """
        rows = self.data[layer].flatten(0, 1)
        count, width = slots.numel(), rows.shape[1]
        if run is None:
            stored = torch.index_select(rows, 0, slots.flatten(), out=self._gathered.take(count, width))
        else:
            stored = rows[run : run + count]
        if stored.dtype != torch.float32:
            stored = self._wide.take(count, width).copy_(stored)
        return stored.view(*slots.shape, width)


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return config.num_hidden_layers * block_size * config.latent_dim * dtype.itemsize
