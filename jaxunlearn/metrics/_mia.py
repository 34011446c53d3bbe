# SPDX-License-Identifier: Apache-2.0
"""Membership inference: scores that are high for texts the model was not trained on.

Each attack gives one score an example; `auc(members, others)` then says how well it
tells the forgotten rows from rows that were never seen: 1 where it always does, 0.5
where it guesses, below where the forgotten rows look stranger than new ones.
"""

import math
import re
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import _checks, trees
from jaxunlearn.metrics import _common, _probability
from jaxunlearn.typing import Array, PyTree


def mia_loss(
    logps: Array, *, where: Array | None = None, lengths: Array | None = None
) -> Array:
    """LOSS: the mean negative log-probability of a token, `mean_nll` by another name.

    Args, Returns, Raises: as `mean_nll`.
    References: Yeom et al. 2018, https://arxiv.org/abs/1709.01604
    """
    return _probability.mean_nll(logps, where=where, lengths=lengths)


def mia_reference(nll: Array, ref_nll: Array) -> Array:
    """Reference: how much stranger a text is to the model than to another one.

    Args:
        nll: [...] float, `mean_nll` under the model, nats a token.
        ref_nll: [...] float, under a model that has not seen the texts.
    Returns:
        [...] float32, nll - ref_nll, nats a token.
    Raises:
        ValueError: if the shapes differ.
    References: Carlini et al. 2021, https://arxiv.org/abs/2012.07805
    """
    _checks.same_shape("mia_reference", nll=nll, ref_nll=ref_nll)
    return _common.at_least_float32(nll) - _common.at_least_float32(ref_nll)


def mia_zlib(nll: Array, lengths: Array) -> Array:
    """ZLIB: nll / lengths, as repetitive text is likely without being known.

    Args:
        nll: [...] float, `mean_nll` of each text, nats a token.
        lengths: [...] bytes of each text when compressed, `zlib_lengths`.
    Returns:
        [...] float32, nats a token and byte.
    Raises:
        ValueError: if the shapes differ.
    References: Carlini et al. 2021, https://arxiv.org/abs/2012.07805
    """
    _checks.same_shape("mia_zlib", nll=nll, lengths=lengths)
    nll = _common.at_least_float32(nll)
    return nll / jnp.asarray(lengths).astype(nll.dtype)


def zlib_lengths(texts: Sequence[str]) -> np.ndarray:
    """[n] int64, bytes of each text in UTF-8 when zlib compresses it; on the host."""
    if isinstance(texts, str):
        raise TypeError("zlib_lengths needs a sequence of texts, got one text.")
    return np.array([len(zlib.compress(t.encode("utf-8"))) for t in texts], np.int64)


def mia_lowercase(nll: Array, lower_nll: Array) -> Array:
    """Lowercase: nll / lower_nll, what a text costs over what it costs in lower case.

    Args:
        nll: [...] float, `mean_nll` of each text, nats a token.
        lower_nll: [...] float, that of `text.lower()`.
    Returns:
        [...] float32; MUSE calls it PPL/lower.
    Raises:
        ValueError: if the shapes differ.
    References: Carlini et al. 2021, https://arxiv.org/abs/2012.07805
    """
    _checks.same_shape("mia_lowercase", nll=nll, lower_nll=lower_nll)
    return _common.at_least_float32(nll) / _common.at_least_float32(lower_nll)


def mia_min_k(
    logps: Array,
    *,
    k: float = 0.4,
    where: Array | None = None,
    least: int = 1,
    empty: float = math.nan,
) -> Array:
    """Min-K%: minus the mean of the max(least, int(k n)) lowest log-probabilities.

    Args:
        logps: [..., L] float, log-probability of each token, nats.
        k: share of the tokens, in (0, 1], a Python number: the count is worked out as
            Python does it, before tracing.
        where: [..., L] bool, True where the token counts; None counts all.
        least: how many tokens at least, 0 or 1. With 0, as in MUSE's code, a text too
            short for one token gets `empty`.
        empty: the score where no token is taken; OpenUnlearning's is 0, which looks
            like a member.
    Returns:
        [...] float32, nats a token; NaN where a token that counts is NaN.
    Raises:
        ValueError: if k is outside (0, 1], least is not 0 or 1, or the shapes differ.
            TypeError: if where is not boolean.
    References: Shi et al. 2023, https://arxiv.org/abs/2310.16789; defaults are those of
        OpenUnlearning.
    """
    _checks.positive("mia_min_k", k=k)
    if k > 1:
        raise ValueError(f"mia_min_k needs k <= 1, a share of the tokens, got k={k}.")
    if least not in (0, 1):
        raise ValueError(f"mia_min_k needs least to be 0 or 1, got least={least}.")
    _checks.mask("mia_min_k", where, logps=logps)
    logps = _common.at_least_float32(logps)
    where = _common.counted(logps, where)
    length = logps.shape[-1]
    counts = [min(n, max(least, int(k * n))) for n in range(length + 1)]
    taken = jnp.asarray(counts)[where.sum(-1)]
    ordered = jnp.sort(jnp.where(where, logps, jnp.inf), axis=-1)
    lowest = jnp.arange(length) < taken[..., None]
    total = jnp.where(lowest, ordered, 0.0).sum(-1)
    score = -total / jnp.maximum(taken, 1).astype(logps.dtype)
    score = jnp.where(taken > 0, score, jnp.asarray(empty, logps.dtype))
    broken = (where & jnp.isnan(logps)).any(-1)  # sorting would hide it at the end
    return jnp.where(broken, jnp.asarray(jnp.nan, logps.dtype), score)


def mia_min_k_plus_plus(
    logits: Array,
    targets: Array,
    *,
    k: float = 0.4,
    where: Array | None = None,
    least: int = 1,
    empty: float = math.nan,
) -> Array:
    """Min-K%++: Min-K% of log-probabilities standardised by their own distribution.

    Args:
        logits: [..., L, V] float; to score token t of a text, pass those at t - 1.
        targets: [..., L] int, in [0, V) where they count.
        k, where, least, empty: as `mia_min_k`.
    Returns:
        [...] float32, standard deviations.
    Raises:
        ValueError, TypeError: as `mia_min_k`.
    References: Zhang et al. 2024, https://arxiv.org/abs/2404.02936
    """
    scores = standardised_logps(logits, targets, where=where)
    return mia_min_k(scores, k=k, where=where, least=least, empty=empty)


def standardised_logps(
    logits: Array, targets: Array, *, where: Array | None = None, floor: float = 1e-6
) -> Array:
    """(log p(target) - mu) / sqrt(max(var, floor)), what Min-K%++ sorts.

    mu and var are mean and variance of log p over the vocabulary under p itself. Give
    it some positions at a time where [..., V] is too large to hold.

    Args:
        logits: [..., V] float.
        targets: [...] int, in [0, V) where they count.
        where: [...] bool, True where the target counts; elsewhere the value is 0.
        floor: smallest variance, nats squared, > 0.
    Returns:
        [...] float32, standard deviations; NaN where a target that counts is outside
        [0, V).
    Raises:
        ValueError: if the shapes differ or floor <= 0. TypeError: if where is not
            boolean.
    References: Zhang et al. 2024, https://arxiv.org/abs/2404.02936
    """
    name = "standardised_logps"
    _checks.positive(name, floor=floor)
    _checks.same_shape(name, logits=logits[..., 0], targets=targets)
    _checks.mask(name, where, targets=targets)
    if where is not None:
        logits = jnp.where(where[..., None], logits, jnp.zeros_like(logits))
        targets = jnp.where(where, targets, jnp.zeros_like(targets))
    logits = _common.at_least_float32(logits)
    # Distances from the largest logit: their mean and variance are those of log p but
    # for a constant, and small where p is near one token or near uniform.
    apart = logits - jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(apart)
    finite = jnp.where(weights == 0, 0.0, apart)  # 0 log 0 is 0
    first = weights * finite
    total, mean, square = _sums(weights, first, first * finite)
    mean, square = mean / total, square / total
    spread = square - jnp.square(mean)
    size = logits.shape[-1]
    inside = (targets >= 0) & (targets < size)  # a negative one would wrap
    index = jnp.where(inside, targets, jnp.full_like(targets, size))
    chosen = jnp.take_along_axis(apart, index[..., None], axis=-1, mode="fill")
    scores = (chosen[..., 0] - mean) / jnp.sqrt(jnp.maximum(spread, floor))
    return scores if where is None else jnp.where(where, scores, 0.0)


def _sums(*arrays):
    """Sums over the last axis in one pass; apart, CPUs took eight times as long."""

    def add(left, right):
        return tuple(a + b for a, b in zip(left, right, strict=True))

    zeros = tuple(jnp.zeros((), x.dtype) for x in arrays)
    return jax.lax.reduce(arrays, zeros, add, (arrays[0].ndim - 1,))


def mia_gradnorm(
    gradient: PyTree, *, p: float = 2.0, stacked: str | None = None
) -> Array:
    """GradNorm: the mean over parameter tensors of the p-norm of a gradient.

    The gradient is that of the mean negative log-probability of one example's tokens.
    For many examples map over them (`jax.lax.map` holds one gradient at a time).

    Args:
        gradient: a tree like the params; None leaves are passed over.
        p: 1 or more, or math.inf, a Python number.
        stacked: regular expression for whole paths of leaves that hold one tensor a
            layer along axis 0, each of which counts as one; None has none. The peer's
            models keep layers apart, so ours need r"blocks/.*" to agree with it.
    Returns:
        [] float32.
    Raises:
        ValueError: if p < 1, the tree has no leaf, or nothing matches stacked.
    Paper and code: the mean over tensors, and not the norm of all, is OpenUnlearning's.
    """
    _checks.positive("mia_gradnorm", p=1.0 if p == math.inf else p)
    if p < 1:
        raise ValueError(f"mia_gradnorm needs p >= 1, got p={p}.")
    leaves = {path: x for path, x in trees.paths(gradient).items() if x is not None}
    if not leaves:
        raise ValueError("mia_gradnorm needs a tree with at least one leaf, got none.")
    layered = {x for x in leaves if stacked is not None and re.fullmatch(stacked, x)}
    if stacked is not None and not layered:
        raise ValueError(
            f"mia_gradnorm needs stacked={stacked!r} to match a whole path, got "
            f"{_checks.listed(leaves)}."
        )
    norms = []
    for path, leaf in leaves.items():
        leaf = jnp.abs(_common.at_least_float32(leaf))
        rows = leaf.reshape(leaf.shape[0] if path in layered else 1, -1)
        norms.append(jnp.linalg.norm(rows, ord=p, axis=1))
    return jnp.concatenate(norms).mean()
