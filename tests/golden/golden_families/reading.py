# SPDX-License-Identifier: Apache-2.0
"""Helpers of the families: log-probabilities of labels, and gradients."""

import jax
import jax.numpy as jnp

from jaxunlearn import losses

IGNORE = -100


def answer_tokens(x, part, *, ref=False):
    """Log-probability of each next label and which of them count, both [B, T - 1]."""
    logits = x[f"ref_{part}_logits" if ref else f"{part}_logits"]
    targets = x[f"{part}_labels"][:, 1:]
    where = targets != IGNORE
    return losses.token_logps(logits[:, :-1], targets, where=where), where


def answer_logps(x, part, *, ref=False):
    """[B], log-probability of each row's labels, summed."""
    return answer_tokens(x, part, ref=ref)[0].sum(-1)


def token_mean(loss, x, part):
    """Mean of a loss of token log-probabilities over the batch's labelled tokens."""
    logps, where = answer_tokens(x, part)
    return loss(logps, where=where).sum() / where.sum().astype(logps.dtype)


def retain(kind, x):
    """OpenUnlearning's retain losses by their names."""
    if kind == "NLL":
        return token_mean(losses.nll, x, "retain")
    if kind == "KL":
        return losses.kl(x["retain_logits"], x["ref_retain_logits"]).mean()
    raise ValueError(f"No retain loss is called {kind!r}; there are 'NLL' and 'KL'.")


def with_retain(case, x, forget):
    """gamma * forget(x) + alpha * retain, if the case names a retain loss."""
    given = case["hyperparameters"]
    kind = given.get("retain_loss_type")

    def total(x):
        loss = given.get("gamma", 1.0) * forget(x)
        if kind is not None:
            loss = loss + given.get("alpha", 1.0) * retain(kind, x)
        return loss

    loss, grads = with_gradients(total, x)
    return {"loss": loss, **grads}


def with_gradients(loss, x):
    """(loss(x), gradients of its sum with respect to the trained model's outputs)."""
    names = [
        name
        for name in x
        if name.endswith(("_logits", "_acts"))
        and not name.startswith(("ref_", "grad_"))
    ]

    def total(logits):
        value = loss({**x, **logits})
        parts = jax.tree.leaves(value)
        return sum(jnp.sum(part) for part in parts), value

    gradients, value = jax.grad(total, has_aux=True)({name: x[name] for name in names})
    return value, {f"grad_{name}": g for name, g in gradients.items()}
