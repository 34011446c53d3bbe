# SPDX-License-Identifier: Apache-2.0
"""Relearning: finetune on some forgotten facts, then evaluate the others.

If no fact helps to guess another, then the others can only come back because they were
still in the weights (Deeb and Roger, "Do unlearning methods remove information from
language model weights?", arXiv 2410.08827). Attack the original model in the same way:
its accuracy afterwards is the most that the attack can recover.
"""

import functools
from collections.abc import Sequence

import jax
import optax

from jaxunlearn import _checks, combine, losses, terms, trees, wrap
from jaxunlearn._fit import Hook, fit
from jaxunlearn._step import init_state, make_step
from jaxunlearn.data import table as tables
from jaxunlearn.typing import Frozen, Model, Params, PRNGKey

KERNELS = r"blocks/(?!mlp/(router|shared_gate)/).*/kernel"  # routers stay
WEIGHTS = r"(?!projection/).*"  # all but the directions of wrap.projection
# The facts that the attacker knows. The order of rows depends on this name too.
STREAM = "known"


def relearn(
    model: Model,
    params: Params,
    train_facts: tables.Table,
    *,
    steps: int,
    batch_size: int = 16,
    learning_rate: float | optax.Schedule = 1e-5,
    rank: int = 0,
    pattern: str = KERNELS,
    rounding: str = "nearest",
    key: PRNGKey | None = None,
    seed: int = 0,
    hooks: Sequence[Hook] = (),
    progress: bool = False,
) -> tuple[Params, list[dict]]:
    """Finetunes the attacked model on the answers to the facts that the attacker knows.

    The attacker needs the weights and some forgotten facts with their answers. The
    result shows how much of the other forgotten facts comes back: evaluate them with
    the params returned.

    Args:
        model: the attacked model.
        params: its parameters; they are not changed.
        train_facts: table of the facts to train on (T in the paper), as `encode_facts`
            makes it.
        steps: number of updates of AdamW, without weight decay, on the NLL averaged
            over tokens.
        batch_size: rows in each step.
        learning_rate: a number or a schedule.
        rank: 0 trains all parameters except the directions of wrap.projection, which
            count as part of the model (`unwrap` removes them). A positive rank trains
            only LoRA matrices, with alpha = 2 rank, and merges them at the end.
        pattern: regular expression for the paths of the kernels that get LoRA.
        rounding: of updates to params below float32, as combine.with_rounding; with
            "nearest" the attack on such a model can be much weaker.
        key: initialises LoRA, and draws dropout in models that have it;
            jax.random.key(0) if None.
        seed: orders the rows.
        hooks: as for `fit`.
        progress: as for `fit`.
    Returns:
        (params after the attack, log); the log has one entry for each step, with
        `known/loss`.
    Raises:
        ValueError: if `train_facts` has no rows, or wrap.lora refuses the pattern or
            the rank.
    References: https://arxiv.org/abs/2410.08827
    """
    _checks.not_negative("attacks.relearn", rank=rank)
    tables.num_rows(train_facts, name="train_facts")
    loader = tables.streams({STREAM: train_facts}, batch_size, seed=seed)
    key = jax.random.key(0) if key is None else key
    model, train, rest = trainable(model, params, rank, pattern, key)
    parts = {STREAM: terms.on_logps(losses.nll, model, STREAM, reduce="token")}
    tx = optax.chain(
        combine.weighted_sum(), optax.adamw(learning_rate, weight_decay=0.0)
    )
    tx = combine.with_rounding(tx, rounding)
    state = init_state(train, tx, key)
    step = jax.jit(make_step(parts, tx), donate_argnums=0)
    state, log = fit(
        step, state, loader, Frozen(rest), steps=steps, hooks=hooks, progress=progress
    )
    after = trees.merge(state.params, rest)
    return (wrap.merge_lora(model, after) if rank else after), log


def trainable(
    model: Model, params: Params, rank: int, pattern: str, key: PRNGKey
) -> tuple[Model, Params, Params]:
    """(model, leaves to train, other leaves): all weights, or LoRA if rank > 0."""
    if rank:
        model = _with_lora(model, pattern, rank)
        params = wrap.add_lora(model, params, key)
    return model, *trees.split(params, wrap.LORA if rank else WEIGHTS)


@functools.lru_cache(maxsize=8)  # an equal model keeps jit from compiling again
def _with_lora(model: Model, pattern: str, rank: int) -> Model:
    return wrap.lora(model, pattern=pattern, rank=rank, alpha=2.0 * rank)
