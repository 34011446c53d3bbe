# SPDX-License-Identifier: Apache-2.0
"""Retraining on T (RTT): train on some forgotten facts, ask the others every epoch.

    folds = attacks.make_folds(facts, 5, by="name")
    after = attacks.rtt(model, unlearned, tokenizer, folds)
    before = attacks.rtt(model, original, tokenizer, folds)   # the same attack
    attacks.recovery(after, before)

Learning rates run side by side in one compiled program (jax.vmap over their params):
`rates_per_batch` says how many. References: https://arxiv.org/abs/2410.08827
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn import _checks, combine, evaluate, losses, terms, trees, wrap
from jaxunlearn._step import init_state, make_step
from jaxunlearn.attacks import _folds, _formats
from jaxunlearn.attacks._relearn import KERNELS, WEIGHTS
from jaxunlearn.data import table as tables
from jaxunlearn.typing import Frozen, Model, Params

RATES = tuple(n * 1e-7 for n in (1, 2, 4, 8, 16, 32))
LION = optax.scale_by_lion(0.9, 0.99)


class Sweep(NamedTuple):
    """One rotation's attacks, one for each learning rate.

    Attributes:
        rates: learning rates, R of them.
        hits: [R, epochs + 1, n] bool, whether each fact held out was answered right
            before the attack and after each epoch.
        logps: [R, epochs + 1, n, k] float32, log-probability of each choice, nats,
            summed over its tokens.
        losses: [R, epochs] float32, mean training loss of each epoch, nats a token.
        finite: [R] bool, False where a step's loss was not finite; such a step changes
            nothing.
    """

    rates: tuple[float, ...]
    hits: np.ndarray
    logps: np.ndarray
    losses: np.ndarray
    finite: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        """[R, epochs + 1] float, fraction of the facts held out."""
        return self.hits.mean(-1)


def rtt(
    model: Model,
    params: Params,
    tokenizer: Any,
    folds: Sequence[Sequence[_folds.Fact]],
    *,
    format: str = "letter_answer",
    asked: str = "letter",
    prompt: str = "{question}",
    by: str | Sequence[str] = "question",
    rotations: Sequence[int] = (0, 1),
    say: Callable[[int, Sweep], None] | None = None,
    **settings: Any,
) -> list[Sweep]:
    """Holds out one fold after another, trains on the others, asks the one held out.

    Args:
        model, params: who is attacked; params are left as they are.
        tokenizer: a fast tokenizer.
        folds: facts that share nothing, see make_folds.
        format: what is trained on, see encode_facts.
        asked: how the others are asked, see encode_asked.
        prompt: of the format "answer" and of "choice".
        by: columns of which no two folds may share a value; `statement` is one of them
            where the format is "statement".
        rotations: numbers of the folds held out; the paper's are two of five.
        say: called with each rotation's number and Sweep.
        settings: as for retrain.
    Returns:
        A Sweep for each rotation; `best_accuracy` and `recovery` make numbers of them.
    Raises:
        ValueError: naming the fact that two folds share, and as encode_facts,
            encode_asked and retrain.
    """
    columns = (by,) if isinstance(by, str) else tuple(by)
    trained = ("statement",) if format == "statement" else ()
    _folds.check_folds(folds, (*columns, *trained))
    everything = [fact for fold in folds for fact in fold]
    length = _formats.encode_facts(tokenizer, everything, format, prompt=prompt)
    how = dict(prompt=prompt, length=length["tokens"].shape[1])
    known = [_formats.encode_facts(tokenizer, f, format, **how) for f in folds]
    table = _formats.encode_asked(model, tokenizer, everything, asked, prompt=prompt)
    ends = np.cumsum([len(fold) for fold in folds])
    found = []
    for held_out in rotations:
        _folds.rotation(folds, held_out)  # refuses what is no fold
        own = range(ends[held_out] - len(folds[held_out]), ends[held_out])
        found.append(
            retrain(
                model,
                params,
                tables.concat([t for i, t in enumerate(known) if i != held_out]),
                tables.select(table, own),
                **settings,
            )
        )
        if say is not None:
            say(held_out, found[-1])
    return found


def retrain(
    model: Model,
    params: Params,
    known: tables.Table,
    asked: tables.Table,
    *,
    rates: Sequence[float] = RATES,
    epochs: int = 6,
    batch_size: int = 4,
    direction: optax.GradientTransformation = LION,
    warmup: int = 24,
    rank: int = 0,
    pattern: str = KERNELS,
    rates_per_batch: int = 1,
    eval_batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> Sweep:
    """Trains on `known` at several learning rates and asks `asked` after every epoch.

    Args:
        model, params: who is attacked; params are left as they are.
        known: facts the attacker trains on (T), see encode_facts.
        asked: facts held out (V), see encode_asked.
        rates: learning rates, R of them.
        epochs: passes over `known`.
        batch_size: rows at each step; all of `known` if it has fewer.
        direction: makes a direction of the gradient, which the rate multiplies. The
            paper's is Lion; optax.scale_by_adam() makes Adam. Give the same object
            again and nothing is compiled anew.
        warmup: steps over which the rate rises from nothing.
        rank: 0 trains every parameter but directions of wrap.projection, which stand
            still (see `unwrap`); above it LoRA's products alone, beside the kernels
            that `pattern` matches.
        pattern: see rank.
        rates_per_batch: rates in one program; it has that many copies of what trains and its
            optimizer state.
        ask_batch: facts asked at a time.
        seed: of the order of rows and of LoRA's leaves.
        progress: whether to show a bar (on standard error).
    Raises:
        ValueError: if there is no row or rate, or a setting makes no sense.
    Paper and code: the released code trains float16 params; these rates move few
        weights there. Here params keep their dtype: float32 moves all of them, and
        other rates may be best.
    """
    owner = "attacks.retrain"
    _checks.positive_int(
        owner, epochs=epochs, batch_size=batch_size, rates_per_batch=rates_per_batch
    )
    _checks.not_negative(owner, warmup=warmup, rank=rank)
    if not rates:
        raise ValueError(f"{owner} needs at least one learning rate, got none.")
    for rate in rates:
        _checks.positive(owner, rate=rate)
    rows = tables.num_rows(known, name="known")
    batch_size = min(batch_size, rows)  # an epoch has a step at least
    if rank:
        model = _low(model, pattern, rank)
        params = wrap.add_lora(params, model, jax.random.key(seed))
    train, rest = trees.split(params, wrap.LORA if rank else WEIGHTS)
    tx = _chain(direction, warmup)
    before = _ask(
        model, jax.tree.map(lambda x: x[None], train), rest, asked, eval_batch_size
    )
    logps, lost, finite = [], [], []
    chunks = -(-len(rates) // rates_per_batch)
    bar = _bar(chunks * -(-epochs * rows // batch_size)) if progress else None
    for start in range(0, len(rates), rates_per_batch):
        some = jnp.asarray(rates[start : start + rates_per_batch], jnp.float32)
        state = _begin(train, some, jax.random.key(seed), tx)
        batches = tables.batches(known, batch_size, seed=seed, name="known")
        own, done = [np.repeat(before, len(some), 0)], 0
        for epoch in range(1, epochs + 1):
            steps = -(-epoch * rows // batch_size) - done
            values = []
            for _ in range(steps):
                batch = {"known": next(batches)}
                state, metrics = _step(state, batch, rest, model=model, tx=tx)
                values.append([metrics["known/loss"], metrics["finite"]])
                if bar:
                    bar.update()
            done += steps
            values = np.asarray(jax.device_get(values), np.float32)  # [steps, 2, R]
            lost.append(values[:, 0].mean(0))
            finite.append(values[:, 1].all(0))
            own.append(_ask(model, state.params, rest, asked, eval_batch_size))
        logps.append(np.stack(own, 1))
    if bar:
        bar.close()

    def joined(values):  # [chunks * epochs] of [R] to [R, epochs]
        pieces = [values[i * epochs : (i + 1) * epochs] for i in range(chunks)]
        return np.concatenate([np.stack(piece, 1) for piece in pieces])

    found = np.concatenate(logps)
    return Sweep(
        tuple(float(rate) for rate in rates),
        evaluate.best_choice(found) == np.asarray(asked["right"]),
        found,
        joined(lost),
        joined(finite).all(1),
    )


def _bar(steps):
    tqdm = _checks.library("attacks.rtt(progress=True)", "tqdm", "hf").tqdm
    return tqdm(total=steps, unit="step", dynamic_ncols=True, leave=False)


@functools.lru_cache(maxsize=8)  # equal arguments of jit compile once
def _low(model: Model, pattern: str, rank: int) -> Model:
    return wrap.lora(model, pattern=pattern, rank=rank, alpha=2.0 * rank)


@functools.lru_cache(maxsize=8)
def _chain(direction, warmup):
    """The direction times a number in the state, which rises over `warmup` steps."""

    def risen(count):
        return jnp.minimum(1.0, (count + 1) / max(1, warmup))

    return optax.chain(
        combine.weighted_sum(),
        direction,
        optax.scale_by_schedule(risen),
        optax.inject_hyperparams(optax.scale)(step_size=-1.0),
    )


@partial(jax.jit, static_argnames="tx")
def _begin(train, rates, key, tx):
    """A state for each rate, stacked."""

    def one(rate):
        state = init_state(train, tx, key)
        kept = optax.tree_utils.tree_get(state.opt_state, "step_size")
        new = optax.tree_utils.tree_set(
            state.opt_state, step_size=(-rate).astype(kept.dtype)
        )
        return state.replace(opt_state=new)

    return jax.vmap(one)(rates)


@partial(jax.jit, static_argnames=("model", "tx"), donate_argnames="state")
def _step(state, batch, rest, *, model, tx):
    term = terms.on_logps(losses.nll, model, "known", reduce="token")
    step = make_step({"known": term}, tx)
    return jax.vmap(step, in_axes=(0, None, None))(state, batch, Frozen(rest))


def _ask(model, train, rest, asked, size) -> np.ndarray:
    """[R, n, k] float32: log-probabilities of all choices, for stacked params."""
    found = []
    columns = {name: x for name, x in asked.items() if name != "right"}
    for batch in tables.eval_batches(columns, size):
        valid = batch.pop("valid")
        each = np.asarray(_options(train, rest, batch, model=model))
        found.append(each[:, valid])
    return np.concatenate(found, 1)


@partial(jax.jit, static_argnames="model")
def _options(train, rest, batch, *, model):
    def one(train):
        return evaluate.choice_logps(model, trees.merge(train, rest), batch)

    return jax.vmap(one)(train)
