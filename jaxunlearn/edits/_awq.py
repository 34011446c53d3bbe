# SPDX-License-Identifier: Apache-2.0
"""Activation-aware rounding: AWQ and LLM.int8."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, _precision
from jaxunlearn.edits import _inputs, _quantize
from jaxunlearn.typing import Array, Batch, Model, Params


def awq(
    model: Model,
    params: Params,
    batches: Sequence[Batch],
    kind: str = "int4",
    *,
    group: int | str = "channel",
    scheme: str = "asymmetric",
    steps: int = 20,
    layers_per_pass: int | None = None,
    pattern: str = _quantize.LINEAR,
    donate: bool = False,
) -> Params:
    """AWQ: rounds weights after scaling up those whose inputs are large.

    W becomes W' = Q(diag(s) W) / s, so weights of large inputs have smaller rounding
    errors. Here s = a^r / sqrt(max(a^r) min(a^r)), and a is the mean of |x| of each
    input on calibration rows. r is the value among 0, 1/steps, .., 1 - 1/steps with the
    smallest ||(W' - W)^T X||^2, summed over the kernels that read the same input; they
    share s (Eq. 4 and 5 of Lin et al. 2023). r = 0 gives `quantize`, so the result is
    never worse than it by this measure.

    Args:
        model, params, batches, kind, group, scheme, layers_per_pass, pattern, donate:
            as for `gptq`.
        steps: number of values of r to try, >= 1.
    Returns:
        A tree like params, with its dtypes and sharding. The values are on a grid only
        after multiplication by s. A deployed model stores the grid values and puts 1/s
        into the preceding norm or kernel.
    Raises:
        ValueError: as `gptq`.
    Paper and code: the division by the root comes from the released code. That code
        measures the error of a full attention or MLP block, skips the o projection if
        heads share values, and searches for a clipping range of the weights. Here the
        error is that of the paper's equation, every kernel is scaled, and nothing is
        clipped.
    References: https://arxiv.org/abs/2306.00978
    """
    _checks.one_of("awq", tuple(_quantize.BITS), kind=kind)
    _checks.positive_int("awq", steps=steps)
    _quantize.check_grid("awq", scheme, group)

    def edit(kernels, inputs):
        for path, kernel in kernels.items():
            _quantize.check_group("awq", path, kernel.shape, group)
        _inputs.check_tokens("awq", kernels, inputs)
        return _search(
            kernels,
            inputs.gram,
            inputs.mean,
            bits=_quantize.BITS[kind],
            scheme=scheme,
            group=group,
            steps=steps,
        )

    return _inputs.map_sites(
        "awq",
        model,
        params,
        batches,
        edit,
        pattern=pattern,
        layers_per_pass=layers_per_pass,
        donate=donate,
    )


def llm_int8(
    model: Model,
    params: Params,
    batches: Sequence[Batch],
    *,
    threshold: float = 6.0,
    pattern: str = _quantize.LINEAR,
    donate: bool = False,
) -> Params:
    """Rounds to int8 with one scale per output, except the weights of outlier inputs.

    An input is an outlier if some |x| >= threshold on the calibration rows (Section 3
    of Dettmers et al. 2022, which decides for each batch at run time). LLM.int8 also
    rounds activations; this edit changes weights only. Without outliers the result is
    that of `quantize(params, "int8")`.

    Args:
        model, params, batches, pattern, donate: as for `gptq`.
        threshold: smallest |x| that makes an input an outlier, > 0.
    Returns:
        A tree like params, with its dtypes and sharding.
    Raises:
        ValueError: if threshold <= 0, there are no batches, or no leaf matches.
    References: https://arxiv.org/abs/2208.07339
    """
    _checks.positive("llm_int8", threshold=threshold)

    def edit(kernels, inputs):
        outlier = inputs.largest >= threshold
        return {path: _round_others(x, outlier) for path, x in kernels.items()}

    return _inputs.map_sites(
        "llm_int8",
        model,
        params,
        batches,
        edit,
        pattern=pattern,
        layers_per_pass=None,
        donate=donate,
    )


@jax.jit
def _round_others(kernels: Array, outlier: Array) -> Array:
    """int8 values of kernels [n, in, out]; rows of outlier inputs [n, in] are kept."""
    w, outlier = _precision.at_least_float32(kernels), outlier[:, :, None]
    new = _quantize.rounded(
        jnp.where(outlier, 0, w), bits=8, scheme="symmetric", group="channel"
    )
    return jnp.where(outlier, w, new).astype(kernels.dtype)


@partial(jax.jit, static_argnames=("bits", "scheme", "group", "steps"))
def _search(kernels, gram, mean, *, bits, scheme, group, steps):
    """AWQ of the kernels {path: [n, in, out]} that read one site, layer by layer."""

    def one(layer):
        kernels, gram, mean = layer
        wide = {path: _precision.at_least_float32(x) for path, x in kernels.items()}

        def at(ratio):
            s = jnp.maximum(mean**ratio, 1e-4)
            s = (s / jnp.sqrt(jnp.max(s) * jnp.min(s)))[:, None]
            return {
                path: _quantize.rounded(
                    w * s.astype(w.dtype), bits=bits, scheme=scheme, group=group
                )
                / s.astype(w.dtype)
                for path, w in wide.items()
            }

        def error(ratio):
            new = at(ratio)
            gaps = [(new[path] - w).astype(jnp.float32) for path, w in wide.items()]
            return sum(
                jnp.sum(gap * jnp.matmul(gram, gap, precision="highest"))
                for gap in gaps
            )

        ratios = jnp.arange(steps, dtype=jnp.float32) / steps
        best = ratios[jnp.argmin(jax.lax.map(error, ratios))]
        return {path: x.astype(kernels[path].dtype) for path, x in at(best).items()}

    return jax.lax.map(one, (kernels, gram, mean))
