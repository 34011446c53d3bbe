# SPDX-License-Identifier: Apache-2.0
"""MRP: learn directions that are removed at a few layers (arXiv 2508.15449).

    -NLL(forget) + alpha * NLL(retain), over the directions W of `wrap.projection` alone

At each projection h becomes h - (h Q^T) Q, where Q is an orthonormal basis of all
tasks' rows; every other weight is frozen. One topic after another:

    model = wrap.projection(base, {"mlp_out": (4, 9)})
    for forget, retain, loader in topics:
        params = mrp.begin(model, params, forget=forget, retain=retain)
        recipe = mrp.graddiff(model)
        step, state, frozen = recipe.setup(model, params)
        state, _ = fit(step, state, loader, frozen, steps=steps)
        params = trees.merge(state.params, frozen.params)
    plain = wrap.fold_projection(model, params)

Defaults are those of the authors' code for Llama-2-7B: two directions at each of two
layers, alpha 1.2, plain SGD at 2e-4, two epochs a topic. That code draws the layers at
random and projects `block`, which cannot be folded into weights. Here the caller
chooses the layers, and the site `mlp_out` can be folded.
"""

from collections.abc import Iterable, Mapping
from functools import partial

import optax

from jaxunlearn import combine, losses, stats, terms, wrap
from jaxunlearn.recipes import _recipe
from jaxunlearn.recipes._recipe import Rate, Recipe
from jaxunlearn.recipes.blur import RETAIN
from jaxunlearn.typing import Batch, Model, Params


def begin(
    model: Model,
    params: Params,
    *,
    forget: Iterable[Batch],
    retain: Iterable[Batch],
    num_directions: int = 2,
    kind: str = "contrast",
    num_protected: int = 64,
) -> Params:
    """Params with a new task's directions, initialised from its forget rows.

    Moments of both sets are taken at the projected sites, after the projections of
    earlier tasks. `wrap.initial_directions` has the rule, and how the released code
    differs.

    Args:
        model: from `wrap.projection`.
        params: of the model before wrapping, or with earlier tasks' directions, which
            become constant.
        forget: batches of the new task; read once.
        retain: batches to retain; read once.
        num_directions: at each layer, >= 1.
        kind: "contrast", or "pca" of the forget rows alone.
        num_protected: protected eigenvectors of the retain rows; less than half the
            units.
    Returns:
        Params for `graddiff` and `wrap.fold_projection`.
    Raises:
        ValueError: as `stats.moments`, `wrap.initial_directions` and
            `wrap.add_projection`.
    """
    sites = wrap.projection_sites(model)
    inside, outside = (
        stats.moments(model, params, rows, sites) for rows in (forget, retain)
    )
    before = wrap.projection_basis(params)
    found = {
        site: wrap.initial_directions(
            inside[site],
            num_directions,
            retain=outside[site],
            kind=kind,
            num_protected=num_protected,
            basis=before.get(site),
        )
        for site in sites
    }
    return wrap.add_projection(model, params, found)


def graddiff(
    model: Model,
    *,
    alpha: float = 1.2,
    cap: float | None = None,
    learning_rate: Rate = 2e-4,
    momentum: float | None = None,
    clip: float | None = None,
    retain: Mapping[str, float] = RETAIN,
) -> Recipe:
    """Ascent on `forget` and NLL on the retain streams, over the directions alone.

    The loss depends only on the span of W. Its gradient is therefore orthogonal to the
    rows of W, whose norms grow: the same learning rate moves the span less and less.

    Args:
        model: from `wrap.projection`; its params come from `begin`.
        alpha: weight of the retain loss.
        cap: tokens of `forget` whose NLL is above it, in nats, have no gradient. None,
            as in the paper, is unbounded.
        learning_rate: SGD's learning rate or schedule. The authors' value is for rows
            of 4096 values in bfloat16; in float32 it must be tuned again.
        momentum: SGD's; none in the paper.
        clip: largest norm of the gradient, or None as in the paper.
        retain: retain streams and their weights.
    Returns:
        A Recipe on `forget` and the retain streams that trains `wrap.PROJECTION`.
    """
    weights = {name: alpha * weight for name, weight in retain.items()}
    ascent = terms.on_logps(
        partial(losses.ascent, cap=cap), model, "forget", reduce="token"
    )
    parts = {"forget": ascent} | _recipe.retain_parts(model, retain)
    total = terms.joint(parts, {"forget": 1.0} | weights)
    links = [] if clip is None else [optax.clip_by_global_norm(clip)]
    sgd = optax.sgd(learning_rate, momentum=momentum)
    tx = optax.chain(combine.weighted_sum(), *links, sgd)
    return Recipe({"total": total}, tx, wrap.PROJECTION)
