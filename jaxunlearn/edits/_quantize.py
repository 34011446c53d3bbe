# SPDX-License-Identifier: Apache-2.0
"""Rounding weights to few bits: integer grids, code books and ggml's blocks.

The rounded weights keep their dtype ("fake quantization"), so the same model runs them.
They are the weights that a deployed quantized model computes with; only the arithmetic
of its kernels may differ.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, _precision, trees
from jaxunlearn.edits import _ggml
from jaxunlearn.typing import Array, Params

# Routers and gates of shared experts stay as they are, as in GGUF files.
LINEAR = r"blocks/(?!mlp/(router|shared_gate)/).*/kernel"
BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}

# Appendix E of 2305.14314: equal areas under a normal density, with an exact 0.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
# As in bitsandbytes: sign, two exponent bits, one fraction bit. The smallest value that
# is not 0 is subnormal.
FP4 = tuple(x / 12 for x in (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0))
_KINDS = (*BITS, "nf4", "fp4", *_ggml.KINDS)

# Scheme -> the code of the largest |w|, as a function of half = 2^(bits - 1).
_MAX_CODE = {
    "symmetric": lambda half: half - 1.0,
    "symmetric_half": lambda half: half - 0.5,
    "symmetric_full": lambda half: half - 0.0,
}
SCHEMES = (*_MAX_CODE, "asymmetric")


def quantize(
    params: Params,
    kind: str = "int4",
    *,
    group: int | str | None = None,
    scheme: str = "symmetric",
    pattern: str = LINEAR,
    donate: bool = False,
) -> Params:
    """Rounds each weight to the nearest value that a few bits can represent.

    Integers ("int8" to "int2"): w becomes s (clip(round(w / s) + z, 0, 2^b - 1) - z),
    with one scale s and one zero point z per group; round is half to even. With
    m = max |w|:

    | scheme | s | z |
    | --- | --- | --- |
    | "symmetric" | m / (2^(b-1) - 1) | 2^(b-1) |
    | "symmetric_half" | m / (2^(b-1) - 0.5), of compressed-tensors and qwix | 2^(b-1) |
    | "symmetric_full" | m / 2^(b-1), Delta in 2410.16454 | 2^(b-1) |
    | "asymmetric" | (max(w, 0) - min(w, 0)) / (2^b - 1) | round(-min(w, 0) / s) |

    Code books ("nf4", "fp4"): w becomes a c, where a = max |w| over a block of 64
    weights along the input axis, and c is the value of the book nearest to w / a, as in
    bitsandbytes without double quantization. If 64 does not divide the number of
    inputs, blocks continue with the weights of the next output, and the last block is
    shorter, as in bitsandbytes.

    GGUF ("q4_0", "q4_1", "q8_0"): the values read from a GGUF file, with blocks of 32
    along the input axis and float16 scales. In float32 they equal those of the
    quantizer of `gguf` to the bit, so `hf.save_gguf` does not change them.

    Weights are rounded in float32 (float64 leaves in float64, except for GGUF). Scales
    of integers are reduced to 16 bits, so that a code times a scale is exact
    ("symmetric_half" keeps the full scale). Quantizing twice equals quantizing once,
    bit by bit: for code books in every dtype; for "symmetric", "asymmetric" (if both
    ends are halfway between codes its scale has one bit less) and GGUF in float32. In
    narrower dtypes this holds up to their rounding. The other two schemes reduce the
    range each time. Therefore quantize the trained model, not a quantized one. A weight
    that is not finite stays so, and may make its group not finite.

    Args:
        params: the params to edit; kernels are [..., in, out], and each entry of the
            leading axes (a layer) is quantized separately.
        kind: "int8", "int4", "int3", "int2", "nf4", "fp4", "q4_0", "q4_1" or "q8_0".
            The released code of 2410.16454 uses "fp4" for 4 bits and LLM.int8 for 8,
            which equals "int8" if there are no outliers (see `llm_int8`).
        group: the weights that share a scale: a number of inputs, "channel" (all inputs
            of an output) or "tensor". None is "channel" for integers, 64 for code books
            and 32, the only possible value, for GGUF.
        scheme: see above; for integers only.
        pattern: regular expression matched against whole leaf paths. The default
            matches the linear kernels of the blocks, not embeddings, norms or biases.
        donate: frees each leaf as soon as its rounded copy exists, so that only one
            leaf is in memory twice; params cannot be used afterwards.
    Returns:
        A tree like params, with its dtypes and sharding; leaves that do not match are
        the same arrays. Leaves are processed one after another.
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
            f"quantize needs scheme only for {_checks.listed(BITS)}, got "
            f"scheme={scheme!r} with kind={kind!r}. Leave it out, or change kind."
        )
    if kind in _ggml.KINDS:
        if group not in (None, _ggml.BLOCK):
            raise ValueError(
                f"quantize needs group={_ggml.BLOCK} for kind={kind!r}, got "
                f"group={group!r}. Leave it out, or use {_checks.listed(BITS)}."
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
    """params with function(path, leaf) for the leaves whose whole path matches.

    The result keeps the sharding of the leaf; with `donate` the leaf is freed.
    """
    compiled = re.compile(pattern)
    if not any(compiled.fullmatch(path) for path in trees.paths(params)):
        raise ValueError(
            f"{owner} needs a pattern that matches a leaf, got pattern={pattern!r}. "
            f"The leaves are {_checks.listed(trees.paths(params))}."
        )

    def leaf(path, x):
        if not compiled.fullmatch(path):
            return x
        if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{owner} needs a pattern that matches only float kernels [..., in, "
                f"out], got {path!r} of shape {x.shape} and dtype {x.dtype}. Match "
                "fewer leaves."
            )
        return placed(function(path, x), x, free=donate)

    return trees.map_with_path(leaf, params)


def placed(new: Array, x: Array, *, free: bool = False) -> Array:
    """new with the sharding of x, if x is a concrete array; `free` then deletes x."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        return new
    new = jax.device_put(new, x.sharding)
    if free:
        new.block_until_ready()  # otherwise several leaves are in memory twice
        x.delete()
    return new


def grid(w: Array, bits: int, scheme: str, axes: tuple[int, ...]):
    """(scale, zero point) of the weights along `axes`, which keep length 1."""
    half = 2 ** (bits - 1)
    if scheme == "asymmetric":
        low = jnp.minimum(jnp.min(w, axes, keepdims=True), 0)
        high = jnp.maximum(jnp.max(w, axes, keepdims=True), 0)
        scale = _reduced((high - low) / (2**bits - 1))
        # If both ends are halfway between codes, up to rounding, both may be rounded
        # inward, and the range shrinks when quantized again. With the next smaller
        # scale one of them is rounded outward, so the range stays the same.
        near = (1 - 2.0**-20) / scale
        codes = jnp.round(high * near) - jnp.round(low * near)
        scale = jnp.where(codes < 2**bits - 1, _reduced(scale * (1 - 2.0**-15)), scale)
        return scale, jnp.clip(jnp.round(-low / scale), 0, 2**bits - 1)
    largest = jnp.max(jnp.abs(w), axes, keepdims=True)
    scale = largest / _MAX_CODE[scheme](half)
    if scheme == "symmetric_half":  # extremes are halfway: a shorter scale moves them
        scale = jnp.where(scale == 0, 1, scale)  # NaN stays NaN
    else:
        scale = _reduced(scale)
    return scale, jnp.full_like(scale, half)


def onto_grid(w: Array, scale: Array, zero: Array, bits: int) -> Array:
    """The values of the grid nearest to w."""
    codes = jnp.clip(jnp.round(w / scale) + zero, 0, 2**bits - 1)
    return scale * (codes - zero)


def rounded(w: Array, *, bits: int, scheme: str, group: int | str) -> Array:
    """w [..., in, out] rounded to the grids of its groups, in the dtype of w."""
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
            f"group={group} and {path!r} with {shape[-2]} inputs. Use a divisor, or "
            "group='channel'."
        )


def check_grid(owner: str, scheme: str, group: int | str) -> None:
    """Raises ValueError or TypeError unless scheme and group are valid."""
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
    return rounded(
        _precision.at_least_float32(x), bits=bits, scheme=scheme, group=group
    ).astype(x.dtype)


def _to_book(path, x, *, kind, block):
    del path
    return _look_up_leaf(x, kind=kind, block=block)


@partial(jax.jit, static_argnames=("kind", "block"))
def _look_up_leaf(x, *, kind, block):
    w, (inputs, outputs) = _precision.at_least_float32(x), x.shape[-2:]
    if inputs % block == 0:
        blocks = w.reshape(*w.shape[:-2], -1, block, outputs)
        return _in_book(blocks, kind, -2).reshape(x.shape).astype(x.dtype)
    rows = jnp.swapaxes(w, -1, -2).reshape(*w.shape[:-2], inputs * outputs)
    padding = -rows.shape[-1] % block
    rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, padding)])
    rows = _in_book(rows.reshape(*rows.shape[:-1], -1, block), kind, -1)
    rows = rows.reshape(*w.shape[:-2], -1)[..., : inputs * outputs]
    return jnp.swapaxes(rows.reshape(*w.shape[:-2], outputs, inputs), -1, -2).astype(
        x.dtype
    )


def _to_ggml(path, x, *, kind):
    if x.shape[-2] % _ggml.BLOCK:
        raise ValueError(
            f"quantize needs numbers of inputs that {_ggml.BLOCK} divides for "
            f"kind={kind!r}, got {path!r} with {x.shape[-2]} inputs. Match fewer "
            f"leaves in pattern, or use {_checks.listed(BITS)}."
        )
    return _ggml_leaf(x, kind=kind)


@partial(jax.jit, static_argnames="kind")
def _ggml_leaf(x, *, kind):
    return _ggml.rounded(x.astype(jnp.float32), kind).astype(x.dtype)


def _in_book(blocks: Array, kind: str, axis: int) -> Array:
    """Blocks along `axis`, rounded to their largest |w| times values of the book."""
    largest = jnp.max(jnp.abs(blocks), axis, keepdims=True)
    x = blocks / jnp.where(largest == 0, 1, largest)
    if kind == "nf4":
        return largest * _nearest(x, NF4)
    return largest * jnp.sign(x) * _nearest(jnp.abs(x), FP4)


def _nearest(x: Array, book: tuple[float, ...]) -> Array:
    """The value of an increasing book nearest to x; ties go to the lower one."""
    y = jnp.full_like(x, book[0])
    for below, above in zip(book[:-1], book[1:], strict=True):
        y = jnp.where(x > (below + above) / 2, above, y)
    return y


def _reduced(scale: Array) -> Array:
    """The scale with 15 mantissa bits; 1 if it is 0, so that zeros stay 0."""
    short = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=15)
    return jnp.where(short == 0, 1, short)
