# SPDX-License-Identifier: Apache-2.0
"""The report: what the page shows, that one file is enough, what it refuses."""

import html.parser
import json
import re
import shutil

import pytest

from jaxunlearn.workflows import records
from jaxunlearn.workflows.report import attacks, figures, read, tables, tokens
from jaxunlearn.workflows.report import run as report
from tests.workflows import report_folders as folders


class Page(html.parser.HTMLParser):
    """Text, addresses, and tags left open."""

    VOID = ("meta", "img", "br", "hr")

    def __init__(self, text):
        super().__init__()
        self.text, self.addresses, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def runs(tmp_path):
    return folders.three(tmp_path / "runs")


def test_the_page_holds_every_model_and_is_self_contained(runs, tmp_path):
    out = tmp_path / "out"
    note, command = "2 < 3 & so on", "jaxunlearn report"
    report.write(read.load([runs]), out, note=note, command=command)
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    outside = [x for x in page.addresses if not x.startswith(("#", "data:image/png"))]
    assert not outside and "@import" not in text and "url(" not in text
    assert "2 &lt; 3 &amp; so on" in text and "<script" not in text
    shown = "".join(page.text)
    for words in ("original", "retrained", "npo", "openunlearning.npo", "1.0e-09"):
        assert words in shown, words
    assert "0.030 to 0.070" in shown  # the interval of npo's forget probability
    for words in ("jax 0.10.2", "jaxunlearn evaluate m", "retain: 1 (r7)"):
        assert words in shown, words
    assert "jaxunlearn report" in shown
    assert {x.name for x in out.iterdir()} == {
        "report.html",
        "report.md",
        "forget_utility.png",
        "training.png",
    }
    for file in out.glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")


def test_models_stand_in_one_order_and_a_folder_counts_once(runs):
    found = read.load([runs / "npo", runs, runs / "original" / ".." / "original"])
    assert [run.name for run in found] == ["original", "retrained", "npo"]
    assert found[2].training[2]["forget/loss"] == 3.0
    assert read.value(found[0], "forget", "probability") == 0.98
    assert read.value(found[1], "overall", "forget_quality") is None


def test_tokens_are_coloured_by_log_probability_and_escaped(runs, tmp_path):
    (example,) = tokens.examples(read.load([runs]))
    assert [line.name for line in example.lines] == ["original", "retrained", "npo"]
    npo = example.lines[2]
    assert npo.mean == f"{2.718281828**-6:.3f}"  # of the two that are finite
    assert npo.tokens[1] == tokens.Token(" <b>|", "#dddddd", "not finite")
    assert npo.tokens[0].tooltip == "-3.00 nats, probability 0.0498"
    assert tokens.colour(0.0) == "#f58c3c" and tokens.colour(-50.0) == "#ffffff"
    assert tokens.colour(-4.0) == "#fac69e"
    report.write(read.load([runs]), tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert " &lt;b&gt;|" in text and "Who &amp; why?" in text
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| Who &amp; why? | 0.964 | 0.009 | 0.002 |" in markdown


def test_texts_of_every_direction_and_broken_surrogates_are_shown(tmp_path):
    prompt, pieces = "מה בירת צרפת? 🙂", ["باريس", "\ud83d", "👨‍👩‍👧"]
    numbers = folders.metrics(0.9, 0.6)
    place = folders.write(tmp_path, "קודם", "original", numbers, logps=[-1.0] * 3)
    row = {"id": "f0", "prompt": prompt, "tokens": pieces, "logps": [-1.0, -1.0, None]}
    records.write_lines(place / "tokens" / "forget.jsonl", [row])
    assert records.read_lines(place / "tokens" / "forget.jsonl") == [row]
    page = report.write(read.load([place]), tmp_path / "page").read_text("utf-8")
    assert f'<summary dir="auto" lang="">{prompt}</summary>' in page
    assert '<div class="tokens" dir="auto" lang="">' in page
    assert pieces[0] in page and pieces[2] in page and "\\ud83d" in page
    assert "<bdi>קודם</bdi>" in page


def test_every_row_of_markdown_has_the_columns_of_its_table(runs, tmp_path):
    put_card(runs / "npo")
    report.write(read.load([runs]), tmp_path)
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").split("\n")
    width, seen = 0, 0
    for line in lines:
        count = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not (width and count) or count == width, line
        width, seen = count, seen + (count > 0)
    assert seen > 20
    images = re.findall(r"!\[.*\]\((.*)\)", "\n".join(lines))
    assert images and all((tmp_path / name).exists() for name in images)


def test_parts_of_a_joint_term_share_a_panel_with_terms_that_stand_apart(runs):
    run = read.load([runs])[2]
    entry = {"step": 0, "total/loss": 3.0, "total/forget/loss": 2.0, "blur/cosine": 0}
    (named,) = figures._named(run._replace(training=[entry]))
    assert named == {
        "step": 0,
        "total/loss": 3.0,
        "forget/loss": 2.0,
        "blur/cosine": 0,
    }


def test_as_many_examples_as_requested_are_spread_over_the_rows(runs):
    found = read.load([runs])
    rows = [dict(found[0].tokens["forget"][0], id=i) for i in range(10)]
    many = [
        run._replace(tokens={"forget": rows[: 10 - n]}) for n, run in enumerate(found)
    ]
    assert [x.id for x in tokens.examples(many, max_rows=3)] == ["0", "3", "6"]
    assert len(tokens.examples(many, max_rows=20)) == 8  # those that all have
    assert tokens.examples(many, max_rows=0) == []
    assert tokens.examples([run._replace(tokens={}) for run in found]) == []


def put_card(folder):
    rows = [
        {"attack": "none", "unlearned": 0.06, "attacked": None},
        {
            "attack": "relearn",
            "unlearned": 0.06,
            "attacked": folders.number(0.5, 0.4, 0.6),
        },
    ]
    folders.put(
        folder / "card.json", {"measure": "exact", "chance": 0.25, "rows": rows}
    )
    curve = {
        "attack": "int",
        "measure": "probability",
        "x": {"label": "bits", "values": ["none", "int8", "int4"]},
        "curves": {"npo": [0.06, 0.07, None], "original": [0.9, 0.9, 0.8]},
    }
    folders.put(folder / "attacks" / "bits.json", curve)
    other = {"attack": "few shots", "score": {"before": 0.1, "after": 0.2}, "list": [1]}
    folders.put(folder / "attacks" / "shots.json", other)


def test_attacks_and_the_card_are_shown_where_they_are(runs, tmp_path):
    report.write(read.load([runs]), tmp_path / "a")
    assert 'id="attacks"' not in (tmp_path / "a" / "report.html").read_text()
    put_card(runs / "npo")
    found = read.load([runs])
    card, shots = tables.of_attacks(found[2].attack)
    assert card.note == "exact; chance level 0.250"
    assert card.rows[1] == ("relearn", "", [("0.060", ""), ("0.500", "0.400 to 0.600")])
    assert [x.title for x in shots.columns] == ["score before", "score after"]
    report.write(found, tmp_path / "b")
    text = (tmp_path / "b" / "report.html").read_text(encoding="utf-8")
    assert "Robustness card: npo" in text and 'alt="int: npo"' in text
    assert (tmp_path / "b" / "attack_0_bits.png").exists()


def test_what_the_attack_driver_writes_is_shown(runs, tmp_path):
    values, both = (
        {"completion": 0.0, "choice": 0.25},
        {"choice": {"attack": "relearn"}},
    )
    both["choice"] |= {"before": 0.25, "after": 0.75}
    row = {"name": "relearn", "num_facts": 4, "before": values, "forget": values}
    card = {"about": {"chance": 0.25}, "rows": [row], "strongest": both}
    card |= {"leak": {"unlearned": {"1": 0.1, "10": 0.4}}, "rtt": {"rate": 0.5}}
    folders.put(runs / "npo" / "card.json", card | {"not_run": {"gguf": "no file"}})
    for name, hits in (("rtt 0", [[[0, 0], [1, 0]]]), ("rtt 1", [[[1, 0], [1, 1]]])):
        attack = {"job": name, "key": "k", "result": {"sweep": {"hits": hits}}}
        folders.put(runs / "npo" / "attacks" / f"{name}.json", attack)
    found = read.load([runs])
    titles = [table.title.split(":")[0] for table in tables.of_attacks(found[2].attack)]
    assert titles == [
        "Robustness card",
        "The strongest attack",
        "Retraining on other facts",
        "Not run",
    ]
    first = tables.of_attacks(found[2].attack)[0]
    columns = [column.title for column in first.columns]
    assert columns[:3] == ["num facts", "before completion", "before choice"]
    assert first.note == "chance level 0.250"
    curves = attacks.curves(found[2].attack)
    assert curves["leak"]["x"]["values"] == [1, 10]
    assert curves["leak"]["curves"] == {"unlearned": [0.1, 0.4]}
    assert curves["rtt"]["curves"] == {"unlearned": [0.25, 0.75]}
    page = report.write(found, tmp_path).read_text(encoding="utf-8")
    assert "no file" in page and (tmp_path / "attack_0_rtt.png").exists()


def test_words_compare_with_the_retrained_and_the_original(runs):
    (line,) = tables.in_words(read.load([runs]))
    assert line == (
        "npo: its truth ratios on the rows to forget do not differ significantly from "
        "the retrained model's (p = 0.300); the probability of the answers to forget "
        "is 0.060 (0.980 original, 0.050 retrained); that of the answers to retain "
        "0.900 (0.900 original, 0.900 retrained); model utility is 0.600 (0.700 "
        "original, 0.710 retrained)."
    )


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.12345, "0.123"),
        (0.0, "0.000"),
        (1.2e-7, "1.2e-07"),
        (15.68, "15.68"),
        (-123.4, "-123"),
        (2.5e7, "2.5e+07"),
        (400, "400"),
        ("none", "none"),
        (True, "True"),
    ],
)
def test_numbers_in_words(value, text):
    assert tables.number(value) == text


def test_a_run_without_utility_tokens_or_log_still_has_a_page(tmp_path):
    bare = {
        "tasks": {"mmlu": {"accuracy": folders.number(0.25, 0.2, 0.3)}},
        "overall": {},
    }
    place = folders.write(tmp_path, "only", "original", bare)
    found = read.load([place])
    assert figures.trade_off(found, tmp_path / "x.png") is None
    assert figures.training(found, tmp_path / "x.png") is None
    page = report.write(found, tmp_path / "out").read_text(encoding="utf-8")
    assert "0.250" in page and "0.200 to 0.300" in page
    assert not list((tmp_path / "out").glob("*.png"))


def test_the_same_runs_give_the_same_bytes(runs, tmp_path):
    for name in ("a", "b"):
        report.write(read.load([runs]), tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_real_evaluation_is_read(scored, retrained, tmp_path):
    found = read.load([scored, retrained])
    assert [run.role for run in found] == ["retrained", "unlearned"]
    page = report.write(found, tmp_path).read_text(encoding="utf-8")
    for title in ("Rows to forget", "World facts", "membership attacks", "min-k++ AUC"):
        assert title in page, title
    assert len(tokens.examples(found)) == 6 or len(tokens.examples(found)) == 3


def damage(file, text):
    file.write_bytes(text)


@pytest.mark.parametrize(
    "harm, message",
    [
        (
            lambda f: shutil.rmtree(f / "npo"),
            "npo, which is not there",
        ),
        (
            lambda f: [x.unlink() for x in (f / "npo").glob("*.json")],
            "about.json and metrics.json in .*npo",
        ),
        (
            lambda f: (f / "npo" / "metrics.json").unlink(),
            "npo is not finished: metrics.json missing. .* again: jaxunlearn",
        ),
        (
            lambda f: folders.put(f / "npo" / "cache.json", {"metrics": None}),
            "npo is not finished",
        ),
        (
            lambda f: damage(f / "npo" / "metrics.json", b'{"tasks": {'),
            "metrics.json needs JSON",
        ),
        (
            lambda f: damage(f / "npo" / "training.jsonl", b'{"step": 0}\n{"st'),
            "training.jsonl, line 2 needs JSON",
        ),
        (
            lambda f: damage(f / "npo" / "about.json", b'"\xff"'),
            "about.json needs UTF-8 text, but byte 1",
        ),
        (
            lambda f: folders.put(f / "npo" / "about.json", {"name": "npo"}),
            "about.json needs .* without 'role', 'data'",
        ),
        (
            lambda f: folders.put(f / "npo" / "metrics.json", []),
            "metrics.json needs .* without 'tasks', 'overall'",
        ),
        (
            lambda f: folders.put(f / "npo" / "card.json", {"rows": [3]}),
            "card.json needs rows that are JSON objects",
        ),
        (
            lambda f: folders.put(
                f / "npo" / "attacks" / "a.json",
                {"measure": "m", "x": {"values": [1, 2]}, "curves": {"npo": [1]}},
            ),
            "2 values, .* got 1 for 'npo'",
        ),
    ],
)
def test_folders_that_cannot_be_read_are_refused(runs, harm, message):
    harm(runs)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read.load([runs / "npo", runs / "original"])


def change(folder, **more):
    file = folder / "about.json"
    folders.put(file, json.loads(file.read_text()) | more)


@pytest.mark.parametrize(
    "more, message",
    [
        (
            {"data": {"forget": "c" * 64, "retain": "b" * 64}},
            "task 'forget' 'original' has rows with digest a{16}... and 'npo' has rows "
            "with digest c{16}",
        ),
        (
            {"data": {"mmlu": "c"}},
            "same tasks, but 'original' has 'forget', 'ret",
        ),
        (
            {"settings": folders.SETTINGS | {"new_tokens": 9}},
            "differ in settings: new_tokens 4 and 9",
        ),
        ({"name": "original"}, "are both 'original'"),
        ({"role": "teacher"}, "role='teacher'"),
    ],
)
def test_evaluations_that_cannot_be_compared_are_refused(runs, more, message):
    change(runs / "npo", **more)
    with pytest.raises(ValueError, match=message):
        read.load([runs])


def test_gradnorm_alone_may_differ(runs):
    change(runs / "npo", settings=folders.SETTINGS | {"gradnorm": False})
    assert len(read.load([runs])) == 3


def test_nothing_and_a_negative_number_of_examples_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="got none"):
        read.load([])
    with pytest.raises(ValueError, match="examples=-1"):
        report.write(read.load([runs]), tmp_path, examples=-1)
