# SPDX-License-Identifier: Apache-2.0
"""The product of activations and kernels, and its two gradients, in bfloat16."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import models, sharding
from jaxunlearn.models import _matmul

ROWS, IN, OUT = (4, 16), 32, 48


def drawn(transposed=False):
    """(x [4, 16, 32] bfloat16, a float32 kernel, factors of the outputs)."""
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (OUT, IN) if transposed else (IN, OUT)
    x = jax.random.normal(keys[0], (*ROWS, IN), jnp.bfloat16).astype(jnp.float32)
    factors = jax.random.normal(keys[2], (*ROWS, OUT), jnp.bfloat16)
    return x, jax.random.normal(keys[1], shape), factors.astype(jnp.float32)


def product(name):
    if name == "dot":
        return lambda x, kernel: _matmul.dot(x, kernel, jnp.dtype("bfloat16"))
    transposed = name == "tied logits"
    return lambda x, kernel: _matmul.logits(
        x.astype(jnp.bfloat16),
        _matmul.cast(kernel, jnp.dtype("bfloat16")),
        transposed=transposed,
    )


@pytest.mark.parametrize("name", ["dot", "logits", "tied logits"])
def test_values_and_gradients_are_float32_sums_of_bfloat16_operands(name):
    x, kernel, factors = drawn(name == "tied logits")

    @jax.jit
    def run(x, kernel):
        def total(x, kernel):
            y = product(name)(x, kernel)
            return jnp.sum(y * factors), y

        return jax.grad(total, (0, 1), has_aux=True)(x, kernel)

    (dx, dkernel), y = run(x, kernel)
    low = np.asarray(kernel.astype(jnp.bfloat16), np.float64)
    low = low.T if name == "tied logits" else low
    rows, grads = np.float64(x).reshape(-1, IN), np.float64(factors).reshape(-1, OUT)
    expected = rows.T @ grads
    expected = expected.T if name == "tied logits" else expected
    assert {y.dtype, dx.dtype, dkernel.dtype} == {jnp.dtype("float32")}
    assert_allclose(y.reshape(-1, OUT), rows @ low, rtol=1e-5, atol=1e-4)
    # The gradient of the rounded argument of the logits is rounded too.
    rtol = 1e-5 if name == "dot" else 2**-8
    assert_allclose(dx.reshape(-1, IN), grads @ low.T, rtol=rtol, atol=1e-4)
    assert_allclose(dkernel, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the form is for CPUs")
@pytest.mark.parametrize("name", ["dot", "logits", "tied logits"])
def test_xla_casts_no_operand_to_float32_on_cpus(name):
    x, kernel, factors = drawn(name == "tied logits")

    def total(x, kernel):
        return jnp.sum(product(name)(x, kernel) * factors)

    compiled = jax.jit(jax.grad(total, (0, 1))).lower(x, kernel).compile().as_text()
    types = dict(re.findall(r"%?([\w.\-]+) = (\w+)\[", compiled))
    dots = re.findall(r" dot\(%?([\w.\-]+), %?([\w.\-]+)\)", compiled)
    assert len(dots) >= 2
    assert {types[each] for pair in dots for each in pair} == {"bf16"}


def test_float32_products_are_xlas():
    x, kernel, _ = drawn()

    def text(run):
        def total(x, kernel):
            return jnp.sum(run(x, kernel))

        return jax.jit(jax.grad(total, (0, 1))).lower(x, kernel).as_text()

    assert text(lambda x, kernel: _matmul.dot(x, kernel, x.dtype)) == text(
        lambda x, kernel: x @ kernel
    )


def test_a_batch_of_kernels_has_the_values_of_each():
    x, kernel, _ = drawn()
    kernels = jnp.stack([kernel, 2 * kernel])
    xs = jnp.stack([x, -x])

    @jax.jit
    def grads(x, kernel):
        return jax.grad(lambda *a: jnp.sum(product("dot")(*a) ** 2), (0, 1))(x, kernel)

    many = jax.jit(jax.vmap(grads))(xs, kernels)
    for i in range(2):
        for found, expected in zip(many, grads(xs[i], kernels[i]), strict=True):
            assert_allclose(
                found[i],
                expected,
                rtol=2**-7,
                atol=1e-3 * float(jnp.abs(expected).max()),
            )


def test_hessian_products_run_forward_mode_over_gradients():
    x, kernel, _ = drawn()

    def loss(kernel):
        return 0.5 * jnp.sum(product("dot")(x, kernel) ** 2)

    move = jnp.ones_like(kernel)
    _, found = jax.jit(lambda k: jax.jvp(jax.grad(loss), (k,), (move,)))(kernel)
    rows = x.astype(jnp.float32).reshape(-1, IN)
    expected = rows.T @ (rows @ move)
    assert_allclose(found, expected, rtol=0.05, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize(
    "rows, width, out", [(1, 8, 8), (8, 1, 8), (8, 8, 1), (2, 3, 5)]
)
def test_products_of_few_rows_or_columns_run(rows, width, out):
    x = jnp.full((rows, width), 0.5)
    kernel = jnp.full((width, out), 0.25)

    @jax.jit
    def run(x, kernel):
        def total(x, kernel):
            y = product("dot")(x, kernel)
            return jnp.sum(y), y

        return jax.grad(total, (0, 1), has_aux=True)(x, kernel)

    (dx, dkernel), y = run(x, kernel)
    assert_array_equal(y, np.full((rows, out), 0.125 * width))
    assert_array_equal(dx, np.full((rows, width), 0.25 * out))
    assert_array_equal(dkernel, np.full((width, out), 0.5 * rows))


@pytest.mark.parametrize(
    "platform, flags, capabilities, expected",
    [
        ("cpu", {"avx512f", "avx512_bf16"}, (), "bfloat16"),
        ("cpu", {"avx512f"}, (), "float32"),
        ("cpu", set(), (), "float32"),
        ("gpu", set(), ("7.5",), "float32"),
        ("gpu", set(), ("9.0",), "bfloat16"),
        ("tpu", set(), (), "bfloat16"),
    ],
)
def test_auto_is_the_faster_dtype(monkeypatch, platform, flags, capabilities, expected):
    devices = [types.SimpleNamespace(compute_capability=c) for c in capabilities]
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setattr(_matmul, "_processor_flags", lambda: frozenset(flags))
    assert _matmul.fastest_dtype() == expected
    config = models.DecoderConfig(
        **dict(family="llama", vocab=32, width=16, layers=3, heads=4, kv_heads=2),
        **dict(head_dim=4, hidden=24, positions=64, compute_dtype="auto"),
    )
    assert config.compute_dtype == expected
