# SPDX-License-Identifier: Apache-2.0
"""Metrics: arrays to values by example, and those to one number. They only look.

| by example | reads | says |
| --- | --- | --- |
| `mean_nll`, `probability` | log-probabilities of tokens | how likely an answer is |
| `probability_with_options` | `mean_nll` of all options | its share among them |
| `truth_ratio`, `truth_probability` | `mean_nll` of both kinds | is right preferred |
| `truth_score` | `truth_ratio` | the same, in [0, 1] |
| `exact_memorization`, `extraction_strength` | `greedy_hits` | what comes back |
| `mia_loss`, `mia_reference` | `mean_nll` | high for texts that are new |
| `mia_zlib`, `mia_lowercase` | `mean_nll` | the same |
| `mia_min_k`, `mia_min_k_plus_plus` | tokens' log-probabilities, logits | the same |
| `mia_gradnorm` | one example's gradient | the same |
| `unlearning_metric`, `overfitting_metric` | gradients | the condensation paper's |
| `rouge`, `exact_match` | generated texts (`truncate_at_stop`) and references | what of it is said |
| `choice_accuracy`, `class_probability` | scores of options or classes | the choice |

| one number | of |
| --- | --- |
| `mean`, `harmonic_mean` | values |
| `auc`, and `bootstrap` for its interval | scores of members and of others |
| `privleak`, `relative_difference` | two such areas |
| `attack_accuracy`, `attack_members` | scores, by a fitted logistic regression |
| `attack_threshold` | scores, by the best threshold elsewhere |
| `forget_quality` | truth ratios of the model and of a retrained one |
| `tofu_scores`, `tofu_ratios`, `model_utility` | TOFU's questions |
| `semeval_terms`, `semeval` | the rows of SemEval-2025 Task 4 |

The first table's functions of arrays keep the leading axes, run under jit and give
float32 (float64 if float64 came in); what could not be measured is NaN. On a model:

    logps, where = terms.target_logps(model, params, batch)
    metrics.probability(logps, where=where)                     # [B]

Those of texts,
and all of the second table, run on the host in float64 and refuse empty sets and NaN.
`forget_quality` needs scipy and `rouge` rouge-score: the extra `metrics`.
"""

from jaxunlearn.metrics._accuracy import choice_accuracy, class_probability
from jaxunlearn.metrics._aggregate import harmonic_mean, mean
from jaxunlearn.metrics._attackers import (
    Logistic,
    Threshold,
    attack_accuracy,
    attack_members,
    attack_threshold,
    logistic_regression,
    stratified_splits,
)
from jaxunlearn.metrics._gradients import overfitting_metric, unlearning_metric
from jaxunlearn.metrics._memorization import (
    drop_last,
    exact_memorization,
    extraction_strength,
    greedy_hits,
)
from jaxunlearn.metrics._mia import (
    mia_gradnorm,
    mia_loss,
    mia_lowercase,
    mia_min_k,
    mia_min_k_plus_plus,
    mia_reference,
    mia_zlib,
    standardised_logps,
    zlib_lengths,
)
from jaxunlearn.metrics._probability import (
    mean_nll,
    probability,
    probability_with_options,
    truth_probability,
    truth_ratio,
    truth_score,
)
from jaxunlearn.metrics._semeval import SemEval, semeval, semeval_id, semeval_terms
from jaxunlearn.metrics._separation import (
    ForgetQuality,
    Interval,
    auc,
    bootstrap,
    forget_quality,
    privleak,
    relative_difference,
)
from jaxunlearn.metrics._similarity import exact_match, rouge, truncate_at_stop
from jaxunlearn.metrics._tofu import TofuRows, model_utility, tofu_ratios, tofu_scores

__all__ = [
    "ForgetQuality",
    "Interval",
    "Logistic",
    "SemEval",
    "Threshold",
    "TofuRows",
    "attack_accuracy",
    "attack_members",
    "attack_threshold",
    "auc",
    "bootstrap",
    "choice_accuracy",
    "class_probability",
    "truncate_at_stop",
    "exact_match",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "greedy_hits",
    "harmonic_mean",
    "logistic_regression",
    "mean",
    "mean_nll",
    "mia_gradnorm",
    "mia_loss",
    "mia_lowercase",
    "mia_min_k",
    "mia_min_k_plus_plus",
    "mia_reference",
    "mia_zlib",
    "model_utility",
    "overfitting_metric",
    "privleak",
    "probability",
    "probability_with_options",
    "relative_difference",
    "rouge",
    "semeval",
    "semeval_id",
    "semeval_terms",
    "standardised_logps",
    "stratified_splits",
    "tofu_ratios",
    "tofu_scores",
    "truth_probability",
    "truth_ratio",
    "truth_score",
    "unlearning_metric",
    "drop_last",
    "zlib_lengths",
]
