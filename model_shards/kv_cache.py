"""The paged latent cache: what attention keeps of a token, for all layers.

row of one token and layer   kv_a_layernorm(kv_c) and rope(k_pe), as `model_shards.latent_codec` stores them
slot of a token              block * block_size + offset within the block
"""

import torch

from model_shards.config import ModelConfig
from model_shards.latent_codec import choose_codec
from model_shards.latent_row import row_bytes
from model_shards.quantization import Quantization
from model_shards.scratch import Scratch, Workspace


class LatentKVCache:
    """One tensor [num_hidden_layers, num_blocks, block_size, W]; the owner decides who holds which block.

    W is latent_dim in `dtype`, the model's, or a row of bytes when kv_c is quantized.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype, self.quantization = dtype, quantization
        self.rank, self.rope = config.kv_lora_rank, config.qk_rope_head_dim
        self._codec = choose_codec(config, dtype, quantization)
        self._latent_dim = config.latent_dim
        shape = (config.num_hidden_layers, num_blocks, block_size, self._codec.width)
        # Zeros and not empty memory: a NaN in a slot that nobody wrote must not reach anyone.
        self.data = torch.zeros(shape, dtype=self._codec.stored, device=device)
        self._gathered = Scratch(self._codec.stored, device)
        self.workspace = Workspace(device)

    @property
    def scratch_bytes(self) -> int:
        """Bytes beside `data`: room for the largest read yet and what was computed of it; the caller bounds both."""
        return self._gathered.nbytes + self.workspace.nbytes

    def layer(self, index: int) -> torch.Tensor:
        """View of one layer, [num_blocks, block_size, W]."""
        return self.data[index]

    def write(self, layer: int, slot_mapping: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor) -> None:
        """Stores normalised kv_c [T, kv_lora_rank] and rotated k_pe [T, qk_rope_head_dim] at slots [T] int64."""
        self.data[layer].flatten(0, 1).index_copy_(0, slot_mapping, self._codec.encode(kv_c, k_pe))

    def gather(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """Copies the rows of `slots` [...] int64; [..., latent_dim] in the model's dtype."""
        rows = self.data[layer].flatten(0, 1).index_select(0, slots.flatten())
        return self._codec.decode(rows).view(*slots.shape, self._latent_dim)

    def read(self, layer: int, slots: torch.Tensor, run: int | None = None) -> torch.Tensor:
        """The rows of `slots` [...] in float32, [..., latent_dim]: to be read only, and valid until the next `read`.

        `run` is the first slot when the slots lie together: then nothing is gathered, and plain rows of float32 are
        read where they lie.
        """
        rows = self.data[layer].flatten(0, 1)
        count = slots.numel()
        if run is None:
            scratch = self._gathered.take(count, rows.shape[1])
            stored = torch.index_select(rows, 0, slots.flatten(), out=scratch)
        else:
            stored = rows[run : run + count]
        return self._codec.widen(stored, self.workspace.latents).view(*slots.shape, self._latent_dim)


def bytes_per_block(
    config: ModelConfig, block_size: int, dtype: torch.dtype, quantization: Quantization | None = None
) -> int:
    """Bytes of one block over all layers."""
    return config.num_hidden_layers * block_size * row_bytes(config, dtype.itemsize, quantization is not None)
