"""The same model, engine and cells on CUDA devices; plain processes, no Ray."""

import dataclasses

import pytest
import torch

from cluster.cell import Cell
from tests.cells import (
    LIMITS,
    NUM_TOKENS,
    assert_equal_to_transformers,
    assert_greedy_up_to_rounding,
    make_expected,
    requests_of,
    run_in_process,
    spec_of,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return make_expected(tmp_path_factory.mktemp("checkpoint"), seed=7)


@pytest.mark.parametrize("num_micro_batches", [1, 2, 3])
def test_fp32_tokens_of_one_process_equal_transformers(expected, num_micro_batches):
    limits = dataclasses.replace(LIMITS, num_micro_batches=num_micro_batches)
    tokens = run_in_process(expected, 3, torch.float32, torch.device("cuda"), limits)
    assert_equal_to_transformers(expected, tokens)


def test_bf16_tokens_of_one_process_are_greedy_up_to_rounding(expected):
    tokens = run_in_process(expected, 3, torch.bfloat16, torch.device("cuda"))
    assert_greedy_up_to_rounding(expected, tokens)


def test_fp32_tokens_with_attention_in_8_bits_are_those_of_a_cpu(expected):
    devices = (torch.device("cuda"), torch.device("cpu"))
    on_gpu, on_cpu = (run_in_process(expected, 3, torch.float32, device, attention_in_int8=True) for device in devices)
    assert on_gpu == on_cpu


def test_bf16_serves_attention_in_8_bits(expected):
    tokens = run_in_process(expected, 3, torch.bfloat16, torch.device("cuda"), attention_in_int8=True)
    assert all(len(answer) == NUM_TOKENS for answer in tokens.values())


@pytest.mark.parametrize(("topology", "limits"), [((1, 2), {}), ((2, 2), {"num_micro_batches": 2, "num_blocks": 20})])
def test_fp32_tokens_of_ranks_that_share_a_gpu_equal_transformers(expected, topology, limits):
    spec = spec_of(expected, *topology, device="cuda", limits=dataclasses.replace(LIMITS, **limits))
    with Cell(dataclasses.replace(spec, data_backend="gloo")) as cell:
        assert_equal_to_transformers(expected, cell.generate(requests_of(expected), timeout_s=120.0))


@pytest.mark.parametrize("topology", [(1, 1), (1, 3), (2, 4), (3, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_of_a_cell_over_nccl(expected, topology, dtype):
    # NCCL puts no two ranks on one GPU.
    if torch.cuda.device_count() < sum(topology):
        pytest.skip(f"{sum(topology)} ranks need as many GPUs, found {torch.cuda.device_count()}")
    with Cell(spec_of(expected, *topology, device="cuda", dtype=dtype)) as cell:
        tokens = cell.generate(requests_of(expected), timeout_s=120.0)
    if dtype == "float32":
        assert_equal_to_transformers(expected, tokens)
    else:
        assert_greedy_up_to_rounding(expected, tokens)
