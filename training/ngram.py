"""What counting alone knows: unigram and trigram models over the same tokens, the bar for a trained one."""

from collections import Counter

import numpy as np

_DISCOUNT = 0.75


def unigram_loss(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Mean negative log probability of `held_out` in nats a token, with one added to every count."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[held_out[2:]].mean())


def trigram_loss(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """The same of an interpolated trigram model with absolute discounting (Ney, Essen and Kneser, 1994).

    p(w | u v) = max(c(u v w) - d, 0) / c(u v) + d * n(u v) / c(u v) * p(w | v), n: kinds of tokens seen after; and so
    on down to the unigram, which is interpolated with the uniform distribution.
    """
    first, second, third = (train[start : len(train) - 2 + start].tolist() for start in range(3))
    trigrams: Counter[tuple[int, ...]] = Counter(zip(first, second, third, strict=True))
    bigrams: Counter[tuple[int, ...]] = Counter(zip(second, third, strict=True))
    unigrams = Counter(third)
    after_pair, kinds_after_pair = _contexts(trigrams)
    after_one, kinds_after_one = _contexts(bigrams)
    total, kinds = len(third), len(unigrams)
    loss = 0.0
    tokens = held_out.tolist()
    for u, v, w in zip(tokens, tokens[1:], tokens[2:], strict=False):
        p = max(unigrams[w] - _DISCOUNT, 0) / total + _DISCOUNT * kinds / total / vocab_size
        if after_one[(v,)]:
            p = (max(bigrams[v, w] - _DISCOUNT, 0) + _DISCOUNT * kinds_after_one[(v,)] * p) / after_one[(v,)]
        if after_pair[u, v]:
            p = (max(trigrams[u, v, w] - _DISCOUNT, 0) + _DISCOUNT * kinds_after_pair[u, v] * p) / after_pair[u, v]
        loss -= float(np.log(p))
    return loss / (len(tokens) - 2)


def _contexts(ngrams: "Counter[tuple[int, ...]]") -> "tuple[Counter[tuple[int, ...]], Counter[tuple[int, ...]]]":
    """How many tokens follow each context, and how many kinds of them."""
    tokens: Counter[tuple[int, ...]] = Counter()
    kinds: Counter[tuple[int, ...]] = Counter()
    for ngram, count in ngrams.items():
        tokens[ngram[:-1]] += count
        kinds[ngram[:-1]] += 1
    return tokens, kinds
