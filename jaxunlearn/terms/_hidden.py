# SPDX-License-Identifier: Apache-2.0
"""Terms on hidden states: the forward pass stops after the layer that is read."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, losses
from jaxunlearn.terms._bound import BoundTerm
from jaxunlearn.typing import Array, Model, Total


def on_hidden(
    loss: Callable[..., Array],
    model: Model,
    stream: str,
    *,
    layer: int,
    target: Array | None = None,
    adaptive: float | None = None,
    reference: str = "model",
    tokens: str = "real",
    reduce: str = "sequence",
) -> BoundTerm:
    """A term on the output of one block, beside a fixed target or the reference's.

        vectors = jnp.stack([losses.steering_vector(k, width) for k in keys])
        terms.on_hidden(losses.rmu, model, "forget", layer=7, target=vectors)
        terms.on_hidden(losses.rmu, model, "retain", layer=7)

    Args:
        loss: (hidden [B, L, D], target that broadcasts to it, where=[B, L]) -> [B, L].
        model: one with a site `block` (models.make).
        stream: name of the stream to read.
        layer: index of the block whose output is read; later ones do not run.
        target: [D]; or [K, D], one vector a topic, and then the batch's column `topic`
            [B] int32 says which of them each row has; a topic that is not there makes
            the loss NaN. None takes the reference's states of the same tokens.
        adaptive: makes the target point along `target`, `adaptive` times as long as the
            reference's own state of that token (losses.adaptive_target).
        reference: where the reference's states come from, if the target needs them:
            "model" runs the reference model up to the layer, "column" reads the batch's
            `ref_hidden` [B, L, D].
        tokens: which count: "real" tokens, "answer" tokens, or "all", padding too.
        reduce: "sequence" is the mean over rows of each row's mean over tokens, "token"
            the mean over tokens of all rows.
    Returns:
        A Term whose value is that mean.
    Raises:
        ValueError: for an unknown option, a target that is neither [D] nor [K, D],
            `adaptive` without a target or, when it runs, a layer the model lacks.
    """
    _checks.one_of("on_hidden", ("model", "column"), reference=reference)
    _checks.one_of("on_hidden", ("real", "answer", "all"), tokens=tokens)
    _checks.one_of("on_hidden", ("sequence", "token"), reduce=reduce)
    if target is not None and jnp.ndim(target) not in (1, 2):
        raise ValueError(
            "on_hidden needs a target of shape [D] or [topics, D], got "
            f"{jnp.shape(target)}."
        )
    if adaptive is not None and target is None:
        raise ValueError(
            f"on_hidden needs a target for adaptive={adaptive}, got none. Pass "
            "losses.steering_vector's."
        )
    refers = target is None or adaptive is not None
    by_topic = target is not None and jnp.ndim(target) == 2
    columns = ["tokens", "mask"]
    columns += ["answer"] if tokens == "answer" else []
    columns += ["topic"] if by_topic else []
    columns += ["ref_hidden"] if refers and reference == "column" else []

    def score(params, hidden, batches, ref):
        del params
        (hidden,), (batch,) = hidden, batches
        where = {
            "real": lambda: batch["mask"],
            "answer": lambda: batch["answer"] & batch["mask"],
            "all": lambda: jnp.ones_like(batch["mask"]),
        }[tokens]()
        aim = target
        if by_topic:
            topic = jnp.asarray(batch["topic"])
            topic = jnp.where(topic < 0, len(target), topic)  # -1 is no topic either
            rows = jnp.asarray(target).at[topic]
            aim = rows.get(mode="fill", fill_value=jnp.nan)[:, None]
        if refers:
            if reference == "column":
                states = batch["ref_hidden"]
            else:
                states = model.apply(ref, batch, until=layer).hidden
            states = jax.lax.stop_gradient(states)
            if adaptive is None:
                aim = states
            else:
                aim = losses.adaptive_target(states, aim, scale=adaptive)
        values = loss(hidden, aim, where=where)
        counts = jnp.sum(where, axis=1, dtype=jnp.int32)
        if reduce == "token":
            return Total(jnp.sum(values), jnp.sum(counts)), {}
        means = jnp.sum(values, axis=1) / jnp.maximum(counts, 1).astype(values.dtype)
        return Total(jnp.sum(means), jnp.sum(counts > 0, dtype=jnp.int32)), {}

    needs_ref = refers and reference == "model"
    return BoundTerm(
        model, (stream,), score, tuple(columns), needs_ref=needs_ref, layer=layer
    )
