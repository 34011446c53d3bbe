# SPDX-License-Identifier: Apache-2.0
"""Terms: a loss bound to a model and to the stream it reads.

A term returns the sum of its loss and the number of things summed, so that the division
happens once, after microbatches and devices. The unembedding and the loss run over a
few tokens of every sequence at a time, and the backward pass computes those logits
again: nothing of shape [B, L, V] ever exists.

A loss names what it needs. Its first parameter is what the model computes. For
`on_logps` every further positional parameter without a default is a column: `ref_logps`
and others come from the batch, `lengths` is counted by the term. For `on_tokens` it may
be `ref_logits`. Hyperparameters are bound with functools.partial:

    terms.on_logps(partial(losses.npo, beta=0.1), model, "forget")
    terms.on_logps(losses.nll, model, "retain", reduce="token")
    terms.on_tokens(losses.kl, model, "retain")
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, losses, sharding
from jaxunlearn.typing import (
    Array,
    Batch,
    Metrics,
    Model,
    Params,
    PRNGKey,
    Streams,
    Total,
)

_MOST_LOGITS = 2**28  # of one chunk on one device of a mesh: 1 GiB in float32


@dataclasses.dataclass(frozen=True)
class BoundTerm:
    """A Term on the hidden states of one stream.

    Attributes:
        model: the model that is run.
        stream: name of the stream it is run on.
        score: (params, hidden [B, L, D], batch, ref) -> (Total, Metrics).
        columns: what the stream must hold.
        needs_ref: whether `score` reads the reference model's parameters.
        of_logps: where log-probabilities of the answer are all that the term wants of
            the hidden states, the rest of `score`: (logps [B, L - 1], where [B, L - 1],
            batch) -> (Total, Metrics).
        chunk: tokens of each sequence unembedded at a time; None is the default.
    """

    model: Model
    stream: str
    score: Callable[[Params, Array, Batch, Params | None], tuple[Total, Metrics]]
    columns: tuple[str, ...] = ()
    needs_ref: bool = False
    of_logps: Callable[[Array, Array, Batch], tuple[Total, Metrics]] | None = None
    chunk: int | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.stream,)

    def batch(self, streams: Streams, ref: Params | None) -> Batch:
        """The term's own batch, once everything it needs is known to be there."""
        fix = "Add it to your loader."
        _checks.has_keys("The term", "stream", self.reads, streams, fix)
        batch = streams[self.stream]
        fix = "evaluate.reference_logps makes ref_logps, data.encode the others."
        owner = f"The term on {self.stream!r}"
        _checks.has_keys(owner, "columns", self.columns, batch, fix)
        if self.needs_ref and ref is None:
            raise ValueError(
                f"{owner} needs the reference model, got none. "
                "Pass Frozen(rest, ref=params) to the step."
            )
        return batch

    def __call__(
        self, params: Params, streams: Streams, ref: Params | None, rng: PRNGKey
    ) -> tuple[Total, Metrics]:
        batch = self.batch(streams, ref)
        hidden = self.model.apply(params, batch, rng=rng).hidden
        return self.score(params, hidden, batch, ref)


@dataclasses.dataclass(frozen=True)
class JointTerm:
    """A weighted sum of terms whose gradients nobody needs to see apart; see
    `joint`."""

    parts: tuple[tuple[str, float, BoundTerm], ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.stream for _, _, part in self.parts))

    @property
    def needs_ref(self) -> bool:
        return any(part.needs_ref for _, _, part in self.parts)

    def __call__(
        self, params: Params, streams: Streams, ref: Params | None, rng: PRNGKey
    ) -> tuple[Total, Metrics]:
        parts = [part for _, _, part in self.parts]
        batches = [part.batch(streams, ref) for part in parts]
        rows = _rows(batches)
        model = parts[0].model
        hidden = model.apply(params, rows, rng=rng).hidden
        cuts, start = [], 0
        for batch in batches:
            height, length = batch["tokens"].shape
            cuts.append((slice(start, start + height), length))
            start += height
        chunks = {part.chunk for part in parts}
        if all(part.of_logps for part in parts) and len(chunks) == 1:
            # One pass of the unembedding serves all: its kernel is read, and its
            # gradient added up, once a chunk and not once a chunk and part.
            logps, where = _target_logps(model, params, hidden, rows, chunks.pop())
            scores = [
                part.of_logps(logps[i, : n - 1], where[i, : n - 1], batch)
                for part, batch, (i, n) in zip(parts, batches, cuts, strict=True)
            ]
        else:
            scores = [
                part.score(params, hidden[i, :n], batch, ref)
                for part, batch, (i, n) in zip(parts, batches, cuts, strict=True)
            ]
        totals, metrics = [], {}
        for (name, weight, _), (total, extra) in zip(self.parts, scores, strict=True):
            totals.append(Total(weight * total.sum, total.count))
            metrics[f"{name}/loss"] = total
            metrics |= {f"{name}/{key}": value for key, value in extra.items()}
        return jax.tree.map(lambda *xs: jnp.stack(xs), *totals), metrics


def joint(
    terms: Mapping[str, BoundTerm], weights: Mapping[str, float] | None = None
) -> JointTerm:
    """One term for a weighted sum of terms: sum over k of weights[k] * mean of term k.

    The model runs once over the rows of all streams and there is one gradient tree,
    where terms kept apart cost a tree each. Use it when the losses merely add; keep
    terms apart when the combiner (blur, primal_dual, saliency) must see each gradient,
    or when a weight follows a schedule (combine.weighted_sum).

    Args:
        terms: terms on one and the same model, by name.
        weights: one number a term; 1 for every term if None.
    Returns:
        A Term that reports `<name>/loss` of each part before weighting.
    Raises:
        ValueError: without terms, with terms on different models, or a weight not
            finite.
    """
    if not terms:
        raise ValueError("terms.joint needs at least one term, got none.")
    weights = dict.fromkeys(terms, 1.0) if weights is None else weights
    fix = "Give one weight for each term."
    _checks.has_keys("terms.joint", "weights", terms, weights, fix)
    _checks.has_keys("terms.joint", "terms", weights, terms, fix)
    _checks.finite("terms.joint", **weights)
    models = [term.model for term in terms.values()]
    if any(model is not models[0] for model in models):
        raise ValueError(
            "terms.joint needs terms on one model, got several. Keep the terms apart "
            "and join their gradients with combine.weighted_sum."
        )
    return JointTerm(tuple((name, float(weights[name]), terms[name]) for name in terms))


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
        model: whose log-probabilities are meant.
        stream: name of the stream to read.
        reduce: "sequence" counts sequences that have an answer, "token" counts answer
            tokens.
        chunk: tokens of each sequence unembedded at a time; see `target_logps`.
    Returns:
        A Term whose value is the mean over what `reduce` counts; it reports `nll`, the
        mean negative log-probability of an answer token.
    Raises:
        ValueError: for an unknown `reduce`, and when it runs for a chunk below 1.
    """
    _checks.one_of("on_logps", ("sequence", "token"), reduce=reduce)
    needed = _columns(loss)

    def of_logps(logps, where, batch):
        tokens = jnp.sum(where, dtype=jnp.int32)
        nll = Total(-jnp.sum(logps), tokens)
        lengths = jnp.sum(where, axis=1, dtype=jnp.int32)
        lengths_or_one = jnp.maximum(lengths, 1).astype(jnp.float32)
        columns = dict(batch) | {"lengths": lengths_or_one}
        arguments = [columns[name] for name in needed]
        if reduce == "token":
            values = loss(logps, *arguments, where=where)
            return Total(jnp.sum(values), tokens), {"nll": nll}
        values = jnp.where(lengths > 0, loss(jnp.sum(logps, axis=1), *arguments), 0.0)
        return Total(jnp.sum(values), jnp.sum(lengths > 0, dtype=jnp.int32)), {
            "nll": nll
        }

    def score(params, hidden, batch, ref):
        del ref
        logps, where = _target_logps(model, params, hidden, batch, chunk)
        return of_logps(logps, where, batch)

    columns = ("tokens", "mask", *(name for name in needed if name != "lengths"))
    return BoundTerm(model, stream, score, columns, of_logps=of_logps, chunk=chunk)


def on_tokens(
    loss: Callable[..., Array],
    model: Model,
    stream: str,
    *,
    chunk: int | None = None,
) -> BoundTerm:
    """A term on whole next-token distributions, averaged over answer tokens.

    Args:
        loss: (logits [..., V], [ref_logits [..., V],] where=[...]) -> [...]. A second
            parameter called `ref_logits` makes the term run the reference model.
        model: whose distributions are meant.
        stream: name of the stream to read.
        chunk: tokens of each sequence unembedded at a time; see `target_logps`.
    Returns:
        A Term whose value is the mean over answer tokens.
    """
    needs_ref = "ref_logits" in _columns(loss)

    def score(params, hidden, batch, ref):
        _, where = _aligned(batch)
        ref_hidden = model.apply(ref, batch).hidden if needs_ref else None

        def piece(hidden, ref_hidden, where):
            logits = model.unembed(params, hidden)
            refs = (model.unembed(ref, ref_hidden),) if needs_ref else ()
            return loss(logits, *(jax.lax.stop_gradient(x) for x in refs), where=where)

        size = _chunk(model, params, hidden) if chunk is None else chunk
        values = _in_chunks(piece, size, hidden, ref_hidden, where)
        count = jnp.sum(where, dtype=jnp.int32)
        return Total(jnp.sum(jnp.where(where[:, :-1], values, 0.0)), count), {}

    return BoundTerm(model, stream, score, ("tokens", "mask"), needs_ref)


def target_logps(
    model: Model, params: Params, batch: Batch, *, chunk: int | None = None
) -> tuple[Array, Array]:
    """Log-probability of every answer token given the tokens before it.

    Args:
        model: the model.
        params: its parameters.
        batch: `tokens`, `mask` and optionally `answer`, each [B, L].
        chunk: tokens of each sequence unembedded at a time, >= 1. By default half of
            the sequence, 32 at most: a chunk of logits is [B, chunk, V] float32. Where
            rows are cut over devices, as many as give a device 2^28 logits.
    Returns:
        (logps [B, L - 1] float32 nats, 0 where not counted; where [B, L - 1] bool);
        column t belongs to token t + 1. The first real token has nothing before it and
        never counts.
    """
    hidden = model.apply(params, batch).hidden
    return _target_logps(model, params, hidden, batch, chunk)


def _target_logps(model, params, hidden, batch, chunk):
    targets, where = _aligned(batch)

    def piece(hidden, targets, where):
        # Masking the states costs nothing beside masking their logits, and keeps junk
        # out of the value and the gradient just as well.
        hidden = jnp.where(where[..., None], hidden, jnp.zeros_like(hidden))
        targets = jnp.where(where, targets, jnp.zeros_like(targets))
        logps = losses.token_logps(model.unembed(params, hidden), targets)
        return jnp.where(where, logps, 0.0)

    chunk = _chunk(model, params, hidden) if chunk is None else chunk
    return _in_chunks(piece, chunk, hidden, targets, where), where[:, :-1]


def _aligned(batch):
    """Targets and which of them count, [B, L]: the token after each, none after the
    last. The length stays, so that a mesh which divides L divides them too."""
    mask = batch["mask"]
    counted = batch.get("answer", mask) & mask
    targets, counted = (jnp.roll(x, -1, axis=1) for x in (batch["tokens"], counted))
    return targets, (counted & mask).at[:, -1].set(False)


def _rows(batches: list[Batch]) -> Batch:
    """The rows of all batches as one: the [B, L] columns that all have, widened to the
    longest, and `answer` if any has it."""
    if any("answer" in batch for batch in batches):
        batches = [{"answer": batch["mask"], **batch} for batch in batches]
    shared = [
        name
        for name, column in batches[0].items()
        if column.ndim == 2 and all(name in other for other in batches)
    ]
    longest = max(batch["tokens"].shape[1] for batch in batches)

    def widen(x):
        return jnp.pad(x, ((0, 0), (0, longest - x.shape[1])))

    return {
        name: jnp.concatenate([widen(batch[name]) for batch in batches])
        for name in shared
    }


def _chunk(model: Model, params: Params, hidden: Array) -> int:
    """Tokens of each sequence unembedded at a time where nobody said: see
    `target_logps`.

    On a mesh every chunk gathers the unembedding's kernel and adds its gradient up over
    devices; at 32 tokens a chunk that was 24 times all other traffic of a step of four
    layers at 8B's width.
    """
    length = hidden.shape[1] - 1
    few = max(1, min(32, -(-length // 2)))
    rows = math.prod(sharding.parts_of(axis) for axis in sharding.BATCH)
    if rows == 1:
        return few
    one = jax.eval_shape(model.unembed, params, hidden[:, :1])
    parts = rows * sharding.parts_of("tensor")
    return max(few, min(length, _MOST_LOGITS * parts // max(1, one.size)))


def _in_chunks(function, chunk, *arrays):
    """Maps function over pieces of axis 1 of the arrays, [B, L, ...], keeping only what
    it returns, and not for the last token, which has no target: [B, L - 1].

    Axis 0 stays whole, so that it can stay cut over data-parallel devices; cutting
    flattened tokens would hand every device all the rows of a chunk. In the same way a
    chunk takes every n-th token, some of each part of a sequence cut over context.
    """
    batch, length = arrays[0].shape[0], arrays[0].shape[1] - 1
    _checks.positive_int("A term", chunk=chunk)
    parts = sharding.parts_of("context")
    chunk = -(-chunk // parts) * parts
    pieces = -(-length // chunk)
    whole = pieces * chunk

    def cut(x):
        short = max(0, whole - x.shape[1])
        x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))[:, :whole]
        return jnp.moveaxis(x.reshape(batch, chunk, pieces, *x.shape[2:]), 2, 0)

    cuts = jax.tree.map(cut, arrays)
    values = jax.lax.map(lambda xs: jax.checkpoint(function)(*xs), cuts)
    return jnp.moveaxis(values, 0, 2).reshape(batch, whole)[:, :length]


def _columns(loss: Callable[..., Array]) -> tuple[str, ...]:
    """Names of the loss's parameters after the first that have no default."""
    parameters = list(inspect.signature(loss).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.default is p.empty and p.kind in kinds)
