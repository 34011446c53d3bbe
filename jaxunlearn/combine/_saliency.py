# SPDX-License-Identifier: Apache-2.0
"""SURE: updates only the units on which the forget gradient is large.

If unlearning hardly changed the weights, quantization may round them back to those of
the original model. A larger learning rate prevents this, and updating only salient
units limits the damage to what is retained. `saliency` wraps a full optimizer chain,
combiner included:

    tx = combine.saliency(
        optax.chain(combine.weighted_sum({"forget": 1.0, "retain": 20.0}),
                    optax.clip_by_global_norm(1.0), optax.adamw(1e-4)),
        percentile=90,
    )
"""

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks, sharding, trees
from jaxunlearn.combine import _common
from jaxunlearn.typing import Array, Params, PyTree, Rules

Units = Sequence[tuple[str, Sequence[int | None]]]

ROWS: Units = (
    (r"embedding", (1, None)),
    (r"kernel|lora_[ab]", (None, 1)),
    (r".*", ()),
)
"""A unit is the weights of one output of a kernel [..., in, out] or one row of an
embedding [tokens, width]; in all other leaves it is a single entry."""

_UNITS: Mapping[str, Units] = {
    "row": ROWS,
    "module": ((r"embedding|kernel|lora_[ab]", (None, None)), (r".*", (None,))),
    "weight": ((r".*", ()),),
}


class SaliencyState(NamedTuple):
    """Attributes:
    count: int32[], steps taken.
    stats: float32[] scalars of the last step: `threshold`, gamma; `kept`, the fraction
        of all entries that are updated.
    mask: with refresh="once", bool arrays that broadcast against the leaves, True where
        an entry is updated; else ().
    inner: the state of the inner chain.
    """

    count: Array
    stats: dict[str, Array]
    mask: Params
    inner: PyTree


def saliency(
    inner: optax.GradientTransformation,
    *,
    term: str = "forget",
    percentile: float = 90.0,
    unit: str | Units = "row",
    refresh: str = "step",
    apply_to: str = "update",
    compat: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Masks a chain so that it updates only units with a large gradient of one term.

    The score of unit i is s_i = |g_i|, the Euclidean norm of the term's gradient over
    the entries of the unit. Let gamma be the percentile of the scores of all units in
    the model. Then

        m_i = 1[s_i >= gamma],   update = m * inner({k: m * g_k})

    The gradients are masked too, before the inner combiner. Gradient clipping and
    projections then see only the entries that are updated (`blur` guarantees
    <u, g_lower> = gamma |g_lower|^2 on them), and the moments of other entries decay.
    Guarantees, bit for bit:

        an entry whose unit has s_i < gamma does not change, whatever momentum or weight
            decay the inner chain has;
        units with s_i = gamma are updated, so at least one unit is; of n units with
            distinct scores, n - ceil(percentile / 100 * (n - 1)) are updated.

    | version | settings |
    | --- | --- |
    | the paper | unit="module", refresh="once" |
    | the released code, with its mask applied | the defaults |
    | the released code as it is | compat="released" |

    The percentile is interpolated linearly, as in NumPy. Under >= this is the same as
    the smallest score of rank at least percentile / 100 * (units - 1). It is found by
    bisection on the bits of float32 scores, with 31 counts: a sharded tree is never
    gathered or sorted, and the mask on a mesh equals that on one device (except that
    the scores of rows are sums, whose rounding may depend on the mesh).

    Args:
        inner: the full chain from {term: gradients} to an update: a combiner, then
            clipping and the optimizer. If `inner` were only a combiner, the optimizer
            after it would also change masked entries.
        term: the term whose gradient is scored.
        percentile: in [0, 100]; 0 updates everything. The paper uses 90 and 99.
        unit: what one score belongs to. "row": a row of an embedding, the weights of
            one output of a kernel, or an entry of any other leaf. "module": each
            kernel, embedding, bias and scale, per layer. "weight": every entry. Or
            ordered rules (pattern of leaf paths, sizes), of which the first that
            matches applies. Sizes describe the last axes of a leaf: None spans the
            axis, n makes blocks of n neighbours; along the axes before them (such as
            layers) every index is separate. For the heads of the decoder:
            [("attention/[qkv]/kernel", (None, head_dim)), *combine.ROWS]. A
            convolution [h, w, in, out] needs (None, None, None, 1).
        refresh: "step" computes the mask at every step; "once" uses the mask of the
            first step throughout, which should therefore have a large batch.
        apply_to: "update", or "grad" to mask only the gradients: momentum and weight
            decay then change entries outside the mask.
        compat: "released" computes the mask without applying it and counts the term's
            gradient twice, which is the effect of the released code.
    Returns:
        A transformation like `inner`; its `update` takes `rules` as `blur` does. Its
        state is a `SaliencyState`.
    Raises:
        ValueError: if percentile is outside [0, 100] or a setting is unknown; when
            traced, if no rule of `unit` matches a leaf or its sizes do not divide the
            axes. KeyError: in update, if the term has no gradients.
    Paper and code: the paper scores modules once, at the original weights. Its code
        scores rows (output neurons, rows of embeddings, entries of vectors) at every
        step, runs the backward pass of the forget loss twice, and puts the mask into a
        method that is never called.
    References: https://arxiv.org/abs/2410.16454
    """
    if not 0 <= percentile <= 100:
        raise ValueError(
            f"saliency needs a percentile in [0, 100], got percentile={percentile}."
        )
    if isinstance(unit, str):
        _checks.one_of("saliency", tuple(_UNITS), unit=unit)
    _checks.one_of("saliency", ("step", "once"), refresh=refresh)
    _checks.one_of("saliency", ("update", "grad"), apply_to=apply_to)
    _checks.one_of("saliency", (None, "released"), compat=compat)
    units = _UNITS[unit] if isinstance(unit, str) else tuple(unit)
    inner = optax.with_extra_args_support(inner)
    released = compat == "released"

    def init(params):
        mask = ()
        if refresh == "once":
            mask = trees.map_with_path(
                lambda path, x: jnp.zeros(_mask_shape(x, _sizes(path, x, units)), bool),
                params,
            )
        stats = {name: jnp.zeros([], jnp.float32) for name in ("threshold", "kept")}
        return SaliencyState(jnp.zeros([], jnp.int32), stats, mask, inner.init(params))

    def update(grads, state, params=None, *, rules=None, **extra):
        _common.has_terms("saliency", grads, (term,))
        _common.same_trees("saliency", {term: grads[term], **grads})

        def measure():
            return _salient(grads[term], units, percentile, rules)

        mask, stats = state.mask, state.stats
        if refresh == "step":
            mask, stats = measure()
        else:
            mask, stats = jax.lax.cond(state.count == 0, measure, lambda: (mask, stats))
        if released:
            grads = {**grads, term: jax.tree.map(lambda g: 2 * g, grads[term])}
        else:
            grads = {name: _masked(mask, g) for name, g in grads.items()}
        updates, new = inner.update(grads, state.inner, params, rules=rules, **extra)
        if apply_to == "update" and not released:
            updates = _masked(mask, updates)
        count = optax.safe_increment(state.count)
        kept = mask if refresh == "once" else ()
        return updates, SaliencyState(count, stats, kept, new)

    return optax.GradientTransformationExtraArgs(init, update)


def _masked(mask: Params, tree: Params) -> Params:
    return jax.tree.map(lambda m, x: jnp.where(m, x, jnp.zeros_like(x)), mask, tree)


def _sizes(path: str, x: Array, units: Units) -> tuple[int, ...]:
    """Number of entries that a unit of the leaf spans along each axis."""
    name = path.split(f"/{trees.LAYERS}")[0]  # drops a selection of layers
    for rule, sizes in units:
        if not re.fullmatch(f"(?:.*/)?(?:{rule})", name):
            continue
        if len(sizes) > x.ndim > 0:
            raise ValueError(
                f"saliency needs at most {x.ndim} sizes in the rule of unit for "
                f"{path!r} of shape {x.shape}, got {tuple(sizes)}. Add a rule for it "
                "before this one."
            )
        sizes = (*(1,) * (x.ndim - len(sizes)), *sizes)[: x.ndim]
        sizes = tuple(
            a if n is None else n for a, n in zip(x.shape, sizes, strict=True)
        )
        if any(n < 1 or a % n for a, n in zip(x.shape, sizes, strict=True)):
            raise ValueError(
                f"saliency needs sizes of unit that divide the shape {x.shape} of "
                f"{path!r}, got {sizes}. Change its rule."
            )
        return sizes
    raise ValueError(
        f"saliency needs a rule of unit for every leaf, got none for {path!r}. Add "
        "*combine.ROWS at the end of unit."
    )


def _mask_shape(x: Array, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the leaf, with 1 for the axes that a unit spans."""
    return tuple(1 if n == a else a for a, n in zip(x.shape, sizes, strict=True))


def _salient(
    grads: Params, units: Units, percentile: float, rules: Rules | None
) -> tuple[Params, dict[str, Array]]:
    """(the mask, its stats)."""
    leaves = trees.paths(grads)
    sizes = {path: _sizes(path, x, units) for path, x in leaves.items()}
    single = {p: [x] for p, x in leaves.items() if math.prod(sizes[p]) == 1}
    scores = {p: _scores(x, sizes[p]) for p, x in leaves.items() if p not in single}
    pool = [jnp.ravel(x) for x in scores.values()]
    ranked = single | ({"units": [jnp.concatenate(pool)]} if pool else {})
    rules = None if rules is None else (("units", ()), *rules)
    bits = _order_statistic(ranked, percentile, rules)

    def mask(path, x):
        if path in single:
            return _bits(x) >= bits
        large, shape = _bits(scores[path]) >= bits, _mask_shape(x, sizes[path])
        for axis, (size, n) in enumerate(zip(shape, sizes[path], strict=True)):
            if size > 1 and n > 1:
                large = jnp.repeat(large, n, axis=axis)
        return large

    masks = trees.map_with_path(mask, grads)
    size = sum(x.size for x in leaves.values())
    moving = [
        jnp.mean(m, dtype=jnp.float32) * (x.size / size)
        for m, x in zip(jax.tree.leaves(masks), leaves.values(), strict=True)
    ]
    threshold = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return masks, {"threshold": threshold, "kept": sum(moving)}


def _scores(x: Array, sizes: tuple[int, ...]) -> Array:
    """Norm of each unit, float32, replicated on every device.

    Entries are divided by the largest before they are squared: in float32 the square of
    1e-23 is 0 and that of 1e20 is inf.
    """
    shape = [
        n for a, size in zip(x.shape, sizes, strict=True) for n in (a // size, size)
    ]
    within = tuple(range(1, len(shape), 2))
    x = jnp.abs(x.astype(jnp.float32)).reshape(shape)
    largest = jnp.max(x, axis=within, keepdims=True)
    scale = jnp.where(largest >= jnp.finfo(jnp.float32).tiny, largest, 1.0)
    norms = jnp.squeeze(scale, within) * jnp.sqrt(jnp.sum((x / scale) ** 2, within))
    return sharding.constrain(norms, *(None,) * norms.ndim)


def _bits(x: Array) -> Array:
    """uint32 numbers that are ordered as |x| is; nan is the largest."""
    wide = jnp.abs(x.astype(jnp.float32))
    return jax.lax.bitcast_convert_type(wide, jnp.uint32)


def _order_statistic(
    leaves: Mapping[str, Sequence[Array]], percentile: float, rules: Rules | None
) -> Array:
    """The bits of the smallest |entry| such that at least `percentile` percent of the
    others are at most as large."""
    count = sum(math.prod(x.shape) for (x,) in leaves.values())
    if not count:
        raise ValueError("saliency needs gradients, got a tree without entries.")
    # Exact in decimals: 99.9 means 999/10, not the nearest float.
    rank = math.ceil(Fraction(str(percentile)) * (count - 1) / 100)
    needed = divmod(rank + 1, 2**16)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2

        def below(_, x):
            # The number of entries of one matrix fits into int32; that of a stack of
            # matrices may not.
            return _digits(
                jnp.sum(_bits(x) <= middle, axis=_last_two(x), dtype=jnp.int32)
            )

        (digits,) = sharding.sums(below, leaves, [range(len(leaves))], rules)
        upper, lower = _carried(digits)
        enough = (upper > needed[0]) | ((upper == needed[0]) & (lower >= needed[1]))
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    bounds = (jnp.uint32(0), jnp.uint32(0x7FFFFFFF))
    return jax.lax.fori_loop(0, 31, halve, bounds)[1]


def _digits(counts: Array) -> tuple[Array, Array, Array]:
    """The sum of counts as three int32 (bits from 16 up, bits 8 to 15, bits 0 to 7).

    They can be added over leaves and devices: 8 million of the two lower digits fit
    into int32.
    """
    lower = jnp.sum(counts & 0xFFFF)
    upper, lower = jnp.sum(counts >> 16) + (lower >> 16), lower & 0xFFFF
    return upper, lower >> 8, lower & 0xFF


def _carried(digits: Array) -> tuple[Array, Array]:
    """(sum >> 16, sum & 0xFFFF) of a sum of `_digits`."""
    upper, middle, lower = digits
    middle += lower >> 8
    return upper + (middle >> 8), (middle & 0xFF) << 8 | lower & 0xFF


def _last_two(x: Array) -> tuple[int, ...]:
    return tuple(range(x.ndim))[-2:]
