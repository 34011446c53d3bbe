# SPDX-License-Identifier: Apache-2.0
"""GPTQ: rounds one input after another; later inputs compensate for the error."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, _precision
from jaxunlearn.edits import _inputs, _quantize
from jaxunlearn.typing import Array, Batch, Model, Params

_BLOCK = 128  # number of inputs whose errors are applied to later ones in one product


def gptq(
    model: Model,
    params: Params,
    batches: Sequence[Batch],
    kind: str = "int4",
    *,
    group: int | str = "channel",
    scheme: str = "symmetric",
    damping: float = 0.01,
    layers_per_pass: int | None = None,
    pattern: str = _quantize.LINEAR,
    donate: bool = False,
) -> Params:
    """GPTQ: rounds the weights of each kernel so that its outputs change little.

    H = 2 X X^T is computed from the kernel's inputs on calibration rows, and
    damping * mean(diag H) is added to its diagonal. U is the upper Cholesky factor of
    H^-1. Inputs are processed in order: the weights w_j of input j are rounded to q_j,
    and U_jk (w_j - q_j) / U_jj is subtracted from the weights of every later input k
    (Algorithm 1 of Frantar et al. 2022). The scale of a group is computed just before
    its first input is rounded, from weights that contain the corrections so far; the
    scales of "channel" and "tensor" are computed before the first input.

    Args:
        model: one whose sites name their readers, such as those of `models.make`.
        params: the parameters to edit.
        batches: calibration rows with `tokens` and `mask`; the paper uses 128 rows of
            2048 tokens of general text. One batch is in memory at a time.
        kind: "int8", "int4", "int3" or "int2".
        group: as for `quantize`.
        scheme: as for `quantize`.
        damping: see above, > 0.
        layers_per_pass: number of layers whose inputs one pass over the rows collects.
            None collects all in one pass: inputs are those of the unedited model, and
            the H of every layer is in memory. With 1, as in the paper, a block sees the
            inputs that the quantized blocks before it produce, and only the H of one
            block is in memory, but there are as many passes and compilations as layers,
            each up to its layer.
        pattern: as for `quantize`; all kernels it matches must read a site.
        donate: as for `quantize`; params are also lost if an error is raised later.
    Returns:
        A tree like params, with its dtypes and sharding. Its values are on the grids
        described at `quantize`, but not on those of the new extremes: applying gptq
        again changes them.
    Raises:
        ValueError: as `quantize`; if there are no batches, fewer real tokens than a
            kernel has inputs, or inputs that are not finite.
    Paper and code: the released code sets the weights of inputs that are 0 on all rows
        to 0; here they are rounded. Its option to process inputs in order of decreasing
        H_jj is not implemented.
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
                f"gptq needs damping that makes H positive definite, got "
                f"damping={damping} for {_checks.listed(kernels)}. Increase damping."
            )
        return {path: _solve(x, factors, **settings) for path, x in kernels.items()}

    return _inputs.map_sites(
        "gptq",
        model,
        params,
        batches,
        edit,
        pattern=pattern,
        layers_per_pass=layers_per_pass,
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
    """GPTQ of all layers of a stacked kernel [n, in, out], in its dtype."""

    def one(layer):
        return _layer(*layer, bits=bits, scheme=scheme, group=group)

    wide = _precision.at_least_float32(kernels)
    new = jax.lax.map(one, (wide, factors.astype(wide.dtype)))
    return new.astype(kernels.dtype)


def _layer(w: Array, factor: Array, *, bits, scheme, group) -> Array:
    """GPTQ of one kernel [in, out], padded to blocks of inputs that share a scale."""
    inputs, outputs = w.shape
    size = _BLOCK if isinstance(group, str) else group
    padding = -inputs % size
    total = inputs + padding
    grid_of_all = None
    if isinstance(group, str):
        axes = {"channel": (0,), "tensor": (0, 1)}[group]
        grid_of_all = _quantize.grid(w, bits, scheme, axes)
    w = jnp.pad(w, ((0, padding), (0, 0)))
    factor = jnp.pad(factor, ((0, padding), (0, padding)))
    factor += jnp.diag((jnp.arange(total) >= inputs).astype(factor.dtype))

    def block(i, w):
        start = i * size
        rows = jax.lax.dynamic_slice(w, (start, 0), (size, outputs))
        factor_rows = jax.lax.dynamic_slice(factor, (start, 0), (size, total))
        within = jax.lax.dynamic_slice(factor_rows, (0, start), (size, size))
        scale, zero = grid_of_all or _quantize.grid(rows, bits, scheme, (0,))

        def row(j, carry):
            rows, errors = carry
            new = _quantize.onto_grid(rows[j][None], scale, zero, bits)[0]
            error = (rows[j] - new) / within[j, j]
            later = jnp.where(jnp.arange(size) > j, within[j], 0)
            rows = (rows - later[:, None] * error).at[j].set(new)
            return rows, errors.at[j].set(error)

        rows, errors = jax.lax.fori_loop(0, size, row, (rows, jnp.zeros_like(rows)))
        later = jnp.where(jnp.arange(total) >= start + size, factor_rows, 0)
        w = w - jnp.matmul(later.T, errors, precision="highest")
        return jax.lax.dynamic_update_slice(w, rows, (start, 0))

    return jax.lax.fori_loop(0, total // size, block, w)[:inputs]
