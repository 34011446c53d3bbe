# SPDX-License-Identifier: Apache-2.0
"""SURE: only the units of the model that the forget gradient is large on may move.

An unlearned model whose weights have hardly moved may round back to the original when
it is quantized. Larger rates prevent that, and confining them to salient units spares
what is retained. `saliency` goes around a whole optimizer chain, combiner included:

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
"""The weights that lead to one output of a kernel [..., in, out], one token of an
embedding [tokens, width]; all else entry by entry."""

MODULES: Units = (
    (r"embedding|kernel|lora_[ab]", (None, None)),
    (r".*", (None,)),
)
"""Each kernel, embedding, bias and scale as a whole, layer by layer."""

WEIGHTS: Units = ((r".*", ()),)
"""Every entry by itself."""

_UNITS = {"row": ROWS, "module": MODULES, "weight": WEIGHTS}


class SaliencyState(NamedTuple):
    """Attributes:
    count: int32[], steps taken.
    stats: float32[] scalars of the last step: `threshold`, gamma; `kept`, the fraction
        of all entries that may move.
    mask: with refresh="once", bool arrays that broadcast against the leaves, True
        where an entry may move; else ().
    inner: the state of the chain inside.
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
    """Lets only units move on which the gradient of a term is large.

    A unit i is scored by s_i = |g_i|, the Euclidean norm of the term's gradient over
    its entries. With gamma the percentile of all scores, of the whole model together,

        m_i = 1[s_i >= gamma],   update = m * inner({k: m * g_k})

    Gradients are masked too, before the combiner inside: a norm to clip by, or a
    projection, is then that of what moves (`blur` keeps <u, g_lower> = gamma
    |g_lower|^2 on it), and moments outside fade. Guarantees, bit for bit:

        an entry whose unit has s_i < gamma does not change, whatever momentum or
            weight decay the chain inside has;
        s_i = gamma counts as large, so that at least one unit moves; of n units with
            scores that differ n - ceil(percentile / 100 * (n - 1)) do.

    | form | settings |
    | --- | --- |
    | the paper's | unit="module", refresh="once" |
    | its code with the mask really applied | the defaults |
    | its code as released | compat="released" |

    The percentile interpolates linearly, as NumPy's does; compared with >=, that is the
    least score of rank at least percentile / 100 * (units - 1). It is found by
    bisection on the bits of float32 scores: 31 counts of how many lie below, so that a
    tree on a mesh is never gathered or sorted, and the mask there is that of one device
    (scores of rows are sums, whose rounding may differ between meshes).

    Args:
        inner: the chain that makes an update of {term: gradients}: a combiner first,
            then clipping and the optimizer. A combiner alone would leave the optimizer
            behind it to move what is masked.
        term: whose gradient is scored.
        percentile: in [0, 100]; 0 lets everything move. The paper took 90 and 99.
        unit: "row", "module", "weight" (see ROWS, MODULES, WEIGHTS), or rules of your
            own, ordered (pattern of leaf paths, sizes). Sizes speak of a leaf's last
            axes: None for a whole axis, n for blocks of n neighbours; axes before are
            taken entry by entry, as layers are. Heads of the decoder:
            [("attention/[qkv]/kernel", (None, head_dim)), *combine.ROWS]. A
            convolution [h, w, in, out] needs (None, None, None, 1).
        refresh: "step" scores every step anew; "once" keeps the mask of the first
            step, so give that one a large batch.
        apply_to: "update", or "grad" to mask gradients only: momentum and weight decay
            then move what the mask of this step leaves out.
        compat: "released" measures the mask but never applies it, and counts the
            term's gradient twice, as the released code comes to do.
    Returns:
        A transformation like `inner`; its `update` takes `rules` as `blur` does. Its
        state is a `SaliencyState`.
    Raises:
        ValueError: if percentile is outside [0, 100], a setting is unknown or, when
            traced, a leaf fits no rule of `unit` or its axes do not divide. KeyError:
            in update, if the term has no gradients.
    Paper and code: the paper scores modules once, at the original weights; its code
        scores rows (output neurons, tokens of embeddings, entries of vectors) at every
        step, goes backward twice through the forget loss and puts the mask into a
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
    """How many entries a unit of the leaf spans along each axis."""
    name = path.split(f"/{trees.LAYERS}")[0]  # layers of a kernel are kernels too
    for rule, sizes in units:
        if not re.fullmatch(f"(?:.*/)?(?:{rule})", name):
            continue
        if len(sizes) > x.ndim > 0:
            raise ValueError(
                f"saliency needs at most {x.ndim} sizes for the axes of {path!r}, "
                f"{x.shape}, got {tuple(sizes)}. Put a rule for it before this one."
            )
        sizes = (*(1,) * (x.ndim - len(sizes)), *sizes)[: x.ndim]
        sizes = tuple(
            a if n is None else n for a, n in zip(x.shape, sizes, strict=True)
        )
        if any(n < 1 or a % n for a, n in zip(x.shape, sizes, strict=True)):
            raise ValueError(
                f"saliency needs units whose sizes divide the axes of {path!r}, "
                f"{x.shape}, got {sizes}."
            )
        return sizes
    raise ValueError(
        f"saliency needs a rule of unit for every leaf, got none for {path!r}. Put "
        "*combine.ROWS at the end."
    )


def _mask_shape(x: Array, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """That of the leaf, but 1 along axes that a unit spans."""
    return tuple(1 if n == a else a for a, n in zip(x.shape, sizes, strict=True))


def _salient(
    grads: Params, units: Units, percentile: float, rules: Rules | None
) -> tuple[Params, dict[str, Array]]:
    """The mask and its stats."""
    leaves = trees.paths(grads)
    sizes = {path: _sizes(path, x, units) for path, x in leaves.items()}
    scores = {p: _scores(x, sizes[p]) for p, x in leaves.items() if _joins(sizes[p])}
    single = {p: [x] for p, x in leaves.items() if not _joins(sizes[p])}
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


def _joins(sizes: tuple[int, ...]) -> bool:
    return math.prod(sizes) > 1


def _scores(x: Array, sizes: tuple[int, ...]) -> Array:
    """Norm of each unit, float32, whole on every device. The largest entry is divided
    out, as squares of 1e-23 would be lost and those of 1e20 infinite."""
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
    """uint32 in the order of |x|; nan comes last."""
    wide = jnp.abs(x.astype(jnp.float32))
    return jax.lax.bitcast_convert_type(wide, jnp.uint32)


def _order_statistic(
    leaves: Mapping[str, Sequence[Array]], percentile: float, rules: Rules | None
) -> Array:
    """The bits of the least |entry| with at least percentile % of the others below or
    equal to it."""
    count = sum(math.prod(x.shape) for (x,) in leaves.values())
    if not count:
        raise ValueError("saliency needs gradients, got a tree without entries.")
    # As typed: 99.9 is meant, not the float next to it.
    rank = math.ceil(Fraction(str(percentile)) * (count - 1) / 100)
    needed = divmod(rank + 1, 2**16)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2

        def below(_, x):
            # An int32 holds the entries of a matrix, not those of a stack of them.
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
    """Three int32 that stand for the sum of counts and add up over leaves and devices,
    8 million of these before the lower two, of 8 bits, leave an int32."""
    lower = jnp.sum(counts & 0xFFFF)
    upper, lower = jnp.sum(counts >> 16) + (lower >> 16), lower & 0xFFFF
    return upper, lower >> 8, lower & 0xFF


def _carried(digits: Array) -> tuple[Array, Array]:
    """(sum >> 16, the 16 bits below) of added `_digits`."""
    upper, middle, lower = digits
    middle += lower >> 8
    return upper + (middle >> 8), (middle & 0xFF) << 8 | lower & 0xFF


def _last_two(x: Array) -> tuple[int, ...]:
    return tuple(range(x.ndim))[-2:]
