# SPDX-License-Identifier: Apache-2.0
"""The methods agree with each other on a small decoder, also sharded.

The upper level learns weights of the retain rows and how strongly to forget; the lower
level unlearns, pulled towards where it began so that it has a minimum.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_allclose

from jaxunlearn import bilevel, losses, sharding, terms, trees
from tests import tiny

pytestmark = pytest.mark.slow  # nearly every test compiles a model

ROWS, LENGTH, PULL, RATE = 8, 12, 2.0, 0.15

KERNELS = "blocks/mlp/down/kernel"  # the kernels that RMU trains


def problem(pattern=".*", **settings):
    """(upper, lower, x, y); the objectives close over the batches."""
    model, params = tiny.tiny_model(**settings)
    y, rest = trees.split(params, pattern)
    vocab = settings.get("vocab", 32)
    forget, retain, utility = (
        tiny.tiny_batch(ROWS, LENGTH, seed=seed, vocab=vocab) for seed in range(3)
    )
    reference = jnp.sum(terms.target_logps(model, params, forget)[0], axis=1)
    x = {"weights": jnp.linspace(-1.0, 1.0, ROWS), "forget": jnp.float32(-1.0)}

    def answers(y, batch):
        logps, where = terms.target_logps(model, trees.merge(y, rest), batch)
        return jnp.sum(logps, axis=1), jnp.sum(where, axis=1).astype(jnp.float32)

    def lower(x, y):
        logps, lengths = answers(y, retain)
        kept = jnp.mean(jax.nn.softplus(x["weights"]) * losses.nll(logps) / lengths)
        forgotten = jnp.mean(losses.npo(answers(y, forget)[0], reference, beta=0.1))
        start, _ = trees.split(params, pattern)
        far = sum(
            jnp.sum((a - b) ** 2)
            for a, b in zip(jax.tree.leaves(y), jax.tree.leaves(start), strict=True)
        )
        return kept + jnp.exp(x["forget"]) * forgotten + 0.5 * PULL * far

    def upper(x, y):
        logps, lengths = answers(y, utility)
        return jnp.mean(losses.nll(logps) / lengths) + 0.01 * x["forget"] ** 2

    return upper, lower, x, y


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def exact():
    """(the problem on the kernels that RMU trains, its minimiser, the result of CG)."""
    upper, lower, x, y = problem(KERNELS, layers=2)
    best = jax.jit(lambda y: bilevel.solve(partial(lower, x), y, optax.sgd(RATE), 60))(
        y
    )
    found = jax.jit(partial(bilevel.implicit_cg, upper, lower, damping=0.0))(x, best)
    return (upper, lower, x, y), best, found


@pytest.mark.slow
def test_cg_converges_at_a_minimum(exact):
    stats = exact[2].stats
    assert stats["converged"] and stats["residual"] < 2e-6
    assert stats["curvature"] > 0
    assert stats["gradient"] < 1e-5
    dx = exact[2].dx
    assert np.linalg.norm(dx["weights"]) > 1e-4
    assert abs(dx["forget"]) > 1e-4


@pytest.mark.parametrize(
    ("form", "from_best", "limit"),
    [
        (
            partial(
                bilevel.implicit_neumann,
                damping=0.0,
                step_size=RATE,
                num_terms=40,
                tol=1e-4,
            ),
            True,
            1e-3,
        ),
        (partial(bilevel.unrolled, tx=optax.sgd(RATE), steps=60), False, 1e-3),
        (
            partial(bilevel.unrolled, tx=optax.sgd(RATE), steps=60, truncate=20),
            False,
            1e-2,
        ),
        (
            partial(bilevel.f2sa, strength=30.0, tx=optax.sgd(RATE), steps=60),
            False,
            2e-2,
        ),
    ],
    ids=["neumann", "unrolled", "truncated", "f2sa"],
)
@pytest.mark.slow
def test_the_methods_agree_on_a_decoder(exact, form, from_best, limit):
    (upper, lower, x, y), best, expected = exact
    found = jax.jit(partial(form, upper, lower))(x, best if from_best else y)
    wanted, came = flat(expected.dx), flat(found.dx)
    assert np.linalg.norm(came - wanted) < limit * np.linalg.norm(wanted)
    cosine = came @ wanted / np.linalg.norm(came) / np.linalg.norm(wanted)
    assert cosine > 0.9999


def test_cg_agrees_with_finite_differences_on_the_decoder(exact):
    (upper, lower, x, y), _, expected = exact

    @jax.jit
    def value(x):
        y_star = bilevel.solve(partial(lower, x), y, optax.sgd(RATE), 60)
        return upper(x, y_star)

    for name, step in (("forget", 0.1), ("weights", 0.3)):
        along = jax.tree.map(jnp.zeros_like, x) | {name: jnp.ones_like(x[name])}
        up = jax.tree.map(lambda a, d: a + step * d, x, along)  # noqa: B023
        down = jax.tree.map(lambda a, d: a - step * d, x, along)  # noqa: B023
        slope = (float(value(up)) - float(value(down))) / (2 * step)
        assert_allclose(jnp.sum(expected.dx[name]), slope, rtol=0.03)


def some_forms(upper, lower, x, y):
    """One method of each kind; tests/bilevel/ridge_test.py runs all of them sharded."""
    inner = dict(tx=optax.sgd(RATE), steps=2)
    return {
        "f2sa": bilevel.f2sa(upper, lower, x, y, strength=5.0, **inner),
        "cg": bilevel.implicit_cg(upper, lower, x, y, damping=1.0, max_iterations=5),
    }


@pytest.mark.slow
def test_a_sharded_decoder_gives_the_same():
    settings = dict(width=32, heads=8, kv_heads=8, head_dim=4, hidden=32, vocab=64)
    upper, lower, x, y = problem(KERNELS, layers=2, **settings)
    expected = jax.jit(partial(some_forms, upper, lower))(x, y)

    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model, _ = tiny.tiny_model(layers=2, **settings)
    places = sharding.by_rules(y, mesh, model.rules)
    rows = {
        "weights": NamedSharding(mesh, PartitionSpec(sharding.BATCH)),
        "forget": NamedSharding(mesh, PartitionSpec()),
    }
    with jax.set_mesh(mesh):
        came = jax.jit(partial(some_forms, upper, lower))(
            jax.device_put(x, rows), jax.device_put(y, places)
        )
    (kernel,) = jax.tree.leaves(came["f2sa"].found["y"])
    assert not kernel.sharding.is_fully_replicated
    for form, one in expected.items():
        for (path, a), b in zip(
            trees.paths(one).items(), jax.tree.leaves(came[form]), strict=True
        ):
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            size = max(1e-3, np.abs(a).max())
            assert np.abs(a - b).max() < 1e-3 * size, f"{form} {path}"
