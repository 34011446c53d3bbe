# SPDX-License-Identifier: Apache-2.0
"""Terms on the probabilities that a model gives to the next token."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.terms import _chunks, _inputs
from jaxunlearn.terms._bound import BoundTerm
from jaxunlearn.typing import Array, Model, Total


def on_logps(
    loss: Callable[..., Array],
    model: Model,
    stream: str,
    *,
    reduce: str = "sequence",
    chunk: int | None = None,
) -> BoundTerm:
    """A term on log-probabilities of the answer tokens, in nats.

    Args:
        loss: with reduce="sequence", (logps [B], columns...) -> [B], logps summed over
            each answer; with reduce="token", (logps [B, L], columns..., where=[B, L])
            -> [B, L].
        model: the model that gives the log-probabilities.
        stream: name of the stream to read.
        reduce: "sequence" averages over the sequences that have an answer, "token" over
            the answer tokens.
        chunk: tokens of each sequence unembedded at a time; see `target_logps`.
    Returns:
        A Term whose value is that mean; it reports `nll`, the mean negative
        log-probability of an answer token.
    Raises:
        TypeError: for swapped arguments, or with reduce="token" a loss that does not
            take `where`.
        ValueError: for an unknown `reduce` and, when it runs, for a loss that returns
            another shape (one that averages, say) or a chunk below 1.
    """
    _inputs.check("on_logps", loss, model, stream)
    _checks.one_of("on_logps", ("sequence", "token"), reduce=reduce)
    if reduce == "token":
        _inputs.takes_where("on_logps with reduce='token'", loss)
    needed = _inputs.columns(loss)

    def of_logps(logps, where, batches):
        (logps,), (where,), (batch,) = logps, where, batches
        tokens = jnp.sum(where, dtype=jnp.int32)
        nll = Total(-jnp.sum(logps), tokens)
        lengths = jnp.sum(where, axis=1, dtype=jnp.int32)
        lengths_or_one = jnp.maximum(lengths, 1).astype(jnp.float32)
        columns = dict(batch) | {"lengths": lengths_or_one}
        arguments = [columns[name] for name in needed]
        if reduce == "token":
            values = loss(logps, *arguments, where=where)
            _inputs.not_averaged("on_logps", loss, values, where.shape, "token")
            return Total(jnp.sum(values), tokens), {"nll": nll}
        values = loss(jnp.sum(logps, axis=1), *arguments)
        _inputs.not_averaged("on_logps", loss, values, lengths.shape, "sequence")
        values = jnp.where(lengths > 0, values, 0.0)
        return Total(jnp.sum(values), jnp.sum(lengths > 0, dtype=jnp.int32)), {
            "nll": nll
        }

    columns = ("tokens", "mask", *(name for name in needed if name != "lengths"))
    return _of_logps(model, (stream,), of_logps, columns, chunk)


def on_pairs(
    loss: Callable[..., Array],
    model: Model,
    *,
    win: str,
    lose: str,
    chunk: int | None = None,
) -> BoundTerm:
    """A term on two answers to each question: row i of one stream is paired with row i
    of the other.

    Args:
        loss: (logps [B], ref_logps [B], lose_logps [B], lose_ref_logps [B]) -> [B],
            log-probabilities summed over each answer, such as losses.dpo.
        model: the model that gives the log-probabilities.
        win: name of the stream of preferred answers.
        lose: name of the stream of dispreferred answers. Both have `ref_logps`, and
            `pair` as data.paired makes it.
        chunk: tokens of each sequence unembedded at a time; see `target_logps`.
    Returns:
        A Term whose value is the mean over the rows that have both answers; it reports
        `nll` of the losing and `win_nll` of the winning answers' tokens.
    Raises:
        TypeError: for swapped arguments.
        KeyError: when it runs or is traced, if a stream lacks a column.
        ValueError: when it runs, if the streams have different numbers of rows, rows
            that are not pairs, or the loss returns another shape than [B]. In a
            compiled step that `fit` does not run, the loss of such a batch is NaN.
    """
    _inputs.check("on_pairs", loss, model, win, lose)

    def of_logps(logps, where, batches):
        pair = {
            name: batch["tokens"][:, 0]
            for name, batch in zip((win, lose), batches, strict=True)
        }
        _checks.same_shape("A term on pairs", **pair)
        nlls = [
            Total(-jnp.sum(x), jnp.sum(counts, dtype=jnp.int32))
            for x, counts in zip(logps, where, strict=True)
        ]
        both = jnp.all(jnp.stack([jnp.any(counts, axis=1) for counts in where]), axis=0)
        # Masked before the loss: NaN in one answer would reach the other's gradient.
        arguments = [
            jnp.where(both, argument, jnp.zeros_like(argument))
            for x, batch in zip(logps, batches, strict=True)
            for argument in (jnp.sum(x, axis=1), batch["ref_logps"])
        ]
        values = loss(*arguments)
        _inputs.not_averaged("on_pairs", loss, values, both.shape, "pair")
        values = jnp.where(both, values, 0.0)
        mismatched = jnp.any(batches[0]["pair"] != batches[1]["pair"])
        values = jnp.where(mismatched, jnp.nan, values)
        count = jnp.sum(both, dtype=jnp.int32)
        return Total(jnp.sum(values), count), {"nll": nlls[1], "win_nll": nlls[0]}

    columns = ("tokens", "mask", "ref_logps", "pair")
    term = _of_logps(model, (win, lose), of_logps, columns, chunk)
    return dataclasses.replace(term, paired=True)


def _of_logps(model, reads, of_logps, columns, chunk):
    def score(params, hidden, batches, ref_params):
        del ref_params
        each = [
            _chunks.logps_of(model, params, x, batch, chunk)
            for x, batch in zip(hidden, batches, strict=True)
        ]
        logps, where = zip(*each, strict=True)
        return of_logps(logps, where, batches)

    return BoundTerm(model, reads, score, columns, of_logps=of_logps, chunk=chunk)


def on_tokens(
    loss: Callable[..., Array],
    model: Model,
    stream: str,
    *,
    skip: int = 0,
    chunk: int | None = None,
) -> BoundTerm:
    """A term on the logits of the whole vocabulary, averaged over answer tokens.

    Args:
        loss: (logits [..., V], [ref_logits [..., V],] [targets [...],] where=[...]) ->
            [...]. A parameter called `ref_logits` makes the term run the reference
            model; one called `targets` gets the answer's tokens.
        model: the model that gives the logits.
        stream: name of the stream to read.
        skip: the first `skip` answer tokens of each row do not count.
        chunk: tokens of each sequence unembedded at a time; see `target_logps`.
    Returns:
        A Term whose value is the mean over answer tokens.
    Raises:
        TypeError: for swapped arguments, or a loss that does not take `where`.
        ValueError: if skip is negative, the loss has other parameters without a
            default or, when it runs, it returns another shape.
    """
    _inputs.check("on_tokens", loss, model, stream)
    _inputs.takes_where("on_tokens", loss)
    needed = _inputs.columns(loss)
    for name in needed:
        _checks.one_of("on_tokens", ("ref_logits", "targets"), parameter=name)
    _checks.not_negative("on_tokens", skip=skip)
    needs_ref = "ref_logits" in needed

    def score(params, hidden, batches, ref_params):
        (hidden,), (batch,) = hidden, batches
        targets, where = _chunks.aligned(batch)
        if skip:
            where &= jnp.cumsum(where, axis=1, dtype=jnp.int32) > skip
        ref_hidden = model.apply(ref_params, batch).hidden if needs_ref else None

        def piece(hidden, ref_hidden, targets, where):
            logits = model.unembed(params, hidden)
            columns = {"targets": jnp.where(where, targets, jnp.zeros_like(targets))}
            if needs_ref:
                ref_logits = model.unembed(ref_params, ref_hidden)
                columns["ref_logits"] = jax.lax.stop_gradient(ref_logits)
            values = loss(logits, *(columns[name] for name in needed), where=where)
            _inputs.not_averaged("on_tokens", loss, values, where.shape, "token")
            return jnp.where(where, values, 0.0)

        size = _chunks.chunk_size(model, params, hidden) if chunk is None else chunk
        values = _chunks.in_chunks(piece, size, hidden, ref_hidden, targets, where)
        return Total(jnp.sum(values), jnp.sum(where, dtype=jnp.int32)), {}

    return BoundTerm(model, (stream,), score, ("tokens", "mask"), needs_ref)
