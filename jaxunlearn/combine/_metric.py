# SPDX-License-Identifier: Apache-2.0
"""BLUR's products in Adam's metric, for the step that Adam takes and not the one it is
given.

    tx = combine.adam_metric(optax.chain(combine.blur(gamma=0.1), optax.adamw(1e-5)))
"""

import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks


def adam_metric(
    inner: optax.GradientTransformation, *, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Hands `blur` inside the chain the metric of the Adam inside the chain.

    Adam moves by P^-1 u, where P = sqrt(v) + eps is diagonal, so that blur's promise
    <u, l> = gamma |l|^2 is not that of the step. With every product <a, b> replaced by
    <a, P^-1 b>,

        xi = gamma - <h, P^-1 l> / <l, P^-1 l>,  <P^-1 u, l> = gamma <l, P^-1 l>.

    P is that of the second moment before this step (of ones before the first), as this
    step's depends on u. The promise is for the step without momentum: with it, Adam
    averages the u of several steps.

    Args:
        inner: a chain with one `blur` and, after it, one Adam (adam, adamw, lamb: any
            with optax's scale_by_adam).
        b2, eps: as that Adam has them.
    Returns:
        A transformation like `inner`, with its state; norms, cosine and xi in blur's
        stats are then those of this metric. It costs no memory and one more pass over
        the moments.
    Raises:
        ValueError: if b2 is not in (0, 1), eps <= 0 or, in init, the chain lacks either
            part or has two, or its Adam leaves out leaves.
    References: a consequence of https://arxiv.org/abs/2506.08164, which projects before
        Adam.
    """
    _checks.positive("adam_metric", b2=b2, eps=eps)
    if b2 >= 1:
        raise ValueError(f"adam_metric needs b2 below 1, got b2={b2}.")
    inner = optax.with_extra_args_support(inner)

    def init(params):
        state = inner.init(params)
        for part, name in (("BlurState", "blur"), ("ScaleByAdamState", "Adam")):
            found = optax.tree_utils.tree_get_all_with_path(state, part)
            if len(found) != 1:
                raise ValueError(
                    f"adam_metric needs a chain with one {name}, got {len(found)}. "
                    "Use optax.chain(combine.blur(...), optax.adamw(...))."
                )
        adam = optax.tree_utils.tree_get(state, "ScaleByAdamState")
        if jax.tree.structure(adam.nu) != jax.tree.structure(params):
            raise ValueError(
                "adam_metric needs an Adam over all leaves that train, got one over "
                f"{jax.tree.structure(adam.nu)}. Leave leaves out by trees.split "
                "rather than optax.masked."
            )
        return state

    def update(grads, state, params=None, **extra):
        adam = optax.tree_utils.tree_get(state, "ScaleByAdamState")
        begun = adam.count > 0
        steps = jnp.maximum(adam.count, 1).astype(jnp.float32)
        known = 1 - jnp.float32(b2) ** steps

        def scale(v):
            size = jnp.sqrt(v.astype(jnp.float32) / known) + jnp.float32(eps)
            return jnp.where(begun, jax.lax.rsqrt(size), 1)

        metric = jax.tree.map(scale, adam.nu)
        return inner.update(grads, state, params, metric=metric, **extra)

    return optax.GradientTransformationExtraArgs(init, update)
