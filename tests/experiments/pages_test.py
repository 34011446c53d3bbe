# SPDX-License-Identifier: Apache-2.0
"""Every committed README is what its committed JSON says: each page is drawn again."""

import importlib
import re

import pytest

from experiments.shared import command, page

PAGES = (
    "experiments.mrp.figures",
    "experiments.quantization.figures",
    "experiments.rtt.figures",
    "experiments.semeval.figures",
    "experiments.surgery.figures",
)
"""Modules with readme(results), PLOTS (name of results -> function that draws them) and
SUMMARIES (name of results -> function of their lines that gives `summary`)."""


def committed(name):
    """(module, folder of the experiment, its results)."""
    folder = command.ROOT / name.replace(".", "/").rsplit("/", 1)[0]
    return importlib.import_module(name), folder, page.results(folder)


@pytest.mark.parametrize("name", PAGES)
def test_the_readme_is_drawn_from_the_committed_results(name):
    module, folder, found = committed(name)
    assert found
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert page.readme(module.readme, found) == text
    for image in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
        assert (folder / image).stat().st_size > 1000


@pytest.mark.parametrize("name", PAGES)
def test_committed_summaries_are_those_of_the_lines(name):
    """What the JSON says of its lines is what the code computes from them."""
    module, _, found = committed(name)
    for stem, summarise in module.SUMMARIES.items():
        again = summarise(found[stem]["lines"])
        assert page.plain(again) == found[stem]["summary"]


@pytest.mark.parametrize("name", PAGES)
def test_plots_are_drawn(name, tmp_path):
    module, _, found = committed(name)
    for stem, draw in module.PLOTS.items():
        draw(found[stem], tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 5000
