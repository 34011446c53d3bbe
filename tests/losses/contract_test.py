# SPDX-License-Identifier: Apache-2.0
"""The contract of all losses; a new loss is one row. Golden values: tests/golden."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import losses

ROWS = 3


class Row(NamedTuple):
    """A loss, arguments of one shape, a hand-computed value, and other properties.

    Attributes:
        loss: called with the arguments and `where`.
        args: arrays; gradients are checked for the first.
        expected: the value, worked out by hand.
        refs: positions of the arguments that must not receive a gradient.
        extreme: first arguments at which value and gradient stay finite.
        slope: where weights are held fixed, the gradient that the docstring gives.
    """

    loss: Callable
    args: tuple
    expected: list[float]
    refs: tuple[int, ...] = ()
    extreme: tuple[float, ...] = (-1e30, -1e4, 0.0, 1e4, 1e30)
    slope: Callable | None = None


LN2, LN3 = np.log(2.0), np.log(3.0)
LOGPS = np.array([-1.0, -2.0, -4.0])
# Softmax of HALVES is 1/2, 1/2; that of QUARTERS is 3/4, 1/4.
HALVES, QUARTERS = np.zeros((ROWS, 2)), np.tile([LN3, 0.0], (ROWS, 1))
SQUARES = (-1e15, -1e4, 0.0, 1e4, 1e15)


def of_class_0(loss):
    """The loss with target 0 at every position."""

    def run(logits, *args, where=None):
        zeros = jnp.zeros(logits.shape[:-1], jnp.int32)
        return loss(logits, *args, zeros, where=where)

    return run


LOSSES = {
    "nll": Row(losses.nll, (LOGPS,), [1.0, 2.0, 4.0]),
    "ascent": Row(losses.ascent, (LOGPS,), [-1.0, -2.0, -4.0]),
    # The ratio pi / pi_ref is 1, 3 and 1/3, beta is 1: 2 log(1 + ratio).
    # The NLL 4 exceeds the cap of 3, so the value is -3 and the gradient 0.
    "ascent_cap": Row(partial(losses.ascent, cap=3.0), (LOGPS,), [-1.0, -2.0, -3.0]),
    # mean_v log (1 / 2 p_v) of 3/4, 1/4.
    "kl_uniform": Row(
        losses.kl_uniform,
        (QUARTERS,),
        [0.5 * np.log(2 / 3) + 0.5 * np.log(2.0)] * ROWS,
    ),
    # Probabilities 3/4, 1/2 and 1/4 of the target, in the form with two divergences.
    "js_target": Row(
        losses.js_target,
        (np.log([0.75, 0.5, 0.25]),),
        [
            0.5 * (np.log(2 / (1 + q)) + q * np.log(2 * q / (1 + q)) + (1 - q) * LN2)
            for q in (0.75, 0.5, 0.25)
        ],
    ),
    "npo": Row(
        partial(losses.npo, beta=1.0),
        (LOGPS, LOGPS - np.array([0.0, LN3, -LN3])),
        [2 * LN2, 2 * np.log(4.0), 2 * np.log(4 / 3)],
        refs=(1,),
    ),
    # beta (logps / lengths + delta) is 0, ln 3, -ln 3 and 2 / beta is 1.
    "simnpo": Row(
        partial(losses.simnpo, beta=2.0, delta=1.0),
        (np.array([-1.0, LN3 - 2, -1.5 * LN3 - 3]), np.array([1.0, 2.0, 3.0])),
        [LN2, np.log(4.0), np.log(4 / 3)],
    ),
    "kl": Row(
        losses.kl,
        (QUARTERS, HALVES),
        [0.5 * np.log(2 / 3) + 0.5 * np.log(2.0)] * ROWS,
        refs=(1,),
    ),
    "kl_reverse": Row(
        partial(losses.kl, direction="reverse"),
        (QUARTERS, HALVES),
        [0.75 * np.log(1.5) + 0.25 * np.log(0.5)] * ROWS,
        refs=(1,),
    ),
    # m is 5/8, 3/8: half of KL(3/4, 1/4 || m) and of KL(1/2, 1/2 || m).
    "js": Row(
        losses.js,
        (QUARTERS, HALVES),
        [
            0.5 * (0.75 * np.log(1.2) + 0.25 * np.log(2 / 3))
            + 0.25 * (np.log(0.8) + np.log(4 / 3))
        ]
        * ROWS,
        refs=(1,),
    ),
    # The margins are 0, ln 3 and -ln 3, beta is 1: log(1 + 1 / ratio).
    "dpo": Row(
        partial(losses.dpo, beta=1.0),
        (LOGPS, LOGPS - np.array([1.0, LN3, 0.0]), LOGPS, LOGPS - [1.0, 0.0, LN3]),
        [LN2, np.log(4 / 3), np.log(4.0)],
        refs=(1, 3),
    ),
    "dpo_compat": Row(
        partial(losses.dpo, beta=0.5, compat="openunlearning"),
        (LOGPS, LOGPS - 2 * np.array([0.0, LN3, -LN3])),
        [4 * LN2, 4 * np.log(4 / 3), 4 * np.log(4.0)],
        refs=(1,),
    ),
    # p is 1, 1/2, 1/4 and p ** 2 the weight.
    "wga": Row(
        partial(losses.wga, beta=2.0),
        (np.log([1.0, 0.5, 0.25]),),
        [0.0, -LN2 / 4, -LN2 / 8],
        slope=lambda logps: jnp.exp(2 * logps),
    ),
    # p (1 - p) ** 2 is 0, 1/8, 9/64.
    "satimp": Row(
        partial(losses.satimp, beta1=1.0, beta2=2.0),
        (np.log([1.0, 0.5, 0.25]),),
        [0.0, -LN2 / 8, -LN2 * 9 / 32],
        slope=lambda logps: jnp.exp(logps) * (1 - jnp.exp(logps)) ** 2,
    ),
    # Lowering logit 0 by ln 3 turns 3/4, 1/4 into halves.
    "undial": Row(
        of_class_0(partial(losses.undial, beta=LN3)),
        (QUARTERS, QUARTERS),
        [0.5 * (np.log(4 / 3) + np.log(4.0))] * ROWS,
        refs=(1,),
    ),
    # Without class 0 the teacher is class 1, whose probability under the model is 1/4.
    "ce_u": Row(
        of_class_0(losses.ce_u),
        (QUARTERS,),
        [np.log(4.0)] * ROWS,
        slope=lambda z: jax.nn.softmax(z) - jnp.array([0.0, 1.0], z.dtype),
    ),
    # max - mean of (ln 3, 0) is ln 3 / 2.
    # With two classes, the other class has probability 1/4.
    "complementary_ce": Row(
        of_class_0(losses.complementary_ce), (QUARTERS,), [np.log(4.0)] * ROWS
    ),
    "logit_margin": Row(
        losses.logit_margin, (QUARTERS,), [LN3**2 / 4] * ROWS, extreme=SQUARES
    ),
    # Half of (ln 3 - 1)^2 + 1.
    "rmu": Row(
        losses.rmu,
        (QUARTERS, HALVES + 1),
        [((LN3 - 1) ** 2 + 1) / 2] * ROWS,
        refs=(1,),
        extreme=SQUARES,
    ),
    # sum_v exp(0) (0 - z_v) = -ln 3.
    "kl_raw": Row(
        partial(losses.kl, normalize=False), (QUARTERS, HALVES), [-LN3] * ROWS, (1,)
    ),
    # Mean over the two entries of 2 log(1 + exp(z - ref)), with z - ref = ln 3 and 0.
    "npo_logits": Row(
        partial(losses.npo_logits, beta=1.0),
        (QUARTERS, HALVES),
        [np.log(4.0) + LN2] * ROWS,
        refs=(1,),
    ),
    # Targets 0, 1, 0 under 3/4, 1/4.
    "token_logps": Row(
        lambda z, where=None: losses.token_logps(z, jnp.array([0, 1, 0]), where=where),
        (QUARTERS,),
        [np.log(0.75), np.log(0.25), np.log(0.75)],
    ),
}
each = pytest.mark.parametrize("row", LOSSES.values(), ids=LOSSES)


def arrays(row, dtype=jnp.float32):
    return tuple(jnp.asarray(x, dtype) for x in row.args)


def total(row):
    return lambda *args, **kwargs: row.loss(*args, **kwargs).sum()


@each
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_hand_computed_values_are_not_reduced(row, wrap):
    value = wrap(row.loss)(*arrays(row))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, row.expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "token_logps"])
def test_keeps_the_leading_axes(name):
    row = LOSSES[name]
    stacked = [jnp.stack([x, x])[:, None] for x in arrays(row)]
    assert row.loss(*stacked).shape == (2, 1, ROWS)


@each
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 3e38])
def test_masked_entries_change_neither_value_nor_gradient(row, junk):
    where = jnp.array([True, False, True])
    clean = arrays(row)
    dirty = tuple(x.at[1].set(junk) for x in clean)
    every = tuple(range(len(clean)))
    run = jax.value_and_grad(total(row), argnums=every)
    value, grads = run(*clean, where=where)
    dirty_value, dirty_grads = run(*dirty, where=where)
    assert row.loss(*dirty, where=where)[1] == 0
    np.testing.assert_array_equal(value, dirty_value)
    np.testing.assert_allclose(value, np.delete(row.expected, 1).sum(), rtol=1e-5)
    for g, dirty_g in zip(grads, dirty_grads, strict=True):
        np.testing.assert_array_equal(g, dirty_g)
        assert not np.any(g[1])


@each
def test_bfloat16_in_float32_out(row):
    low = arrays(row, jnp.bfloat16)
    value = row.loss(*low)
    assert value.dtype == jnp.float32
    rounded = row.loss(*(x.astype(jnp.float32) for x in low))
    np.testing.assert_allclose(value, rounded, rtol=1e-6)
    assert jax.grad(total(row))(*low).dtype == jnp.bfloat16


@each
def test_float64_stays_float64(row):
    with jax.enable_x64(True):
        value = row.loss(*arrays(row, jnp.float64))
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, row.expected, rtol=1e-12, atol=1e-14)


@each
def test_finite_value_and_gradient_at_extremes(row):
    first, *rest = arrays(row)
    for size in row.extreme:
        if row is LOSSES["kl_raw"] and size > 0:
            continue  # here exp(logit) is used as a probability
        x = first.at[0].set(size) if first.ndim == 1 else first.at[0, 0].set(size)
        value, grad = jax.value_and_grad(total(row))(x, *rest)
        assert np.isfinite(value), size
        assert np.isfinite(grad).all(), size


@each
def test_no_gradient_for_the_reference(row):
    for position in row.refs:
        assert not np.any(jax.grad(total(row), argnums=position)(*arrays(row)))
    assert np.any(jax.grad(total(row))(*arrays(row)))


@each
def test_gradient_agrees_with_differences(row):
    with jax.enable_x64(True):
        args = arrays(row, jnp.float64)
        step = jnp.asarray(np.random.default_rng(0).normal(size=args[0].shape)) * 1e-5
        grad = jax.grad(total(row))(*args)
        if row.slope:
            np.testing.assert_allclose(grad, row.slope(args[0]), rtol=1e-12)
            return
        along = jnp.vdot(grad, step)
        ends = [total(row)(args[0] + sign * step, *args[1:]) for sign in (1, -1)]
        np.testing.assert_allclose(along, (ends[0] - ends[1]) / 2, rtol=1e-6)


@each
def test_a_mask_that_is_not_boolean_is_an_error(row):
    with pytest.raises(TypeError, match="boolean where"):
        row.loss(*arrays(row), where=jnp.ones(ROWS))
    with pytest.raises(ValueError, match="one shape"):
        row.loss(*arrays(row), where=jnp.ones(ROWS + 1, bool))


def test_every_exported_loss_has_a_row():
    helpers = {"steering_vector", "adaptive_target"}
    rows = {
        name
        for name in losses.__all__
        if any(row == name or row.startswith(name) for row in LOSSES)
    }
    assert set(losses.__all__) - helpers == rows


@each
@pytest.mark.slow
def test_sharded_rows_give_the_values_of_one_device(row):
    args = tuple(jnp.concatenate([x] * 8) for x in arrays(row))
    if row is LOSSES["token_logps"]:
        targets = jnp.tile(jnp.array([0, 1, 0]), 8)
        row = row._replace(loss=lambda z: losses.token_logps(z, targets))
    mesh = jax.make_mesh((8,), ("data",))
    place = jax.NamedSharding(mesh, jax.P("data"))
    cut = tuple(jax.device_put(x, place) for x in args)
    run = jax.jit(jax.value_and_grad(lambda *xs: jnp.mean(row.loss(*xs))))
    for whole, pieces in zip(
        *map(jax.tree.leaves, (run(*args), run(*cut))), strict=True
    ):
        np.testing.assert_allclose(pieces, whole, rtol=1e-5, atol=1e-6)
