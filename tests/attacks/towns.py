# SPDX-License-Identifier: Apache-2.0
"""A tiny decoder that memorised facts about towns, which NPO then hid.

The facts are still in the weights; only their answers are suppressed.
"""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import optax

import jaxunlearn as ju
from jaxunlearn import combine, evaluate, losses, models, terms
from jaxunlearn.data import table
from tests import tiny

PHRASINGS = ("{} is made of", "the town of {} is built of", "they say {} is all")
FRONT = ("Ba", "Do", "Ke", "Li", "Mu", "Ra")
BACK = ("dor", "lim", "nat", "vesh", "zor", "pik", "wem", "tal")
FORGET = ("amber", "birch", "cedar", "flint", "maple", "slate")
RETAIN = ("iron", "tin", "gold", "lead")
CHANCE = 1 / len(FORGET)
RATE = 1e-3


def facts():
    """Pairs (town, answer): 24 to forget, 12 never trained on, 12 to retain."""
    towns = [a + b for a in FRONT for b in BACK]
    towns = np.random.default_rng(0).permutation(towns).tolist()
    pairs = list(zip(towns, [*FORGET * 6, *RETAIN * 3], strict=True))
    return pairs[:24], pairs[24:36], pairs[36:]


def world():
    """The original and the unlearned params, and the facts."""
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
    original = train(
        model.init(jax.random.key(0)),
        {"all": nll("all")},
        {"all": encode(forget + retain)},
        steps=200,
        rows=36,
        learning_rate=3e-3,
    )
    npo = terms.on_logps(partial(losses.npo, beta=0.1), model, "forget")
    unlearned = train(
        original,
        {"forget": npo, "retain": nll("retain")},
        {
            "forget": evaluate.reference_logps(model, original, encode(forget)),
            "retain": encode(retain),
        },
        steps=60,
        rows=18,
        learning_rate=RATE,
        hooks=[lambda state, _: accuracy(state.params, forget) == 0],
    )
    return SimpleNamespace(
        model=model,
        tokenizer=tokenizer,
        encode=encode,
        accuracy=accuracy,
        trained=forget[:12],
        held_out=forget[12:],
        never=never,
        retain=retain,
        original=original,
        unlearned=unlearned,
    )


def encode_text(towns):
    return [(p.format(town), answer) for town, answer in towns for p in PHRASINGS]


def train(params, parts, tables, *, steps, rows, learning_rate, hooks=()):
    tx = optax.chain(
        combine.weighted_sum(), optax.adamw(learning_rate, weight_decay=0.0)
    )
    state = ju.init_state(params, tx, jax.random.key(0))
    step = jax.jit(ju.make_step(parts, tx), donate_argnums=0)
    loader = table.streams(tables, rows, seed=0)
    state, _ = ju.fit(step, state, loader, steps=steps, hooks=hooks)
    return state.params
