# SPDX-License-Identifier: Apache-2.0
"""A joint term is the weighted sum of its parts, in one forward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxunlearn import losses, terms
from tests import tiny
from tests.terms.logits_test import KINDS, RNG, batch_for, close, reference


def parts_and_streams():
    model, _ = tiny.bigram_model()
    parts = {
        "forget": KINDS["npo"][0](model=model, stream="forget"),
        "retain": KINDS["nll"][0](model=model, stream="retain"),
        "near": KINDS["kl"][0](model=model, stream="retain", chunk=2),
    }
    streams = {
        "forget": batch_for("left"),
        "retain": batch_for("right", rows=2, length=9, seed=3),
        "unread": {},
    }
    return parts, streams


WEIGHTS = {"forget": -0.5, "retain": 2.0, "near": 0}


@pytest.mark.parametrize(
    ("kinds", "weights", "answers"),
    [
        (("forget", "retain"), None, ()),
        (("forget", "retain"), WEIGHTS, ("forget",)),
        (("forget", "retain"), None, ("forget", "retain")),
        (tuple(WEIGHTS), WEIGHTS, ("forget", "retain")),
        (tuple(WEIGHTS), None, ("forget",)),
    ],
)
def test_joint_is_the_weighted_sum_of_the_means(kinds, weights, answers):
    parts, streams = parts_and_streams()
    parts = {name: parts[name] for name in kinds}
    for name in ("forget", "retain"):
        columns = dict(streams[name])
        answer = columns.pop("answer")
        streams[name] = columns | ({"answer": answer} if name in answers else {})
    _, params = tiny.bigram_model()
    weights = weights and {name: weights[name] for name in kinds}
    joint = terms.joint(parts, weights)
    ref = reference()
    assert joint.reads == ("forget", "retain") and joint.needs_ref == ("near" in kinds)
    factors = dict.fromkeys(parts, 1.0) if weights is None else weights

    def together(params):
        total, metrics = joint(params, streams, ref, RNG)
        return jnp.sum(total.mean()), metrics

    def apart(params):
        metrics, value = {}, 0.0
        for name, term in parts.items():
            total, extra = term(params, streams, ref, RNG)
            value += factors[name] * total.mean()
            metrics[f"{name}/loss"] = total
            metrics |= {f"{name}/{key}": x for key, x in extra.items()}
        return value, metrics

    run = [jax.jit(jax.value_and_grad(f, has_aux=True)) for f in (together, apart)]
    close(*(f(params) for f in run), atol=1e-4)


def test_joint_unembeds_once_if_all_parts_need_log_probabilities():
    parts, streams = parts_and_streams()
    _, params = tiny.bigram_model()
    products = {}
    for kinds in (("forget",), ("forget", "retain"), tuple(WEIGHTS)):
        joint = terms.joint({name: parts[name] for name in kinds})
        run = partial(joint, streams=streams, ref_params=reference(), key=RNG)
        products[len(kinds)] = str(jax.make_jaxpr(run)(params)).count("dot_general")
    assert products[1] == products[2] < products[3]


def test_a_column_of_another_width_is_not_joined():
    parts, streams = parts_and_streams()
    _, params = tiny.bigram_model()
    parts = {name: parts[name] for name in ("forget", "retain")}
    joint = jax.jit(lambda given: terms.joint(parts)(params, given, None, RNG)[0])
    plain = joint(streams)
    wider = {
        name: batch | {"topics": jnp.zeros((len(batch["tokens"]), 99))}
        for name, batch in streams.items()
        if batch
    }
    close(joint(wider), plain)


def test_joint_refuses_terms_that_cannot_be_joined():
    parts, _ = parts_and_streams()
    with pytest.raises(ValueError, match="at least one term"):
        terms.joint({})
    with pytest.raises(KeyError, match="reads weights 'near', but there is"):
        terms.joint(parts, {"forget": 1.0, "retain": 1.0})
    with pytest.raises(KeyError, match="'more'"):
        terms.joint(parts, dict.fromkeys((*parts, "more"), 1.0))
    with pytest.raises(ValueError, match="finite retain"):
        terms.joint(parts, dict.fromkeys(parts, 1.0) | {"retain": float("inf")})
    other, _ = tiny.bigram_model(width=8)
    another = terms.on_logps(losses.nll, other, "x")
    with pytest.raises(ValueError, match="terms on one model"):
        terms.joint(parts | {"another": another})


def test_joint_refuses_a_half():
    parts, _ = parts_and_streams()
    parts["forget"] = terms.halves(parts["forget"])[0]
    with pytest.raises(ValueError, match="HalfTerm as 'forget'"):
        terms.joint(parts)
