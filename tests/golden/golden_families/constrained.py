# SPDX-License-Identifier: Apache-2.0
"""PDU: several steps of the primal-dual combiner on the same batch."""

import jax.numpy as jnp

from golden_families import reading
from jaxunlearn import combine, losses


def pdu(case, x):
    """Loss of each step (with the dual before its update), duals, first gradient."""
    given = case["hyperparameters"]
    epsilon, updates = given["retain_loss_eps"], given["primal_dual"]
    tx = combine.primal_dual(
        weight=given["gamma"],
        initial_dual=given["alpha"],
        epsilon=epsilon,
        step_size=given["dual_step_size"] if updates else 0.0,
    )
    (forget, g_forget), (retain, g_retain) = (
        reading.with_gradients(loss, x)
        for loss in (_forget, lambda x: reading.retain(given["retain_loss_type"], x))
    )
    grads = {"forget": g_forget, "retain": g_retain}
    values = {"forget": forget, "retain": retain}
    state = tx.init(g_retain)
    losses_, duals, first = [], [], None
    for _ in range(given["steps"]):
        dual = state.dual.astype(forget.dtype)
        losses_.append(given["gamma"] * forget + dual * (retain - epsilon))
        direction, state = tx.update(grads, state, values=values)
        duals.append(state.dual.astype(forget.dtype))
        first = direction if first is None else first
    return {
        "loss": jnp.stack(losses_),
        "dual_after_step": jnp.stack(duals),
        "forget_loss": forget,
        "retain_loss": retain,
        **first,
    }


def _forget(x):
    """The logit margin, masked by the labels of the same positions."""
    where = x["forget_labels"] != reading.IGNORE
    loss = losses.logit_margin(x["forget_logits"], where=where)
    return loss.sum() / where.sum().astype(loss.dtype)
