# SPDX-License-Identifier: Apache-2.0
"""What experiments share: a ledger that resumes, intervals, pages, plots, commands."""

import json
from typing import NamedTuple

import numpy as np
import pytest
from numpy.testing import assert_allclose

from experiments.shared import command, intervals, ledger, page, plot


class Settings(NamedTuple):
    steps: int = 3
    rates: tuple[float, ...] = (0.1, 0.2)
    seeds: tuple[int, ...] = (0, 1)
    scored: dict = {"forget": 2}  # noqa: RUF012
    gamma: float = 0.5


def experiment(file, settings, ran):
    """Two methods at two rates, then the better one on the second seed."""
    book = ledger.Ledger(file, ledger.head(settings, world="w"))

    def best(name):
        tried = [x for x in book.lines if x["method"] == name and x["seed"] == 0]
        return max(tried, key=lambda line: line["score"])["rate"]

    for name, rate, seed in ledger.sweep("ab", settings.rates, settings.seeds, best):
        key = f"{name} {rate} {seed}"
        if book.lacks(key):
            ran.append(key)
            line = {"key": key, "method": name, "rate": rate, "seed": seed}
            book.add(line | {"score": rate if name == "a" else -rate})
    return book


def test_a_stopped_experiment_resumes_and_repeats_only_what_is_missing(tmp_path):
    file, ran = tmp_path / "new" / "runs.jsonl", []
    book = experiment(file, Settings(), ran)
    assert ran == [
        *("a 0.1 0", "a 0.2 0", "b 0.1 0", "b 0.2 0"),
        *("a 0.2 1", "b 0.1 1"),
    ]
    first, *rest = map(json.loads, file.read_text().splitlines())
    assert first == book.head and rest == book.lines and "seeds" not in first
    text = file.read_text().splitlines(keepends=True)
    file.write_text("".join(text[:-2]) + text[-2][:20])  # cut off while writing
    again = []
    assert experiment(file, Settings(), again).lines == book.lines
    assert again == ["a 0.2 1", "b 0.1 1"] and book["a 0.2 1"]["score"] == 0.2
    experiment(file, Settings(seeds=(0, 1, 2)), again)  # more seeds may follow
    assert again[2:] == ["a 0.2 2", "b 0.1 2"]
    with pytest.raises(ValueError, match=r"steps.*4.*steps.*3"):
        experiment(file, Settings(steps=4), again)
    file.write_text(text[0][:9])  # killed while the head was written
    experiment(file, Settings(), again)
    assert again[4:] == ran


def test_no_run_starts_when_the_time_is_up(monkeypatch):
    now, ran = iter([0.0, 0.0, 61.0]), []
    monkeypatch.setattr(ledger.time, "monotonic", lambda: next(now))
    ledger.run_for([lambda: ran.append(1)] * 3, minutes=1)
    assert ran == [1]
    monkeypatch.undo()
    ledger.run_for([lambda: ran.append(2)] * 3)
    assert ran == [1, 2, 2, 2]


def test_the_lowest_rate_that_reaches_the_bar():
    rates = (1, 2)
    assert ledger.lowest_rate(rates, {}, 0.1) == (None, False)
    assert ledger.lowest_rate(rates, {1: 0.05}, 0.1) == (1, True)
    assert ledger.lowest_rate(rates, {1: 0.5}, 0.1) == (None, False)
    assert ledger.lowest_rate(rates, {1: 0.5, 2: 0.1}, 0.1) == (2, True)
    assert ledger.lowest_rate(rates, {1: 0.5, 2: 0.4}, 0.1) == (2, False)
    assert ledger.lowest_rate(rates, {1: 0.5, 2: None}, 0.1) == (1, False)  # diverged
    assert ledger.lowest_rate(rates, {1: None, 2: None}, 0.1) == (1, False)


def test_spread_and_intervals_by_hand():
    assert intervals.spread([2.0]) == [2.0, 0.0]
    assert_allclose(intervals.spread([1.0, 3.0]), [2.0, 2**0.5])
    assert_allclose(intervals.spread([1.0, 3.0], ddof=0), [2.0, 1.0])
    found = intervals.wilson(np.array([1] * 5 + [0] * 15))
    assert_allclose(found, [0.25, 0.112, 0.469], atol=1e-3)
    value, low, high = intervals.bootstrap(lambda x: x.mean(-1), np.arange(400) % 2)
    assert value == 0.5 and as_wide_as_theory(low, high)
    assert intervals.bootstrap(lambda x: float("nan"), np.zeros(3)) is None
    pairs = np.stack([np.arange(9.0), np.arange(9.0) - 1])
    found = intervals.bootstrap(lambda x: (x[0] - x[1]).mean(-1), pairs)
    assert_allclose(found, 1.0)  # columns stay pairs


def as_wide_as_theory(low, high):
    """Whether a 95% interval of 400 coin flips is as wide as theory says."""
    return abs((high - low) - 4 * 0.5 / 20) < 0.01 and low < 0.5 < high


def test_verdicts_are_undecided_where_the_interval_contains_the_bar():
    cases = {"holds": [0.7, 0.6, 0.8], "fails": [0.3, 0.2, 0.4]}
    cases["undecided"] = [0.6, 0.4, 0.8]
    for word, interval in cases.items():
        assert intervals.verdict(interval, 0.5) == word
    assert intervals.much_larger([0.3, 0.1, 0.5], 0.2) == "holds"
    assert intervals.much_larger([0.1, 0.0, 0.15], 0.2) == "fails"
    assert intervals.much_larger([0.3, -0.1, 0.5], 0.2) == "undecided"


def test_a_page_is_drawn_from_its_json(tmp_path):
    def draw(content, file):
        with plot.saved(file, size=(4, 3), columns=2) as (_, grid):
            series = {"x": [[1.0, 0.1], [2.0, 0.2]], "y": [[1, 0.5, 2], [1, 1, 1]]}
            plot.bars(grid[0, 0], ["a", "b"], series)
            plot.curve(grid[0, 1], [0, 1], series["x"], label="x")

    def lines(results):
        rows = [[name, page.pm(x["spread"])] for name, x in results.items()]
        return [*page.table(["name", "value"], rows)]

    content = {"spread": [0.5, 0.25], "bad": float("nan")}
    page.publish(tmp_path, "small", content, lines, draw)
    text = (tmp_path / "README.md").read_text()
    assert "| name | value |\n| --- | --- |\n| small | 0.500 ± 0.250 |\n" in text
    assert (tmp_path / "results" / "small.png").stat().st_size > 1000
    found = page.results(tmp_path)
    assert found == {"small": {"spread": [0.5, 0.25], "bad": None}}
    assert page.readme(lines, found) == text
    assert page.share([0.5, 0.25, 0.75]) == "50% [25%, 75%]" and page.share(None) == ""
    assert page.bounds([0.5, 0.25, 0.75]) == "0.50 [0.25, 0.75]"
    assert page.seeds([0, 1]) == "seeds 0, 1" and page.rate(None) == ""


CONFIG = "experiments/small/configs/biographies.py"


def read(*argv, config=CONFIG, settings=Settings()):  # noqa: B008
    return command.read("doc", config, settings, {"--draw": {}}, list(argv))


def test_settings_and_configs_change_by_name():
    found = read("--set", "steps=7", "--set", "rates=0.5", "--set", "scored.forget=9")
    assert found.settings == Settings(7, (0.5,), scored={"forget": 9})
    found = read("--set", "world.model.width=32", "--set", "seeds=3,4", "--draw", "x")
    assert found.config.model.width == 32 and found.config.model.layers == 5
    assert found.settings.seeds == (3, 4) and found.options.draw == "x"
    assert read("--set", "gamma=1").settings.gamma == 1.0
    assert read("--set", "steps=9", settings=None).config.steps == 9


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--set", "stpes=7"], ["stpes", "steps"]),
        (["--set", "world.model.widht=7"], ["widht", "width"]),
        (["--set", "steps=many"], ["steps", "many"]),
        (["--set", "steps"], ["KEY=VALUE", "steps"]),
        (["--drwa", "x"], ["--drwa", "--draw"]),
        (["--config", "nowhere.py"], ["--config", "nowhere.py"]),
    ],
)
def test_what_is_misspelt_names_the_nearest(argv, parts, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(
            lambda found: pytest.fail("ran"),
            "doc",
            config=CONFIG,
            settings=Settings(),
            options={"--draw": {}},
            argv=argv,
        )
    assert stop.value.code == 2
    out = capsys.readouterr().err
    assert out.startswith("error: ") and all(part in out for part in parts)
    assert out.count("\n") == 1


def test_errors_are_one_line_and_ctrl_c_says_how_to_resume(capsys):
    def stopped(found):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        command.main(stopped, "doc", argv=[])
    assert stop.value.code == 130 and "same command" in capsys.readouterr().err

    def broken(found):
        raise ValueError("steps=0")

    with pytest.raises(ValueError, match="steps=0"):
        command.main(broken, "doc", argv=["--debug"])
