# SPDX-License-Identifier: Apache-2.0
"""Terms refuse losses, models and streams that cannot work, and name the argument."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxunlearn import losses, terms
from tests import tiny

MODEL, PARAMS = tiny.tiny_model(layers=1)
MAKERS = {
    "on_logps": lambda loss, model: terms.on_logps(
        loss, model, "forget", reduce="token"
    ),
    "on_pairs": lambda loss, model: terms.on_pairs(loss, model, win="win", lose="lose"),
    "on_tokens": lambda loss, model: terms.on_tokens(loss, model, "forget"),
    "on_hidden": lambda loss, model: terms.on_hidden(loss, model, "forget", layer=0),
}
each = pytest.mark.parametrize("name", MAKERS)


def run(term):
    streams = {
        name: tiny.tiny_batch() | {"ref_logps": jnp.zeros(4), "pair": jnp.arange(4)}
        for name in term.reads
    }
    return jax.eval_shape(partial(term, key=None), PARAMS, streams, PARAMS)


@each
def test_swapped_loss_and_model_are_refused(name):
    with pytest.raises(TypeError, match=f"{name}.*loss=a Model.*model=nll"):
        MAKERS[name](MODEL, losses.nll)


@each
def test_a_module_in_place_of_a_model_is_refused(name):
    with pytest.raises(TypeError, match="model=a dict.*from_nnx"):
        MAKERS[name](losses.nll, {})


def test_a_stream_is_given_by_its_name():
    with pytest.raises(TypeError, match="stream=a dict"):
        terms.on_logps(losses.nll, MODEL, tiny.tiny_batch())


@pytest.mark.parametrize("name", ["on_logps", "on_tokens", "on_hidden"])
def test_a_loss_over_tokens_needs_where(name):
    def plain(values):
        return values

    with pytest.raises(TypeError, match=rf"{name}.*`where`.*plain\(values\)"):
        MAKERS[name](plain, MODEL)
    MAKERS[name](lambda values, **kwargs: values, MODEL)
    terms.on_logps(plain, MODEL, "forget")  # sums over each answer: no mask is left


@each
def test_a_loss_that_averages_is_refused(name):
    def average(*arrays, where=None):
        return jnp.mean(arrays[0])

    with pytest.raises(ValueError, match=rf"{name}.*shape \(\) from average"):
        run(MAKERS[name](average, MODEL))


def test_a_loss_that_averages_over_sequences_is_refused():
    term = terms.on_logps(lambda logps: jnp.mean(-logps), MODEL, "forget")
    with pytest.raises(ValueError, match=r"sequence, shape \(4,\), got shape \(\)"):
        run(term)
