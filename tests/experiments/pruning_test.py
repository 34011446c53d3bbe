# SPDX-License-Identifier: Apache-2.0
"""The pruning experiment on a tiny decoder: which units go, resuming, the page."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from experiments.pruning import figures, run, texts
from experiments.shared import ledger
from jaxunlearn import edits, evaluate, stats
from tests import tiny

UNITS = 3 * 24


SETTINGS = run.Settings(
    length=8,
    batch_size=2,
    first_tokens=24,
    later_tokens=16,
    scored_tokens=16,
    steps=2,
    fraction=0.25,
)


def book(folder):
    return ledger.Ledger(folder / "prune.jsonl", {"key": "head", "texts": {}})


def rows(count, seed, low, high):
    tokens = np.random.default_rng(seed).integers(low, high, (count, 8), np.int32)
    whole = np.ones(tokens.shape, bool)
    return {"tokens": tokens, "mask": whole, "answer": whole}


@pytest.fixture(scope="module")
def pair():
    """Two texts that share no token."""
    return {
        side: run.Text(rows(3, 2 * i, *ids), rows(2, 2 * i + 1, *ids))
        for i, (side, ids) in enumerate({"code": (0, 16), "prose": (16, 32)}.items())
    }


@pytest.fixture(scope="module")
def done(pair, tmp_path_factory):
    """(folder, lines)."""
    folder = tmp_path_factory.mktemp("prune")
    return folder, run.prune(*tiny.tiny_model(), pair, SETTINGS, book(folder))


def mask(folder, trajectory):
    return np.load(folder / f"{trajectory.key}.npy")


def test_every_trajectory_removes_a_quarter_at_each_step(done):
    folder, lines = done
    assert lines[0]["key"] == "step 0" and len(lines) == 1 + 2 * 4
    for line in lines[1:]:
        assert line["removed"] == 0.25 * line["step"]
    for name in ("selective-code", "selective-prose", "magnitude", "random"):
        assert np.load(folder / f"{name}-0.npy").sum() == UNITS // 2
    assert_array_equal(mask(folder, run.Run("random")).sum(1), [12, 12, 12])
    code, prose = (mask(folder, run.Run("selective", s)) for s in run.SIDES)
    assert (code & ~prose).any()


def test_accuracies_are_those_of_the_pruned_weights(done, pair):
    folder, lines = done
    model, params = tiny.tiny_model()
    for each in (run.Run("selective", "code"), run.Run("magnitude")):
        gone = {"mlp": jnp.asarray(mask(folder, each))}
        pruned = edits.prune_units(model, params, gone)
        (line,) = [x for x in lines if x["key"] == f"{each.key} 2"]
        for side, text in pair.items():
            scores = evaluate.token_scores(model, pruned, text.scored)
            assert line[side] == pytest.approx(scores.hits.sum() / 14)  # of 2 * 7
    found = run.exactness(model, params, gone["mlp"], pair["prose"])
    assert found["gap"] < 1e-5 and found["width"][0] == 24 >= found["width"][1]


def test_what_goes_first_is_active_on_the_text_to_forget(pair, tmp_path):
    model, params = tiny.tiny_model()
    settings = SETTINGS._replace(steps=1, later_tokens=24)
    run.prune(model, params, pair, settings, book(tmp_path))
    seen = {
        side: stats.activity(model, params, [text.seen])["mlp"].abs
        for side, text in pair.items()
    }
    ratio = np.asarray(seen["code"] / (seen["prose"] + 1e-3))
    gone = mask(tmp_path, run.Run("selective", "code"))
    assert ratio[gone].min() > ratio[~gone].max()
    norms = np.asarray(run.magnitude(model, params))
    mlp = {
        k: np.asarray(x["kernel"])
        for k, x in params["blocks"]["mlp"].items()
        if k != "norm"
    }
    weights = [*mlp["gate"][1, :, 5], *mlp["up"][1, :, 5], *mlp["down"][1, 5]]
    assert_allclose(norms[1, 5], np.linalg.norm(weights), rtol=1e-5)
    gone = mask(tmp_path, run.Run("magnitude"))
    assert norms[gone].max() < norms[~gone].min()


def test_a_stopped_run_resumes_from_its_masks(done, pair, tmp_path):
    folder, lines = done
    text = (folder / "prune.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "prune.jsonl").write_text("".join(text[:-1]))
    for file in folder.glob("*.npy"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    first = tmp_path / "first"  # the mask of the step before the missing one
    settings = SETTINGS._replace(steps=1)
    run.prune(*tiny.tiny_model(), pair, settings, book(first))
    (tmp_path / "random-0.npy").write_bytes((first / "random-0.npy").read_bytes())
    found = run.prune(*tiny.tiny_model(), pair, SETTINGS, book(tmp_path))
    plain = [
        [{k: v for k, v in x.items() if "seconds" not in k} for x in each]
        for each in (found, lines)
    ]
    assert plain[0] == plain[1]


def test_the_page_reports_drops_and_their_ratio(done, tmp_path):
    line = dict(seed=0, forget="code", step=1, removed=0.02, choose_core_seconds=0.1)
    line |= dict(statistics_seconds_code=2.0, statistics_seconds_prose=1.0)
    line |= dict(statistics_core_seconds_code=3.0, statistics_core_seconds_prose=1.5)
    line |= dict(statistics_tokens_code=24, statistics_tokens_prose=24)
    line |= dict(method="selective", key="x")
    before = dict(key="step 0", step=0, code=0.5, prose=0.4)
    untouched = line | dict(method="magnitude", forget="", code=0.45, prose=0.5)
    lines = [before, line | dict(code=0.3, prose=0.36), untouched]
    first, second = figures.drops(lines, "code")
    assert first["forget"] == pytest.approx(0.4)
    assert first["retain"] == pytest.approx(0.1)
    assert first["ratio"] == pytest.approx(4.0) and second["ratio"] == float("inf")
    (only,) = figures.drops(lines, "prose")
    assert only["method"] == "magnitude" and only["forget"] == pytest.approx(-0.25)
    lines.append(lines[1] | dict(forget="prose", code=0.5, prose=0.2))

    about = dict(config=SETTINGS._asdict(), texts=dict(code="code", prose="prose"))
    about |= dict(command="this", versions={"jax": "1"}, neurons=[3, 24])
    about |= dict(checks=dict(gap=1e-7, width=[24, 20], seconds=[2.0, 1.5]))
    for each in (done[1], lines):
        page = "\n".join(figures.readme({"smollm2": dict(about=about, runs=each)}))
        assert "Forget prose, retain code" in page and "1.0e-07" in page
    assert "| selective | 2% | 40.0% | 10.0% | 4.0 |" in page
    figures.draw({"runs": done[1]}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_texts_have_two_disjoint_parts(tmp_path, monkeypatch):
    for (seen, scored), _ in (texts.code(), texts.english("/nowhere")):
        assert min(map(len, (seen, scored))) > 20_000
        assert not set(seen.split("\n\n")[:50]) & set(scored.split("\n\n")[:50])
    assert "import" in texts.code()[0][0]
    with pytest.raises(FileNotFoundError, match="two Python files .* got 0"):
        texts.code(tmp_path)
    tokenizer, text = tiny.tiny_tokenizer(), "The river flows to the sea. "
    few = ((text * 4, text), "here")
    monkeypatch.setattr(texts, "english", lambda folder: few)
    monkeypatch.setattr(texts, "code", lambda: few)
    with pytest.raises(ValueError, match="16 tokens of code"):
        run.read(SETTINGS, tokenizer)
    settings = SETTINGS._replace(scored_tokens=8, later_tokens=8)
    found, where = run.read(settings, tokenizer)
    assert where == {"code": "here", "prose": "here"}
    assert found["code"].scored["tokens"].shape == (1, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(fraction=0.6), "'fraction': 0.6"),
        (dict(scored_tokens=4), "'scored_tokens': 4"),
        (dict(later_tokens=25), "'later_tokens': 25"),
        (dict(steps=0), "steps"),
        (dict(eps=0.0), "eps"),
    ],
)
def test_settings_that_cannot_run_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        run.check(SETTINGS._replace(**change))
