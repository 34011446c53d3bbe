# SPDX-License-Identifier: Apache-2.0
"""Terms on hidden states: the forward pass stops after the layer that is read."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, losses
from jaxunlearn.terms import _inputs
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
    """A term on the output of one block, compared with a fixed target or with the
    reference model's output.

        vectors = jnp.stack([losses.steering_vector(k, width) for k in keys])
        terms.on_hidden(losses.rmu, model, "forget", layer=7, target=vectors)
        terms.on_hidden(losses.rmu, model, "retain", layer=7)

    Args:
        loss: (hidden [B, L, D], target that broadcasts to it, where=[B, L]) -> [B, L].
        model: one with a site `block` (models.make).
        stream: name of the stream to read.
        layer: index of the block whose output is read; later ones do not run.
        target: [D]; or [K, D], one vector a topic, and then the batch's column `topic`
            [B] int32 gives each row's topic; a topic that does not exist makes the loss
            NaN. None takes the reference's states of the same tokens.
        adaptive: scales the target to `adaptive` times the norm of the reference's
            state of that token (losses.adaptive_target).
        reference: the source of the reference's states, if the target needs them:
            "model" runs the reference model up to the layer, "column" reads the batch's
            `ref_hidden` [B, L, D].
        tokens: which count: "real" tokens, "answer" tokens, or "all", with padding.
        reduce: "sequence" is the mean over rows of each row's mean over tokens, "token"
            the mean over tokens of all rows.
    Returns:
        A Term whose value is that mean.
    Raises:
        TypeError: for swapped arguments, or a loss that does not take `where`.
        ValueError: for an unknown option, a target that is neither [D] nor [K, D],
            `adaptive` without a target or, when it runs, a layer that the model lacks
            or a loss that returns another shape than [B, L].
    """
    _inputs.check("on_hidden", loss, model, stream)
    _inputs.takes_where("on_hidden", loss)
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
    reads_reference = target is None or adaptive is not None
    by_topic = target is not None and jnp.ndim(target) == 2
    columns = ["tokens", "mask"]
    columns += ["answer"] if tokens == "answer" else []
    columns += ["topic"] if by_topic else []
    columns += ["ref_hidden"] if reads_reference and reference == "column" else []

    def score(params, hidden, batches, ref_params):
        del params
        (hidden,), (batch,) = hidden, batches
        where = {
            "real": lambda: batch["mask"],
            "answer": lambda: batch["answer"] & batch["mask"],
            "all": lambda: jnp.ones_like(batch["mask"]),
        }[tokens]()
        goal = target
        if by_topic:
            topic = jnp.asarray(batch["topic"])
            # A negative index would count from the end; here it is not a topic.
            topic = jnp.where(topic < 0, len(target), topic)
            rows = jnp.asarray(target).at[topic]
            goal = rows.get(mode="fill", fill_value=jnp.nan)[:, None]
        if reads_reference:
            if reference == "column":
                states = batch["ref_hidden"]
            else:
                states = model.apply(ref_params, batch, until=layer).hidden
            states = jax.lax.stop_gradient(states)
            if adaptive is None:
                goal = states
            else:
                goal = losses.adaptive_target(states, goal, scale=adaptive)
        values = loss(hidden, goal, where=where)
        _inputs.not_averaged("on_hidden", loss, values, where.shape, "token")
        counts = jnp.sum(where, axis=1, dtype=jnp.int32)
        if reduce == "token":
            return Total(jnp.sum(values), jnp.sum(counts)), {}
        means = jnp.sum(values, axis=1) / jnp.maximum(counts, 1).astype(values.dtype)
        return Total(jnp.sum(means), jnp.sum(counts > 0, dtype=jnp.int32)), {}

    needs_ref = reads_reference and reference == "model"
    return BoundTerm(
        model, (stream,), score, tuple(columns), needs_ref=needs_ref, layer=layer
    )
