"""What quantizing costs in logits, on the package's checkpoint, whatever that is today.

The bounds are about three times what was measured (docs/checkpoints.md), for the random checkpoint and a trained one.
"""

import pytest
import torch

from deploy.models import default_model_directory
from model_shards.cut import cut_checkpoint
from model_shards.quantization import Quantization
from tests.quantization_quality import answer_logits, passages, quality

DIRECTORY = default_model_directory()
TEXTS = passages(DIRECTORY, 8)
LOGIT_ERROR = {Quantization.INT8: 0.06, Quantization.FP8: 0.18}
CACHE_LOGIT_ERROR = {Quantization.INT8: 0.06, Quantization.FP8: 0.18}
ATTENTION_LOGIT_ERROR = 0.18  # in bfloat16, activations and logits in 8 bits, too
PERPLEXITY_CHANGE = {Quantization.INT8: 0.02, Quantization.FP8: 0.05}


@pytest.fixture(scope="module")
def reference() -> list[torch.Tensor]:
    return answer_logits(DIRECTORY, TEXTS)


def test_an_unquantized_cut_gives_the_same_logits_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, reference: list[torch.Tensor]
) -> None:
    out = tmp_path_factory.mktemp("cut")
    cut_checkpoint(DIRECTORY, out)
    assert all(map(torch.equal, answer_logits(out, TEXTS), reference))


@pytest.mark.parametrize("quantization", list(Quantization))
def test_quantized_logits_and_perplexity_stay_near_those_of_the_source(
    tmp_path_factory: pytest.TempPathFactory, reference: list[torch.Tensor], quantization: Quantization
) -> None:
    out = tmp_path_factory.mktemp("cut")
    cut_checkpoint(DIRECTORY, out, quantization)
    measured = quality(reference, answer_logits(out, TEXTS), TEXTS)
    assert 0 < measured.logit_error < LOGIT_ERROR[quantization]
    assert abs(measured.perplexity / measured.reference_perplexity - 1) < PERPLEXITY_CHANGE[quantization]


@pytest.mark.parametrize("quantization", list(Quantization))
def test_a_quantized_cache_stays_near_a_plain_one(reference: list[torch.Tensor], quantization: Quantization) -> None:
    measured = quality(reference, answer_logits(DIRECTORY, TEXTS, quantization), TEXTS)
    assert 0 < measured.logit_error < CACHE_LOGIT_ERROR[quantization]
    assert abs(measured.perplexity / measured.reference_perplexity - 1) < PERPLEXITY_CHANGE[quantization]


def test_attention_in_8_bits_stays_near_the_source(reference: list[torch.Tensor]) -> None:
    measured = quality(reference, answer_logits(DIRECTORY, TEXTS, dtype=torch.bfloat16, attention_in_int8=True), TEXTS)
    assert 0 < measured.logit_error < ATTENTION_LOGIT_ERROR
    assert abs(measured.perplexity / measured.reference_perplexity - 1) < PERPLEXITY_CHANGE[Quantization.INT8]
