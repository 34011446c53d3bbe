# SPDX-License-Identifier: Apache-2.0
"""The page of BLUR, from the results of the comparison and of the benchmarks."""

from collections.abc import Mapping

from experiments.comparison.figures import PAIRS, pair_sentences, pair_table
from experiments.shared.page import Content, head, table

PLAIN = "plain NLL"
MAX_RATIO = 1.03  # of the seconds of two steps that count as equally fast


def readme(results: Mapping[str, Content]) -> list[str]:
    """README.md, of {"small", "methods_cost", "step_smollm2_cpu"}."""
    pairs = results["small"]["pairs"]
    cost, step = results["methods_cost"], results["step_smollm2_cpu"]
    ahead = sum(pair["gap"][0] > 0 and pair["beyond_spread"] for pair in pairs)
    behind = sum(pair["gap"][0] < 0 and pair["beyond_spread"] for pair in pairs)
    ratios = step["ratios"]
    lines = head(
        "BLUR: bi-level unlearning",
        claim="Projecting the retain gradient, so that it never works against "
        "forgetting, gives more utility at the same forgetting than adding the two "
        "losses, at the cost of a weighted sum "
        "([2506.08164](https://arxiv.org/abs/2506.08164)).",
        command="python -m experiments.comparison.run\n"
        "python -m experiments.benchmarks.methods\n"
        "python -m experiments.benchmarks.step --output step.json\n"
        "python -m experiments.blur.run  # draws this page",
        time="The comparison about 40 minutes, the benchmarks a few minutes each, on "
        "two cores.",
        setup="Utility: the small world of [experiments/comparison]"
        "(../comparison/README.md), three seeds, no large model. Cost: the small "
        f"world's decoder, and SmolLM2-135M with {step['rows']} + {step['rows']} rows "
        f"of {step['length']} tokens. BLUR-RMU forgets too little at every rate of the "
        "sweep to be compared.",
        verdict=[
            "More utility at equal forgetting: BLUR is ahead beyond the deviation "
            f"over seeds in {ahead} of {len(pairs)} comparisons, behind in {behind}, "
            f"and **undecided** in {len(pairs) - ahead - behind}. The claim is **not "
            "shown** in this small world.",
            f"The cost of a weighted sum: {_cost_verdict(ratios)} for time, where at "
            f"most {MAX_RATIO} times counts as the same. A step of SmolLM2-135M takes "
            f"{ratios['blur_seconds_over_weighted_sum']:.2f} times that of the "
            "weighted sum as one term, and "
            f"{ratios['blur_seconds_over_weighted_sum_apart']:.2f} times that of the "
            "sum of two separate terms. It needs "
            f"{ratios['blur_minus_weighted_sum_peak_gb']:.2f} GB more peak memory, "
            "because both gradients exist at the same time.",
        ],
    )
    lines += ["## Utility at equal forgetting", "", PAIRS, "", *pair_table(pairs)]
    lines += [*(f"- {sentence}" for sentence in pair_sentences(pairs)), ""]
    lines += ["![Every method](../comparison/results/small.png)", ""]
    return [*lines, *_cost(cost), *_step(step)]


def _cost_verdict(ratios: Mapping[str, float]) -> str:
    same = ratios["blur_seconds_over_weighted_sum"] <= MAX_RATIO
    return "**holds**" if same else "**fails**"


def _cost(cost: Content) -> list[str]:
    methods = {line["method"]: line for line in cost["methods"]}
    names = [
        name
        for name in methods
        if name == PLAIN or name.split(".")[0] in ("blur", "sum")
    ]
    rows = [
        (
            name,
            f"{methods[name]['milliseconds']:.0f}",
            f"{methods[name]['time_ratio']:.2f}",
            f"{methods[name]['memory_ratio']:.2f}",
        )
        for name in names
    ]
    return [
        "## Cost in the small world",
        "",
        f"Medians of {cost['rounds']} steps; ratios to a plain NLL step of the same "
        "tokens. All methods: [methods_cost.md]"
        "(../benchmarks/results/methods_cost.md).",
        "",
        *table(["method", "ms", "time ratio", "memory ratio"], rows),
    ]


def _step(step: Content) -> list[str]:
    titles = {
        "weighted_sum": "weighted sum, one joint term",
        "weighted_sum_apart": "weighted sum, two terms",
        "blur": "BLUR, two terms",
        "torch": "weighted sum in torch",
    }
    rows = [
        (
            title,
            f"{step[name]['seconds']:.2f}",
            f"{step[name]['tokens_per_second']:.0f}",
            f"{step[name]['peak_gb']:.2f}",
        )
        for name, title in titles.items()
    ]
    return [
        "## Cost on SmolLM2-135M",
        "",
        f"NPO plus NLL, {step['dtype']}, AdamW, two CPU cores; medians.",
        "",
        *table(["step", "seconds", "tokens a second", "peak memory, GB"], rows),
    ]
