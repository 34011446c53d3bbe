# SPDX-License-Identifier: Apache-2.0
"""Rounding that looks at activations without second moments: AWQ and LLM.int8."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
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
    at_once: int | None = None,
    pattern: str = _quantize.LINEAR,
    donate: bool = False,
) -> Params:
    """Rounds weights scaled up where their input is large, so that those err less.

    W becomes W' = Q(diag(s) W) / s, with s = a^r / sqrt(max(a^r) min(a^r)), a the mean
    of |x| of each input on calibration rows and r the best of 0, 1/steps, ..
    1 - 1/steps: that with the least ||(W' - W)^T X||^2, added over the kernels that
    read the same input, which share s (Eq. 4 and 5 of Lin et al. 2023). At r = 0 it is
    `quantize`, so it is never worse by that measure.

    Args:
        model, params, batches, kind, group, scheme, at_once, pattern, donate: as for
            `gptq`.
        steps: values of r that are tried, >= 1.
    Returns:
        A tree like params, in its dtypes and shards. Values lie on a grid only once
        multiplied by s, as a deployed model would hold them, with 1/s in the norm or
        kernel before.
    Raises:
        ValueError: as `gptq`.
    Paper and code: dividing by the root is the released code's. That code measures the
        error of a whole attention or MLP, leaves the o projection out where heads share
        values, and searches how far to clip weights. Here the measure is that of the
        paper's equation, every kernel has its s, and nothing is clipped.
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
        at_once=at_once,
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
    """int8 with one scale an output, but inputs with outliers keep their weights.

    An input is an outlier where any |x| >= threshold on the calibration rows (Section 3
    of Dettmers et al. 2022, which looks at each batch as it comes). Activations, which
    LLM.int8 rounds as well, are not rounded: this edits weights. Without outliers it is
    `quantize(params, "int8")`.

    Args:
        model, params, batches, pattern, donate: as for `gptq`.
        threshold: > 0.
    Returns:
        A tree like params, in its dtypes and shards.
    Raises:
        ValueError: if threshold <= 0, there are no batches, or no leaf matches.
    References: https://arxiv.org/abs/2208.07339
    """
    _checks.positive("llm_int8", threshold=threshold)

    def edit(kernels, inputs):
        outlier = inputs.largest >= threshold
        return {path: _but(x, outlier) for path, x in kernels.items()}

    return _inputs.map_sites(
        "llm_int8",
        model,
        params,
        batches,
        edit,
        pattern=pattern,
        at_once=None,
        donate=donate,
    )


@jax.jit
def _but(kernels: Array, outlier: Array) -> Array:
    w, kept = _quantize.wide(kernels), outlier[:, :, None]
    new = _quantize.rounded(
        jnp.where(kept, 0, w), bits=8, scheme="symmetric", group="channel"
    )
    return jnp.where(kept, w, new).astype(kernels.dtype)


@partial(jax.jit, static_argnames=("bits", "scheme", "group", "steps"))
def _search(kernels, gram, mean, *, bits, scheme, group, steps):
    """{path: [n, in, out]} of the kernels that read one site, layer by layer."""

    def one(layer):
        kernels, gram, mean = layer
        wide = {path: _quantize.wide(x) for path, x in kernels.items()}

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
