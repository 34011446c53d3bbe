# SPDX-License-Identifier: Apache-2.0
"""Retraining on T (RTT): train on some forgotten facts, evaluate the others.

    folds = attacks.make_folds(facts, 5, by="name")
    unlearned = attacks.rtt(model, unlearned_params, tokenizer, folds)
    original = attacks.rtt(model, original_params, tokenizer, folds)  # the same attack
    attacks.recovery(unlearned=unlearned, original=original)

Several learning rates run in one compiled program (jax.vmap over their params);
`rates_per_batch` is their number. References: https://arxiv.org/abs/2410.08827
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn import _checks, evaluate, losses, terms, trees
from jaxunlearn._ahead import one_behind
from jaxunlearn._fit import MAX_SWALLOWED, warn_of_rounding
from jaxunlearn._step import SWALLOWED, init_state, make_step
from jaxunlearn.attacks import _folds, _formats
from jaxunlearn.attacks._relearn import (
    KERNELS,
    STREAM,
    optimizer,
    trainable,
    with_rate,
)
from jaxunlearn.data import table as tables
from jaxunlearn.typing import Frozen, Model, Params, PRNGKey

LEARNING_RATES = tuple(n * 1e-7 for n in (1, 2, 4, 8, 16, 32))
LION = optax.scale_by_lion(0.9, 0.99)


class Sweep(NamedTuple):
    """The attacks of one rotation, one for each learning rate.

    Attributes:
        learning_rates: R of them.
        hits: [R, epochs + 1, n] bool, whether each held-out fact was answered
            correctly, before the attack and after each epoch.
        logps: [R, epochs + 1, n, k] float32, log-probability of each choice, nats,
            summed over its tokens.
        losses: [R, epochs] float32, mean training loss of each epoch, nats per token.
        finite: [R] bool, False if the loss of some step was not finite; such a step
            leaves the params unchanged.
    """

    learning_rates: tuple[float, ...]
    hits: np.ndarray
    logps: np.ndarray
    losses: np.ndarray
    finite: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        """[R, epochs + 1] float, fraction of the held-out facts answered correctly."""
        return self.hits.mean(-1)


def rtt(
    model: Model,
    params: Params,
    tokenizer: Any,
    folds: Sequence[Sequence[_folds.Fact]],
    *,
    train_format: str = "letter_answer",
    eval_format: str = "letter",
    prompt_format: tables.PromptFormat = tables.PLAIN,
    by: str | Sequence[str] = "question",
    rotations: Sequence[int] = (0, 1),
    callback: Callable[[int, Sweep], None] | None = None,
    **settings: Any,
) -> list[Sweep]:
    """For each rotation, trains on all folds but one and evaluates the held-out fold.

    The attacker needs the weights and the answers to the facts of all folds but one. A
    high accuracy on the held-out fold means that its facts were hidden, not removed;
    `recovery` compares it with the same attack on the original model.

    Args:
        model, params: the attacked model; params are not changed.
        tokenizer: a fast tokenizer.
        folds: lists of facts that share nothing, see `make_folds`.
        train_format: how facts are written for training, see `encode_facts`.
        eval_format: how held-out facts are put as questions, see `encode_questions`.
        prompt_format: how questions and answers are joined. Its wording is for the
            train format "answer" and the eval format "choice".
        by: columns of which no value may be in two folds. With the train format
            "statement", the column `statement` is added.
        rotations: which folds are held out, by index; the paper holds out two of five.
        callback: called with the index and the Sweep of each rotation when it ends.
        settings: as for `retrain`.
    Returns:
        A Sweep for each rotation; `best_accuracy` and `recovery` summarise them.
    Raises:
        ValueError: if two folds share a fact (it is named), an index is not that of a
            fold, and as `encode_facts`, `encode_questions` and `retrain`.
    References: https://arxiv.org/abs/2410.08827
    """
    columns = (by,) if isinstance(by, str) else tuple(by)
    trained = ("statement",) if train_format == "statement" else ()
    _folds.check_folds(folds, (*columns, *trained))
    if wrong := [index for index in rotations if not 0 <= index < len(folds)]:
        raise ValueError(
            f"attacks.rtt needs rotations from 0 to {len(folds) - 1}, the indices of "
            f"the folds, got {_checks.listed(wrong)}."
        )
    all_facts = [fact for fold in folds for fact in fold]
    encode = partial(
        _formats.encode_facts,
        tokenizer,
        format=train_format,
        prompt_format=prompt_format,
    )
    length = encode(all_facts)["tokens"].shape[1]  # one shape for all folds
    train_folds = [encode(fold, length=length) for fold in folds]
    questions = _formats.encode_questions(
        model, tokenizer, all_facts, eval_format, prompt_format=prompt_format
    )
    ends = np.cumsum([len(fold) for fold in folds])
    sweeps = []
    for held_out in rotations:
        rows = range(ends[held_out] - len(folds[held_out]), ends[held_out])
        sweep = retrain(
            model,
            params,
            tables.concat([t for i, t in enumerate(train_folds) if i != held_out]),
            tables.select(questions, rows),
            **settings,
        )
        sweeps.append(sweep)
        if callback is not None:
            callback(held_out, sweep)
    return sweeps


def retrain(
    model: Model,
    params: Params,
    train_facts: tables.Table,
    eval_facts: tables.Table,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 6,
    batch_size: int = 4,
    direction: optax.GradientTransformation = LION,
    warmup_steps: int = 24,
    rank: int = 0,
    pattern: str = KERNELS,
    rates_per_batch: int = 1,
    eval_batch_size: int = 32,
    rounding: str = "nearest",
    key: PRNGKey | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Sweep:
    """Trains on some facts at several learning rates; evaluates others every epoch.

    This is one rotation of `rtt`, with tables instead of folds.

    Args:
        model, params: the attacked model; params are not changed.
        train_facts: table of the facts to train on (T), from `encode_facts`.
        eval_facts: table of the held-out facts (V), from `encode_questions`.
        learning_rates: R of them.
        epochs: passes over `train_facts`.
        batch_size: rows in each step; all of `train_facts` if it has fewer.
        direction: turns the gradient into a direction, which is multiplied by the
            learning rate. The paper uses Lion; optax.scale_by_adam() gives Adam. Pass
            the same object in every call, or the step is compiled again.
        warmup_steps: number of steps over which the learning rate rises linearly.
        rank, pattern: as for `relearn`; LoRA matrices are not merged here.
        rates_per_batch: number of learning rates in one program. It holds that many
            copies of the leaves that train and of their optimizer state.
        eval_batch_size: number of facts evaluated at a time.
        rounding, key: as for `relearn`.
        seed: orders the rows.
        progress: whether to show a progress bar on standard error.
    Returns:
        The hits, log-probabilities and losses of all learning rates.
    Raises:
        ValueError: if there is no row or no learning rate, or a number is out of range.
    Warns:
        UserWarning: as `fit`, if rounding swallowed a part of the last update.
    Paper and code: the released code trains float16 params, of which these learning
        rates move only a few. Here params keep their dtype; in float32 all of them
        move, so other learning rates may be best.
    """
    owner = "attacks.retrain"
    _checks.positive_int(
        owner, epochs=epochs, batch_size=batch_size, rates_per_batch=rates_per_batch
    )
    _checks.not_negative(owner, warmup_steps=warmup_steps, rank=rank)
    if not learning_rates:
        raise ValueError(f"{owner} needs at least one learning rate, got none.")
    for learning_rate in learning_rates:
        _checks.positive(owner, learning_rate=learning_rate)
    num_rows = tables.num_rows(train_facts, name="train_facts")
    _checks.token_ids(f"{owner}: train_facts", model, train_facts)
    batch_size = min(batch_size, num_rows)  # an epoch has at least one step
    key = jax.random.key(0) if key is None else key
    model, train, rest = trainable(model, params, rank, pattern, key)
    tx = _chain(direction, warmup_steps, rounding)
    evaluated = partial(
        _choice_logps, model, rest=rest, eval_facts=eval_facts, size=eval_batch_size
    )
    before = evaluated(jax.tree.map(lambda x: x[None], train))
    logps, epoch_losses, finite = [], [], []
    num_chunks = -(-len(learning_rates) // rates_per_batch)
    num_steps = num_chunks * -(-epochs * num_rows // batch_size)
    bar = _bar(num_steps) if progress else None
    for start in range(0, len(learning_rates), rates_per_batch):
        chunk = learning_rates[start : start + rates_per_batch]
        state = _init(train, jnp.asarray(chunk, jnp.float32), key, tx)
        batches = tables.batches(train_facts, batch_size, seed=seed, name=STREAM)
        chunk_logps, done = [np.repeat(before, len(chunk), 0)], 0
        for epoch in range(1, epochs + 1):
            steps = -(-epoch * num_rows // batch_size) - done
            values = []
            for _ in range(steps):
                batch = {STREAM: next(batches)}
                state, metrics = _step(state, batch, rest, model=model, tx=tx)
                values.append([metrics[f"{STREAM}/loss"], metrics["finite"]])
                if bar:
                    bar.update()
            done += steps
            values = np.asarray(jax.device_get(values), np.float32)  # [steps, 2, R]
            epoch_losses.append(values[:, 0].mean(0))
            finite.append(values[:, 1].all(0))
            chunk_logps.append(evaluated(state.params))
        logps.append(np.stack(chunk_logps, 1))
        swallowed = float(np.max(metrics.get(SWALLOWED, 0.0)))
        if swallowed > MAX_SWALLOWED:
            warn_of_rounding(train, swallowed, done - 1, stacklevel=2)
    if bar:
        bar.close()

    def by_rate(values):  # [chunks * epochs] arrays of [rates] to [R, epochs]
        chunks = [values[i * epochs : (i + 1) * epochs] for i in range(num_chunks)]
        return np.concatenate([np.stack(chunk, 1) for chunk in chunks])

    all_logps = np.concatenate(logps)
    return Sweep(
        tuple(float(rate) for rate in learning_rates),
        evaluate.best_choice(all_logps) == np.asarray(eval_facts["right"]),
        all_logps,
        by_rate(epoch_losses),
        by_rate(finite).all(1),
    )


def _bar(steps):
    tqdm = _checks.library("attacks.retrain(progress=True)", "tqdm", "hf").tqdm
    return tqdm(total=steps, unit="step", dynamic_ncols=True, leave=False)


@functools.lru_cache(maxsize=8)  # an equal chain keeps jit from compiling again
def _chain(direction, warmup_steps, rounding):
    """`optimizer` with a linear warmup."""

    def warmup(count):
        return jnp.minimum(1.0, (count + 1) / max(1, warmup_steps))

    direction = optax.chain(direction, optax.scale_by_schedule(warmup))
    return optimizer(direction, None, rounding)


@partial(jax.jit, static_argnames="tx")
def _init(train, learning_rates, key, tx):
    """A state for each learning rate, stacked along the first axis."""

    def one(learning_rate):
        state = init_state(train, tx, key)
        return state.replace(opt_state=with_rate(state.opt_state, learning_rate))

    return jax.vmap(one)(learning_rates)


@partial(jax.jit, static_argnames=("model", "tx"), donate_argnames="state")
def _step(state, batch, rest, *, model, tx):
    term = terms.on_logps(losses.nll, model, STREAM, reduce="token")
    step = make_step({STREAM: term}, tx)
    return jax.vmap(step, in_axes=(0, None, None))(state, batch, Frozen(rest))


def _choice_logps(model, train, *, rest, eval_facts, size) -> np.ndarray:
    """[R, n, k] float32, log-probabilities of all choices, for stacked params."""
    columns = {name: x for name, x in eval_facts.items() if name != "right"}
    choices = {"tokens": columns["choices"], "mask": columns["choice_mask"]}
    for rows in (columns, choices):
        _checks.token_ids("attacks.retrain: eval_facts", model, rows)
    started = (
        (batch.pop("valid"), _batch_logps(train, rest, batch, model=model))
        for batch in tables.eval_batches(columns, size)
    )
    found = [np.asarray(logps)[:, valid] for valid, logps in one_behind(started)]
    return np.concatenate(found, 1)


@partial(jax.jit, static_argnames="model")
def _batch_logps(train, rest, batch, *, model):
    def one(train):
        return evaluate.choice_logps(model, trees.merge(train, rest), batch)

    return jax.vmap(one)(train)
