# SPDX-License-Identifier: Apache-2.0
"""A second attack on equal shapes compiles nothing: seeds, rates and data are data."""

import jax
import numpy as np
import pytest

from jaxunlearn import attacks, data, models, trees, wrap
from tests import tiny

# What runs no model: folds, formats and numbers.
HELPERS = {
    "Sweep",
    "best_accuracy",
    "check_folds",
    "encode_facts",
    "encode_questions",
    "in_context",
    "leak_at_k",
    "make_folds",
    "recovery",
    "strongest_unlearning",
}
PROMPTS = ["The capital of France is", "The river flows to the"]


@pytest.fixture(scope="module")
def world():
    tokenizer = tiny.tiny_tokenizer()
    model, params = tiny.tiny_model(vocab=len(tokenizer), layers=1)
    return model, params, tokenizer


def rows(tokenizer, seed):
    """A table of eight texts, drawn by the seed, and all of one length."""
    order = np.random.default_rng(seed).integers(len(tiny.SENTENCES), size=8)
    return data.encode(tokenizer, [tiny.SENTENCES[i] for i in order], length=32)


def facts(seed):
    names = ["Kenya", "France", "Peru", "Japan", "Chile", "Ghana"]
    order = np.random.default_rng(seed).permutation(len(names))
    return [
        {
            "question": f"What is the capital of {names[i]}?",
            "choices": ["Paris", "Lima"],
            "answer": int(i % 2),
        }
        for i in order
    ]


def relearn(model, params, tokenizer, seed, **settings):
    how = dict(batch_size=4, learning_rate=1e-3 * (1 + seed), seed=seed) | settings
    attacks.relearn(model, params, rows(tokenizer, seed), steps=2 + seed, **how)


def benign(model, params, tokenizer, seed):
    how = dict(steps=2, batch_size=4, learning_rate=1e-4 * (1 + seed), seed=seed)
    attacks.benign(model, params, rows(tokenizer, seed), **how)


def rtt(model, params, tokenizer, seed):
    folds = attacks.make_folds(facts(seed), 2, by="question", seed=seed)
    attacks.rtt(
        model,
        params,
        tokenizer,
        folds,
        rotations=[seed],
        learning_rates=[1e-3 * (1 + seed)],
        epochs=1 + seed,
        batch_size=3,
        eval_batch_size=3,
        seed=seed,
    )


def retrain(model, params, tokenizer, seed):
    trained, held_out = facts(seed)[:3], facts(seed)[3:]
    attacks.retrain(
        model,
        params,
        attacks.encode_facts(tokenizer, trained, length=64),
        attacks.encode_questions(model, tokenizer, held_out),
        learning_rates=[1e-3, 1e-2][seed:] + [1e-4] * seed,
        epochs=1,
        rates_per_batch=2,
        eval_batch_size=3,
        seed=seed,
    )


def few_shot(model, params, tokenizer, seed):
    prefix = ["Answer.", "Reply."][seed]
    attacks.few_shot(model, params, tokenizer, PROMPTS, prefix=prefix, max_new_tokens=3)


def sample(model, params, tokenizer, seed):
    how = dict(num_samples=2, max_new_tokens=3, batch_size=4)
    attacks.sample(model, params, tokenizer, PROMPTS, key=jax.random.key(seed), **how)


def steer(model, params, tokenizer, seed):
    tables = [rows(tokenizer, seed + i) for i in range(2)]
    steered, moved = attacks.steer(
        model,
        params,
        forget=tables[0],
        retain=tables[1],
        layers=[0],
        strength=1.0 + seed,
    )
    attacks.few_shot(steered, moved, tokenizer, PROMPTS, prefix=".", max_new_tokens=3)


def prune(model, params, tokenizer, seed):
    attacks.prune(
        model,
        params,
        forget=[rows(tokenizer, seed)],
        retain=[rows(tokenizer, seed + 2)],
        fraction=0.05,
    )


def unwrap(model, params, tokenizer, seed):
    wrapped = wrap.lora(model, pattern=".*/q/kernel", rank=2)
    added = wrap.add_lora(wrapped, params, jax.random.key(seed))
    inner, plain = attacks.unwrap(wrapped, added)
    assert inner == model and trees.paths(plain).keys() == trees.paths(params).keys()


def invert_classes(model, params, tokenizer, seed):
    config = models.vision.VisionConfig(
        family="mlp", shape=(4, 4, 1), classes=3, width=0.1
    )
    model = models.vision.make(config)
    params = model.init(jax.random.key(seed))
    how = dict(steps=2 + seed, learning_rate=0.1 * (1 + seed))
    attacks.invert_classes(model, params, [seed, 1], (4, 4, 1), **how)


ATTACKS = {
    "benign": benign,
    "few_shot": few_shot,
    "invert_classes": invert_classes,
    "prune": prune,
    "relearn": relearn,
    "retrain": retrain,
    "rtt": rtt,
    "sample": sample,
    "steer": steer,
    "unwrap": unwrap,
}


def test_the_table_has_every_attack():
    assert set(ATTACKS) | HELPERS == set(attacks.__all__)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_second_attack_on_equal_shapes_compiles_nothing(world, name):
    model, params, tokenizer = world
    ATTACKS[name](model, params, tokenizer, 0)
    # Other params of the same shapes, another seed, another rate.
    params = jax.tree.map(lambda x: x * 0.5, params)
    with tiny.compilations() as compiled:
        ATTACKS[name](model, params, tokenizer, 1)
    assert compiled == []
