# SPDX-License-Identifier: Apache-2.0
"""LLM Surgery in a tiny world: three sets of questions, what runs, the claims."""

import jax
import numpy as np
import pytest

from experiments.shared import ledger
from experiments.small import biographies, score, unlearn
from experiments.surgery import figures
from experiments.surgery import run as surgery
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")
CONFIG = surgery.SurgeryConfig((1e-2,), seeds=(0,), steps=10, num_scored=16)
ABOUT = dict(parameters=1, world="w", versions={"jax": "1"}, **CONFIG._asdict())


@pytest.fixture(scope="module")
def book(small_world, tmp_path_factory):
    """The ledger of a run with two recipes."""
    file = tmp_path_factory.mktemp("surgery") / "surgery.jsonl"
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        builds = surgery.recipes_by_name(500)
        few = {name: builds[name] for name in (surgery.BASELINE, "surgery")}
        patch.setattr(surgery, "recipes_by_name", lambda vocab: few)
        book = ledger.Ledger(file, ledger.head(CONFIG))
        surgery.run(small_world[1], book, CONFIG)
    return book


def test_new_biographies_contradict_the_old_ones():
    old = biographies.rows(forget=6, retain=1)["forget"]
    new = biographies.fictitious(old)
    assert new == biographies.fictitious(old) != biographies.fictitious(old, seed=1)
    for a, b in zip(old, new, strict=True):
        assert (a["author"], a["question"]) == (b["author"], b["question"])
        options = [b["paraphrased_answer"], *b["perturbed_answer"]]
        assert len(set(options)) == 6 and a["answer"] != b["answer"]
        assert a["paraphrased_answer"] not in options
    with pytest.raises(ValueError, match="'Who\\?'"):
        biographies.fictitious([{"author": "Nobody", "question": "Who?"}])


def test_the_option_with_the_most_probable_tokens_is_chosen():
    model, params = tiny.tiny_model()
    rows = tiny.tiny_batch(6, 12)
    table = {name: np.asarray(x) for name, x in rows.items()}
    hidden = model.apply(params, rows).hidden
    logps = jax.nn.log_softmax(model.unembed(params, hidden))[:, :-1]
    each = np.take_along_axis(logps, table["tokens"][:, 1:, None], -1)[..., 0]
    where = table["answer"][:, 1:]
    means = np.where(where, each, 0).sum(1) / where.sum(1)
    expected = means.reshape(2, 3).argmax(1)
    assert score.chosen_options(model, params, table, 3).tolist() == expected.tolist()
    broken = jax.tree.map(lambda x: x * np.nan, params)
    assert score.chosen_options(model, broken, table, 3).tolist() == [-1, -1]


def test_the_sets_are_scored_apart(small_world):
    small = small_world[1]
    sets = surgery.choices(small, 5)
    assert {k: len(x["tokens"]) for k, x in sets.items()} == dict.fromkeys(
        figures.SETS, 15
    )
    streams = surgery.tables(small)
    assert len(streams["update"]["tokens"]) == len(streams["forget"]["tokens"])
    assert (streams["update"]["tokens"] != streams["forget"]["tokens"]).any(1).all()


def test_the_baseline_learns_the_new_facts_and_surgery_unlearns_the_old(book):
    names = ["original", "retrained", "baseline 0.01 0", "surgery 0.01 0"]
    assert [x["key"] for x in book.lines] == names
    before, baseline, strong = (book[names[i]]["accuracy"] for i in (0, 2, 3))
    assert before["unlearn"] > before["update"]
    assert baseline["update"] > before["update"]
    assert strong["unlearn"] < before["unlearn"]


def test_the_best_rate_balances_the_three_sets():
    def line(rate, *values, seed=0):
        found = dict(zip(figures.SETS, values, strict=True))
        return dict(method="x", seed=seed, rate=rate, accuracy=found)

    lines = [line(1, 0.5, 0.5, 0.5), line(2, 0.2, 0.5, 0.4), line(3, 0.2, 0.5, 0.4)]
    lines.append(line(1, 0.0, 1.0, 1.0, seed=1))
    assert unlearn.best_rate(lines, "x", seed=0, score=figures.balance) == 2


def test_a_world_of_other_facts_is_refused(small_world):
    small = small_world[1]
    config = {"facts": {"source": "tofu"}}
    with pytest.raises(ValueError, match="'tofu'"):
        surgery.tables(small._replace(about={**small.about, "config": config}))


def test_the_page_states_the_three_claims(book, tmp_path):
    def line(method, unlearn, update, retain, **more):
        found = dict(unlearn=unlearn, update=update, retain=retain)
        return {"key": method, "method": method, "accuracy": found, **more}

    lines = [
        line("original", 0.9, 0.3, 0.8),
        line("surgery", 0.5, 0.5, 0.8, rate=0.1, seed=0),
        line("surgery", 0.3, 0.7, 0.6, rate=0.1, seed=1),
        line("surgery", 0.9, 0.9, 0.9, rate=0.2, seed=0),
    ]
    content = {"about": ABOUT, "lines": lines}
    text = "\n".join(figures.readme({"small": content}))
    assert "| surgery | 0.1 | 2 | 0.400 ± 0.100 | 0.600 ± 0.100 | 0.700 ± 0.1" in text
    assert "-0.500" in text and "+0.300 (the paper's +0.2 is reached)" in text
    figures.write(book.lines, ABOUT, tmp_path)
    assert (tmp_path / "results" / "small.png").stat().st_size > 0
