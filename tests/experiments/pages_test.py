# SPDX-License-Identifier: Apache-2.0
"""Every committed README is what its committed JSON says: each page is drawn again."""

import importlib
import re

import pytest

from experiments.shared import command, page

# Experiment -> {name of its results: function that draws their plot}.
PAGES = {
    "experiments.mrp.figures": ("small",),
    "experiments.semeval.figures": ("small",),
    "experiments.surgery.figures": ("small",),
}


@pytest.mark.parametrize("name", PAGES)
def test_the_readme_is_drawn_from_the_committed_results(name):
    module = importlib.import_module(name)
    folder = command.ROOT / name.replace(".", "/").rsplit("/", 1)[0]
    found = page.results(folder)
    assert set(found) == set(PAGES[name])
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert page.readme(module.readme, found) == text
    for image in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
        assert (folder / image).stat().st_size > 1000


@pytest.mark.parametrize("name", PAGES)
def test_committed_summaries_are_those_of_the_lines(name):
    """What the JSON says of its lines is what the code computes from them."""
    module = importlib.import_module(name)
    folder = command.ROOT / name.replace(".", "/").rsplit("/", 1)[0]
    for content in page.results(folder).values():
        if "summary" in content:
            again = module.summarise(content["lines"])
            assert page.plain(again) == content["summary"]


def test_plots_are_drawn(tmp_path):
    for name, stems in PAGES.items():
        module = importlib.import_module(name)
        folder = command.ROOT / name.replace(".", "/").rsplit("/", 1)[0]
        file = tmp_path / f"{name}.png"
        for stem in stems:
            module.draw(page.results(folder)[stem], file)
            assert file.stat().st_size > 5000
