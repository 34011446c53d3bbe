# SPDX-License-Identifier: Apache-2.0
"""Relearning: finetune on some forgotten facts, then ask about the others.

Facts that do not help to guess one another can only come back if they were still in the
weights (Deeb and Roger, "Do unlearning methods remove information from language model
weights?", arXiv 2410.08827). Run it on the original model as well: what it scores there
is the most that an attack can recover.
"""

from collections.abc import Sequence

import jax
import optax

from jaxunlearn import _checks, combine, losses, terms, trees, wrap
from jaxunlearn._fit import Hook, fit
from jaxunlearn._step import init_state, make_step
from jaxunlearn.data import table as tables
from jaxunlearn.typing import Frozen, Model, Params

KERNELS = r"blocks/.*/kernel"
WEIGHTS = r"(?!projection/).*"  # directions of wrap.projection are part of the model


def relearn(
    model: Model,
    params: Params,
    known: tables.Table,
    *,
    steps: int,
    batch_size: int = 16,
    learning_rate: float | optax.Schedule = 1e-5,
    rank: int = 0,
    pattern: str = KERNELS,
    seed: int = 0,
    hooks: Sequence[Hook] = (),
    progress: bool = False,
) -> tuple[Params, list[dict]]:
    """Finetunes on the answers of the facts the attacker knows.

    Args:
        model: the attacked model.
        params: its parameters; left as they are.
        known: table of the facts the attacker trains on (T in the paper).
        steps: updates of AdamW without weight decay on the token-mean NLL.
        batch_size: rows at each step.
        learning_rate: learning rate or schedule.
        rank: 0 trains every parameter but directions of wrap.projection, which stand
            still (see `unwrap`); above it LoRA's products alone, merged in the end,
            beside the kernels that `pattern` matches.
        pattern: see rank.
        seed: of the order of the rows and of LoRA's leaves.
        hooks: as for fit.
        progress: as for fit.
    Returns:
        (params after the attack, log).
    Raises:
        ValueError: if `known` has no rows, or wrap.lora refuses pattern or rank.
    """
    _checks.not_negative("attacks.relearn", rank=rank)
    loader = tables.streams({"known": known}, batch_size, seed=seed)
    if rank:
        model = wrap.lora(model, pattern=pattern, rank=rank, alpha=2.0 * rank)
        params = wrap.add_lora(params, model, jax.random.key(seed))
    train, rest = trees.split(params, wrap.LORA if rank else WEIGHTS)
    parts = {"known": terms.on_logps(losses.nll, model, "known", reduce="token")}
    tx = optax.chain(
        combine.weighted_sum(), optax.adamw(learning_rate, weight_decay=0.0)
    )
    state = init_state(train, tx, jax.random.key(seed))
    step = jax.jit(make_step(parts, tx), donate_argnums=0)
    state, log = fit(
        step, state, loader, Frozen(rest), steps=steps, hooks=hooks, progress=progress
    )
    after = trees.merge(state.params, rest)
    return (wrap.merge_lora(after, model) if rank else after), log
