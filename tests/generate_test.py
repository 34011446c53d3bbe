# SPDX-License-Identifier: Apache-2.0
"""Decoding equals repeated full passes; end token, sampling and errors."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import jaxunlearn as ju
from tests import tiny

generate = importlib.import_module("jaxunlearn._generate")
NEW = 6
SETTINGS = {
    "plain": {},
    "tied-biased": {"tied": True, "qkv_bias": True, "mlp_bias": True},
    "windows": {"windows": (3, None, 1), "kv_heads": 1},
    "longrope": {"rope": tiny.LONGROPE},
}


def slow(model, params, batch, count):
    """Greedy tokens [B, count]: each row by itself, without padding or cache."""
    length = batch["tokens"].shape[1] + count

    @jax.jit
    def best(params, tokens, real):
        row = {"tokens": tokens[None], "mask": jnp.arange(length)[None] < real}
        hidden = model.apply(params, row).hidden[0, real - 1]
        return jnp.argmax(model.unembed(params, hidden))

    rows = []
    for tokens, mask in zip(batch["tokens"], batch["mask"], strict=True):
        text = np.asarray(tokens)[np.asarray(mask)].tolist()
        start = len(text)
        for _ in range(count):
            padded = np.resize(np.array(text, np.int32), length)
            text.append(int(best(params, jnp.asarray(padded), len(text))))
        rows.append(text[start:])
    return np.array(rows)


def mixed():
    """Two rows padded left, two padded right; lengths differ."""
    left, right = (
        tiny.tiny_batch(side=side, answer=False) for side in ("left", "right")
    )
    pick = jnp.array([True, False, True, False])[:, None]
    return {name: jnp.where(pick, left[name], right[name]) for name in left}


@pytest.fixture(scope="module")
def greedy():
    """A random model with its greedy continuation of `mixed`."""
    model, params = tiny.tiny_model()
    return model, params, slow(model, params, mixed(), NEW)


@pytest.mark.parametrize(
    "name",  # the plain model is compared with full passes in the next test, too
    [x if x != "plain" else pytest.param(x, marks=pytest.mark.slow) for x in SETTINGS],
)
def test_greedy_equals_repeated_full_passes(name):
    model, params = tiny.tiny_model(**SETTINGS[name])
    batch = mixed()
    lengths = np.asarray(batch["mask"].sum(axis=1))
    assert len(set(lengths.tolist())) == 4  # ragged, padded on both sides
    assert not batch["mask"][2, 0] and not batch["mask"][1, -1]
    new = ju.generate(model, params, batch, max_new_tokens=NEW)
    assert new.shape == (4, NEW) and new.dtype == jnp.int32
    expected = slow(model, params, batch, NEW)
    assert_array_equal(new, expected)
    assert len(set(expected.ravel().tolist())) > 2  # not one token over and over
    if name == "longrope":  # a row stays within the limit, and three pass it
        limit, last = model.config.cache_limit, lengths + NEW - 1
        assert (last <= limit).sum() == 1 and (lengths <= limit).all()


def test_padding_and_other_rows_do_not_change_a_row(greedy):
    model, params, expected = greedy
    for side in ("left", "right"):
        batch = tiny.tiny_batch(side=side, answer=False)
        new = ju.generate(model, params, batch, max_new_tokens=NEW)
        assert_array_equal(new, expected)
    plain = {name: np.asarray(mixed()[name])[[2]] for name in ("tokens", "mask")}
    assert_array_equal(
        ju.generate(model, params, plain, max_new_tokens=NEW), expected[[2]]
    )


def test_rows_of_different_lengths_are_split_into_batches():
    model, params = tiny.tiny_model()
    long = tiny.tiny_batch(rows=32, length=40, answer=False)
    cut = jnp.where(jnp.arange(32) % 2 == 0, 40, 4 + jnp.arange(32) % 5)
    right = jnp.arange(32) % 3 == 0
    place = jnp.arange(40)
    near = jnp.where(right[:, None], place, 39 - place) < cut[:, None]
    batch = {"tokens": long["tokens"], "mask": near}
    pieces, back = generate._pieces(batch)
    widths = [piece["tokens"].shape[1] for piece in pieces]
    assert len(pieces) > 1 and widths[0] == 8 and widths[-1] == 40
    assert sum(int(piece["mask"].sum()) for piece in pieces) == int(near.sum())
    assert sorted(back.tolist()) == list(range(32))
    new = ju.generate(model, params, batch, max_new_tokens=NEW)
    assert_array_equal(new, slow(model, params, batch, NEW))
    # Under jit the lengths are not known, and nothing is sorted.
    traced = jax.jit(lambda b: ju.generate(model, params, b, max_new_tokens=NEW))
    assert_array_equal(traced(batch), new)


def test_stacked_layers_give_the_same_tokens(greedy):
    model, params, expected = greedy

    def stacked(rows, length):
        cache = model.init_cache(rows, length)
        return cache | {x: jnp.stack(cache[x]) for x in ("keys", "values")}

    scanned = model._replace(init_cache=stacked, prepare_decode=None)
    assert_array_equal(
        ju.generate(scanned, params, mixed(), max_new_tokens=NEW), expected
    )


def test_the_first_of_equal_logits_is_chosen():
    logits = jnp.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0, -jnp.inf, 1.0]])
    assert_array_equal(generate._argmax(logits), jnp.argmax(logits, axis=-1))
    lost = jnp.full((2, 3), jnp.nan)  # a broken model still names a token
    assert generate._argmax(lost).max() < 3


def test_the_end_token_stops_a_row_and_fills_it(greedy):
    model, params, expected = greedy
    for end in sorted(set(expected.ravel().tolist())):
        new = ju.generate(model, params, mixed(), max_new_tokens=NEW, eos_ids=end)
        ended = np.cumsum(expected == end, axis=1) > 0  # from the first one on
        assert_array_equal(new, np.where(ended, end, expected))


def test_decoding_stops_when_every_row_has_ended(greedy):
    model, params, expected = greedy
    calls = []

    def extend(params, batch, cache):
        jax.debug.callback(lambda x: calls.append(x), batch["tokens"].shape[1])
        return model.decode(params, batch, cache)

    counted = model._replace(decode=extend)
    row = {name: x[:1] for name, x in mixed().items()}
    first = int(expected[0, 0])
    new = ju.generate(counted, params, row, max_new_tokens=NEW, eos_ids=first)
    jax.block_until_ready(new)
    jax.effects_barrier()
    assert_array_equal(new, np.full((1, NEW), first))
    assert len(calls) == 1  # the prompt: its first token ended every row


def test_samples_depend_only_on_the_key():
    model, params = tiny.tiny_model()

    def draw(seed, temperature=1.0):
        return np.asarray(
            ju.generate(
                model,
                params,
                mixed(),
                max_new_tokens=NEW,
                temperature=temperature,
                key=jax.random.key(seed),
            )
        )

    assert_array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))
    # Tokens of one row come from different draws, as do the rows of one token.
    hot = draw(0, temperature=1e4)
    assert len(set(hot.ravel().tolist())) > 8
    # A temperature near 0 takes the likeliest token.
    assert_array_equal(draw(3, 1e-4), slow(model, params, mixed(), NEW))


@pytest.mark.parametrize(
    "temperature", [0.7, pytest.param(2.0, marks=pytest.mark.slow)]
)
def test_samples_follow_the_distribution(temperature):
    model, params = tiny.tiny_model()
    rows = 4000
    prompt = tiny.tiny_batch(rows=1, length=5, answer=False)
    batch = {name: jnp.tile(x, (rows, 1)) for name, x in prompt.items()}
    new = ju.generate(
        model,
        params,
        batch,
        max_new_tokens=1,
        temperature=temperature,
        key=jax.random.key(5),
    )
    hidden = model.apply(params, prompt).hidden[0, -1]
    logits = np.asarray(model.unembed(params, hidden), np.float64) / temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    counts = np.bincount(np.asarray(new)[:, 0], minlength=len(p))
    often = p * rows >= 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(p[often], p[~often].sum()) * rows
    assert often.sum() > 5
    freedom = often.sum()
    chi_square = ((observed - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)  # 5 standard deviations


def test_a_model_without_a_cache_is_refused():
    model, params = tiny.tiny_model()
    bare = model._replace(init_cache=None, decode=None)
    with pytest.raises(ValueError, match="decode=None"):
        ju.generate(bare, params, mixed(), max_new_tokens=1)


def test_texts_beyond_the_positions_are_refused():
    model, params = tiny.tiny_model()
    batch = tiny.tiny_batch(rows=2, length=60, answer=False)
    assert ju.generate(model, params, batch, max_new_tokens=4).shape == (2, 4)
    with pytest.raises(ValueError, match="within 64 positions, got 65"):
        ju.generate(model, params, batch, max_new_tokens=5)


def test_wrong_settings_are_errors():
    model, params = tiny.tiny_model()
    for kwargs, error, message in (
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens >= 1, got"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens=1.5"),
        ({"max_new_tokens": 1, "temperature": 0.5}, ValueError, "key=None"),
        ({"max_new_tokens": 1, "temperature": -1.0}, ValueError, "temperature >= 0"),
    ):
        with pytest.raises(error, match=message):
            ju.generate(model, params, mixed(), **kwargs)
