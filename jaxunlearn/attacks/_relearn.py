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
import jax.numpy as jnp
import optax

from jaxunlearn import _checks, combine, losses, terms, trees, wrap
from jaxunlearn._fit import Hook, fit
from jaxunlearn._step import Step, init_state, make_step
from jaxunlearn.data import table as tables
from jaxunlearn.typing import Array, Frozen, Model, Params, PRNGKey, PyTree

KERNELS = r"blocks/(?!mlp/(router|shared_gate)/).*/kernel"  # routers stay
# All but the directions of wrap.projection and of `steer`.
WEIGHTS = r"(?!(projection|steering)/).*"
ADAM = optax.scale_by_adam()
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
        learning_rate: a number or a schedule. Numbers are data: calls with equal shapes
            run one compiled program. A schedule is compiled; pass the same object again
            to use its program again.
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
    schedule = learning_rate if callable(learning_rate) else None
    tx = optimizer(ADAM, schedule, rounding)
    state = init_state(train, tx, key)
    if schedule is None:
        state = state.replace(opt_state=with_rate(state.opt_state, learning_rate))
    state, log = fit(
        jitted_step(model, tx),
        state,
        loader,
        Frozen(rest),
        steps=steps,
        hooks=hooks,
        progress=progress,
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


# An equal model, chain and step keep jit from compiling again. `maxsize` bounds the
# programs that stay in memory.


@functools.lru_cache(maxsize=8)
def jitted_step(model: Model, tx: optax.GradientTransformation) -> Step:
    """The step on the NLL of the stream `known`, averaged over tokens."""
    parts = {STREAM: terms.on_logps(losses.nll, model, STREAM, reduce="token")}
    return jax.jit(make_step(parts, tx), donate_argnums=0)


@functools.lru_cache(maxsize=8)
def optimizer(
    direction: optax.GradientTransformation,
    schedule: optax.Schedule | None,
    rounding: str,
) -> optax.GradientTransformationExtraArgs:
    """The direction times minus the learning rate: that of the schedule, or if it is
    None a number in the state, which `with_rate` sets, so that one program runs every
    rate."""
    chain = optax.chain(combine.weighted_sum(), direction, _scale(schedule))
    return combine.with_rounding(chain, rounding)


def _scale(schedule):
    if schedule is None:
        return optax.inject_hyperparams(optax.scale)(step_size=-1.0)
    return optax.scale_by_learning_rate(schedule)


def with_rate(opt_state: PyTree, learning_rate: float | Array) -> PyTree:
    """The state of `optimizer` with this learning rate."""
    default = optax.tree_utils.tree_get(opt_state, "step_size")
    step_size = -jnp.asarray(learning_rate, default.dtype)
    return optax.tree_utils.tree_set(opt_state, step_size=step_size)


@functools.lru_cache(maxsize=8)
def _with_lora(model: Model, pattern: str, rank: int) -> Model:
    return wrap.lora(model, pattern=pattern, rank=rank, alpha=2.0 * rank)
