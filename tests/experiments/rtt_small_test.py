# SPDX-License-Identifier: Apache-2.0
"""RTT in a tiny world: what runs, what resumes, and what the page says."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from experiments.rtt import figures, run
from experiments.rtt.small import page, score
from experiments.rtt.small import world as small
from experiments.small import biographies, unlearn

pytestmark = pytest.mark.usefixtures("standard_promotion")
CONFIG = small.SmallConfig(
    rates=dict.fromkeys(small.METHODS, (1e-4, 3e-3)),
    seeds=(0,),
    steps=2,
    batch_size=4,
    num_facts=16,
    num_folds=2,
    attack_rates=(1e-4, 3e-3),
    epochs=1,
    max_loss=10.0,
    finetune=(30, 1e-2),
    num_scored=dict(forget=8, retain=8),
)


@pytest.fixture(scope="module")
def one_method():
    """NPO alone, on facts of both kinds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "METHODS", {"NPO": small.METHODS["NPO"]})
        patch.setattr(small, "FINETUNED", ("NPO",))
        yield


@pytest.fixture(scope="module")
def done(one_method, small_world, tmp_path_factory):
    """The experiment after its run."""
    file = tmp_path_factory.mktemp("lines") / "rtt.jsonl"
    with jax.numpy_dtype_promotion("standard"):
        done = run.open_world(small.Small(small_world[1], CONFIG, file))
        done.run()
    return done


@pytest.fixture(scope="module")
def lines(done):
    return done.book.lines


def test_all_models_are_attacked_on_every_fold(lines):
    attacked = [x for x in lines if x["kind"] == "rtt"]
    names = (*score.REFERENCES, "NPO", "finetuned NPO")
    expected = {(who, 0, fold) for who in names for fold in (0, 1)}
    assert {(x["who"], x["seed"], x["fold"]) for x in attacked} == expected
    for x in attacked:
        for measure in score.MEASURES:
            assert np.shape(x[measure]) == (2, 2)  # rates, before and after an epoch
        assert np.shape(x["losses"]) == (2, 1) and x["facts"] == 8
        assert x["of"] == ("finetuned" if "finetuned" in x["who"] else "pretrained")
    swept = [x for x in lines if x["kind"] == "unlearned"]
    assert {(x["of"], x["method"], x["rate"]) for x in swept} == {
        (of, "NPO", rate) for of in ("pretrained", "finetuned") for rate in (1e-4, 3e-3)
    }


def test_models_with_the_knowledge_differ_from_models_without(lines):
    def verbatim(who):
        runs = [x for x in lines if x["kind"] == "rtt" and x["who"] == who]
        return np.mean([x["verbatim"][0][0] for x in runs])

    assert verbatim("original") > 0.5 > verbatim("retrained")
    assert verbatim("finetuned original") > verbatim("retrained") + 0.2
    assert verbatim("never seen") < 0.5


def test_a_stopped_run_uses_the_unlearned_models_that_are_saved(
    done, small_world, monkeypatch
):
    file = done.book.file
    text = file.read_text().splitlines(keepends=True)
    file.write_text("".join(text[:-1]))
    monkeypatch.setattr(unlearn, "run", lambda *x, **y: pytest.fail("unlearned again"))
    again = run.open_world(small.Small(small_world[1], CONFIG, file))
    again.run()
    assert [x["key"] for x in again.book.lines] == [x["key"] for x in done.book.lines]
    last, expected = again.book.lines[-1], done.book.lines[-1]
    assert_allclose(last["verbatim"], expected["verbatim"], atol=1e-5)
    used = {x["rate"] for x in done.book.lines if "rate" in x and x["kind"] == "rtt"}
    folders = list(file.with_suffix(".unlearned").iterdir())
    assert len(folders) == 2 and len(used) <= 2  # those of other rates are removed


def test_wrong_answers_are_worded_as_the_right_one():
    rows = biographies.rows(forget=3, retain=1)["forget"]
    for row in rows:
        wrong = biographies.wrong_answers(row)
        assert len(set(wrong)) == 5 and row["answer"] not in wrong
        start = row["answer"][:8]
        assert all(text.startswith(start) and text.endswith(".") for text in wrong)
    assert biographies.wrong_answers(rows[0] | {"question": "Who?"}) is None


def test_tables_are_as_long_as_the_longest_refusal(small_world):
    world = small_world[1]
    short = world._replace(about={**world.about, "length": 8})
    found = unlearn.tables(short)
    assert len({each["tokens"].shape[1] for each in found.values()}) == 1
    rows = found["refusal"]
    refusal = rows["tokens"][1][rows["answer"][1]]
    assert world.tokenizer.decode(refusal).strip() == unlearn.REFUSALS[1] + "</s>"


def test_no_known_author_is_among_those_never_seen(small_world):
    world = small_world[1]
    never = small.never_seen(world, CONFIG)
    seen = {row["author"] for rows in world.questions.values() for row in rows}
    assert not seen & {row["author"] for row in never}
    assert len(never) >= CONFIG.num_facts


def test_the_rate_is_the_strongest_within_the_bound():
    def run(rate, forget, retain, finite=True):
        return dict(
            rate=rate, forget_probability=forget, retain_loss=retain, finite=finite
        )

    swept = [
        run(1, 0.9, 0.1),
        run(2, 0.3, 0.35),
        run(3, 0.0, 0.9),
        run(4, 0, 0.1, False),
    ]
    assert small.pick(swept, 0.4)["rate"] == 2
    assert small.pick(swept, 1.0)["rate"] == 3
    assert small.pick(swept[:3], 0.01)["rate"] == 1


def line(who, fold, *values, seed=0, **more):
    """A run with one row of `values` (before, after each epoch) a rate."""
    both = {m: [list(x) for x in values] for m in score.MEASURES}
    shared = dict(kind="rtt", who=who, fold=fold, seed=seed, facts=50)
    rates = [1e-4, 3e-4][: len(values)]
    return shared | dict(rates=rates, finite=[True] * len(rates)) | both | more


def unlearned(of, method, rate=1e-3, seed=0, retain=0.3):
    return dict(
        key=f"unlearned {of} {method} {rate} {seed}",
        kind="unlearned",
        of=of,
        method=method,
        rate=rate,
        seed=seed,
        retain_loss=retain,
        forget_probability=0.1,
        retain_exact=0.9,
        facts=dict(choice=0.3, verbatim=0.1),
    )


def made(late, before=0.3):
    """NPO on two seeds and folds; what was finetuned in comes back to `late`."""
    lines = [unlearned("pretrained", "NPO"), unlearned("finetuned", "NPO")]
    lines.append(unlearned("pretrained", "NPO", seed=1, retain=0.5))
    for fold in (0, 1):
        lines += [
            line("original", fold, (1.0, 0.9)),
            line("retrained", fold, (0.2, 0.2)),
            line("NPO", fold, (before, 0.8), rate=1e-3),
            line("NPO", fold, (before, 0.6), seed=1, rate=1e-3),
            line("finetuned original", fold, (0.8, 0.7)),
            line("finetuned NPO", fold, (0.2, late), rate=1e-3),
        ]
    return lines


def judged(lines):
    rows = score.summarise(lines)
    return rows, score.claim(lines, rows)


def test_later_seeds_are_attacked_at_the_best_rate():
    def swept(fold, *values, seed=0):
        return dict(
            kind="rtt", who="NPO", seed=seed, rates=[1, 2], fold=fold, verbatim=values
        )

    lines = [swept(0, (0.1, 0.9), (0.2, 0.5)), swept(1, (0.1, 0.1), (0.7, 0.6))]
    assert small.best_rates(lines, "NPO") == [2]
    assert small.best_rates(lines[:1] + [swept(0, (0, 0), (1, 1), seed=1)], "NPO") == [
        1
    ]


def test_recovery_by_hand():
    rows = {row["who"]: row for row in score.summarise(made(0.5))}
    npo = rows["NPO"]["verbatim"]
    assert_allclose(npo["before"], [0.3, 0.0], atol=1e-9)
    assert_allclose(npo["last"], [0.7, np.std([0.8, 0.6], ddof=1)])
    assert_allclose(npo["recovery"][0], 0.7 / 1.0)
    assert_allclose(npo["above"][0], (0.6 / 0.8 + 0.4 / 0.8) / 2)
    assert_allclose(npo["returned"], (0.7 - 0.3) / (0.9 - 0.3))  # folds are alike
    assert_allclose(npo["best_returned"], (0.7 - 0.3) / (1.0 - 0.3))
    assert_allclose(npo["left"], 0.1 / 0.8)
    assert npo["forgot"]
    late = rows["finetuned NPO"]["choice"]
    assert_allclose(late["above"][0], 0.3 / 0.6)
    assert_allclose(late["returned"][0], 0.3 / 0.5)
    assert rows["NPO"]["seeds"] == [0, 1] and rows["NPO"]["folds"] == 4
    assert_allclose(rows["NPO"]["retain_loss"], 0.4)


def test_folds_count_by_their_facts():
    lines = made(0.5)
    for x in lines:
        if x.get("fold") == 1:
            x["facts"] = 150
        if (x.get("fold"), x.get("who"), x.get("seed")) == (1, "NPO", 0):
            x["choice"] = [[0.7, 0.9]]
    row = next(x for x in score.summarise(lines) if x["who"] == "NPO")
    before = (0.3 + 0.25 * 0.3 + 0.75 * 0.7) / 2
    after = (0.25 * 0.8 + 0.75 * 0.9 + 0.6) / 2
    assert_allclose(row["choice"]["before"][0], before)
    value, low, high = row["choice"]["returned"]
    assert_allclose(value, (after - before) / (0.9 - before))
    assert low < value < high


def test_what_was_never_forgotten_does_not_come_back():
    """A method that forgets nothing has the paper's full recovery, and no verdict."""
    rows, found = judged(made(0.5, before=1.0))
    npo = next(row for row in rows if row["who"] == "NPO")["choice"]
    assert npo["left"] == 1.0 and not npo["forgot"] and npo["recovery"][0] == 1.0
    assert npo["returned"] is None and "choice" not in found["most_returns"]
    text = "\n".join(page._answers(found, rows))
    assert "still have 100% of what" in text and "half or more: none" in text
    assert "in pretraining, by choice: nothing was removed" in text
    assert page._claim(found) == "not measured."
    rows, found = judged(made(0.25, before=0.65))
    text = "\n".join(page._answers(found, rows))
    assert "; most was never forgotten" in text
    assert "the smaller part that was" in page._claim(found)
    table = "\n".join(page._tables(rows))
    assert "| 56% (forgot less than half) |" in table and "| 0% |" in table


@pytest.mark.parametrize(
    ("late", "before", "first", "second", "whole"),
    [
        (0.25, 0.3, "holds", "holds", "the claim holds here"),
        (0.6, 0.3, "holds", "fails", "the claim does not hold in both parts here"),
        (0.25, 0.6, "fails", "holds", "the claim does not hold in both parts here"),
    ],
)
def test_the_claim_is_judged_by_what_was_removed(late, before, first, second, whole):
    found = judged(made(late, before))[1]
    assert found["most_returns"] == dict.fromkeys(score.MEASURES, first)
    assert found["much_less"] == dict.fromkeys(score.MEASURES, second)
    assert found["compared"] == {
        "methods": ["NPO"],
        "seeds": [0],
    }  # what both bases have
    claim = page._claim(found)
    assert claim.startswith(whole) and f"**{first}** by both measures" in claim


def test_half_a_claim_is_undecided():
    rows, found = judged([x for x in made(0.5) if "finetuned" not in x.get("who", "")])
    assert found["most_returns"]["choice"] == "holds" and not found["less"]
    claim = page._claim(found)
    assert (
        claim.startswith("the claim is undecided here")
        and "does was not measured" in claim
    )


def test_one_fold_decides_nothing():
    found = judged([x for x in made(0.25) if x.get("fold", 0) == 0])[1]
    assert found["returned"]["original"]["choice"][0] > 0.6
    assert {*found["most_returns"].values(), *found["much_less"].values()} == {
        "undecided"
    }


def test_the_rate_of_the_last_epoch_is_chosen_on_other_folds():
    lines = [
        line("NPO", 0, (0.1, 0.9, 0.8), (0.1, 0.3, 0.2)),
        line("NPO", 1, (0.1, 0.2, 0.3), (0.1, 0.2, 0.7)),
    ]
    held = score.held_out(lines, "choice")
    assert (held[0, 0]["last"], held[0, 1]["last"]) == (0.2, 0.3)
    assert (held[0, 0]["best"], held[0, 1]["best"]) == (0.9, 0.7)
    assert score.held_out(lines[:1], "choice")[0, 0]["last"] == 0.8  # no other


def test_controls_are_judged_by_the_last_epoch():
    """The best of rates and epochs is far from chance, no last epoch is."""
    lines = made(0.5)
    for fold, best in ((0, (0.9, 0.2)), (1, (0.2, 0.9))):
        rates = [(0.25, best[0], 0.28), (0.25, best[1], 0.22)]
        lines.append(line("never seen", fold, *rates))
    row = score.summarise(lines)[-1]
    first, second = row["controls"]
    assert_allclose([first["last"][0], second["last"][0]], [0.28, 0.22])
    assert_allclose(first["last"][1:], [0.201, 0.375], atol=1e-3)  # Wilson's, of 100
    assert not first["differs_from_chance"] and not second["differs_from_chance"]
    text = page._control(row)
    assert "28% [20%, 37%] at rate 0.0001 (does not differ from chance)" in text
    assert "biased upwards, 90%" in text
    for x in lines[-2:]:
        x["choice"][1][-1] = 0.5
    row = score.summarise(lines)[-1]
    assert row["controls"][1]["differs_from_chance"]
    assert "at rate 0.0003 (differs from chance)" in page._control(row)


def test_the_page_says_what_ran_and_how_far_losses_match():
    lines = made(0.5)
    lines.append(unlearned("finetuned", "NPO", rate=2e-3, retain=0.9))
    rows = score.summarise(lines)
    (text,) = page._parts(rows)
    assert (
        "original, retrained, finetuned original, finetuned NPO: seed 0, 2 att" in text
    )
    assert "; NPO: seeds 0, 1, 4 attacks. To save time" in text
    text = page._matched(lines, {"max_loss": 0.4}, rows)
    assert "0.300 to 0.400 nats a token (NPO 0.400, finetuned NPO 0.300)" in text
    assert "single seeds: NPO seed 1 (0.500). So strengths" in text
    assert "on the first seed with NPO; a larger one was not tried" in text
    text = "\n".join(page._sweep(lines, {"max_loss": 0.4}, rows))
    assert "| 0.90 | used, over the bound |" in text
    assert "| 0.90 | over the bound |" in text


def test_the_page_of_a_stopped_run_says_so(lines, tmp_path):
    about = CONFIG._asdict() | {"parameters": 1, "world": "w"}
    figures.write("small", lines, about, tmp_path)
    assert (tmp_path / "results" / "small.png").stat().st_size > 5000
    text = (tmp_path / "README.md").read_text()
    assert "by the few attacks" in text and "| **retrained** |" in text
    assert "2 of 10 attacks on unlearned models" in text  # one method of five ran
    rates = {"rates": dict.fromkeys(("NPO", "RMU"))}
    missing = page._missing(lines, about | rates)
    assert "2 of 4" in missing[0] and "none yet of RMU" in missing[0]
    assert not page._missing(lines, about | {"rates": {"NPO": None}})
