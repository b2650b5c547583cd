"""The paged latent cache: slots, layers and its size."""

import pytest
import torch

from model_shards.kv_cache import LatentKVCache, bytes_per_block
from model_shards.quantization import Quantization
from tests.reference import CPU, make_hf_config, model_config_of

CONFIG = model_config_of(make_hf_config())  # kv_lora_rank 32, qk_rope_head_dim 8


def test_a_token_is_written_to_block_times_size_plus_offset_in_its_layer_alone() -> None:
    cache = LatentKVCache(CONFIG, 5, 4, torch.float32, CPU)
    kv_c, k_pe = torch.full((2, 32), 1.0), torch.full((2, 8), 2.0)
    cache.write(1, torch.tensor([3 * 4 + 2, 0]), kv_c, k_pe)
    assert cache.layer(1).shape == (5, 4, 40)
    for block, offset in ((3, 2), (0, 0)):
        assert torch.equal(cache.layer(1)[block, offset], torch.cat((kv_c[0], k_pe[0])))
    assert int(cache.data.count_nonzero()) == 2 * 40


def test_gathered_rows_keep_the_shape_of_the_slots() -> None:
    cache = LatentKVCache(CONFIG, 2, 4, torch.float32, CPU)
    cache.layer(0).copy_(torch.arange(8.0).view(2, 4, 1).expand(2, 4, 40))
    rows = cache.gather(0, torch.tensor([[7, 0, 3], [1, 1, 6]]))
    assert rows.shape == (2, 3, 40)
    assert rows[..., 0].tolist() == [[7, 0, 3], [1, 1, 6]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_read_in_float32_gathered_or_where_they_lie(dtype: torch.dtype) -> None:
    cache = LatentKVCache(CONFIG, 3, 4, dtype, CPU)
    cache.data.normal_(generator=torch.Generator().manual_seed(1))
    together = torch.tensor([[5, 6, 7, 8]])
    for slots, run in ((torch.tensor([[7, 0, 3], [1, 1, 6]]), None), (together, None), (together, 5)):
        rows = cache.read(2, slots, run)
        assert rows.dtype == torch.float32
        assert torch.equal(rows, cache.gather(2, slots).float())
    if dtype == torch.float32:
        assert cache.read(2, together, 5).data_ptr() == cache.layer(2).flatten(0, 1)[5].data_ptr()


def test_scratch_grown_under_inference_mode_is_written_outside_of_it() -> None:
    cache = LatentKVCache(CONFIG, 3, 4, torch.bfloat16, CPU)
    with torch.inference_mode():
        cache.read(0, torch.tensor([1, 2]))
    assert cache.read(0, torch.tensor([2])).shape == (1, 40)


def test_latents_are_stored_in_the_dtype_of_the_cache() -> None:
    cache = LatentKVCache(CONFIG, 1, 4, torch.bfloat16, CPU)
    cache.write(0, torch.tensor([1]), torch.ones(1, 32), torch.ones(1, 8))
    assert cache.layer(0).dtype == torch.bfloat16
    assert bool((cache.layer(0)[0, 1] == 1).all())


def test_bytes_per_block_is_what_a_block_takes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for quantization in (None, *Quantization):
            cache = LatentKVCache(CONFIG, 7, 4, dtype, CPU, quantization)
            assert bytes_per_block(CONFIG, 4, dtype, quantization) * 7 == cache.data.nbytes


def test_nothing_written_writes_nothing() -> None:
    cache = LatentKVCache(CONFIG, 1, 4, torch.float32, CPU)
    cache.write(0, torch.empty(0, dtype=torch.int64), torch.empty(0, 32), torch.empty(0, 8))
    assert not cache.data.any()
