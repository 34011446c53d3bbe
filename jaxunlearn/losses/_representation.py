# SPDX-License-Identifier: Apache-2.0
"""Losses on hidden states: RMU, which steers the activations of one layer.

The forget term moves hidden states to a random direction; the retain term keeps them at
those of the reference. Both are `rmu`, with different targets.
"""

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, _precision
from jaxunlearn.typing import Array, PRNGKey


def rmu(hidden: Array, target: Array, *, where: Array | None = None) -> Array:
    """Mean squared distance of hidden states to a target: mean_d (hidden - target)^2.

    Forget: target = `steering_vector`. Retain: target = the reference's hidden states
    of the same tokens.

    Args:
        hidden: [..., D] float, states after some block.
        target: [..., D] float, or any shape that broadcasts to it. No gradient flows
            through it.
        where: [...] bool, True where the token counts; None counts all, padding too.
    Returns:
        [...] float32, one value per token, 0 where masked; reduce outside.
    Raises:
        ValueError: if the target does not broadcast, or where has another shape.
    Paper and code: the paper sums over D; its code and this function take the mean.
        WMDP's code averages over all positions. OpenUnlearning averages over labelled
        tokens, but as the mean of the rows' sums times the mean of their inverse
        lengths.
    References: https://arxiv.org/abs/2403.03218
    """
    hidden = _precision.at_least_float32(hidden)
    target = _precision.at_least_float32(jax.lax.stop_gradient(target)).astype(
        hidden.dtype
    )
    _checks.mask("rmu", where, hidden=hidden[..., 0])
    try:
        target = jnp.broadcast_to(target, hidden.shape)
    except ValueError:
        raise ValueError(
            f"rmu needs a target that broadcasts to hidden {hidden.shape}, got "
            f"{target.shape}. Read both after the same layer."
        ) from None
    if where is not None:
        hidden = jnp.where(where[..., None], hidden, 0.0)
        target = jnp.where(where[..., None], target, 0.0)
    return jnp.mean((hidden - target) ** 2, axis=-1)


def steering_vector(key: PRNGKey, width: int, *, coefficient: float = 6.5) -> Array:
    """RMU's target: a random direction of a given length, drawn once per topic.

    The entries are uniform on [0, 1), so all have the same sign, as in the papers; the
    vector is then scaled to length `coefficient`. For several topics, split the key so
    that each gets a different direction.

    Args:
        key: draws the direction.
        width: D, the width of the hidden states to steer.
        coefficient: length, > 0. RMU uses 6.5 for Zephyr-7B, OpenUnlearning 2.
    Returns:
        [D] float32.
    Raises:
        ValueError: if width < 1 or coefficient <= 0.
    References: https://arxiv.org/abs/2403.03218
    """
    _checks.positive_int("steering_vector", width=width)
    _checks.positive("steering_vector", coefficient=coefficient)
    direction = jax.random.uniform(key, (width,), jnp.float32)
    return coefficient * direction / jnp.linalg.norm(direction)


def adaptive_target(
    ref_hidden: Array, direction: Array, *, scale: float = 5.0
) -> Array:
    """Adaptive RMU's target: a direction scaled to the norm of the reference's state.

    Computes scale * |ref_hidden| * direction / |direction| for every token, so the same
    scale can be used for layers whose states differ in norm.

    Args:
        ref_hidden: [..., D] float, hidden states of the reference.
        direction: [D] float, such as `steering_vector`'s, or [..., D] that broadcasts
            to ref_hidden.
        scale: beta of the paper, > 0.
    Returns:
        [..., D] float32, a target for `rmu`.
    Raises:
        ValueError: if scale <= 0 or the widths differ.
    References: https://arxiv.org/abs/2408.06223
    """
    _checks.positive("adaptive_target", scale=scale)
    ref_hidden = _precision.at_least_float32(ref_hidden)
    direction = _precision.at_least_float32(direction).astype(ref_hidden.dtype)
    if direction.shape[-1] != ref_hidden.shape[-1]:
        raise ValueError(
            "adaptive_target needs a direction as wide as ref_hidden, got widths "
            f"{direction.shape[-1]} and {ref_hidden.shape[-1]}."
        )
    size = jnp.linalg.norm(ref_hidden, axis=-1, keepdims=True)
    length = jnp.linalg.norm(direction, axis=-1, keepdims=True)
    return scale * size * (direction / length)
