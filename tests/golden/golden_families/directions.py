# SPDX-License-Identifier: Apache-2.0
"""BLUR's directions: two gradient trees to one, in each repository's parameters."""

import re

import jax
import optax

from jaxunlearn import combine
from jaxunlearn.combine import _blur


def muse(case, x):
    """BLO_forget_lower, BLO_forget_upper and the static penalty Pen."""
    given = case["hyperparameters"]
    mode, gamma = given["mode"], given["gama"]
    names = {"upper": "forget", "lower": "retain"}
    combiners = {
        "BLO_forget_lower": lambda: combine.blur(gamma=gamma),
        "BLO_forget_upper": lambda: combine.blur(gamma=gamma, **names),
        "Pen": lambda: combine.penalty(strength=gamma, **names),
    }
    if mode not in combiners:
        raise ValueError(f"No mode is called {mode!r}; there are {list(combiners)}.")
    products = _products(x)
    return {**_direction(combiners[mode](), x), **products}


def tofu(case, x):
    """The forget term at the lower level, or at the upper."""
    given = case["hyperparameters"]
    upper, lower = ("retain", "forget") if given["lower"] else ("forget", "retain")
    return _direction(combine.blur(gamma=given["gamma"], upper=upper, lower=lower), x)


def wmdp(case, x):
    """g_f + alpha * (projected g_r), which is alpha times BLUR at gamma = 1 / alpha."""
    alpha = case["hyperparameters"]["alpha"]
    blur = combine.blur(gamma=1 / alpha)
    return _direction(optax.chain(blur, optax.scale(alpha)), x)


def _gradients(x):
    grads = {"forget": {}, "retain": {}}
    for role, value in x.items():
        if found := re.fullmatch(r"(forget|retain)_grad_(\d+)", role):
            grads[found[1]][found[2]] = value
    return grads


def _direction(tx, x):
    grads = _gradients(x)
    update, _ = tx.update(grads, tx.init(grads["retain"]))
    return {f"direction_{i}": value for i, value in update.items()}


def _products(x):
    grads = _gradients(x)
    pairs = zip(*(jax.tree.leaves(grads[k]) for k in ("retain", "forget")), strict=True)
    leaves = {str(i): list(pair) for i, pair in enumerate(pairs)}
    (p,) = _blur._products(leaves, [range(len(leaves))], None)
    return {
        "norm_R_sq": p.upper_scale**2 * p.upper,
        "norm_F_sq": p.lower_scale**2 * p.lower,
        "inner_F_R": p.upper_scale * p.lower_scale * p.both,
    }
