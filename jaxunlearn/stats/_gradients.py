# SPDX-License-Identifier: Apache-2.0
"""Gradients over a table: their mean, and the mean of their squares (Fisher)."""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxunlearn import _checks, sharding, trees
from jaxunlearn.typing import Frozen, Params, PRNGKey, Streams, Term, Total


def gradient(
    term: Term,
    params: Params,
    batches: Iterable[Streams],
    frozen: Frozen = Frozen(),
    *,
    key: PRNGKey | None = None,
    mesh: Mesh | None = None,
) -> Params:
    """Gradient of a term's mean over a complete table.

        kernels, rest = trees.split(params, r".*/mlp/(gate|up|down)/kernel")
        forget = terms.on_logps(losses.nll, model, "forget", reduce="token")
        batches = [
            {"forget": {name: column[i : i + 16] for name, column in table.items()}}
            for i in range(0, len(table["tokens"]), 16)
        ]
        g = stats.gradient(forget, kernels, batches, ju.Frozen(rest))

    It is the gradient of (sum of the loss over all batches) / (number of rows or tokens
    that count in all batches): it does not depend on how the rows are divided into
    batches. Masks are read first, for the count, then each batch costs one forward and
    one backward pass. Sums are float32.

    Args:
        term: the loss.
        params: the leaves to differentiate, None in the places of the others.
        batches: each with the streams that the term reads, of one shape if possible (a
            shape compiles once), each row once. All are in memory at a time.
        frozen: the other leaves, and the reference model where the term needs it.
        key: draws what the term needs, such as dropout; None for key 0.
        mesh: the mesh of the params, if they are sharded; rows are put onto it.
    Returns:
        A tree like params, float32.
    Raises:
        ValueError: if the term counts nothing in all batches. KeyError: if a batch
            lacks a stream.
    """
    owner = "stats.gradient"
    key = jax.random.key(0) if key is None else key

    def run(params, frozen, streams, key):
        return term(trees.merge(params, frozen.params), streams, frozen.ref_params, key)

    # What counts depends on masks alone, so no forward pass remains in this program.
    count = jax.jit(lambda *args: run(*args)[0].count)

    @partial(jax.jit, donate_argnums=0)
    def add(sums, counted, params, *args):
        def mean(params):
            total, _ = run(params, *args)
            return jnp.sum(Total(total.sum, counted).mean())

        grads = jax.grad(mean)(params)
        return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads)

    with sharding.on_mesh(mesh):
        parts = [
            (frozen, _streams(owner, term, batch, mesh), jax.random.fold_in(key, index))
            for index, batch in enumerate(batches)
        ]
        counted = sum(count(params, *part) for part in parts)
        if not parts or not bool(jnp.any(counted > 0)):
            raise ValueError(
                f"{owner} needs at least one row in which the term counts something, "
                "got none. Check the masks, and that batches is not a generator that "
                "was consumed before."
            )
        sums = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        for part in parts:
            sums = add(sums, counted, params, *part)
    return sums


def fisher(
    term: Term,
    params: Params,
    batches: Iterable[Streams],
    key: PRNGKey,
    *,
    microbatch_size: int = 1,
    ref_params: Params | None = None,
    mesh: Mesh | None = None,
) -> Params:
    """Diagonal of the empirical Fisher information: the mean of squared gradients.

    For `terms.on_logps(losses.nll, model, stream)` and microbatches of one row, it is
    the mean over rows of (d log p(answer) / d weight)^2. Microbatches in which the term
    counts nothing are ignored.

    Args:
        term: the term whose mean over a microbatch is differentiated.
        params: the parameters; all leaves are differentiated.
        batches: each with the streams that the term reads. Consumed once; a generator
            is fine.
        key: draws what the term needs, such as dropout.
        microbatch_size: number of rows whose mean gradient is squared; it must divide
            every batch. 1 is the definition and costs one backward pass per row. The
            batch size costs one pass per batch; the released code of the paper of
            `edits.dampen` does this.
        ref_params: the reference model's parameters, if the term needs them.
        mesh: the mesh of the params, if they are sharded. The rows of a microbatch are
            divided over it, so data * fsdp * expert must divide microbatch_size.
    Returns:
        A tree like params, float32, >= 0.
    Raises:
        ValueError: if microbatch_size does not divide a batch, or the term counts
            nothing in all batches. KeyError: if a batch lacks a stream.
    References: https://arxiv.org/abs/2308.07707
    """
    owner = "stats.fisher"
    _checks.positive_int(owner, microbatch_size=microbatch_size)
    add = jax.jit(partial(_add_squares, term, microbatch_size), donate_argnums=0)
    sums = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
    state = jnp.float32(0), sums
    with sharding.on_mesh(mesh):
        for index, batch in enumerate(batches):
            streams = _streams(owner, term, batch, mesh)
            for x in jax.tree.leaves(streams):
                if x.shape[0] % microbatch_size:
                    raise ValueError(
                        f"{owner} needs a microbatch_size that divides each batch, got "
                        f"microbatch_size={microbatch_size} and a batch of "
                        f"{x.shape[0]} rows."
                    )
            state = add(
                state, params, streams, ref_params, jax.random.fold_in(key, index)
            )
    pieces, sums = state
    if not float(pieces):
        raise ValueError(
            f"{owner} needs at least one row in which the term counts something, got "
            "none. Check the masks, and that batches is not a generator that was "
            "consumed before."
        )
    return jax.tree.map(lambda x: x / pieces, sums)


def _add_squares(term, size, state, params, streams, ref_params, key):
    """(microbatches so far, sum of squared gradients) with those of one batch added."""

    def mean(params, piece, key):
        total, _ = term(params, piece, ref_params, key)
        counted = jnp.any(total.count > 0).astype(jnp.float32)
        return jnp.sum(total.mean()), counted

    def add(state, piece):
        pieces, sums = state
        grads, counted = jax.grad(mean, has_aux=True)(params, *piece)
        sums = jax.tree.map(
            lambda total, g: total + counted * jnp.square(g.astype(jnp.float32)),
            sums,
            grads,
        )
        return (pieces + counted, sums), None

    cut = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), streams)
    count = jax.tree.leaves(cut)[0].shape[0]
    pieces = cut, jax.random.split(key, count)
    if count == 1:  # on CPUs, convolutions in an XLA loop are several times slower
        return add(state, jax.tree.map(lambda x: x[0], pieces))[0]
    return jax.lax.scan(add, state, pieces)[0]


def _streams(owner: str, term: Term, batch: Streams, mesh: Mesh | None) -> Streams:
    """The streams that the term reads, checked and on the mesh."""
    _checks.has_keys(owner, "stream", term.reads, batch, "Add it.")
    streams = {name: dict(batch[name]) for name in term.reads}
    if hasattr(term, "check"):
        term.check(streams)
    return streams if mesh is None else sharding.put_rows(streams, mesh)
