# SPDX-License-Identifier: Apache-2.0
"""BLUR (2506.08164) against weighted sums of the same losses: the page of the results.

    python -m experiments.blur.run

Draws README.md from committed results: utility at equal forgetting
(experiments/comparison), and what a step costs (experiments/benchmarks). To measure
again:

    python -m experiments.comparison.run
    python -m experiments.benchmarks.methods
    python -m experiments.benchmarks.step --output FILE

The method itself is jaxunlearn.combine.blur and jaxunlearn.recipes.blur.
"""

from pathlib import Path

from experiments.benchmarks import figures as benchmarks
from experiments.blur import figures
from experiments.comparison import run as comparison
from experiments.shared import command, page

FOLDER = Path(__file__).resolve().parent


def draw(folder: Path) -> None:
    """Writes README.md."""
    results = page.results(comparison.FOLDER) | page.results(benchmarks.FOLDER)
    page.write_text(Path(folder) / "README.md", page.readme(figures.readme, results))


if __name__ == "__main__":
    command.main(lambda arguments: draw(FOLDER), __doc__)
