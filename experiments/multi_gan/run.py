# SPDX-License-Identifier: Apache-2.0
"""Unlearning with GANs (2407.18467) on images, with its reference models.

    python -m experiments.multi_gan.run --config experiments/vision/configs/fashion.py

Runs the original and the retrained model, multi-GAN, and the same finetuning without
drawn images, as part of the comparison in experiments/vision: finished runs and results
are shared with it. README.md here is drawn from those results; --draw only does that.
"""

from pathlib import Path

from experiments.multi_gan import figures
from experiments.shared import command, page
from experiments.vision import run as vision

FOLDER = Path(__file__).resolve().parent


def run(arguments: command.Arguments) -> None:
    """Runs what is missing and draws the page."""
    if not arguments.options.draw:
        arguments.options.only = ",".join(figures.METHODS[1:])
        vision.run(arguments)
    draw(FOLDER, arguments.options.results)


def draw(folder: Path, vision_folder: Path = vision.FOLDER) -> None:
    """Writes README.md from the comparison's results."""
    text = page.readme(figures.readme, page.results(vision_folder))
    page.write_text(Path(folder) / "README.md", text)


if __name__ == "__main__":
    command.main(run, __doc__, config=vision.CONFIG, options=vision.OPTIONS)
