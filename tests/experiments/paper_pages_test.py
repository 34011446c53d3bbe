# SPDX-License-Identifier: Apache-2.0
"""Committed results draw the committed README.md of their experiment again."""

from pathlib import Path

import pytest

pytest.importorskip("sklearn")
from experiments.benchmarks import cost, generate, harness, methods, plan_table
from experiments.benchmarks import figures as benchmarks
from experiments.bilevel import figures as bilevel
from experiments.blur import run as blur
from experiments.comparison import figures as comparison
from experiments.condensation import run as condensation
from experiments.multi_gan import run as multi_gan
from experiments.pruning import figures as pruning
from experiments.reliability import figures as reliability
from experiments.shared import page
from experiments.vision import figures as vision

EXPERIMENTS = Path(benchmarks.__file__).resolve().parents[1]
PAGES = {
    "benchmarks": benchmarks.readme,
    "bilevel": bilevel.readme,
    "comparison": comparison.readme,
    "pruning": pruning.readme,
    "reliability": reliability.readme,
    "vision": vision.readme,
}
# Pages that are drawn from the results of other folders.
DRAWN = {
    "blur": blur.draw,
    "condensation": condensation.draw,
    "multi_gan": multi_gan.draw,
}
BENCHMARKS = {
    "generate_smollm2_cpu": lambda x: "\n".join(generate.in_words(x)) + "\n",
    "harness_mmlu": lambda x: "\n".join(harness.in_words(x)) + "\n",
    "methods_cost": lambda x: methods.markdown(x["methods"], x["rounds"]),
    "plan": plan_table.markdown,
}
PLOTS = {
    "benchmarks/cost": cost.draw,
    "bilevel/weigh": bilevel.draw_weigh,
    "bilevel/error": bilevel.draw_error,
    "comparison/small": comparison.draw,
    "pruning/smollm2": pruning.draw,
    "vision/fashion_mnist": vision.draw,
    "vision/cifar10_subset": vision.draw,
}


@pytest.mark.parametrize("name", [*PAGES, *DRAWN])
def test_the_committed_page_is_drawn_again(name, tmp_path):
    if name in PAGES:
        text = page.readme(PAGES[name], page.results(EXPERIMENTS / name))
    else:
        DRAWN[name](tmp_path)
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text == (EXPERIMENTS / name / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_committed_page_of_a_benchmark_is_drawn_again(name):
    folder = EXPERIMENTS / "benchmarks"
    text = BENCHMARKS[name](page.results(folder)[name])
    file = folder / "results" / f"{name}.md"
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PLOTS)
def test_the_committed_results_are_plotted(name, tmp_path):
    folder, stem = name.split("/")
    content = page.results(EXPERIMENTS / folder)[stem]
    PLOTS[name](content, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert (EXPERIMENTS / folder / "results" / f"{stem}.png").is_file()


@pytest.mark.parametrize("name", [*PAGES, *DRAWN])
def test_links_of_a_page_lead_somewhere(name):
    folder = EXPERIMENTS / name
    text = (folder / "README.md").read_text(encoding="utf-8")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    local = [link for link in links if not link.startswith("http")]
    assert [link for link in local if not (folder / link).exists()] == []
