# SPDX-License-Identifier: Apache-2.0
"""Pruning attack: removes the units that are specific to forgotten questions.

Units that suppress forgotten answers must be active on forgotten questions, and may be
inactive elsewhere. This uses the scores of selective pruning (arXiv 2403.01267) to
attack an unlearned model.
"""

from collections.abc import Iterable

from jaxunlearn import edits, stats
from jaxunlearn.typing import Batch, Model, Params


def prune(
    model: Model,
    params: Params,
    *,
    forget: Iterable[Batch],
    retain: Iterable[Batch],
    fraction: float = 0.02,
    site: str = "mlp",
    eps: float = 1e-3,
) -> Params:
    """Prunes the units that are most specific to forgotten questions.

    The attacker needs the weights and forgotten questions, but not their answers. If
    answers come back, the removed units were suppressing them.

    Args:
        model, params: the attacked model; params are not changed.
        forget: batches of forgotten questions.
        retain: batches of other text.
        fraction: of the site's units over all layers, in [0, 1].
        site: the site whose units are pruned.
        eps: as for edits.unit_scores.
    Returns:
        Params without those units.
    Raises:
        ValueError: if the site does not exist, the fraction is outside [0, 1], or
            `forget` or `retain` is empty.
    References: https://arxiv.org/abs/2403.01267
    """
    forget_abs, retain_abs = (
        stats.activity(model, params, batches, sites=(site,))[site].abs
        for batches in (forget, retain)
    )
    scores = edits.unit_scores(forget=forget_abs, retain=retain_abs, eps=eps)
    gone = edits.select_units(scores, fraction)
    return edits.prune_units(model, params, {site: gone})
