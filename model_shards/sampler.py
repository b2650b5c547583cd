"""From logits to tokens.

Shapes: R rows, V vocabulary, F rows that are drawn and not greedy, W candidates sorted for top_k and top_p.

Order per row: penalties, temperature, top_k, top_p (over what top_k left), then one draw by inverse CDF in the order of
the vocabulary. The draw is a pure function of (seed, position), so a row's token never depends on the other rows.
Log probabilities are those of the model itself: log-softmax of the raw logits, before penalties and temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model_shards.sampling import SamplingParams

_MASK64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
# Enough candidates for top_p in nearly every row; a flatter row has the whole vocabulary sorted instead.
_TOP_P_CANDIDATES = 1024
# Below this temperature float32 would divide by zero; the draw is the argmax long before.
_MIN_TEMPERATURE = 1e-30
# What a row gives whose logits hold a NaN or an infinity: any token would be an invention.
NO_TOKEN = -1


class TokenStatistics:
    """What the penalties need to know of one sequence, kept up to date token by token.

    Two tensors of V on the logits' device; built only for requests that have a penalty.
    """

    def __init__(self, vocab_size: int, prompt: Sequence[int], output: Sequence[int], device: torch.device) -> None:
        prompt_ids = torch.tensor(prompt, dtype=torch.int64, device=device)
        output_ids = torch.tensor(output, dtype=torch.int64, device=device)
        self._output_counts = torch.bincount(output_ids, minlength=vocab_size).float()  # [V]
        self._seen = self._output_counts > 0  # [V] in prompt or output
        self._seen[prompt_ids] = True

    def record(self, token_id: int) -> None:
        """Counts one generated token; call it once, when the token is committed."""
        self._seen[token_id] = True
        self._output_counts[token_id] += 1

    def penalise(self, logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
        """[V] -> [V]: repetition (CTRL, arXiv:1909.05858, section 4.1), then presence and frequency (OpenAI API)."""
        penalty = params.repetition_penalty
        if penalty != 1.0:
            repeated = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self._seen, repeated, logits)
        if params.presence_penalty != 0.0:
            logits = logits - params.presence_penalty * (self._output_counts > 0)
        if params.frequency_penalty != 0.0:
            logits = logits - params.frequency_penalty * self._output_counts
        return logits


@dataclass(frozen=True)
class SamplingRow:
    """How one row of logits is sampled."""

    params: SamplingParams
    seed: int
    position: int  # of the token to be drawn, in its sequence
    statistics: TokenStatistics | None  # set when `has_penalty(params)`


@dataclass(frozen=True)
class SampledToken:
    """What one row gave."""

    token_id: int  # NO_TOKEN when the row's logits are not finite
    logprob: float | None = None  # None: not asked for
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


def has_penalty(params: SamplingParams) -> bool:
    """Whether the request needs TokenStatistics."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[SampledToken, ...]:
    """Draws one token per row of logits [R, V] float32. Forces one sync: the tokens are needed on the host."""
    assert logits.shape[0] == len(rows), f"{logits.shape[0]} rows of logits for {len(rows)} sampling rows"
    if not rows:
        return ()
    adjusted = _penalised(logits, rows)
    best = adjusted.max(dim=-1)
    token_ids = best.indices
    drawn = [index for index, row in enumerate(rows) if not _is_greedy(row.params)]
    if len(drawn) == len(rows):
        token_ids = _draw(adjusted, rows)
    elif drawn:
        token_ids[drawn] = _draw(adjusted[drawn], [rows[index] for index in drawn])
    token_ids = token_ids.masked_fill(~best.values.isfinite(), NO_TOKEN)
    return _with_logprobs(logits, rows, token_ids)


def uniform(seed: int, position: int) -> float:
    """Output `position` of the SplitMix64 generator (Steele et al., OOPSLA 2014) of `seed`, scaled to [0, 1).

    52 bits: times any positive float64 the product is strictly less than that float, as inverse CDF needs it.
    """
    start = _finalise((seed + _GOLDEN_GAMMA) & _MASK64)
    return float(_finalise((start + (position + 1) * _GOLDEN_GAMMA) & _MASK64) >> 12) * 2.0**-52


def _finalise(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature == 0.0 or params.top_k == 1


def _penalised(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """[R, V]: the input itself when no row has a penalty."""
    if all(row.statistics is None for row in rows):
        return logits
    adjusted = logits.clone()
    for index, row in enumerate(rows):
        if row.statistics is not None:
            adjusted[index] = row.statistics.penalise(logits[index], row.params)
    return adjusted


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """[F, V] -> [F] int64."""
    device = logits.device
    temperatures = torch.tensor(
        [max(row.params.temperature, _MIN_TEMPERATURE) for row in rows], dtype=torch.float32, device=device
    )
    # The best logit at 0 before dividing: a tiny temperature then cannot overflow it.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures[:, None]  # [F, V]
    filtered = [index for index, row in enumerate(rows) if row.params.top_k > 0 or row.params.top_p < 1.0]
    if filtered:
        kept = _keep_best(scaled[filtered], [rows[index].params for index in filtered])
        scaled[filtered] = kept
    cdf = scaled.exp().cumsum(dim=-1, dtype=torch.float64)  # [F, V], not normalised
    draws = torch.tensor([uniform(row.seed, row.position) for row in rows], dtype=torch.float64, device=device)
    # right=True: the first token whose CDF lies above the target, which has a probability above 0.
    token_ids = torch.searchsorted(cdf, draws[:, None] * cdf[:, -1:], right=True)[:, 0]
    # Only logits that are not finite get past the end, and `sample` takes no token from those.
    return token_ids.clamp_max(logits.shape[-1] - 1)


def _keep_best(scaled: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """[F, V] -> [F, V] with -inf outside top_k and top_p; tokens that tie with the last one kept stay too.

    Tokens are kept by their value against a threshold, so the outcome does not depend on how many were sorted.
    """
    vocab_size = scaled.shape[-1]
    top_ks = [min(entry.top_k, vocab_size) if entry.top_k > 0 else vocab_size for entry in params]
    limited = [top_k for top_k in top_ks if top_k < vocab_size]
    width = min(vocab_size, max([_TOP_P_CANDIDATES, *limited]))
    thresholds, enough = _thresholds(scaled, top_ks, [entry.top_p for entry in params], width)
    if not enough:
        thresholds, _ = _thresholds(scaled, top_ks, [entry.top_p for entry in params], vocab_size)
    return scaled.masked_fill(scaled < thresholds[:, None], float("-inf"))


def _thresholds(
    scaled: torch.Tensor, top_ks: Sequence[int], top_ps: Sequence[float], width: int
) -> tuple[torch.Tensor, bool]:
    """[F] least value kept per row from the `width` best; and whether these were enough for every row."""
    device = scaled.device
    vocab_size = scaled.shape[-1]
    top_k = torch.tensor(top_ks, dtype=torch.int64, device=device)[:, None]  # [F, 1]
    top_p = torch.tensor(top_ps, dtype=torch.float64, device=device)[:, None]  # [F, 1]
    best = scaled.topk(width, dim=-1).values  # [F, W] descending
    mass = best.exp().cumsum(dim=-1, dtype=torch.float64)  # [F, W]
    everything = scaled.exp().sum(dim=-1, keepdim=True, dtype=torch.float64)  # [F, 1]
    total = torch.where(top_k < vocab_size, mass.gather(1, top_k.clamp_max(width) - 1), everything)
    # The first prefix that holds top_p of the total: as many tokens are less as its last index says.
    last = torch.minimum((mass < top_p * total).sum(dim=-1, keepdim=True), top_k - 1)  # [F, 1]
    last = torch.where(top_p < 1.0, last, top_k - 1)
    unfiltered = (top_p >= 1.0) & (top_k >= vocab_size)
    enough = bool(((last < width) | unfiltered).all())  # a sync: whether to sort more is the host's to decide
    thresholds = best.gather(1, last.clamp_max(width - 1))
    return thresholds.masked_fill(unfiltered, float("-inf"))[:, 0], enough


def _with_logprobs(
    logits: torch.Tensor, rows: Sequence[SamplingRow], token_ids: torch.Tensor
) -> tuple[SampledToken, ...]:
    chosen: list[int] = token_ids.tolist()
    return tuple(
        SampledToken(token_id)
        if row.params.logprobs is None or token_id == NO_TOKEN
        else _describe(logits[index], token_id, row.params.logprobs)
        for index, (row, token_id) in enumerate(zip(rows, chosen, strict=True))
    )


def _describe(logits: torch.Tensor, token_id: int, count: int) -> SampledToken:
    """The token with its log probability and the `count` best ones, from one row of raw logits [V]."""
    logprobs = logits.log_softmax(dim=-1)
    best = logprobs.topk(min(count, logprobs.shape[0]))
    ids: list[int] = best.indices.tolist()
    values: list[float] = best.values.tolist()
    return SampledToken(token_id, float(logprobs[token_id]), tuple(zip(ids, values, strict=True)))
