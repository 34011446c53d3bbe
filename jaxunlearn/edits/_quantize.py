# SPDX-License-Identifier: Apache-2.0
"""Rounding weights to few bits: whole-number grids, code books and ggml's blocks.

Weights come back in their own dtype, rounded ("fake quantized"), so that the same model
runs them: what a deployed model computes with, up to its kernels' arithmetic.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, trees
from jaxunlearn.edits import _ggml
from jaxunlearn.typing import Array, Params

LINEAR = r"blocks/.*/kernel"
BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}

# Appendix E of 2305.14314: equal areas under a normal density, with an exact 0.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
# bitsandbytes' sign, two bits of exponent, one of fraction; the smallest is subnormal.
FP4 = tuple(x / 12 for x in (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0))
_KINDS = (*BITS, "nf4", "fp4", *_ggml.KINDS)

# Scheme -> the code that the largest |w| falls on, of 2^(bits - 1) = half.
_REACH = {
    "symmetric": lambda half: half - 1.0,
    "symmetric_half": lambda half: half - 0.5,
    "symmetric_full": lambda half: half - 0.0,
}
SCHEMES = (*_REACH, "asymmetric")


def quantize(
    params: Params,
    kind: str = "int4",
    *,
    group: int | str | None = None,
    scheme: str = "symmetric",
    pattern: str = LINEAR,
    donate: bool = False,
) -> Params:
    """Rounds each weight to the nearest value that a few bits can say.

    Whole numbers: w becomes s (clip(round(w / s) + z, 0, 2^b - 1) - z), with one scale
    s and zero point z for each group; halves go to the even code. With m = max |w|:

    | scheme | s | z |
    | --- | --- | --- |
    | "symmetric" | m / (2^(b-1) - 1) | 2^(b-1) |
    | "symmetric_half" | m / (2^(b-1) - 0.5), as compressed-tensors and qwix | 2^(b-1) |
    | "symmetric_full" | m / 2^(b-1), the Delta of 2410.16454 | 2^(b-1) |
    | "asymmetric" | (max(w, 0) - min(w, 0)) / (2^b - 1) | round(-min(w, 0) / s) |

    Code books: w becomes a c, with a = max |w| of 64 weights that follow one another
    along the input axis and c the nearest value of the book to w / a, as bitsandbytes
    without double quantization. Where 64 does not divide the inputs, blocks run on into
    the next output's weights and the last one is short, as there.

    "q4_0", "q4_1" and "q8_0" are what a GGUF file gives back, blocks of 32 along the
    input axis with scales of float16: to the bit what `gguf`'s quantizer says, in
    float32, so that `hf.save_gguf` keeps these values as they are.

    Weights round in float32 (float64 for such leaves, but not for GGUF's kinds). Scales
    of whole numbers have 16 bits, so that a code times a scale is exact
    ("symmetric_half" keeps them whole). Quantizing twice is quantizing once, bit by
    bit: for code books in every dtype; for "symmetric", "asymmetric" (where ends lie
    halfway between codes its scale is shorter by a bit of its 16) and GGUF's kinds in
    float32. In narrower dtypes it holds up to their rounding. The other two schemes
    shrink the range each time. So quantize the model that was trained, not one that was
    quantized. A weight that is not finite stays so, and may take its group with it.

    Args:
        params: the model to edit; kernels are [..., in, out], and each entry of the
            leading axes (a layer) is quantized by itself.
        kind: "int8", "int4", "int3", "int2", "nf4", "fp4", "q4_0", "q4_1" or "q8_0".
            The released code of 2410.16454 runs "fp4" for its 4 bits, and LLM.int8 for
            8, which without outliers is "int8" (see `llm_int8`).
        group: which weights share a scale: that many along the input axis, "channel"
            (all inputs of an output) or "tensor". None means "channel", blocks of 64
            for code books and of 32, which cannot be others, for GGUF's kinds.
        scheme: of whole numbers, see above; the others have none.
        pattern: regular expression matched against whole leaf paths. By default the
            linear kernels of the blocks, without embeddings, norms and biases.
        donate: frees each leaf as soon as its rounded one is there, so that memory
            holds one leaf twice and never the model; params cannot be used afterwards.
    Returns:
        A tree like params, in its dtypes and shards; leaves that do not match are the
        same arrays. Leaves are worked on one after another.
    Raises:
        ValueError: if an argument is unknown, a group does not divide a leaf's inputs,
            or no leaf matches.
    References: https://arxiv.org/abs/2410.16454, https://arxiv.org/abs/2305.14314,
        https://arxiv.org/abs/2208.07339
    """
    _checks.one_of("quantize", _KINDS, kind=kind)
    if kind in BITS:
        group = "channel" if group is None else group
        check_grid("quantize", scheme, group)
        function = partial(_to_grid, bits=BITS[kind], scheme=scheme, group=group)
        return map_leaves("quantize", params, pattern, function, donate)
    if scheme != "symmetric":
        raise ValueError(
            f"quantize needs whole numbers for a scheme, got scheme={scheme!r} "
            f"with kind={kind!r}. Leave it out, or take {_checks.listed(BITS)}."
        )
    if kind in _ggml.KINDS:
        if group not in (None, _ggml.BLOCK):
            raise ValueError(
                f"quantize needs group={_ggml.BLOCK} for GGUF's {kind!r}, got "
                f"group={group!r}. Leave it out, or take {_checks.listed(BITS)}."
            )
        function = partial(_to_ggml, kind=kind)
    else:
        group = 64 if group is None else group
        _checks.positive_int("quantize to a code book", group=group)
        function = partial(_to_book, kind=kind, block=group)
    return map_leaves("quantize", params, pattern, function, donate)


def map_leaves(
    owner: str, params: Params, pattern: str, function, donate: bool
) -> Params:
    """params with function(path, leaf) where the whole path matches `pattern`, in the
    leaf's dtype and shards; with `donate` that leaf is freed."""
    compiled = re.compile(pattern)
    if not any(compiled.fullmatch(path) for path in trees.paths(params)):
        raise ValueError(
            f"{owner} needs a pattern that matches a leaf, got {pattern!r}; the leaves "
            f"are {_checks.listed(trees.paths(params))}."
        )

    def leaf(path, x):
        if not compiled.fullmatch(path):
            return x
        if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{owner} needs kernels [..., in, out] of floats, got {path!r} of "
                f"shape {x.shape} and dtype {x.dtype}. Name fewer leaves in pattern."
            )
        return placed(function(path, x), x, free=donate)

    return trees.map_with_path(leaf, params)


def placed(new: Array, x: Array, *, free: bool = False) -> Array:
    """new in the shards of x, where x has any to show; then x may be freed."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        return new
    new = jax.device_put(new, x.sharding)
    if free:
        new.block_until_ready()  # or memory held several leaves twice
        x.delete()
    return new


def wide(x: Array) -> Array:
    """x in the dtype that it is rounded in."""
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def grid(w: Array, bits: int, scheme: str, axes: tuple[int, ...]):
    """(scale, zero) of the weights along `axes`, which stay with length 1."""
    half = 2 ** (bits - 1)
    if scheme == "asymmetric":
        low = jnp.minimum(jnp.min(w, axes, keepdims=True), 0)
        high = jnp.maximum(jnp.max(w, axes, keepdims=True), 0)
        scale = _short((high - low) / (2**bits - 1))
        # Ends that both lie halfway between codes, up to rounding, may both go inward.
        # The next shorter scale sends one outward: the range is then the same again.
        near = (1 - 2.0**-20) / scale
        codes = jnp.round(high * near) - jnp.round(low * near)
        scale = jnp.where(codes < 2**bits - 1, _short(scale * (1 - 2.0**-15)), scale)
        return scale, jnp.clip(jnp.round(-low / scale), 0, 2**bits - 1)
    largest = jnp.max(jnp.abs(w), axes, keepdims=True)
    scale = largest / _REACH[scheme](half)
    if scheme == "symmetric_half":  # its extremes lie halfway: a short scale tips them
        scale = jnp.where(scale == 0, 1, scale)  # NaN stays NaN
    else:
        scale = _short(scale)
    return scale, jnp.full_like(scale, half)


def onto_grid(w: Array, scale: Array, zero: Array, bits: int) -> Array:
    """The values of the grid nearest to w."""
    codes = jnp.clip(jnp.round(w / scale) + zero, 0, 2**bits - 1)
    return scale * (codes - zero)


def rounded(w: Array, *, bits: int, scheme: str, group: int | str) -> Array:
    """w [..., in, out], in its wide dtype, on the grids of its groups."""
    if isinstance(group, str):
        axes = {"channel": (-2,), "tensor": (-2, -1)}[group]
        return onto_grid(w, *grid(w, bits, scheme, axes), bits)
    blocks = w.reshape(*w.shape[:-2], -1, group, w.shape[-1])
    return onto_grid(blocks, *grid(blocks, bits, scheme, (-2,)), bits).reshape(w.shape)


def check_group(owner: str, path: str, shape: tuple[int, ...], group: int | str):
    """Raises ValueError unless the group divides the inputs of a kernel."""
    if not isinstance(group, str) and shape[-2] % group:
        raise ValueError(
            f"{owner} needs a group that divides the inputs of every kernel, got "
            f"group={group} and {path!r} with {shape[-2]} inputs. Take a divisor, or "
            f"group='channel'."
        )


def check_grid(owner: str, scheme: str, group: int | str) -> None:
    """Raises ValueError or TypeError unless both are known."""
    _checks.one_of(owner, SCHEMES, scheme=scheme)
    if isinstance(group, str):
        _checks.one_of(owner, ("channel", "tensor"), group=group)
    else:
        _checks.positive_int(owner, group=group)


def _to_grid(path, x, *, bits, scheme, group):
    check_group("quantize", path, x.shape, group)
    return _round_leaf(x, bits=bits, scheme=scheme, group=group)


@partial(jax.jit, static_argnames=("bits", "scheme", "group"))
def _round_leaf(x, *, bits, scheme, group):
    return rounded(wide(x), bits=bits, scheme=scheme, group=group).astype(x.dtype)


def _to_book(path, x, *, kind, block):
    del path
    return _look_up_leaf(x, kind=kind, block=block)


@partial(jax.jit, static_argnames=("kind", "block"))
def _look_up_leaf(x, *, kind, block):
    w, (inputs, outputs) = wide(x), x.shape[-2:]
    if inputs % block == 0:
        blocks = w.reshape(*w.shape[:-2], -1, block, outputs)
        return _in_book(blocks, kind, -2).reshape(x.shape).astype(x.dtype)
    rows = jnp.swapaxes(w, -1, -2).reshape(*w.shape[:-2], inputs * outputs)
    short = -rows.shape[-1] % block
    rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, short)])
    rows = _in_book(rows.reshape(*rows.shape[:-1], -1, block), kind, -1)
    rows = rows.reshape(*w.shape[:-2], -1)[..., : inputs * outputs]
    return jnp.swapaxes(rows.reshape(*w.shape[:-2], outputs, inputs), -1, -2).astype(
        x.dtype
    )


def _to_ggml(path, x, *, kind):
    if x.shape[-2] % _ggml.BLOCK:
        raise ValueError(
            f"quantize needs kernels whose inputs {_ggml.BLOCK} divides for GGUF's "
            f"{kind!r}, got {path!r} with {x.shape[-2]} inputs. Name fewer leaves in "
            f"pattern, or take {_checks.listed(BITS)}."
        )
    return _ggml_leaf(x, kind=kind)


@partial(jax.jit, static_argnames="kind")
def _ggml_leaf(x, *, kind):
    return _ggml.rounded(x.astype(jnp.float32), kind).astype(x.dtype)


def _in_book(blocks: Array, kind: str, axis: int) -> Array:
    largest = jnp.max(jnp.abs(blocks), axis, keepdims=True)
    x = blocks / jnp.where(largest == 0, 1, largest)
    if kind == "nf4":
        return largest * _nearest(x, NF4)
    return largest * jnp.sign(x) * _nearest(jnp.abs(x), FP4)


def _nearest(x: Array, book: tuple[float, ...]) -> Array:
    """The value of a rising book nearest to x; the lower one halfway."""
    y = jnp.full_like(x, book[0])
    for below, above in zip(book[:-1], book[1:], strict=True):
        y = jnp.where(x > (below + above) / 2, above, y)
    return y


def _short(scale: Array) -> Array:
    """A scale of 16 bits: 1 where it was 0, so that zeros stay zeros; NaN stays NaN."""
    short = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=15)
    return jnp.where(short == 0, 1, short)
