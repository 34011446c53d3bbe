# SPDX-License-Identifier: Apache-2.0
"""The pruning experiment on a tiny decoder: what goes, what is taken up, the tables."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from experiments.comparison import run as compare
from experiments.pruning import config as prune_smollm2
from experiments.pruning import (
    figures as prune_figures,
)
from experiments.pruning import (
    run as prune,
)
from experiments.pruning import (
    texts as prune_texts,
)
from jaxunlearn import edits, evaluate, stats
from tests import tiny

UNITS = 3 * 24


def small_config(folder, **more):
    c = prune_smollm2.get_config()
    c.output = str(folder)
    sizes = dict(length=8, batch=2, first=24, again=16, scored=16, steps=2)
    c.update(sizes | dict(fraction=0.25) | more)
    return c


def rows(count, seed, low, high):
    tokens = np.random.default_rng(seed).integers(low, high, (count, 8), np.int32)
    whole = np.ones(tokens.shape, bool)
    return {"tokens": tokens, "mask": whole, "answer": whole}


@pytest.fixture(scope="module")
def texts():
    """Two texts that share no token."""
    return {
        side: prune.Text(rows(3, 2 * i, *ids), rows(2, 2 * i + 1, *ids))
        for i, (side, ids) in enumerate({"code": (0, 16), "prose": (16, 32)}.items())
    }


@pytest.fixture(scope="module")
def done(texts, tmp_path_factory):
    """(folder, config, lines)."""
    folder = tmp_path_factory.mktemp("prune")
    config = small_config(folder)
    model, params = tiny.tiny_model()
    return folder, config, prune.prune(model, params, texts, config, {"texts": {}})


def mask(folder, run):
    return np.load(folder / f"{run.key}.npy")


def test_every_trajectory_takes_a_quarter_at_each_step(done):
    folder, _, lines = done
    assert lines[0]["key"] == "step 0" and len(lines) == 1 + 2 * 4
    for line in lines[1:]:
        assert line["removed"] == 0.25 * line["step"]
    for run in ("selective-code", "selective-prose", "magnitude", "random"):
        assert np.load(folder / f"{run}-0.npy").sum() == UNITS // 2
    assert_array_equal(mask(folder, prune.Run("random")).sum(1), [12, 12, 12])
    ours, theirs = (mask(folder, prune.Run("selective", s)) for s in prune.SIDES)
    assert (ours & ~theirs).any()


def test_accuracies_are_those_of_the_pruned_weights(done, texts):
    folder, config, lines = done
    model, params = tiny.tiny_model()
    for run in (prune.Run("selective", "code"), prune.Run("magnitude")):
        gone = {"mlp": jnp.asarray(mask(folder, run))}
        pruned = edits.prune_units(model, params, gone)
        (line,) = [x for x in lines if x["key"] == f"{run.key} 2"]
        for side, text in texts.items():
            scores = evaluate.token_scores(model, pruned, text.scored)
            assert line[side] == pytest.approx(scores.hits.sum() / 14)  # of 2 * 7
    found = prune.checks(model, params, gone["mlp"], texts["prose"])
    assert found["gap"] < 1e-5 and found["width"][0] == 24 >= found["width"][1]


def test_what_goes_first_is_loud_on_the_text_to_forget(texts, tmp_path):
    model, params = tiny.tiny_model()
    config = small_config(tmp_path, steps=1, first=24, again=24)
    prune.prune(model, params, texts, config, {})
    seen = {
        side: stats.activity(model, params, [text.seen])["mlp"].abs
        for side, text in texts.items()
    }
    ratio = np.asarray(seen["code"] / (seen["prose"] + 1e-3))
    gone = mask(tmp_path, prune.Run("selective", "code"))
    assert ratio[gone].min() > ratio[~gone].max()
    norms = np.asarray(prune.magnitude(model, params))
    mlp = {
        k: np.asarray(x["kernel"])
        for k, x in params["blocks"]["mlp"].items()
        if k != "norm"
    }
    weights = [*mlp["gate"][1, :, 5], *mlp["up"][1, :, 5], *mlp["down"][1, 5]]
    assert_allclose(norms[1, 5], np.linalg.norm(weights), rtol=1e-5)
    gone = mask(tmp_path, prune.Run("magnitude"))
    assert norms[gone].max() < norms[~gone].min()


def test_a_run_that_was_stopped_goes_on_to_the_same_masks(done, texts, tmp_path):
    folder, config, lines = done
    text = (folder / "prune.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "prune.jsonl").write_text("".join(text[:-2]) + text[-2][:20])
    for file in folder.glob("*.npy"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    # The masks of what is missing are those of the step before.
    first = tmp_path / "first"
    part = small_config(first, steps=1)
    prune.prune(*tiny.tiny_model(), texts, part, {"texts": {}})
    for name in ("magnitude-0", "random-0"):
        (tmp_path / f"{name}.npy").write_bytes((first / f"{name}.npy").read_bytes())
    again = small_config(tmp_path)
    found = prune.prune(*tiny.tiny_model(), texts, again, {"texts": {}})
    plain = [
        [{k: v for k, v in x.items() if "seconds" not in k} for x in each]
        for each in (found, lines)
    ]
    assert plain[0] == plain[1]
    with pytest.raises(ValueError, match="Move it away"):
        prune.prune(*tiny.tiny_model(), texts, again, {"texts": {"code": "other"}})


def test_the_table_says_drops_and_their_ratio(done, tmp_path):
    line = dict(seed=0, forget="code", step=1, removed=0.02, choose_core_seconds=0.1)
    line |= dict(statistics_seconds_code=2.0, statistics_seconds_prose=1.0)
    line |= dict(statistics_core_seconds_code=3.0, statistics_core_seconds_prose=1.5)
    line |= dict(statistics_tokens_code=24, statistics_tokens_prose=24)
    line |= dict(method="selective", key="x")
    before = dict(key="step 0", step=0, code=0.5, prose=0.4)
    other = line | dict(method="magnitude", forget="", code=0.45, prose=0.5)
    lines = [before, line | dict(code=0.3, prose=0.36), other]
    ours, theirs = prune_figures.drops(lines, "code")
    assert ours["forget"] == pytest.approx(0.4)
    assert ours["retain"] == pytest.approx(0.1)
    assert ours["ratio"] == pytest.approx(4.0) and theirs["ratio"] == float("inf")
    (only,) = prune_figures.drops(lines, "prose")
    assert only["method"] == "magnitude" and only["forget"] == pytest.approx(-0.25)

    config = small_config(tmp_path)
    about = prune.head(config, {"code": "some code", "prose": "some prose"})
    about |= dict(command="this", versions={"jax": "1"}, neurons=[3, 24])
    about |= dict(checks=dict(gap=1e-7, width=[24, 20], seconds=[2.0, 1.5]))
    for each in (lines, done[2]):
        prune_figures.write(each, about, tmp_path / "figures")
        page = (tmp_path / "figures.md").read_text()
        assert "Forget prose, keep code" in page and "1.0e-07" in page
        assert json.loads((tmp_path / "figures.json").read_text())["best"]["code"]
        assert (tmp_path / "figures.png").stat().st_size > 0
    assert "| random, seed 0 |" in page
    prune_figures.write(done[2], about | {"checks": None}, tmp_path / "figures")
    assert "masked activations" not in (tmp_path / "figures.md").read_text()
    first, lines_there = compare.drawn(done[0] / "prune.jsonl")
    assert first == {"key": "head", "texts": {}} and lines_there == done[2]
    prune_figures.write(lines, about, tmp_path / "figures")
    assert (
        "| selective | 2% | 40.0% | 10.0% | 4.0 |"
        in (tmp_path / "figures.md").read_text()
    )


def test_texts_have_two_disjoint_parts(tmp_path, monkeypatch):
    for (seen, scored), _ in (prune_texts.code(), prune_texts.english("/nowhere")):
        assert min(map(len, (seen, scored))) > 20_000
        assert not set(seen.split("\n\n")[:50]) & set(scored.split("\n\n")[:50])
    assert "import" in prune_texts.code()[0][0]
    with pytest.raises(FileNotFoundError, match="two Python files .* got 0"):
        prune_texts.code(tmp_path)
    tokenizer, text = tiny.tiny_tokenizer(), "The river flows to the sea. "
    few = ((text * 4, text), "here")
    monkeypatch.setattr(prune_texts, "english", lambda folder: few)
    monkeypatch.setattr(prune_texts, "code", lambda: few)
    with pytest.raises(ValueError, match="16 tokens of code, got .* Ask for fewer"):
        prune.read(small_config(tmp_path), tokenizer)
    found, where = prune.read(small_config(tmp_path, scored=8, again=8), tokenizer)
    assert where == {"code": "here", "prose": "here"}
    assert found["code"].scored["tokens"].shape == (1, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(fraction=0.6), "fraction \\* steps <= 1"),
        (dict(scored=4), "length <= scored"),
        (dict(again=25), "again <= first"),
        (dict(steps=0), "steps"),
        (dict(eps=0.0), "eps > 0"),
    ],
)
def test_configs_that_cannot_run_are_refused(texts, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        prune.prune(*tiny.tiny_model(), texts, small_config(tmp_path, **change), {})
    config = small_config(tmp_path)
    config.stpes = 3
    with pytest.raises(ValueError, match="stpes"):
        prune.prune(*tiny.tiny_model(), texts, config, {})
