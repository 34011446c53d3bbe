# SPDX-License-Identifier: Apache-2.0
"""MRP: learn which directions of a few layers to take away (arXiv 2508.15449).

    -NLL(forget) + alpha * NLL(retain), over the directions W of `wrap.projection` alone

Where a projection stands, h becomes h - (h Q^T) Q, with Q an orthonormal basis of all
tasks' rows; every other weight is frozen. One topic after another:

    model = wrap.projection(base, {"mlp_out": (4, 9)})
    for forget, retain, loader in topics:
        params = mrp.begin(params, model, forget, retain)
        recipe = mrp.graddiff(model)
        train, rest = trees.split(params, recipe.trainable)
        state = init_state(train, recipe.tx, key)
        state, _ = fit(step, state, loader, Frozen(rest), steps=steps)
        params = trees.merge(state.params, rest)
    plain = wrap.fold_projection(params, model)

Numbers are those of the authors' code for Llama-2-7B: two directions at each of two
layers, alpha 1.2, plain SGD at 2e-4, two epochs a topic. That code draws the layers at
random and projects `block`, which no weights can hold; say which, and `mlp_out` folds.
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
    params: Params,
    model: Model,
    forget: Iterable[Batch],
    retain: Iterable[Batch],
    *,
    count: int = 2,
    kind: str = "contrast",
    num_protected: int = 64,
) -> Params:
    """Params with a new task's directions, begun from what the forget rows hold.

    Both sets' moments are taken where the projections stand, after those of earlier
    tasks. See `wrap.initial_directions` for the rule, and for how the released code differs.

    Args:
        params: of the model before wrapping, or with earlier tasks' directions, which
            become constants.
        model: from `wrap.projection`.
        forget: rows of the new task; read once.
        retain: rows to keep; read once.
        count: directions at each layer, >= 1.
        kind: "contrast", or "pca" of the forget rows alone.
        num_protected: of the retain rows' eigenvectors; less than half the units.
    Raises:
        ValueError: as for `stats.moments`, `wrap.initial_directions`, `wrap.add_projection`.
    """
    places = wrap.projection_sites(model)
    inside, outside = (
        stats.moments(model, params, rows, places) for rows in (forget, retain)
    )
    before = wrap.projection_basis(params)
    found = {
        site: wrap.initial_directions(
            inside[site],
            count,
            retain=outside[site],
            kind=kind,
            num_protected=num_protected,
            basis=before.get(site),
        )
        for site in places
    }
    return wrap.add_projection(params, model, found)


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

    The loss depends on the span of W only, so that its gradient is orthogonal to the
    rows of W, which therefore grow: the same rate moves the span less and less.

    Args:
        model: from `wrap.projection`, with params of `begin`.
        alpha: weight of the retain loss.
        cap: tokens of `forget` whose NLL exceeds it, in nats, push no more. None, as in
            the paper, has no bound.
        learning_rate: SGD's learning rate or schedule. The authors' number is for rows of 4096
            values in bfloat16; in float32 it has to be found anew.
        momentum: SGD's; none in the paper.
        clip: largest norm of the gradient, or None as in the paper.
        retain: retain streams and their weights.
    Returns:
        A Recipe on `forget` and the retain streams, of which `wrap.PROJECTION` trains.
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
