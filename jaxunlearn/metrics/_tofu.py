# SPDX-License-Identifier: Apache-2.0
"""TOFU's scores, computed from values per question, on the host in float64."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import _checks
from jaxunlearn.metrics import _aggregate, _common, _probability
from jaxunlearn.typing import Array

UTILITY_SETS = ("retain", "real_authors", "world_facts")
UTILITY_PARTS = ("probability", "rouge", "truth_ratio")
WITH_OPTIONS = ("real_authors", "world_facts")
SETS = ("forget", *UTILITY_SETS)


class TofuRows(NamedTuple):
    """The values of n questions of one set.

    Attributes:
        correct_nll: [n] float, `mean_nll` of the answer, nats per token.
        wrong_nll: [n, K] float, `mean_nll` of the wrong (perturbed) answers.
        paraphrased_nll: [n] float, `mean_nll` of the paraphrased answer, or of the
            answer in sets without paraphrases (real authors and world facts).
        rouge: [n] float, ROUGE-L recall of the generated answer.
    """

    correct_nll: Array
    wrong_nll: Array
    paraphrased_nll: Array
    rouge: Array


def tofu_ratios(
    rows: TofuRows, *, mean: str = "geometric", eps: float = 0.0
) -> np.ndarray:
    """`truth_ratio` of every question.

    The ratios of two models on the forget set are the input of `forget_quality`.

    Args:
        rows: the values of one set.
        mean, eps: as `truth_ratio`.
    Returns:
        [n] float64.
    Raises:
        ValueError: if the set is empty or has NaN, or the shapes do not match.
    """
    rows = _checked("tofu_ratios", rows)
    with jax.enable_x64(True):
        pair = jnp.asarray(rows.paraphrased_nll), jnp.asarray(rows.wrong_nll)
        return np.asarray(_probability.truth_ratio(*pair, mean=mean, eps=eps))


def tofu_scores(
    sets: Mapping[str, TofuRows], *, mean: str = "geometric", eps: float = 0.0
) -> dict[str, dict[str, float]]:
    """Mean probability, ROUGE-L recall and truth score of each set.

    The probability of real authors and world facts is `probability_with_options`. The
    truth ratio becomes a `truth_score`, with "closer_to_1_better" for the forget set
    and "true_better" for the others.

    Args:
        sets: rows of "forget", "retain", "real_authors" and "world_facts", or of some
            of them.
        mean: as for `truth_ratio`; TOFU's code uses "arithmetic".
        eps: as for `truth_ratio`; OpenUnlearning uses 1e-10.
    Returns:
        set -> {"probability", "rouge", "truth_ratio"}, each in [0, 1]: the input of
        `model_utility`.
    Raises:
        ValueError: if a set is unknown, is empty or has NaN, or its shapes do not
            match.
    References: Maini et al. 2024, https://arxiv.org/abs/2401.06121
    """
    found = {}
    for name, rows in sets.items():
        _checks.one_of("tofu_scores", SETS, set=name)
        ratios = tofu_ratios(rows, mean=mean, eps=eps)
        better = "closer_to_1_better" if name == "forget" else "true_better"
        with jax.enable_x64(True):
            right, wrong = (
                jnp.asarray(np.asarray(x, np.float64))
                for x in (rows.correct_nll, rows.wrong_nll)
            )
            if name in WITH_OPTIONS:
                probs = _probability.probability_with_options(right, wrong, eps=eps)
            else:
                probs = jnp.exp(-right)
            truth = _probability.truth_score(
                jnp.asarray(ratios), better=better, eps=eps
            )
            parts = {"probability": probs, "rouge": rows.rouge, "truth_ratio": truth}
            found[name] = {part: _aggregate.mean(x) for part, x in parts.items()}
    return found


def model_utility(scores: Mapping[str, Mapping[str, float]]) -> float:
    """TOFU's model utility: the harmonic mean of nine scores.

    Args:
        scores: "retain", "real_authors" and "world_facts", each to "probability" (for
            the last two `probability_with_options`), "rouge" (ROUGE-L recall) and
            "truth_ratio" (`truth_score` with "true_better"); each a mean over rows in
            [0, 1]. Other sets and scores, such as those of the forget set, are ignored.
    Raises:
        KeyError: if a score is missing. ValueError: if one is negative or NaN.
    References: Maini et al. 2024, https://arxiv.org/abs/2401.06121
    """
    fix = "Model utility needs all nine; use harmonic_mean for other scores."
    _checks.has_keys("model_utility", "sets", UTILITY_SETS, scores, fix)
    for name in UTILITY_SETS:
        what = f"scores of {name!r}"
        _checks.has_keys("model_utility", what, UTILITY_PARTS, scores[name], fix)
    return _aggregate.harmonic_mean(
        [scores[name][part] for name in UTILITY_SETS for part in UTILITY_PARTS]
    )


def _checked(owner: str, rows: TofuRows) -> TofuRows:
    flat = rows._asdict()
    (wrong,) = _common.on_host(owner, ndim=2, wrong_nll=flat.pop("wrong_nll"))
    values = dict(zip(flat, _common.on_host(owner, **flat), strict=True))
    _checks.same_shape(owner, **values, **{"wrong_nll[:, 0]": wrong[:, 0]})
    return TofuRows(wrong_nll=wrong, **values)
