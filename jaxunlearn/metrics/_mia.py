# SPDX-License-Identifier: Apache-2.0
"""Membership inference: scores that are high for texts the model was not trained on.

Each attack gives one score per example. `auc(members, others)` then measures how well
it separates forgotten rows from rows that were never trained on: 1 if always, 0.5 if it
guesses, and below 0.5 if forgotten rows score even higher than new rows.
"""

import math
import re
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import _checks, _precision, trees
from jaxunlearn.metrics import _common, _probability
from jaxunlearn.typing import Array, PyTree


def mia_loss(
    logps: Array, *, where: Array | None = None, lengths: Array | None = None
) -> Array:
    """LOSS attack: the mean negative log-probability per token; equals `mean_nll`.

    Args, Returns, Raises: as `mean_nll`.
    References: Yeom et al. 2018, https://arxiv.org/abs/1709.01604
    """
    return _probability.mean_nll(logps, where=where, lengths=lengths)


def mia_reference(nll: Array, ref_nll: Array) -> Array:
    """Reference attack: nll - ref_nll, the loss relative to that of another model.

    Args:
        nll: [...] float, `mean_nll` under the model, nats per token.
        ref_nll: [...] float, `mean_nll` under a model not trained on the texts.
    Returns:
        [...] float32, nats per token.
    Raises:
        ValueError: if the shapes differ.
    References: Carlini et al. 2021, https://arxiv.org/abs/2012.07805
    """
    _checks.same_shape("mia_reference", nll=nll, ref_nll=ref_nll)
    return _precision.at_least_float32(nll) - _precision.at_least_float32(ref_nll)


def mia_zlib(nll: Array, lengths: Array) -> Array:
    """ZLIB attack: nll / lengths.

    Repetitive text has a low loss even if it was not trained on; the compressed length
    corrects for this.

    Args:
        nll: [...] float, `mean_nll` of each text, nats per token.
        lengths: [...] compressed length of each text, bytes, from `zlib_lengths`.
    Returns:
        [...] float32, nats per token and byte.
    Raises:
        ValueError: if the shapes differ.
    References: Carlini et al. 2021, https://arxiv.org/abs/2012.07805
    """
    _checks.same_shape("mia_zlib", nll=nll, lengths=lengths)
    nll = _precision.at_least_float32(nll)
    return nll / jnp.asarray(lengths).astype(nll.dtype)


def zlib_lengths(texts: Sequence[str]) -> np.ndarray:
    """[n] int64, length in bytes of each text, compressed by zlib as UTF-8.

    Scripts need one to four bytes for a character, so compare texts of one script only.
    """
    if isinstance(texts, str):
        raise TypeError("zlib_lengths needs a sequence of texts, got one text.")
    # A surrogate without its pair is not valid UTF-8, but has a length there.
    as_bytes = [text.encode("utf-8", "surrogatepass") for text in texts]
    return np.array([len(zlib.compress(x)) for x in as_bytes], np.int64)


def mia_lowercase(nll: Array, lower_nll: Array) -> Array:
    """Lowercase attack: nll / lower_nll, the loss relative to that in lower case.

    In scripts without case (Chinese, Arabic, Hindi, ...) both texts are the same and
    the score is 1 for every text: the attack does not work there.

    Args:
        nll: [...] float, `mean_nll` of each text, nats per token.
        lower_nll: [...] float, `mean_nll` of `text.lower()`.
    Returns:
        [...] float32; MUSE calls it PPL/lower.
    Raises:
        ValueError: if the shapes differ.
    References: Carlini et al. 2021, https://arxiv.org/abs/2012.07805
    """
    _checks.same_shape("mia_lowercase", nll=nll, lower_nll=lower_nll)
    return _precision.at_least_float32(nll) / _precision.at_least_float32(lower_nll)


def mia_min_k(
    logps: Array,
    *,
    k: float = 0.4,
    where: Array | None = None,
    min_tokens: int = 1,
    empty: float = math.nan,
) -> Array:
    """Min-K%: minus the mean of the max(min_tokens, int(k n)) lowest log-probabilities.

    Args:
        logps: [..., L] float, log-probability of each token, nats.
        k: fraction of the tokens, in (0, 1], a Python number: int(k n) is computed in
            Python, before tracing.
        where: [..., L] bool, True where the token counts; None counts all.
        min_tokens: smallest number of tokens to use, 0 or 1. With 0, as in MUSE's code,
            a text with k n < 1 gets `empty`.
        empty: the score if no token is used. OpenUnlearning uses 0, which looks like a
            member.
    Returns:
        [...] float32, nats per token; NaN if a token that counts is NaN.
    Raises:
        ValueError: if k is outside (0, 1], min_tokens is not 0 or 1, or the shapes
            differ. TypeError: if where is not boolean.
    References: Shi et al. 2023, https://arxiv.org/abs/2310.16789; defaults are those of
        OpenUnlearning.
    """
    _checks.positive("mia_min_k", k=k)
    if k > 1:
        raise ValueError(f"mia_min_k needs k <= 1, a fraction of tokens, got k={k}.")
    if min_tokens not in (0, 1):
        raise ValueError(
            f"mia_min_k needs min_tokens to be 0 or 1, got min_tokens={min_tokens}."
        )
    _checks.mask("mia_min_k", where, logps=logps)
    logps = _precision.at_least_float32(logps)
    where = _common.counted(logps, where)
    length = logps.shape[-1]
    counts = [min(n, max(min_tokens, int(k * n))) for n in range(length + 1)]
    num_lowest = jnp.asarray(counts)[where.sum(-1)]
    ordered = jnp.sort(jnp.where(where, logps, jnp.inf), axis=-1)
    lowest = jnp.arange(length) < num_lowest[..., None]
    total = jnp.where(lowest, ordered, 0.0).sum(-1)
    score = -total / jnp.maximum(num_lowest, 1).astype(logps.dtype)
    score = jnp.where(num_lowest > 0, score, jnp.asarray(empty, logps.dtype))
    broken = (where & jnp.isnan(logps)).any(-1)  # sorting moves NaN to the end
    return jnp.where(broken, jnp.asarray(jnp.nan, logps.dtype), score)


def mia_min_k_plus_plus(
    logits: Array,
    targets: Array,
    *,
    k: float = 0.4,
    where: Array | None = None,
    min_tokens: int = 1,
    empty: float = math.nan,
) -> Array:
    """Min-K%++: Min-K% of standardised log-probabilities (`standardised_logps`).

    Args:
        logits: [..., L, V] float; for token t of a text, pass the logits at t - 1.
        targets: [..., L] int, in [0, V) where they count.
        k, where, min_tokens, empty: as `mia_min_k`.
    Returns:
        [...] float32, standard deviations.
    Raises:
        ValueError, TypeError: as `mia_min_k`.
    References: Zhang et al. 2024, https://arxiv.org/abs/2404.02936
    """
    scores = standardised_logps(logits, targets, where=where)
    return mia_min_k(scores, k=k, where=where, min_tokens=min_tokens, empty=empty)


def standardised_logps(
    logits: Array, targets: Array, *, where: Array | None = None, floor: float = 1e-6
) -> Array:
    """Standardised log-probability, (log p(target) - mu) / sqrt(max(var, floor)).

    mu and var are the mean and the variance of log p over the vocabulary under p.
    Min-K%++ sorts these values. Pass a part of the positions at a time if [..., V] is
    too large for memory.

    Args:
        logits: [..., V] float.
        targets: [...] int, in [0, V) where they count.
        where: [...] bool, True where the target counts; elsewhere the value is 0.
        floor: smallest variance to divide by, nats squared, > 0.
    Returns:
        [...] float32, in standard deviations; NaN where a target that counts is outside
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
    logits = _precision.at_least_float32(logits)
    # Logits minus their maximum are log p plus a constant. They are small where p is
    # near one token or near uniform, so that mean and variance are accurate.
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(shifted)
    finite = jnp.where(weights == 0, 0.0, shifted)  # 0 log 0 is 0
    first = weights * finite
    total, mean, square = _sums(weights, first, first * finite)
    mean, square = mean / total, square / total
    variance = square - jnp.square(mean)
    size = logits.shape[-1]
    inside = (targets >= 0) & (targets < size)  # a negative index would wrap
    index = jnp.where(inside, targets, jnp.full_like(targets, size))
    chosen = jnp.take_along_axis(shifted, index[..., None], axis=-1, mode="fill")
    scores = (chosen[..., 0] - mean) / jnp.sqrt(jnp.maximum(variance, floor))
    return scores if where is None else jnp.where(where, scores, 0.0)


def _sums(*arrays):
    """Sums over the last axis in one pass; separate sums take CPUs 8 times as long."""

    def add(left, right):
        return tuple(a + b for a, b in zip(left, right, strict=True))

    zeros = tuple(jnp.zeros((), x.dtype) for x in arrays)
    return jax.lax.reduce(arrays, zeros, add, (arrays[0].ndim - 1,))


def mia_gradnorm(
    gradient: PyTree, *, p: float = 2.0, stacked: str | None = None
) -> Array:
    """GradNorm: the mean over parameter tensors of the p-norm of a gradient.

    The gradient is that of the mean negative log-probability of the tokens of one
    example. For many examples use `jax.lax.map`, which stores one gradient at a time.

    Args:
        gradient: a tree like the params; None leaves are ignored.
        p: a Python number >= 1, or math.inf.
        stacked: regular expression for whole paths of leaves that stack the tensors of
            all layers along axis 0; each layer then counts as one tensor. None means
            that no leaf is stacked. OpenUnlearning's models have separate tensors per
            layer: use r"blocks/.*" for the decoder to get its value.
    Returns:
        [] float32.
    Raises:
        ValueError: if p < 1, the tree has no leaf, or nothing matches stacked.
    Paper and code: like OpenUnlearning, this is the mean over tensors, not the norm of
        the full gradient.
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
            f"mia_gradnorm needs stacked to match the whole path of a leaf, got "
            f"stacked={stacked!r}. The leaves are {_checks.listed(leaves)}."
        )
    norms = []
    for path, leaf in leaves.items():
        leaf = jnp.abs(_precision.at_least_float32(leaf))
        rows = leaf.reshape(leaf.shape[0] if path in layered else 1, -1)
        norms.append(jnp.linalg.norm(rows, ord=p, axis=1))
    return jnp.concatenate(norms).mean()
