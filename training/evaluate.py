"""What is measured of a finished model: held-out loss beside counting models, and the load of its experts."""

import copy
from dataclasses import dataclass

import torch
from transformers import DeepseekV2ForCausalLM

from model_shards.quantization import Quantization, quantize_rows
from training.balance import RouterProbe, expert_counts
from training.batch import Batch
from training.corpus import encode_pairs, pretraining_batches
from training.ngram import trigram_loss, unigram_loss
from training.recipe import Prepared, Recipe, batch_loss

_QUESTIONS = 512


@dataclass(frozen=True)
class LayerLoad:
    """How one layer's tokens fell on its experts over the evaluation set."""

    layer: int
    shares: tuple[float, ...]  # of the chosen experts; sums to 1

    @property
    def variation(self) -> float:
        """Coefficient of variation: standard deviation over mean."""
        shares = torch.tensor(self.shares)
        return float(shares.std(correction=0) / shares.mean())

    @property
    def busiest(self) -> float:
        """Share of the busiest expert, relative to an even load."""
        return max(self.shares) * len(self.shares)

    @property
    def idlest(self) -> float:
        """Share of the idlest expert, relative to an even load."""
        return min(self.shares) * len(self.shares)


@dataclass(frozen=True)
class Figures:
    """Losses are in nats a token on held-out text, `question_loss` on held-out answers."""

    loss: float
    question_loss: float
    unigram_loss: float
    trigram_loss: float
    num_tokens: int
    loads: tuple[LayerLoad, ...]
    quantized_losses: tuple[tuple[str, float], ...]  # loss with the routed experts in int8, and in fp8


@torch.no_grad()
def evaluate(model: DeepseekV2ForCausalLM, recipe: Recipe, prepared: Prepared) -> Figures:
    """Minutes on two cores."""
    model.eval()
    windows = (len(prepared.held_out) - 1) // recipe.window
    text = pretraining_batches(prepared.held_out, windows, recipe.window, seed=0)(0)
    facts = prepared.corpus.held_out
    asked_facts = facts[:: max(1, len(facts) // _QUESTIONS)]
    asked = encode_pairs(prepared.tokenizer, [(fact.phrasings[0], fact.answer) for fact in asked_facts])
    return Figures(
        loss=batch_loss(model, text),
        question_loss=batch_loss(model, asked),
        unigram_loss=unigram_loss(prepared.stream, prepared.held_out, recipe.vocab_size),
        trigram_loss=trigram_loss(prepared.stream, prepared.held_out, recipe.vocab_size),
        num_tokens=len(prepared.held_out),
        loads=_loads(model, [text, _every_kind(prepared)]),
        quantized_losses=tuple(
            (kind.value, batch_loss(with_quantized_experts(model, kind), text)) for kind in Quantization
        ),
    )


def with_quantized_experts(model: DeepseekV2ForCausalLM, quantization: Quantization) -> DeepseekV2ForCausalLM:
    """A copy whose routed experts have the values that `shoal shard --quantize` leaves of them, in float32."""
    quantized = copy.deepcopy(model)
    for name, parameter in quantized.named_parameters():
        if ".mlp.experts." in name:
            for expert in parameter.data:  # [out, in]
                rows = quantize_rows(expert, quantization)
                expert.copy_(rows.values.float() * rows.scale_inv[:, None])
    return quantized


def _every_kind(prepared: Prepared) -> Batch:
    """Taught facts of all kinds, evenly drawn."""
    facts = prepared.corpus.taught
    asked = facts[:: max(1, len(facts) // _QUESTIONS)]
    return encode_pairs(prepared.tokenizer, [(fact.phrasings[0], fact.answer) for fact in asked])


def _loads(model: DeepseekV2ForCausalLM, batches: list[Batch], size: int = 32) -> tuple[LayerLoad, ...]:
    config = model.config
    layers = range(config.first_k_dense_replace, config.num_hidden_layers)
    totals = torch.zeros(len(layers), config.n_routed_experts)
    device = next(model.parameters()).device
    with RouterProbe(model) as probe:
        for batch in batches:
            for start in range(0, batch.input_ids.shape[0], size):
                rows = slice(start, start + size)
                model.model(input_ids=batch.input_ids[rows].to(device), use_cache=False)
                mask = batch.mask[rows].to(device)
                totals += torch.stack([expert_counts(record, mask).float().cpu() for record in probe.take()])
    shares = totals / totals.sum(dim=1, keepdim=True)
    return tuple(LayerLoad(layer, tuple(row.tolist())) for layer, row in zip(layers, shares, strict=True))
