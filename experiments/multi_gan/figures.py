# SPDX-License-Identifier: Apache-2.0
"""The page of multi-GAN, from the results of experiments/vision."""

from collections.abc import Mapping

from experiments.shared.page import Content, head
from experiments.vision import figures

METHODS = ("original", "retrained", "multi-GAN", "multi-GAN without images")


def readme(results: Mapping[str, Content]) -> list[str]:
    """README.md; `results` are those of experiments/vision."""
    lines = head(
        "Unlearning with several GANs",
        claim="Finetuning on images that one GAN draws of the forget set and another "
        "of the retain set, forget labels replaced, unlearns faster than retraining "
        "and better than standard methods "
        "([2407.18467](https://arxiv.org/abs/2407.18467)). Experimental.",
        command="\n".join(
            "python -m experiments.multi_gan.run "
            f"--config experiments/vision/configs/{config}.py"
            for config in figures.CONFIGS.values()
        ),
        time="About 10 minutes for Fashion-MNIST and 1 hour for CIFAR-10 in the "
        "methods alone, on two cores.",
        setup="`method.py` is the method; the network, the data, the attacks and the "
        "other methods are those of [experiments/vision](../vision/README.md), which "
        "explains the columns. Three seeds.",
        verdict=figures.paper_verdict(results, "multi-GAN"),
    )
    return lines + figures.paper_page(results, "multi-GAN", METHODS)
