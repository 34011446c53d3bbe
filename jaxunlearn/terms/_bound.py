# SPDX-License-Identifier: Apache-2.0
"""What a term is made of, and how several share one forward pass."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.terms import _chunks
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

Score = tuple[Total, Metrics]
Hidden = Sequence[Array]  # of each stream that a term reads, [B, L, D]
Batches = Sequence[Batch]


@dataclasses.dataclass(frozen=True)
class BoundTerm:
    """A Term on the hidden states of one stream, or of several.

    Attributes:
        model: the model that is run.
        reads: names of the streams it is run on.
        score: (params, hidden of each stream, batches, ref) -> (Total, Metrics).
        columns: what each of its streams must hold.
        needs_ref: whether `score` reads the reference model's parameters.
        of_logps: where log-probabilities of the answers are all that the term wants of
            the hidden states, the rest of `score`: (logps [B, L - 1] of each stream,
            where [B, L - 1] of each, batches) -> (Total, Metrics).
        chunk: tokens of each sequence unembedded at a time; None is the default.
        layer: the block whose output `score` reads, after which the forward pass stops;
            None for the final hidden states.
    """

    model: Model
    reads: tuple[str, ...]
    score: Callable[[Params, Hidden, Batches, Params | None], Score]
    columns: tuple[str, ...] = ()
    needs_ref: bool = False
    of_logps: Callable[[Hidden, Hidden, Batches], Score] | None = None
    chunk: int | None = None
    layer: int | None = None

    def batches(self, streams: Streams, ref: Params | None) -> list[Batch]:
        """The term's own batches, once everything it needs is known to be there."""
        fix = "Add it to your loader."
        _checks.has_keys("The term", "stream", self.reads, streams, fix)
        for stream in self.reads:
            fix = "evaluate.reference_logps makes ref_logps, data.encode the others."
            owner = f"The term on {stream!r}"
            _checks.has_keys(owner, "columns", self.columns, streams[stream], fix)
            if self.needs_ref and ref is None:
                raise ValueError(
                    f"{owner} needs the reference model, got none. "
                    "Pass Frozen(rest, ref_params=params) to the step."
                )
        return [streams[stream] for stream in self.reads]

    def __call__(
        self, params: Params, streams: Streams, ref: Params | None, key: PRNGKey
    ) -> Score:
        (score,) = _scores([self], params, streams, ref, key)
        return score


@dataclasses.dataclass(frozen=True)
class JointTerm:
    """A weighted sum of terms whose gradients nobody needs to see apart; see
    `joint`."""

    parts: tuple[tuple[str, float, BoundTerm], ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return _streams([part for _, _, part in self.parts])

    @property
    def needs_ref(self) -> bool:
        return any(part.needs_ref for _, _, part in self.parts)

    def __call__(
        self, params: Params, streams: Streams, ref: Params | None, key: PRNGKey
    ) -> Score:
        parts = [part for _, _, part in self.parts]
        scores = _scores(parts, params, streams, ref, key)
        totals, metrics = [], {}
        for (name, weight, _), (total, extra) in zip(self.parts, scores, strict=True):
            totals.append(Total(weight * total.sum, total.count))
            metrics[f"{name}/loss"] = total
            metrics |= {f"{name}/{label}": value for label, value in extra.items()}
        return jax.tree.map(lambda *xs: jnp.stack(xs), *totals), metrics


def joint(
    terms: Mapping[str, BoundTerm], weights: Mapping[str, float] | None = None
) -> JointTerm:
    """One term for a weighted sum of terms: sum over k of weights[k] * mean of term k.

    The model runs once over the rows of all streams, each stream once, and there is one
    gradient tree, where terms kept apart cost a tree each. Use it when the losses
    merely add; keep terms apart when the combiner (blur, primal_dual, saliency) must
    see each gradient, or when a weight follows a schedule (combine.weighted_sum).

    Args:
        terms: terms on one and the same model, by name.
        weights: one number a term; 1 for every term if None.
    Returns:
        A Term that reports `<name>/loss` of each part before weighting.
    Raises:
        ValueError: without terms, with terms on different models, with one that is
            not of this room's `on_*` functions (a half, say), or a weight not finite.
    """
    if not terms:
        raise ValueError("terms.joint needs at least one term, got none.")
    weights = dict.fromkeys(terms, 1.0) if weights is None else weights
    fix = "Give one weight for each term."
    _checks.has_keys("terms.joint", "weights", terms, weights, fix)
    _checks.has_keys("terms.joint", "terms", weights, terms, fix)
    _checks.finite("terms.joint", **weights)
    for name, term in terms.items():
        if not isinstance(term, BoundTerm):
            raise ValueError(
                "terms.joint needs terms that on_logps, on_tokens and their like made, "
                f"got a {type(term).__name__} as {name!r}. Keep it apart and join the "
                "gradients with combine.weighted_sum."
            )
    models = [term.model for term in terms.values()]
    if any(model is not models[0] for model in models):
        raise ValueError(
            "terms.joint needs terms on one model, got several. Keep the terms apart "
            "and join their gradients with combine.weighted_sum."
        )
    return JointTerm(tuple((name, float(weights[name]), terms[name]) for name in terms))


def _scores(
    parts: Sequence[BoundTerm],
    params: Params,
    streams: Streams,
    ref: Params | None,
    key: PRNGKey,
) -> list[Score]:
    """Of every part, from one forward pass over the rows of all their streams."""
    of_parts = [part.batches(streams, ref) for part in parts]
    model = parts[0].model
    # One pass of the unembedding serves all parts that want no more than log-
    # probabilities: its kernel is read, and its gradient added up, once a chunk and not
    # once a chunk and part. Their rows come first.
    likely = [part for part in parts if part.of_logps]
    shared = likely if len({part.chunk for part in likely}) == 1 else []
    own = [part for part in parts if not any(part is other for other in shared)]
    names = _streams([*shared, *own])
    batches = [streams[name] for name in names]
    rows = batches[0] if len(batches) == 1 else _rows(batches)
    cuts, start = {}, 0
    for name, batch in zip(names, batches, strict=True):
        height, length = batch["tokens"].shape
        cuts[name] = (slice(start, start + height), length)
        start += height
    hidden = _run(model, params, rows, [part.layer for part in parts], key)
    if shared:
        last, _ = cuts[_streams(shared)[-1]]
        logps, where = _chunks.logps_of(
            model,
            params,
            hidden[None][: last.stop],
            {name: column[: last.stop] for name, column in rows.items()},
            shared[0].chunk,
        )

    def of(part, x, shorter=0):
        return [x[i, : n - shorter] for i, n in (cuts[name] for name in part.reads)]

    return [
        part.of_logps(of(part, logps, 1), of(part, where, 1), own_batches)
        if any(part is other for other in shared)
        else part.score(params, of(part, hidden[part.layer]), own_batches, ref)
        for part, own_batches in zip(parts, of_parts, strict=True)
    ]


def _run(model, params, rows, layers, key) -> dict[int | None, Array]:
    """Hidden states by layer; the pass ends after the last layer that is read."""
    inner = sorted({layer for layer in layers if layer is not None})
    if not inner:
        return {None: model.apply(params, rows, key=key).hidden}
    until = None if None in layers else inner.pop()
    taps = {"block": inner} if inner else {}
    out = model.apply(params, rows, taps=taps, until=until, key=key)
    tapped = out.taps["block"] if inner else ()
    return {until: out.hidden} | dict(zip(inner, tapped, strict=True))


def _streams(parts: Sequence[BoundTerm]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in parts for name in part.reads))


def _rows(batches: list[Batch]) -> Batch:
    """The rows of all batches as one: the [B, L] columns that all have, widened to the
    longest, `answer` if any has it, and images of one shape and dtype."""
    if any("answer" in batch for batch in batches):
        batches = [{"answer": batch["mask"], **batch} for batch in batches]
    shared = [
        name
        for name in batches[0]
        if all(
            name in batch and batch[name].shape == batch["tokens"].shape
            for batch in batches
        )
    ]
    if all("image" in batch for batch in batches):
        images = [batch["image"] for batch in batches]
        if len({(x.shape[1:], x.dtype) for x in images}) > 1:
            raise ValueError(
                "terms.joint needs images of one shape and dtype in all streams, got "
                f"{[(x.shape[1:], str(x.dtype)) for x in images]}. Make all of them "
                "float32 in [0, 1], as data.images.as_float does."
            )
        shared.append("image")
    longest = max(batch["tokens"].shape[1] for batch in batches)

    def widen(x):
        if x.ndim > 2:
            return x
        return jnp.pad(x, ((0, 0), (0, longest - x.shape[1])))

    return {
        name: jnp.concatenate([widen(batch[name]) for batch in batches])
        for name in shared
    }
