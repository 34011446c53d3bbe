# SPDX-License-Identifier: Apache-2.0
"""Rounding: values by hand, published code books, dtypes and sharding."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import edits, sharding, trees
from jaxunlearn.models import decoder
from tests import tiny

KINDS = ("int8", "int4", "int3", "int2", "nf4", "fp4")
GRIDS = [
    {"kind": kind, "group": group, "scheme": scheme}
    for kind in ("int8", "int4", "int3", "int2")
    for group in ("tensor", "channel", 8)
    for scheme in ("symmetric", "asymmetric")
]
BOOKS = [{"kind": kind, "group": block} for kind in ("nf4", "fp4") for block in (8, 64)]


def kernel(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(0.02 * np.random.default_rng(seed).normal(size=shape), dtype)


def one(w, *args, **kwargs):
    """A single kernel, quantized."""
    tree = {"blocks": {"up": {"kernel": jnp.asarray(w)}}}
    return edits.quantize(tree, *args, **kwargs)["blocks"]["up"]["kernel"]


@pytest.mark.parametrize(
    "scheme, expected",
    [
        ("symmetric", [-7.0, -1.0, 0.0, 2.0, 7.0]),  # s = 1: half to even
        ("symmetric_half", [-8 * 14 / 15, -14 / 15, 0.0, 28 / 15, 98 / 15]),
        ("symmetric_full", [-7.0, -0.875, 0.0, 1.75, 6.125]),  # -8 exists, 8 does not
    ],
)
def test_int4_by_hand(scheme, expected):
    w = jnp.array([-7.0, -1.1, 0.3, 1.7, 7.0])[:, None]
    assert_allclose(one(w, "int4", scheme=scheme)[:, 0], expected, rtol=2e-5)


def test_asymmetric_by_hand():
    w = jnp.array([-6.0, -1.5, 0.4, 2.5, 9.0, 30.0, 31.0, 60.0]).reshape(2, 4).T
    # Left s = (2.5 + 6) / 3 and z = round(2.12) = 2; right s = 60 / 3 and z = 0.
    expected = [[-17 / 3, -17 / 6, 0.0, 17 / 6], [0.0, 40.0, 40.0, 60.0]]
    new = one(w, "int2", scheme="asymmetric")
    assert_allclose(new.T, expected, rtol=2e-5)


def test_the_papers_worked_steps():
    # max |w| = 200: a step of 25 with 4 bits, 1.5625 with 8.
    w = jnp.array([-200.0, 26.0, 13.0, 12.0, 0.8, 0.7])[:, None]
    four = one(w, "int4", scheme="symmetric_full")[:, 0]
    assert_array_equal(four, [-200.0, 25.0, 25.0, 0.0, 0.0, 0.0])
    eight = one(w, "int8", scheme="symmetric_full")[:, 0]
    assert_array_equal(eight, [-200.0, 26.5625, 12.5, 12.5, 1.5625, 0.0])


def test_a_group_shares_a_scale_along_the_inputs():
    w = jnp.array([[7.0, 70.0], [1.2, 12.0], [700.0, 0.7], [120.0, 0.12]])
    by_two = [[7.0, 70.0], [1.0, 10.0], [700.0, 0.7], [100.0, 0.1]]
    assert_allclose(one(w, "int4", group=2), by_two, rtol=2e-5)
    by_channel = [[0.0, 70.0], [0.0, 10.0], [700.0, 0.0], [100.0, 0.0]]
    assert_allclose(one(w, "int4"), by_channel, rtol=2e-5)
    by_tensor = [[0.0, 100.0], [0.0, 0.0], [700.0, 0.0], [100.0, 0.0]]
    assert_allclose(one(w, "int4", group="tensor"), by_tensor, rtol=2e-5)
    layers = jnp.stack([w, 10 * w])  # each layer is separate
    both = one(layers, "int4", group="tensor")
    assert_allclose(both, [by_tensor, 10 * np.array(by_tensor)], rtol=2e-5)


@pytest.mark.parametrize("w", [[-3.0, 0.4, 0.0, 1.0], [2.0, 2.5, 3.0, 3.0]])
def test_asymmetric_represents_zero_and_errors_are_at_most_half_a_step(w):
    w = jnp.array(w)[:, None]
    new = one(w, "int3", scheme="asymmetric")
    step = (max(float(w.max()), 0) - min(float(w.min()), 0)) / 7
    assert_allclose(new, w, atol=step)
    assert_array_equal(new[w == 0], 0.0)


# From Appendix E of 2305.14314, and bitsandbytes' table of values over 12.
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453
-0.28444138169288635 -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534
0.16093020141124725 0.24611230194568634 0.33791524171829224 0.44070982933044434
0.5626170039176941 0.7229568362236023 1.0"""
FP4 = np.array([0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]) / 12
PUBLISHED = {
    "nf4": np.array(NF4.split(), np.float64),
    "fp4": np.unique(np.concatenate([-FP4, FP4])),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_code_books_are_the_published_ones(kind):
    w = jnp.linspace(-1.0, 1.0, 100_001)[:, None]
    new = one(w, kind, group=100_001)[:, 0]
    assert_allclose(np.unique(new), PUBLISHED[kind], rtol=1e-6)
    near = PUBLISHED[kind][np.abs(np.asarray(w) - PUBLISHED[kind]).argmin(1)]
    assert_allclose(new, near, rtol=1e-6)  # no point is a midpoint


@pytest.mark.parametrize("kind", PUBLISHED)
def test_blocks_that_do_not_divide_the_inputs_continue_with_the_next_output(kind):
    w = kernel(2, 5, 3)  # layers, in, out
    new = one(w, kind, group=4)
    for layer, got in zip(np.asarray(w), new, strict=True):
        flat, expected = layer.T.ravel(), []
        for i in range(0, 15, 4):
            a = np.abs(flat[i : i + 4]).max()
            x = flat[i : i + 4, None] / a
            expected += list(a * PUBLISHED[kind][np.abs(x - PUBLISHED[kind]).argmin(1)])
        assert_allclose(got, np.reshape(expected, (3, 5)).T, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(kind="int4", group=128, scheme="symmetric"), 0.117),
        (dict(kind="int4", group=128, scheme="symmetric_half"), 0.110),
        (dict(kind="int4", group=128, scheme="symmetric_full"), 0.105),
        (dict(kind="int4", group=128, scheme="asymmetric"), 0.100),
        (dict(kind="nf4"), 0.092),
        (dict(kind="fp4"), 0.122),
        (dict(kind="int8"), 0.0074),
    ],
)
def test_error_on_normal_weights(settings, expected):
    w = kernel(512, 256)
    error = jnp.linalg.norm(one(w, **settings) - w) / jnp.linalg.norm(w)
    # The expected error of int8 is for about this number of inputs.
    assert_allclose(error, expected, rtol=0.06)


# Of each kind one group and scheme; all 28 are slow.
FEW = [0, 9, 14, 23, 24, 27]
ALL = [
    pytest.param(x, id=str(x), marks=[] if i in FEW else [pytest.mark.slow])
    for i, x in enumerate(GRIDS + BOOKS)
]


@pytest.mark.parametrize("settings", ALL)
def test_quantizing_twice_equals_once_bit_by_bit(settings):
    w = kernel(3, 24, 40, seed=1)
    once = one(w, **settings)
    assert not np.array_equal(once, w)
    assert_array_equal(one(once, **settings), once)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        "int8",
        "int2",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("int4", "int3")),
    ],
)
def test_asymmetric_twice_equals_once_if_both_ends_are_halfway(kind, dtype):
    """One channel in 1,000 has such ends for float32 weights, ten for bfloat16."""
    w = kernel(64, 8192, dtype=dtype).astype(jnp.float32)
    w = w.at[:2, 0].set(jnp.array([-1.5, 1.5])).at[2:, 0].multiply(0.1)
    once = one(w, kind, scheme="asymmetric")
    assert_array_equal(one(once, kind, scheme="asymmetric"), once)
    steps = (w.max(0) - w.min(0)) / (2 ** int(kind[3:]) - 1)
    assert (
        jnp.abs(once - w) <= 0.51 * steps
    ).all()  # ends are not further from the grid


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_weights_affect_only_their_group(kind, bad):
    w = kernel(64, 4)
    new = one(w.at[5, 2].set(bad), kind)
    assert not np.isfinite(new[5, 2])
    rest = one(w.at[5, 2].set(0), kind)
    same = (new == rest) | ~np.isfinite(new)
    assert same[:, 2].all() and same.sum() >= 64 * 3 and (new == rest)[:, :2].all()


@pytest.mark.parametrize("kind", KINDS)
def test_quantizing_twice_equals_once_in_bfloat16(kind):
    once = one(kernel(64, 32, dtype=jnp.bfloat16), kind)
    twice = one(once, kind)
    assert once.dtype == twice.dtype == jnp.bfloat16
    if kind in PUBLISHED:
        assert_array_equal(twice, once)
    step = 2.0**-8 if kind != "int8" else 2.0**-7
    largest = np.abs(np.asarray(once, np.float32)).max()
    difference = np.abs(np.asarray(twice - once, np.float32)).max()
    assert difference <= step * largest


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_distinct_values_is_that_of_the_bits(kind):
    new = one(kernel(64, 1), kind, group=64)
    assert len(np.unique(new)) <= 2 ** (int(kind[3:]) if "int" in kind else 4)
    assert_array_equal(one(jnp.zeros((64, 2)), kind), 0.0)  # no division by 0


@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_donated_leaves_are_freed_and_others_are_not(kind):
    _, params = tiny.tiny_model()
    kept = jax.tree.map(jnp.copy, params)
    new = edits.quantize(params, kind)
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))
    same = edits.quantize(kept, kind, donate=True)
    for path, x in trees.paths(kept).items():
        assert x.is_deleted() == bool(re.fullmatch(r"blocks/.*/kernel", path)), path
        assert jnp.array_equal(trees.paths(same)[path], trees.paths(new)[path]), path


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_kernels_of_the_blocks_change(kind):
    _, params = tiny.tiny_model()
    new = edits.quantize(params, kind)
    for path, x in trees.paths(params).items():
        linear = path.startswith("blocks/") and path.endswith("/kernel")
        assert np.array_equal(trees.paths(new)[path], x) is not linear, path
    last = edits.quantize(params, kind, pattern=r"unembed/kernel")
    changed = [
        path
        for path, x in trees.paths(params).items()
        if trees.paths(last)[path] is not x
    ]
    assert changed == ["unembed/kernel"]


@pytest.mark.parametrize("settings", [*GRIDS[::5], *BOOKS], ids=str)
@pytest.mark.slow
def test_sharded_leaves_give_the_values_of_one_device_and_keep_their_sharding(settings):
    model, params = tiny.tiny_model(width=32, hidden=64, heads=8, kv_heads=4)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    placed = jax.device_put(params, sharding.by_rules(params, mesh, decoder.RULES))
    new, whole = (edits.quantize(p, **settings) for p in (placed, params))
    jax.tree.map(assert_array_equal, new, whole)
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), new, placed
        )
    )


@pytest.mark.parametrize("settings", [GRIDS[0], GRIDS[9], GRIDS[23], BOOKS[0]], ids=str)
def test_jit_equals_eager(settings):
    _, params = tiny.tiny_model()
    edit = partial(edits.quantize, **settings)
    jax.tree.map(assert_array_equal, jax.jit(edit)(params), edit(params))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(kind="int5"), "kind to be one of 'int8', .* got kind='int5'"),
        (dict(kind="nf"), "Did you mean 'nf4'"),
        (dict(scheme="symetric"), "Did you mean 'symmetric'"),
        (dict(group=7), "group=7 and 'blocks/attention/k/kernel' with 16 inputs"),
        (dict(group="row"), "group to be one of 'channel', 'tensor'"),
        (dict(group=0), "group >= 1"),
        (dict(kind="nf4", scheme="asymmetric"), "scheme='asymmetric' .*'nf4'"),
        (dict(pattern="blocks/kernel"), "needs a pattern that matches a leaf"),
        (dict(pattern="final_norm/scale"), "'final_norm/scale' of shape \\(16,\\)"),
    ],
)
def test_invalid_arguments_are_refused(settings, message):
    _, params = tiny.tiny_model()
    with pytest.raises(ValueError, match=message):
        edits.quantize(params, **settings)


@pytest.mark.parametrize(
    "kind, qtype", [("int8", jnp.int8), ("int4", jnp.int4), ("int3", "int3")]
)
def test_rounding_agrees_with_qwix(kind, qtype):
    qwix = pytest.importorskip("qwix")
    w = kernel(2, 128, 48, seed=3)
    for group in ("channel", 32):
        tiles = {"tiled_axes": {1: 32}} if group == 32 else {}
        axes = dict(channelwise_axes=(0, 2), **tiles)
        theirs = qwix.dequantize(qwix.quantize(w, qtype, **axes))
        ours = one(w, kind, group=group, scheme="symmetric_half")
        assert_allclose(ours, theirs, rtol=1e-6)
    if kind != "int3":
        how = dict(calibration_method="minmax", channelwise_axes=(0, 2))
        theirs = qwix.dequantize(qwix.quantize(w, qtype, **how))
        ours = one(w, kind, scheme="asymmetric")
        # A 16-bit scale differs from that of qwix by at most 2^-17, so a weight close
        # to a midpoint may get the other code.
        apart = ~np.isclose(ours, theirs, rtol=2**-15, atol=1e-8)
        assert apart.mean() < 2e-3


def test_nf4_agrees_with_qwix():
    qwix = pytest.importorskip("qwix")
    w = kernel(2, 128, 48, seed=3)
    theirs = qwix.quantize(w, "nf4", channelwise_axes=(0, 2), tiled_axes={1: 64})
    assert_allclose(one(w, "nf4"), qwix.dequantize(theirs), rtol=1e-6)


GGUF = ("q4_0", "q4_1", "q8_0")


def gguf_values(w, kind):
    """[..., in, out] quantized and dequantized by gguf, with rows along in."""
    gguf = pytest.importorskip("gguf")
    name = gguf.GGMLQuantizationType[kind.upper()]
    rows = np.ascontiguousarray(np.swapaxes(np.asarray(w, np.float32), -1, -2))
    back = gguf.quants.dequantize(gguf.quants.quantize(rows, name), name)
    return np.swapaxes(back, -1, -2)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", GGUF)
def test_gguf_kinds_equal_the_library_gguf_bit_by_bit(kind, wrap):
    rng = np.random.default_rng(7)
    sizes = 10.0 ** rng.uniform(-8, 3, size=(3, 1, 200))  # float16's subnormals too
    for w in (
        rng.normal(size=(3, 128, 200)) * 0.02,
        rng.normal(size=(3, 128, 200)) * sizes,
        rng.integers(-8, 8, size=(3, 128, 200)) * 0.5,  # halfway between codes
        rng.normal(size=(3, 128, 200)) * (rng.random((3, 128, 200)) < 0.01),  # zeros
    ):
        w = jnp.asarray(w, jnp.float32)
        new = wrap(partial(one, kind=kind))(w)
        assert_array_equal(new, gguf_values(w, kind))
        assert_array_equal(one(new, kind), new)  # quantizing again changes nothing


def test_gguf_kinds_by_hand():
    w = jnp.zeros((32, 1)).at[:4, 0].set(jnp.array([-8.0, 3.4, 0.6, 7.9]))
    assert_array_equal(one(w, "q4_0")[:5, 0], [-8.0, 3.0, 1.0, 7.0, 0.0])
    w = jnp.full((32, 1), 2.0).at[:4, 0].set(jnp.array([17.0, 2.4, 2.6, 9.5]))
    assert_array_equal(one(w, "q4_1")[:5, 0], [17.0, 2.0, 3.0, 10.0, 2.0])
    w = jnp.zeros((32, 1)).at[:4, 0].set(jnp.array([127.0, -0.5, 0.49, 2.5]))
    assert_array_equal(one(w, "q8_0")[:5, 0], [127.0, -1.0, 0.0, 3.0, 0.0])


@pytest.mark.parametrize(
    "kind",
    ["q4_1", *(pytest.param(x, marks=pytest.mark.slow) for x in GGUF if x != "q4_1")],
)
def test_gguf_kinds_keep_sharding_and_dtypes(kind):
    _, params = tiny.tiny_model(width=32, hidden=64, heads=4, kv_heads=2, head_dim=8)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    placed = jax.device_put(params, sharding.by_rules(params, mesh, decoder.RULES))
    new, whole = (edits.quantize(p, kind) for p in (placed, params))
    jax.tree.map(assert_array_equal, new, whole)
    path = "blocks/mlp/down/kernel"
    for tree in (new, placed):
        place = trees.paths(tree)[path].sharding
        assert place.is_equivalent_to(trees.paths(placed)[path].sharding, 3)
    half = one(kernel(64, 8, dtype=jnp.bfloat16), kind)
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(), "kind='q4_0', got 'blocks/.*' with 16 inputs"),
        (dict(group=16), "group=32 for kind='q4_0', got group=16"),
        (dict(scheme="asymmetric"), "got scheme='asymmetric'"),
    ],
    ids=["inputs", "group", "scheme"],
)
def test_gguf_kinds_refuse(settings, message):
    _, params = tiny.tiny_model()
    with pytest.raises(ValueError, match=message):
        edits.quantize(params, "q4_0", **settings)


def test_codes_are_not_quantized_again():
    """Params of integer codes are refused; rounded weights do not change (above)."""
    codes = jnp.arange(-4, 4, dtype=jnp.int8)[:, None]
    with pytest.raises(ValueError, match="float kernels .* dtype int8"):
        one(codes, "int4")
