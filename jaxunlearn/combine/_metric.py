# SPDX-License-Identifier: Apache-2.0
"""BLUR with inner products in Adam's metric, so that it projects the step Adam takes.

For example:

    tx = combine.adam_metric(optax.chain(combine.blur(gamma=0.1), optax.adamw(1e-5)))
"""

import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks


def adam_metric(
    inner: optax.GradientTransformation, *, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Passes the metric of the Adam in a chain to the `blur` in the same chain.

    Adam moves by P^-1 u, where P = sqrt(v) + eps is diagonal, so the guarantee of
    `blur`, <u, l> = gamma |l|^2, does not hold for the step. With every product <a, b>
    replaced by <a, P^-1 b>,

        xi = gamma - <h, P^-1 l> / <l, P^-1 l>,  <P^-1 u, l> = gamma <l, P^-1 l>.

    P is computed from the second moment before this step (P = 1 at the first step),
    because the moment of this step depends on u. The guarantee is for a step without
    momentum; with momentum Adam averages the u of several steps.

    Args:
        inner: a chain with one `blur` and, after it, one Adam (adam, adamw, lamb: any
            optimizer built on optax.scale_by_adam).
        b2, eps: the values of that Adam.
    Returns:
        A transformation like `inner`, with the state of `inner`. The norms, cosine and
        xi in the stats of `blur` are those in this metric. It needs no extra memory and
        one more pass over the moments.
    Raises:
        ValueError: if b2 is not in (0, 1) or eps <= 0; in init, if the chain does not
            have exactly one of each, or its Adam does not cover all leaves.
    References: this follows from https://arxiv.org/abs/2506.08164, which projects
        before Adam.
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
                f"{jax.tree.structure(adam.nu)}. To freeze leaves, use trees.split "
                "instead of optax.masked."
            )
        return state

    def update(grads, state, params=None, **extra):
        adam = optax.tree_utils.tree_get(state, "ScaleByAdamState")
        has_moment = adam.count > 0
        steps = jnp.maximum(adam.count, 1).astype(jnp.float32)
        bias_correction = 1 - jnp.float32(b2) ** steps

        def scale(v):
            size = jnp.sqrt(v.astype(jnp.float32) / bias_correction) + jnp.float32(eps)
            return jnp.where(has_moment, jax.lax.rsqrt(size), 1)

        metric = jax.tree.map(scale, adam.nu)
        return inner.update(grads, state, params, metric=metric, **extra)

    return optax.GradientTransformationExtraArgs(init, update)
