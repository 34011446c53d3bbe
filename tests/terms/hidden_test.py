# SPDX-License-Identifier: Apache-2.0
"""Terms on hidden states and on pairs equal their formulas."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import losses, terms
from tests import tiny

RNG = jax.random.key(0)
VECTORS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16)), jnp.float32)


def setting():
    model, params = tiny.tiny_model()
    batch = tiny.tiny_batch() | {"topic": jnp.array([0, 1, 1, 0])}
    return model, params, jax.tree.map(lambda x: 0.9 * x, params), batch


def value(term, params, batch, ref=None):
    total, _ = jax.jit(lambda p, b, r: term(p, {"forget": b}, r, RNG))(
        params, batch, ref
    )
    return total


def expected(states, target, where, reduce):
    """With one loop over rows."""
    squares = np.mean((np.asarray(states) - np.asarray(target)) ** 2, axis=-1)
    rows = [squares[i][np.asarray(where[i])] for i in range(len(squares))]
    if reduce == "token":
        return np.concatenate(rows).mean()
    return np.mean([row.mean() for row in rows if len(row)])


@pytest.mark.parametrize(
    ("tokens", "reduce"),
    [
        ("real", "sequence"),
        ("answer", "token"),
        ("all", "sequence"),
        pytest.param("real", "token", marks=pytest.mark.slow),
        pytest.param("answer", "sequence", marks=pytest.mark.slow),
        pytest.param("all", "token", marks=pytest.mark.slow),
    ],
)
def test_the_mean_distance_of_the_tokens_that_count(tokens, reduce):
    model, params, ref, batch = setting()
    where = {
        "real": batch["mask"],
        "answer": batch["answer"],
        "all": np.ones_like(batch["mask"]),
    }[tokens]
    states = model.apply(params, batch, until=1).hidden
    make = partial(terms.on_hidden, losses.rmu, model, "forget", layer=1, reduce=reduce)
    fixed = make(tokens=tokens, target=VECTORS[0])
    assert not fixed.needs_ref
    got = value(fixed, params, batch).mean()
    assert_allclose(got, expected(states, VECTORS[0], where, reduce), rtol=1e-5)
    topics = make(tokens=tokens, target=VECTORS)
    rows = VECTORS[batch["topic"]][:, None]
    got = value(topics, params, batch).mean()
    assert_allclose(got, expected(states, rows, where, reduce), rtol=1e-5)
    for unknown in (len(VECTORS), -1):
        other = batch | {"topic": batch["topic"].at[0].set(unknown)}
        assert np.isnan(value(topics, params, other).mean())
    held = make(tokens=tokens)
    ref_states = model.apply(ref, batch, until=1).hidden
    got = value(held, params, batch, ref).mean()
    assert held.needs_ref
    assert_allclose(got, expected(states, ref_states, where, reduce), rtol=1e-5)
    column = make(tokens=tokens, reference="column")
    assert not column.needs_ref
    again = value(column, params, batch | {"ref_hidden": ref_states}).mean()
    assert_allclose(again, got, rtol=1e-6)


def test_an_adaptive_target_is_scaled_to_the_norm_of_the_reference():
    model, params, ref, batch = setting()
    term = terms.on_hidden(
        losses.rmu, model, "forget", layer=1, target=VECTORS, adaptive=3.0
    )
    states = model.apply(ref, batch, until=1).hidden
    ways = VECTORS / jnp.linalg.norm(VECTORS, axis=-1, keepdims=True)
    aim = 3 * jnp.linalg.norm(states, axis=-1, keepdims=True)
    aim = aim * ways[batch["topic"]][:, None]
    hidden = model.apply(params, batch, until=1).hidden
    got = value(term, params, batch, ref).mean()
    assert_allclose(got, expected(hidden, aim, batch["mask"], "sequence"), rtol=1e-5)


def test_later_layers_are_neither_run_nor_trained():
    model, params, ref, batch = setting()
    term = terms.on_hidden(losses.rmu, model, "forget", layer=0, target=VECTORS[0])
    streams = {"forget": batch}
    grads = jax.jit(jax.grad(lambda p: term(p, streams, None, RNG)[0].sum))(params)
    down = np.asarray(grads["blocks"]["mlp"]["down"]["kernel"])
    assert np.any(down[0]) and not np.any(down[1:])
    assert not np.any(grads["unembed"]["kernel"])
    program = str(jax.make_jaxpr(lambda p: term(p, streams, None, RNG))(params))
    assert "length=1" in program and "length=3" not in program


def test_joint_terms_of_two_layers_and_logits_share_one_pass():
    model, params, ref, batch = setting()
    parts = {
        "low": terms.on_hidden(losses.rmu, model, "forget", layer=0, target=VECTORS[0]),
        "high": terms.on_hidden(losses.rmu, model, "forget", layer=1),
        "nll": terms.on_logps(losses.nll, model, "forget", reduce="token"),
    }
    for names in (("low", "high"), tuple(parts)):
        some = {name: parts[name] for name in names}
        total = value(terms.joint(some), params, batch, ref).mean()
        each = [value(term, params, batch, ref).mean() for term in some.values()]
        assert_allclose(total, each, rtol=1e-5)


def test_pairs_are_read_row_by_row_from_two_streams():
    model, params = tiny.bigram_model()
    column = {"ref_logps": -jnp.arange(6.0, 10.0), "pair": jnp.arange(4)}
    streams = {
        "win": tiny.tiny_batch(length=9, seed=3) | column,
        "lose": tiny.tiny_batch() | column,
    }
    streams["win"]["answer"] = streams["win"]["answer"].at[2].set(False)
    term = terms.on_pairs(partial(losses.dpo, beta=0.3), model, win="win", lose="lose")
    total, metrics = term(params, streams, None, RNG)
    sums = [
        terms.target_logps(model, params, streams[name])[0].sum(1) + 6 + jnp.arange(4.0)
        for name in ("win", "lose")
    ]
    values = -jax.nn.log_sigmoid(0.3 * (sums[0] - sums[1]))
    assert int(total.count) == 3
    assert_allclose(total.sum, values[jnp.array([0, 1, 3])].sum(), rtol=1e-4)
    with pytest.raises(ValueError, match="belong together"):
        cut = {k: v[:2] for k, v in streams["lose"].items()}
        term(params, streams | {"lose": cut}, None, RNG)
    torn = {k: v[::-1] for k, v in streams["lose"].items()}
    with pytest.raises(ValueError, match="row 0 of 'lose'"):
        term(params, streams | {"lose": torn}, None, RNG)
    jitted = jax.jit(lambda streams: term(params, streams, None, RNG)[0].mean())
    assert jnp.isfinite(jitted(streams))
    assert jnp.isnan(jitted(streams | {"lose": torn}))
    with pytest.raises(KeyError, match="'pair'.*data.paired"):
        del torn["pair"]
        jax.eval_shape(lambda x: term(params, x, None, RNG), streams | {"lose": torn})


@pytest.mark.parametrize("empty, other", [("win", "lose"), ("lose", "win")])
def test_nan_in_rows_without_an_answer_has_no_effect(empty, other):
    model, params = tiny.bigram_model()
    term = terms.on_pairs(losses.dpo, model, win="win", lose="lose")
    streams = {
        name: tiny.tiny_batch(seed=seed)
        | {"ref_logps": jnp.full(4, -6.0), "pair": jnp.arange(4)}
        for seed, name in enumerate(("win", "lose"))
    }
    streams[empty]["answer"] = streams[empty]["answer"].at[2].set(False)
    assert jnp.any(streams[other]["answer"][2])

    def gradient(junk):
        ref_logps = streams[empty]["ref_logps"].at[2].set(junk)
        given = streams | {empty: streams[empty] | {"ref_logps": ref_logps}}
        return jax.jit(jax.grad(lambda p: term(p, given, None, RNG)[0].mean()))(params)

    jax.tree.map(assert_allclose, gradient(jnp.nan), gradient(-6.0))


def test_targets_and_skipped_tokens_reach_the_loss():
    (model, params), batch = tiny.bigram_model(), tiny.tiny_batch()
    for skip in (0, 2):
        term = terms.on_tokens(losses.ce_u, model, "forget", skip=skip, chunk=3)
        logits = model.unembed(params, model.apply(params, batch).hidden)[:, :-1]
        where = np.array(terms.target_logps(model, params, batch)[1])
        for row in where:
            row[np.flatnonzero(row)[:skip]] = False
        plain = losses.ce_u(logits, batch["tokens"][:, 1:], where=jnp.asarray(where))
        total = value(term, params, batch)
        assert int(total.count) == where.sum() > 0
        assert_allclose(total.sum, plain.sum(), rtol=1e-4)


def test_wrong_settings_are_errors():
    model, params, _, batch = setting()
    make = partial(terms.on_hidden, losses.rmu, model, "forget")
    with pytest.raises(ValueError, match="tokens to be one of"):
        make(layer=0, tokens="most")
    with pytest.raises(ValueError, match=r"\[D\] or \[topics, D\]"):
        make(layer=0, target=jnp.zeros((1, 2, 3)))
    with pytest.raises(ValueError, match="needs a target for adaptive"):
        make(layer=0, adaptive=2.0)
    with pytest.raises(KeyError, match="'topic'"):
        del batch["topic"]
        make(layer=0, target=VECTORS)(params, {"forget": batch}, None, RNG)
    with pytest.raises(ValueError, match="layers 0 to 2, got until=3"):
        make(layer=3, target=VECTORS[0])(params, {"forget": batch}, None, RNG)
    with pytest.raises(ValueError, match="parameter to be one of"):
        terms.on_tokens(lambda z, labels, *, where: z, model, "forget")
