"""Greedy tokens over gRPC through the running service equal transformers', on every topology."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import yaml

from deploy.gateway import inference_pb2 as pb
from deploy.gateway.inference_pb2_grpc import InferenceStub
from deploy.models import default_model_directory
from tests.cells import NUM_PROMPTS, NUM_TOKENS, make_expected
from tests.serving import running_service

pytestmark = [pytest.mark.service, pytest.mark.timeout(600)]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model with every branch, with the tokenizer of the package's own checkpoint beside it."""
    directory = tmp_path_factory.mktemp("checkpoint")
    tokenizer = default_model_directory()
    for name in TOKENIZER_FILES:
        (directory / name).write_bytes((tokenizer / name).read_bytes())
    expected = make_expected(directory, seed=11, vocab_size=4096)
    return directory, expected.prompts, expected.tokens


def complete(stub, prompt):
    request = pb.CompletionRequest(
        token_ids=pb.TokenIds(ids=prompt), max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True
    )
    tokens = []
    for chunk in stub.Completion(request, timeout=120.0):
        tokens.extend(chunk.token_ids)
        last = chunk
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert last.usage.prompt_tokens == len(prompt)
    assert last.usage.completion_tokens == NUM_TOKENS
    return tokens


@pytest.mark.parametrize(
    ("num_attention", "num_expert", "engine", "micro_batches"),
    [
        pytest.param(1, 1, {}, 1, id="1-1"),
        pytest.param(1, 3, {"max_num_batched_tokens": 19, "max_num_seqs": 16}, 2, id="1-3-small-chunks"),
        pytest.param(2, 4, {}, 3, id="2-4-three-micro-batches"),
        pytest.param(3, 2, {"kv_cache_tokens": 320, "max_model_len": 256}, 1, id="3-2-preempting"),
    ],
)
def test_16_concurrent_prompts(checkpoint, tmp_path, num_attention, num_expert, engine, micro_batches):
    directory, prompts, expected = checkpoint
    config = tmp_path / "shoal.yaml"
    settings = {"engine": engine, "cell": {"micro_batches": micro_batches, "dtype": "float32"}}
    config.write_text(yaml.safe_dump(settings))
    arguments = ["--config", str(config), "--model", str(directory)]
    arguments += ["--attention-replicas", str(num_attention), "--expert-shards", str(num_expert)]
    with running_service(*arguments) as service:
        with grpc.insecure_channel(service.grpc) as channel, ThreadPoolExecutor(NUM_PROMPTS) as pool:
            tokens = list(pool.map(lambda prompt: complete(InferenceStub(channel), prompt), prompts))
        assert tokens == expected
        assert service.stop() == 0
