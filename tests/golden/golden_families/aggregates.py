# SPDX-License-Identifier: Apache-2.0
"""Whole-set numbers and texts: forget quality, utility, ROUGE. Run on the host."""

from jaxunlearn import metrics

# TOFU's sets and scores by the names in its code: (output, input, ours).
SETS = (
    ("Real_Authors", "ra", "real_authors"),
    ("Real_World", "wf", "world_facts"),
    ("Retain", "retain", "retain"),
    ("Forget", "forget", "forget"),
)
SCORES = {
    "ROUGE": "rouge",
    "Probability": "probability",
    "Truth_Ratio": "truth_ratio",
}


def forget_quality(case, x):
    """The p-value for two sets of truth ratios."""
    test = metrics.forget_quality(x["model_truth_ratio"], x["retain_truth_ratio"])
    return {"pvalue": test.pvalue}


def inverse(case, x):
    """The same for 1 / (ratio + 1e-10)."""
    pair = (1 / (x[f"{who}_truth_ratio"] + 1e-10) for who in ("model", "retain"))
    return {"pvalue": metrics.forget_quality(*pair).pvalue}


def harmonic(case, x):
    """The harmonic mean of each vector, by name."""
    return {
        name.replace("values", "value"): metrics.harmonic_mean(values)
        for name, values in x.items()
    }


def tofu_utility(case, x):
    """All scores by the names of TOFU's code, with its arithmetic mean."""
    sets = {ours: _rows(x, there) for _, there, ours in SETS}
    scores = metrics.tofu_scores(sets, mean="arithmetic")
    return {
        "Model_Utility": metrics.model_utility(scores),
        **{
            f"{out}_{score}": scores[ours][part]
            for out, _, ours in SETS
            for score, part in SCORES.items()
        },
    }


def tofu_forget_quality(case, x):
    """From ratios of geometric means; TOFU's code inverts them: the same result."""
    pair = (
        metrics.truth_ratio(
            x[f"{who}_avg_paraphrased_loss"], x[f"{who}_average_perturb_loss"]
        )
        for who in ("forget", "retain_model")
    )
    return metrics.forget_quality(*pair)._asdict()


def rouge_openunlearning(case, x):
    """Generations truncated at the stop strings, references stripped."""
    given, text = case["hyperparameters"], case["text"]
    generated = [
        metrics.truncate_at_stop(t, given["stopwords"]) for t in text["raw_generation"]
    ]
    wanted = [t.strip() for t in text["ground_truth"]]
    stem = given["use_stemmer"]
    return metrics.rouge(generated, wanted, stem=stem, tokenizer="ascii")


def rouge_muse(case, x):
    """Texts as they are; the names rougeL and rouge1 alone mean F1."""
    text, stem = case["text"], case["hyperparameters"]["use_stemmer"]
    pair = text["generation"], text["ground_truth"]
    scores = metrics.rouge(*pair, stem=stem, tokenizer="ascii")
    return {name.removesuffix("_f1"): values for name, values in scores.items()}


def _rows(x, name):
    return metrics.TofuRows(
        correct_nll=x[f"{name}_avg_gt_loss"],
        wrong_nll=x[f"{name}_average_perturb_loss"],
        paraphrased_nll=x[f"{name}_avg_paraphrased_loss"],
        rouge=x[f"{name}_rougeL_recall"],
    )
