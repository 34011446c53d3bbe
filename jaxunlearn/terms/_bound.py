# SPDX-License-Identifier: Apache-2.0
"""The parts of a term, and how several terms share one forward pass."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxunlearn import _checks
from jaxunlearn.terms import _chunks, _routing
from jaxunlearn.typing import (
    Array,
    Batch,
    Metrics,
    Model,
    Params,
    PRNGKey,
    Routing,
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
        model: the model that runs.
        reads: names of the streams that it runs on.
        score: (params, hidden of each stream, batches, ref_params) -> (Total, Metrics).
        columns: columns that each of its streams must have.
        needs_ref: whether `score` reads the reference model's parameters.
        of_logps: for a term that needs no more of the hidden states than the
            log-probabilities of the answers, the second part of `score`: (logps
            [B, L - 1] of each stream, where [B, L - 1] of each, batches) -> (Total,
            Metrics).
        chunk: tokens of each sequence unembedded at a time; None is the default.
        paired: whether row i of each stream belongs to row i of the others; all then
            have the column `pair` with the same values.
        layer: the block whose output `score` reads, after which the forward pass stops;
            None for the final hidden states.
        of_routing: for a term that reads how tokens are distributed over experts alone,
            in place of `score`: (Routing of its rows, batches) -> (Total, Metrics).
    """

    model: Model
    reads: tuple[str, ...]
    score: Callable[[Params, Hidden, Batches, Params | None], Score]
    columns: tuple[str, ...] = ()
    needs_ref: bool = False
    of_logps: Callable[[Hidden, Hidden, Batches], Score] | None = None
    chunk: int | None = None
    layer: int | None = None
    of_routing: Callable[[Routing, Batches], Score] | None = None
    paired: bool = False

    def check(self, streams: Streams) -> None:
        """Raises ValueError for values that only the host can see to be wrong.

        These are ids outside the model's vocabulary, and rows that are not pairs.
        Traced arrays pass; `fit` calls this with every batch.
        """
        found = {name: streams.get(name, {}) for name in self.reads}
        for name, batch in found.items():  # `batches` names what is missing
            if "tokens" in batch:
                _checks.token_ids(f"The term on {name!r}", self.model, batch)
        if self.paired and all("pair" in batch for batch in found.values()):
            columns = {name: batch["pair"] for name, batch in found.items()}
            _checks.pairs("The term on pairs", columns)

    def batches(self, streams: Streams, ref_params: Params | None) -> list[Batch]:
        """The batches that the term reads; raises if it needs something else too."""
        fix = "Add it to your loader."
        _checks.has_keys("The term", "stream", self.reads, streams, fix)
        for stream in self.reads:
            fix = (
                "evaluate.reference_logps makes ref_logps, data.paired makes pair, and "
                "data.encode the others."
            )
            owner = f"The term on {stream!r}"
            _checks.has_keys(owner, "columns", self.columns, streams[stream], fix)
            if self.needs_ref and ref_params is None:
                raise ValueError(
                    f"{owner} needs the reference model, got ref_params=None. Pass "
                    "Frozen(params, ref_params=...) to the step, as Recipe.setup does."
                )
        self.check(streams)
        return [streams[stream] for stream in self.reads]

    def __call__(
        self,
        params: Params,
        streams: Streams,
        ref_params: Params | None,
        key: PRNGKey,
    ) -> Score:
        (score,) = _scores([self], params, streams, ref_params, key)
        return score


@dataclasses.dataclass(frozen=True)
class JointTerm:
    """A weighted sum of terms that has one gradient; see `joint`."""

    parts: tuple[tuple[str, float, BoundTerm], ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return _streams([part for _, _, part in self.parts])

    @property
    def needs_ref(self) -> bool:
        return any(part.needs_ref for _, _, part in self.parts)

    def check(self, streams: Streams) -> None:
        """As that of each part."""
        for _, _, part in self.parts:
            part.check(streams)

    def __call__(
        self,
        params: Params,
        streams: Streams,
        ref_params: Params | None,
        key: PRNGKey,
    ) -> Score:
        parts = [part for _, _, part in self.parts]
        scores = _scores(parts, params, streams, ref_params, key)
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

    The model runs once over the rows of all streams, and there is one gradient tree;
    separate terms cost a tree each. Use it when the losses are only added. Use separate
    terms when the combiner (blur, primal_dual, saliency) needs each gradient, or when a
    weight follows a schedule (combine.weighted_sum).

    Args:
        terms: terms on the same model, by name.
        weights: one number for each term; 1 for every term if None.
    Returns:
        A Term that reports `<name>/loss` of each part before weighting.
    Raises:
        ValueError: without terms, with terms on different models, with a term that no
            `on_*` function made (a half, for example), or a weight that is not finite.
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
                "terms.joint needs terms that an on_* function made, got a "
                f"{type(term).__name__} as {name!r}. Leave it a separate term and add "
                "the gradients with combine.weighted_sum."
            )
    models = [term.model for term in terms.values()]
    if any(model is not models[0] for model in models):
        raise ValueError(
            "terms.joint needs terms on one model, got several models. Leave the terms "
            "separate and add their gradients with combine.weighted_sum."
        )
    return JointTerm(tuple((name, float(weights[name]), terms[name]) for name in terms))


def _scores(
    parts: Sequence[BoundTerm],
    params: Params,
    streams: Streams,
    ref_params: Params | None,
    key: PRNGKey,
) -> list[Score]:
    """The score of every part, from one forward pass over the rows of all streams."""
    of_parts = [part.batches(streams, ref_params) for part in parts]
    model = parts[0].model
    # All parts that need only log-probabilities share one pass of the unembedding: its
    # kernel is read, and its gradient accumulated, once for each chunk instead of once
    # for each chunk and part. The rows of these parts come first.
    on_logps = [part for part in parts if part.of_logps]
    shared = on_logps if len({part.chunk for part in on_logps}) == 1 else []
    others = [part for part in parts if not any(part is x for x in shared)]
    names = _streams([*shared, *others])
    batches = [streams[name] for name in names]
    rows = batches[0] if len(batches) == 1 else _rows(batches)
    cuts, start = {}, 0
    for name, batch in zip(names, batches, strict=True):
        height, length = batch["tokens"].shape
        cuts[name] = (slice(start, start + height), length)
        start += height
    hidden, routing = _run(model, params, rows, [part.layer for part in parts], key)
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

    def routing_of(part):
        return _routing.rows(routing, [cuts[name][0] for name in part.reads])

    def score(part, batches):
        if part.of_routing:
            return part.of_routing(routing_of(part), batches)
        if any(part is other for other in shared):
            return part.of_logps(of(part, logps, 1), of(part, where, 1), batches)
        return part.score(params, of(part, hidden[part.layer]), batches, ref_params)

    scores = [score(*pair) for pair in zip(parts, of_parts, strict=True)]
    if routing is None:
        return scores
    return [
        (total, {**reported, **_routing.metrics(routing_of(part), batches)})
        for part, batches, (total, reported) in zip(
            parts, of_parts, scores, strict=True
        )
    ]


def _run(model, params, rows, layers, key):
    """({layer: hidden states}, routing); the pass ends after the last layer read."""
    inner = sorted({layer for layer in layers if layer is not None})
    if not inner:
        out = model.apply(params, rows, key=key)
        return {None: out.hidden}, out.routing
    until = None if None in layers else inner.pop()
    taps = {"block": inner} if inner else {}
    out = model.apply(params, rows, taps=taps, until=until, key=key)
    tapped = out.taps["block"] if inner else ()
    hidden = {until: out.hidden} | dict(zip(inner, tapped, strict=True))
    return hidden, out.routing


def _streams(parts: Sequence[BoundTerm]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in parts for name in part.reads))


def _rows(batches: list[Batch]) -> Batch:
    """The rows of all batches as one batch: the [B, L] columns that all have, padded to
    the longest, `answer` if any has it, and images of one shape and dtype."""
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

    def pad(x):
        if x.ndim > 2:
            return x
        return jnp.pad(x, ((0, 0), (0, longest - x.shape[1])))

    return {
        name: jnp.concatenate([pad(batch[name]) for batch in batches])
        for name in shared
    }
