# SPDX-License-Identifier: Apache-2.0
"""Relearning recovers facts that are merely hidden, and none that were never learned.

A tiny decoder memorises what some towns are made of, then NPO hides it: the towns'
facts are still in the weights, only their answers are suppressed.
"""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from numpy.testing import assert_array_equal

import jaxunlearn as ju
from jaxunlearn import attacks, combine, evaluate, losses, models, terms
from jaxunlearn.data import table
from tests import tiny

PHRASINGS = ("{} is made of", "the town of {} is built of", "they say {} is all")
FRONT = ("Ba", "Do", "Ke", "Li", "Mu", "Ra")
BACK = ("dor", "lim", "nat", "vesh", "zor", "pik", "wem", "tal")
FORGET = ("amber", "birch", "cedar", "flint", "maple", "slate")
RETAIN = ("iron", "tin", "gold", "lead")
CHANCE = 1 / len(FORGET)
RATE = 1e-3


@pytest.fixture(autouse=True, scope="module")
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        yield


def facts():
    """24 towns to forget, 12 that are never trained, 12 to retain: (town, answer)."""
    towns = [a + b for a in FRONT for b in BACK]
    towns = np.random.default_rng(0).permutation(towns).tolist()
    pairs = list(zip(towns, [*FORGET * 6, *RETAIN * 3], strict=True))
    return pairs[:24], pairs[24:36], pairs[36:]


@pytest.fixture(scope="module")
def world(promotion):
    """The model before and after its facts were hidden, and who can be asked."""
    forget, never, retain = facts()
    everything = encode_text(forget + never + retain)
    tokenizer = tiny.tiny_tokenizer([f"{p} {a}" for p, a in everything])

    def encode(towns):
        prompts, answers = zip(*encode_text(towns), strict=True)
        return table.encode(tokenizer, prompts, answers, length=16)

    def accuracy(params, towns):
        prompts, answers = zip(*encode_text(towns), strict=True)
        texts = evaluate.completions(
            model, params, tokenizer, prompts, max_new_tokens=2, batch_size=36
        )
        right = [t.strip().startswith(a) for t, a in zip(texts, answers, strict=True)]
        return np.mean(right)

    config = models.DecoderConfig(
        family="llama",
        vocab=len(tokenizer),
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        hidden=64,
        positions=32,
        remat="none",
    )
    model = models.make(config)
    nll = partial(terms.on_logps, losses.nll, model, reduce="token")
    knows = train(
        model.init(jax.random.key(0)),
        {"all": nll("all")},
        {"all": encode(forget + retain)},
        steps=200,
        rows=36,
        lr=3e-3,
    )
    npo = terms.on_logps(partial(losses.npo, beta=0.1), model, "forget")
    hides = train(
        knows,
        {"forget": npo, "retain": nll("retain")},
        {
            "forget": evaluate.reference_logps(model, knows, encode(forget)),
            "retain": encode(retain),
        },
        steps=60,
        rows=18,
        lr=RATE,
        hooks=[lambda state, _: accuracy(state.params, forget) == 0],
    )
    return SimpleNamespace(
        model=model,
        encode=encode,
        accuracy=accuracy,
        trained=forget[:12],
        asked=forget[12:],
        never=never,
        knows=knows,
        hides=hides,
    )


def encode_text(towns):
    return [(p.format(town), answer) for town, answer in towns for p in PHRASINGS]


def train(params, parts, tables, *, steps, rows, lr, hooks=()):
    tx = optax.chain(combine.weighted_sum(), optax.adamw(lr, weight_decay=0.0))
    state = ju.init_state(params, tx, jax.random.key(0))
    step = jax.jit(ju.make_step(parts, tx), donate_argnums=0)
    loader = table.streams(tables, rows, seed=0)
    state, _ = ju.fit(step, state, loader, steps=steps, hooks=hooks)
    return state.params


def relearn(world, params, steps, **kwargs):
    known = world.encode(world.trained)
    return attacks.relearn(
        world.model, params, known, steps=steps, batch_size=18, lr=RATE, **kwargs
    )


def test_it_recovers_hidden_facts_and_none_that_were_never_learned(world):
    ask = world.accuracy
    both = world.trained + world.asked
    assert ask(world.knows, both) > 0.95
    assert ask(world.hides, both) == 0.0

    def knows(state, _):
        return ask(state.params, world.trained) > 0.9

    after, log = relearn(world, world.hides, 60, hooks=[knows])
    assert len(log) < 60 and log[-1]["known/loss"] < log[0]["known/loss"] / 2
    assert ask(after, world.asked) > 3 * CHANCE  # hidden facts come back
    for params in (world.knows, world.hides, after):
        assert ask(params, world.never) < 2 * CHANCE  # these were never there


def test_the_params_given_are_left_as_they_were(world):
    before = jax.tree.map(np.array, world.hides)
    after, log = relearn(world, world.hides, 2)
    jax.tree.map(assert_array_equal, world.hides, before)  # nor were they donated
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after, world.hides)
    assert all(jax.tree.leaves(moved))  # every parameter trains
    assert [entry["step"] for entry in log] == [0, 1]
    assert {"known/loss", "known/nll", "seconds"} <= set(log[0])


def test_the_seed_decides_the_order_of_the_rows(world):
    seen = []
    losses = [
        relearn(world, world.hides, 2, seed=seed, hooks=[lambda *x: seen.append(x)])[1]
        for seed in (0, 0, 1)
    ]
    first, same, other = ([entry["known/loss"] for entry in log] for log in losses)
    assert first == same
    assert first != other
    assert len(seen) == 6  # hooks are called


def test_a_bar_is_shown_if_asked_for(world, capsys):
    relearn(world, world.hides, 2, progress=True)
    assert "2/2" in capsys.readouterr().err
    relearn(world, world.hides, 2)
    assert capsys.readouterr().err == ""


def test_no_known_facts_is_an_error(world):
    empty = {name: x[:0] for name, x in world.encode(world.trained).items()}
    with pytest.raises(ValueError, match="The known set is empty: at least one row"):
        attacks.relearn(world.model, world.hides, empty, steps=1)
