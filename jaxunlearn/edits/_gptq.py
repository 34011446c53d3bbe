# SPDX-License-Identifier: Apache-2.0
"""GPTQ: rounding input by input, each error passed on to the inputs still to come."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.edits import _inputs, _quantize
from jaxunlearn.typing import Array, Batch, Model, Params

_BLOCK = 128  # inputs whose errors reach the later ones in one product


def gptq(
    model: Model,
    params: Params,
    batches: Sequence[Batch],
    kind: str = "int4",
    *,
    group: int | str = "channel",
    scheme: str = "symmetric",
    damping: float = 0.01,
    at_once: int | None = None,
    pattern: str = _quantize.LINEAR,
    donate: bool = False,
) -> Params:
    """Rounds the weights of each kernel such that its outputs change little.

    With H = 2 X X^T of the kernel's inputs on calibration rows, damped by
    damping * mean(diag H), and U the upper Cholesky factor of H^-1, inputs are taken in
    order: weights w_j of input j are rounded to q_j, and those of every later input k
    lose U_jk (w_j - q_j) / U_jj (Algorithm 1 of Frantar et al. 2022). A group's scale
    is fitted when its first input's turn comes, to weights that have taken up the
    errors so far; those of "channel" and "tensor" before the first.

    Args:
        model: whose sites name their readers, as those of `models.make` do.
        params: the model to edit.
        batches: calibration rows with `tokens` and `mask`; the paper takes 128 rows of
            2048 tokens of general text. One batch is in memory at a time.
        kind: "int8", "int4", "int3" or "int2".
        group: as for `quantize`.
        scheme: as for `quantize`.
        damping: of H, > 0.
        at_once: how many layers one pass over the rows looks at. None takes all: one
            pass, inputs of the model as it is, and the H of every layer in memory. With
            1, as in the paper, a block sees the inputs that the quantized blocks before
            it give it, and one block's H are in memory; but it runs and compiles as
            many passes as there are layers, each up to its layer.
        pattern: as for `quantize`; kernels that read a site only.
        donate: as for `quantize`; params are lost also where an error comes late.
    Returns:
        A tree like params, in its dtypes and shards. It lies on grids as `quantize`
        gives them, if not on those of its own new extremes: twice is not once.
    Raises:
        ValueError: as `quantize`; if there are no batches, fewer real tokens than a
            kernel has inputs, or inputs that are not finite.
    Paper and code: the released code sets weights to 0 whose input was 0 on every row;
        here they are rounded. Its option to take inputs by falling H_jj is not here.
    References: https://arxiv.org/abs/2210.17323
    """
    _checks.one_of("gptq", tuple(_quantize.BITS), kind=kind)
    _checks.positive("gptq", damping=damping)
    _quantize.check_grid("gptq", scheme, group)
    settings = dict(bits=_quantize.BITS[kind], scheme=scheme, group=group)

    def edit(kernels, inputs):
        for path, kernel in kernels.items():
            _quantize.check_group("gptq", path, kernel.shape, group)
        _inputs.check_tokens("gptq", kernels, inputs)
        factors = _factors(2 * inputs.gram, damping)
        traced = isinstance(factors, jax.core.Tracer)
        if not traced and not jnp.all(jnp.isfinite(factors)):
            raise ValueError(
                f"gptq needs an H that damping makes positive, got another at "
                f"{_checks.listed(kernels)} with damping={damping}. Take more damping."
            )
        return {path: _solve(x, factors, **settings) for path, x in kernels.items()}

    return _inputs.map_sites(
        "gptq",
        model,
        params,
        batches,
        edit,
        pattern=pattern,
        at_once=at_once,
        donate=donate,
    )


@jax.jit
def _factors(hessians: Array, damping: float) -> Array:
    """Upper Cholesky factors U of (H + damping)^-1 = U^T U: [n, in, in]."""

    def factor(h):
        one = jnp.eye(len(h), dtype=h.dtype)
        h = h + jnp.where(jnp.diagonal(h) == 0, one, 0)
        h = h + damping * jnp.mean(jnp.diagonal(h)) * one
        inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(h), True), one)
        return jnp.linalg.cholesky((inverse + inverse.T) / 2).T

    return jax.lax.map(factor, hessians)


@partial(jax.jit, static_argnames=("bits", "scheme", "group"))
def _solve(kernels: Array, factors: Array, *, bits, scheme, group) -> Array:
    """Every layer of a stacked kernel [n, in, out], in its dtype."""

    def one(layer):
        return _layer(*layer, bits=bits, scheme=scheme, group=group)

    wide = _quantize.wide(kernels)
    new = jax.lax.map(one, (wide, factors.astype(wide.dtype)))
    return new.astype(kernels.dtype)


def _layer(w: Array, factor: Array, *, bits, scheme, group) -> Array:
    inputs, outputs = w.shape
    size = _BLOCK if isinstance(group, str) else group
    short = -inputs % size
    total = inputs + short
    whole = None
    if isinstance(group, str):
        axes = {"channel": (0,), "tensor": (0, 1)}[group]
        whole = _quantize.grid(w, bits, scheme, axes)
    w = jnp.pad(w, ((0, short), (0, 0)))
    factor = jnp.pad(factor, ((0, short), (0, short)))
    factor += jnp.diag((jnp.arange(total) >= inputs).astype(factor.dtype))

    def block(i, w):
        start = i * size
        rows = jax.lax.dynamic_slice(w, (start, 0), (size, outputs))
        reach = jax.lax.dynamic_slice(factor, (start, 0), (size, total))
        own = jax.lax.dynamic_slice(reach, (0, start), (size, size))
        scale, zero = whole or _quantize.grid(rows, bits, scheme, (0,))

        def row(j, carry):
            rows, errors = carry
            new = _quantize.onto_grid(rows[j][None], scale, zero, bits)[0]
            error = (rows[j] - new) / own[j, j]
            later = jnp.where(jnp.arange(size) > j, own[j], 0)
            rows = (rows - later[:, None] * error).at[j].set(new)
            return rows, errors.at[j].set(error)

        rows, errors = jax.lax.fori_loop(0, size, row, (rows, jnp.zeros_like(rows)))
        later = jnp.where(jnp.arange(total) >= start + size, reach, 0)
        w = w - jnp.matmul(later.T, errors, precision="highest")
        return jax.lax.dynamic_update_slice(w, rows, (start, 0))

    return jax.lax.fori_loop(0, total // size, block, w)[:inputs]
