# SPDX-License-Identifier: Apache-2.0
"""An optimizer's moments in one or two bytes an entry in place of four."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks, trees
from jaxunlearn.combine._rounding import stochastic
from jaxunlearn.typing import Array, PRNGKey, PyTree

MOMENTS = ("float32", "bfloat16", "int8")

_FIELDS = {"mu", "nu", "trace"}  # of optax's states of Adam, RMSProp, Lion and momentum
_NO_PARAMS = "with_moments needs params in update, got None. Pass what trains."
_MIN_SIZE = 4096  # smaller leaves stay float32: scales of norms, biases
# The largest code and the power, of signed moments and of second moments.
_SIGNED, _SQUARES = (127, 4), (255, 8)


class MomentsState(NamedTuple):
    """State of `with_moments`.

    Attributes:
        count: int32[], updates so far.
        scales: path of a moment in `inner` -> [..., 1] float32, the largest absolute
            value of each row; empty unless moments are "int8".
        inner: the wrapped chain's state, with the moments as they are stored.
    """

    count: Array
    scales: dict[str, Array]
    inner: PyTree


def with_moments(
    tx: optax.GradientTransformation, moments: str = "int8", *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """A chain whose moments are stored in fewer bytes; it computes in float32.

    The moments are the float32 arrays of the state in a field `mu`, `nu` or `trace`
    with the path and the shape of a param of 4,096 entries or more and two dimensions
    or more. Before an update they become float32, and afterwards they are stored again:

    | moments | stored as | bytes of Adam's state, for each param |
    | --- | --- | --- |
    | "float32" | unchanged: returns tx | 8 |
    | "bfloat16" | bfloat16 | 4 |
    | "int8" | s sign(c) (abs(c) / 127)^4, `nu` as s (c / 255)^8 | 2 |

    A row is all entries along the last axis, and s is its largest absolute value, one
    float32 for each row. The powers give codes next to each other similar ratios over
    the whole range (1e8 and 1e19), so that small second moments are not rounded to 0;
    an entry other than 0 never is.

    Each entry is rounded to one of the two values around it, with itself as the mean.
    Rounding to the nearest would stop second moments: a decay of 0.999 changes them by
    a tenth of the distance between two values.

    optax.adamw(mu_dtype="bfloat16") stores the first moment alone in bfloat16, without
    this function. For params below float32 put `with_rounding` around this function.

    Args:
        tx: the chain, its combiner included.
        moments: one of the three.
        seed: of the random draws, a whole number >= 0.
    Returns:
        A chain for the same params and gradients. Its state is placed on a mesh by the
        same rules as the params.
    Raises:
        ValueError: if moments is unknown or seed < 0.
    References: storing Adam's moments in 8 bits as in Dettmers et al. 2021,
        https://arxiv.org/abs/2110.02861, whose codes and blocks are others.
    """
    _checks.one_of("with_moments", MOMENTS, moments=moments)
    _checks.not_negative("with_moments", seed=seed)
    tx = optax.with_extra_args_support(tx)
    if moments == "float32":
        return tx

    def stored(state, params, key):
        """(the state with its moments as they are stored, scales)"""
        scales, places = {}, trees.paths(params)

        def leaf(path, x):
            if not _is_moment(path, x, places):
                return x
            one = jax.random.fold_in(key, len(drawn))
            drawn.append(path)
            if moments == "bfloat16":
                return stochastic(x, jnp.dtype(jnp.bfloat16), one)
            codes, scales[path] = _encoded(x, one, _form(path))
            return codes

        drawn = []
        return trees.map_with_path(leaf, state), scales

    def restored(state):
        def leaf(path, x):
            if path in state.scales:
                return _decoded(x, state.scales[path], _form(path))
            wide = x.dtype == jnp.bfloat16 and _FIELDS & set(path.split("/"))
            return x.astype(jnp.float32) if wide else x

        return trees.map_with_path(leaf, state.inner)

    def init(params):
        inner, scales = stored(tx.init(params), params, jax.random.key(seed))
        return MomentsState(jnp.int32(0), scales, inner)

    def update(grads, state, params=None, **extra):
        if params is None:
            raise ValueError(_NO_PARAMS)
        updates, inner = tx.update(grads, restored(state), params, **extra)
        count = state.count + 1
        key = jax.random.fold_in(jax.random.key(seed), count)
        inner, scales = stored(inner, params, key)
        return updates, MomentsState(count, scales, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_moment(path: str, x: Array, params: Mapping[str, Array]) -> bool:
    if x.dtype != jnp.float32 or x.ndim < 2 or x.size < _MIN_SIZE:
        return False
    names = path.split("/")
    at = next((i for i, name in enumerate(names) if name in _FIELDS), None)
    if at is None:
        return False
    like = params.get("/".join(names[at + 1 :]))
    return like is not None and like.shape == x.shape


def _form(path: str) -> tuple[int, int]:
    """The largest code and the power of a moment's codes."""
    return _SQUARES if "nu" in path.split("/") else _SIGNED


def _encoded(x: Array, key: PRNGKey, form: tuple[int, int]) -> tuple[Array, Array]:
    """(codes int8, or uint8 of second moments, scales [..., 1])"""
    largest, power = form
    size = jnp.abs(x)
    scale = jnp.max(size, axis=-1, keepdims=True)
    part = size / jnp.where(scale > 0, scale, 1.0)
    below = jnp.floor(largest * part ** (1 / power))
    below = jnp.clip(below, 0, largest - 1)
    low, high = ((code / largest) ** power for code in (below, below + 1))
    up = jax.random.uniform(key, x.shape, jnp.float32) * (high - low) < part - low
    code = jnp.maximum(below + up.astype(jnp.float32), jnp.sign(part))
    if form == _SQUARES:
        return code.astype(jnp.uint8), scale
    return (jnp.sign(x) * code).astype(jnp.int8), scale


def _decoded(codes: Array, scale: Array, form: tuple[int, int]) -> Array:
    largest, power = form
    code = codes.astype(jnp.float32)
    return scale * jnp.sign(code) * (jnp.abs(code) / largest) ** power
