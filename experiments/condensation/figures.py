# SPDX-License-Identifier: Apache-2.0
"""The page of the condensation paper, from its results and those of vision."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from experiments.shared.intervals import spread
from experiments.shared.page import Content, head, pm, table
from experiments.vision import figures

METHODS = ("original", "retrained", "condensation")
Numbers = Mapping[str, Mapping[str, float]]


def readme(results: Mapping[str, Mapping[str, Content]]) -> list[str]:
    """README.md, of {"vision": results of the comparison, "condensation": these}."""
    lines = head(
        "Dataset-condensation-driven unlearning",
        claim="An image model unlearns faster than by retraining, and as well, when "
        "the retain set is replaced by condensed images and the network's parts train "
        "in turns ([2402.00195](https://arxiv.org/abs/2402.00195)).",
        command="\n".join(
            "python -m experiments.condensation.run "
            f"--config experiments/vision/configs/{config}.py"
            for config in figures.CONFIGS.values()
        ),
        time="The comparison takes about 5 minutes for Fashion-MNIST and 1.5 hours for "
        "CIFAR-10 in the methods alone, on two cores; the further experiments were not "
        "timed.",
        setup="`method.py` is the method, `run.py` the paper's further experiments; "
        "the network, the data, the attacks and the other methods are those of "
        "[experiments/vision](../vision/README.md), which explains the columns. Three "
        "seeds; the offline modular stage is only in the experiment *condensed*.",
        verdict=figures.paper_verdict(results["vision"], "condensation")
        + [
            sentence
            for content in results["condensation"].values()
            for sentence in verdicts(content)
        ],
    )
    lines += figures.paper_page(results["vision"], "condensation", METHODS)
    for name, content in results["condensation"].items():
        config = content["about"]["config"]
        lines += [
            f"## {figures.DATA[name]}: inversion, membership, condensed models",
            "",
            f"{config['train']} training and {config['test']} test images a class, "
            f"{config['family']} of width {config['width']}. Means over seeds ± "
            "standard deviation. Errors are mean squared errors of pixels in [0, 1]; "
            "AUC and M1 are 0.5 at chance level.",
            "",
        ]
        for experiment, models in by_experiment(content).items():
            columns = list(next(iter(models[0].values())))
            count = f"{len(models)} seed{'s' * (len(models) > 1)}"
            lines += [f"### {experiment.capitalize()} ({count})", ""]
            rows = [
                (name, *(pm(spread([x[name][c] for x in models])) for c in columns))
                for name in models[0]
            ]
            lines += [*table(["model", *columns], rows), VERDICTS[experiment](models)]
            lines.append("")
    return lines


def by_experiment(content: Content) -> dict[str, list[Numbers]]:
    """Experiment -> {model: numbers} of every seed."""
    found: dict[str, list[Numbers]] = {}
    for name in VERDICTS:
        runs = [x["models"] for x in content["runs"] if x["experiment"] == name]
        if runs:
            found[name] = runs
    return found


def verdicts(content: Content) -> list[str]:
    """One sentence an experiment."""
    return [
        f"{name.capitalize()}: {VERDICTS[name](models)}"
        for name, models in by_experiment(content).items()
    ]


def _means(models: Sequence[Numbers], number: str) -> dict[str, float]:
    """Model -> the mean of one number over seeds."""
    return {
        name: float(np.mean([each[name][number] for each in models]))
        for name in models[0]
    }


def _inversion(models: Sequence[Numbers]) -> str:
    error = _means(models, "to the nearest")
    order = sorted(error, key=error.get)
    numbers = ", ".join(f"{name} {error[name]:.3f}" for name in order)
    better = error["condensation"] > error["original"]
    return (
        "the error between the drawn picture and the nearest forgotten image is, from "
        f"the smallest: {numbers}. Unlearning {'makes' if better else 'does not make'} "
        "the picture less similar to the forgotten images."
    )


def _membership(models: Sequence[Numbers]) -> str:
    auc, test = _means(models, "AUC"), _means(models, "test")
    gain, lost = auc["original"] - auc["defended"], test["original"] - test["defended"]
    return (
        f"the defence lowers the attack's AUC by {gain:.3f} and the accuracy on new "
        f"images by {100 * lost:.1f} points."
    )


def _condensed(models: Sequence[Numbers]) -> str:
    gap = {
        name: np.mean([each[name]["forget"] - each[name]["test"] for each in models])
        for name in models[0]
    }
    return (
        "a fresh classifier's accuracy on forgotten images minus its accuracy on new "
        f"images is {100 * gap['before']:.1f} points before and "
        f"{100 * gap['after']:.1f} points after unlearning."
    )


VERDICTS: Mapping[str, Callable[[Sequence[Numbers]], str]] = {
    "inversion": _inversion,
    "membership": _membership,
    "condensed": _condensed,
}
