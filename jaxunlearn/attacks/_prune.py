# SPDX-License-Identifier: Apache-2.0
"""Pruning: take away the units that answer to forgotten questions alone.

What suppresses the forgotten answers must be active on their questions and may be
silent elsewhere; the attacker needs the questions, not the answers. The scores are
those of selective pruning (arXiv 2403.01267), turned against the unlearned model.
"""

from collections.abc import Iterable

from jaxunlearn import edits, stats
from jaxunlearn.typing import Batch, Model, Params


def prune(
    model: Model,
    params: Params,
    forget: Iterable[Batch],
    retain: Iterable[Batch],
    *,
    fraction: float = 0.02,
    site: str = "mlp",
    eps: float = 1e-3,
) -> Params:
    """Removes the units most specific to forgotten questions.

    Args:
        model, params: who is attacked; params are left as they are.
        forget: batches of forgotten questions.
        retain: batches of other text.
        fraction: of the site's units, over all layers, in [0, 1].
        site: whose units.
        eps: as for edits.unit_scores.
    Returns:
        Params in which those units are gone.
    Raises:
        ValueError: if the site does not exist, the fraction is outside [0, 1] or a set
            of batches is empty.
    References: https://arxiv.org/abs/2403.01267
    """
    found = [
        stats.activity(model, params, batches, sites=(site,))[site].abs
        for batches in (forget, retain)
    ]
    scores = edits.unit_scores(*found, eps=eps)
    gone = edits.select_units(scores, fraction)
    return edits.prune_units(model, params, {site: gone})
