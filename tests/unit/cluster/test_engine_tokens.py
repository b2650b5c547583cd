"""The engine with its shards in the same process: tokens equal transformers', whatever the batching."""

import dataclasses

import pytest
import torch

from tests.cells import (
    LIMITS,
    assert_equal_to_transformers,
    assert_greedy_up_to_rounding,
    make_expected,
    run_in_process,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return make_expected(tmp_path_factory.mktemp("checkpoint"), seed=5)


@pytest.mark.parametrize(
    ("num_expert", "limits"),
    [
        pytest.param(1, {}, id="one-shard"),
        pytest.param(3, {"num_micro_batches": 2}, id="uneven-shards-two-micro-batches"),
        pytest.param(8, {"num_micro_batches": 3, "max_num_batched_tokens": 17, "max_num_seqs": 5}, id="small-chunks"),
        pytest.param(2, {"num_micro_batches": 3, "choose_micro_batches": True}, id="chosen-micro-batches"),
        pytest.param(2, {"max_decode_slowdown": 1.5}, id="few-prefills-beside-decodes"),
        pytest.param(2, {"num_blocks": 16, "block_size": 8, "max_model_len": 128}, id="preempting"),
    ],
)
def test_fp32_tokens_equal_transformers(expected, num_expert, limits):
    tokens = run_in_process(expected, num_expert, torch.float32, CPU, dataclasses.replace(LIMITS, **limits))
    assert_equal_to_transformers(expected, tokens)


def test_bf16_tokens_are_greedy_up_to_rounding(expected):
    tokens = run_in_process(expected, 3, torch.bfloat16, CPU)
    assert_greedy_up_to_rounding(expected, tokens)
