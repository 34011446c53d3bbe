# SPDX-License-Identifier: Apache-2.0
"""Metrics: functions that turn arrays into values per example, or into one number.

| per example | input | value |
| --- | --- | --- |
| `mean_nll`, `probability` | token log-probabilities | likelihood of an answer |
| `probability_with_options` | `mean_nll` of all options | share among the options |
| `truth_ratio`, `truth_probability` | `mean_nll` of both kinds | preference for wrong |
| `truth_score` | `truth_ratio` | the same as a score in [0, 1] |
| `exact_memorization`, `extraction_strength` | `greedy_hits` | verbatim recall |
| `mia_loss`, `mia_reference` | `mean_nll` | membership score, high for new texts |
| `mia_zlib`, `mia_lowercase` | `mean_nll` | membership score |
| `mia_min_k`, `mia_min_k_plus_plus` | log-probabilities, logits | membership score |
| `mia_gradnorm` | gradient of one example | membership score |
| `unlearning_metric`, `overfitting_metric` | gradients | of the condensation paper |
| `rouge`, `exact_match` | generated and reference texts | overlap |
| `choice_accuracy`, `class_probability` | scores of options or classes | the choice |

| one number | input |
| --- | --- |
| `mean`, `harmonic_mean` | values |
| `auc`, and `bootstrap` for its interval | scores of members and of non-members |
| `privleak`, `relative_difference` | two AUCs |
| `attack_accuracy`, `attack_members` | scores; fits a logistic regression |
| `attack_threshold` | scores; fits a threshold on calibration rows |
| `forget_quality` | truth ratios of the unlearned and of a retrained model |
| `tofu_scores`, `tofu_ratios`, `model_utility` | values of TOFU's questions |
| `semeval_terms`, `semeval` | values of the rows of SemEval-2025 Task 4 |

Functions of arrays in the first table keep the leading axes, run under jit and return
float32 (float64 for float64 input). A value that could not be measured is NaN. For a
model:

    logps, where = terms.target_logps(model, params, batch)
    metrics.probability(logps, where=where)                     # [B]

Functions of texts, and all of the second table, run on the host in float64 and raise an
error for empty sets and NaN. `forget_quality` needs scipy and `rouge` rouge-score: the
extra `metrics`.
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
from jaxunlearn.metrics._semeval import SemEval, semeval, semeval_terms
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
    "drop_last",
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
    "semeval_terms",
    "standardised_logps",
    "stratified_splits",
    "tofu_ratios",
    "tofu_scores",
    "truncate_at_stop",
    "truth_probability",
    "truth_ratio",
    "truth_score",
    "unlearning_metric",
    "zlib_lengths",
]
