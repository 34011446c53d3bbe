# SPDX-License-Identifier: Apache-2.0
"""The quickstart from end to end, on a tiny model that knows twelve capitals."""

import json
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from numpy.testing import assert_array_equal

import jaxunlearn as ju
from experiments.quickstart import capitals
from experiments.quickstart import run as quickstart
from jaxunlearn import combine, losses, models, terms
from jaxunlearn.data import capitals as facts
from jaxunlearn.data import prose, table
from jaxunlearn.io import hf
from tests import tiny

NUM_TRAINED = 6  # capitals of Europe, and as many others
SCORES = {"greedy_seen", "greedy_unseen", "choice_seen", "choice_unseen"}
RELEARN = {
    "facts_trained",
    "facts_evaluated",
    "original",
    "unlearned",
    "relearned",
    "trained_half",
}
PHASES = ["load", "evaluate before", "unlearn", "evaluate after", "attack"]
KEYS = {
    *("method", "seed", "steps", "seconds", "tokens_per_second", "versions"),
    *("before", "after", "relearn"),
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The same program with fewer statements, rows and steps."""
    texts = tuple(text[:20_000] for text in prose.prose())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capitals, "NUM_STATEMENTS", 2)
        patch.setattr(capitals, "NUM_QUESTIONS", 1)
        patch.setattr(capitals, "MAX_NEW_TOKENS", 4)
        patch.setattr(capitals, "PROSE_ROWS", 16)
        patch.setattr(prose, "prose", lambda: texts)
        patch.setattr(quickstart, "BATCH_SIZES", {"forget": 4, "retain": 4, "prose": 2})
        patch.setattr(quickstart, "RELEARN_STEPS", 2)
        with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
            yield


def train(model, params, tokenizer, trained):
    """Params after training on the statements that will be evaluated."""
    wordings = [s for split in capitals.SPLITS for s in capitals.statements(split)]
    rows = table.encode(
        tokenizer,
        [fact.prompt(s) for fact in trained for s in wordings],
        [f"{fact.answer}." for fact in trained for _ in wordings],
    )
    tx = optax.chain(combine.weighted_sum(), optax.adamw(3e-3, weight_decay=0.0))
    parts = {"all": terms.on_logps(losses.nll, model, "all", reduce="token")}
    state = ju.init_state(params, tx, jax.random.key(0))
    step = jax.jit(ju.make_step(parts, tx), donate_argnums=0)
    state, _ = ju.fit(step, state, table.streams({"all": rows}, 48, seed=0), steps=200)
    return state.params


@pytest.fixture(scope="module")
def folders(quick, tmp_path_factory):
    """Hugging Face folders of a trained and of a random model."""
    pool = facts.capitals()
    europe = [fact for fact in pool if fact.group == "Europe"][:NUM_TRAINED]
    others = [fact for fact in pool if fact.group != "Europe"][:NUM_TRAINED]
    sentences = [
        f"{fact.prompt(phrasing)} {fact.answer}."
        for fact in pool
        for phrasing in facts.phrasings("statement", "train")
    ]
    tokenizer = tiny.tiny_tokenizer(sentences, vocab=1000)
    config = models.DecoderConfig(
        family="llama",
        vocab=len(tokenizer),
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        hidden=64,
        positions=128,
        tied=False,
    )
    model = models.make(config)
    random = model.init(jax.random.key(0))
    trained = train(model, random, tokenizer, europe + others)
    base = tmp_path_factory.mktemp("models")
    for name, params in (("trained", trained), ("random", random)):
        hf.save(model, params, base / name, tokenizer=tokenizer)
    hf.save(model, trained, base / "no_tokenizer")  # without a tokenizer
    return base


def run(folder, output, *flags):
    """What main returned, what it wrote, and the params that it made."""
    made = {}
    train = quickstart.train

    def spy(*arguments):
        made["after"], *others = train(*arguments)
        return made["after"], *others

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "train", spy)
        result = quickstart.main(
            ["--model", str(folder), "--output", str(output), *flags]
        )
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return SimpleNamespace(
        result=result,
        written=json.loads((output / "quickstart.json").read_text()),
        metrics=[json.loads(line) for line in lines],
        output=output,
        before=hf.load(folder)[1],
        **made,
    )


@pytest.fixture(scope="module")
def blur(folders, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "new" / "folder"
    with tiny.programs() as programs:
        done = run(folders / "trained", output, "--steps", "3", "--seed", "1")
    done.programs = programs
    return done


def fraction(value):
    return type(value) is float and 0 <= value <= 1


def check(written, method, steps, seed):
    assert set(written) >= KEYS
    assert (written["method"], written["steps"]) == (method, steps)
    assert written["seed"] == seed
    assert written["seconds"] > 0 and written["tokens_per_second"] > 0
    phases = written["phases"]
    assert list(phases) == PHASES
    total = sum(each["seconds"] for each in phases.values())
    assert total == pytest.approx(written["seconds"])
    peaks = [each["peak_gigabytes"] for each in phases.values()]
    assert peaks[0] > 0.05 and peaks == sorted(peaks)
    assert {"python", "jaxunlearn", "jax", "flax", "optax"} <= set(written["versions"])
    for when in ("before", "after"):
        assert set(written[when]) == {"forget", "retain", "prose_perplexity"}
        assert 1 < written[when]["prose_perplexity"] < np.inf
        for kind in ("forget", "retain"):
            assert set(written[when][kind]) == SCORES
            assert all(fraction(value) for value in written[when][kind].values())
    assert set(written["relearn"]) == RELEARN
    half = written["facts"]["forget"]["known"] // 2
    assert written["relearn"]["facts_trained"] == half
    assert written["relearn"]["facts_evaluated"] in (half, half + 1)
    for name in ("original", "unlearned", "relearned", "trained_half"):
        assert fraction(written["relearn"][name])


def test_quickstart_json_holds_every_number(blur):
    check(blur.written, "blur_npo", 3, 1)
    assert blur.written == json.loads(json.dumps(blur.result))
    for kind in ("forget", "retain"):
        known = blur.written["facts"][kind]["known"]
        assert 4 <= known <= NUM_TRAINED < blur.written["facts"][kind]["evaluated"]
        # Facts count as known if half of the statements are right.
        before = blur.written["before"][kind]
        assert before["greedy_seen"] + before["greedy_unseen"] >= 1
    assert blur.written["relearn"]["original"] >= 0.5


def test_every_program_of_the_model_is_compiled_once(blur):
    found = [text for text in blur.programs if text.count("ShapedArray") > 8]
    names = [text.split(" with ")[0].removeprefix("Compiling ") for text in found]
    assert sum("step" in name for name in names) == 2  # to unlearn, and the attack
    assert {"jit(_scores)", "jit(_continue)"} <= set(names)
    # Prompts of one shape are also run with caches of several sizes, a static argument.
    fixed = [text for text in found if "jit(_start)" not in text]
    assert [text[:60] for text, n in Counter(fixed).items() if n > 1] == []


def test_metrics_hold_one_line_a_step(blur):
    assert [entry["step"] for entry in blur.metrics] == [0, 1, 2]
    for entry in blur.metrics:
        names = {"seconds", "finite", "forget/loss", "retain/loss", "combine/xi"}
        assert names <= set(entry)
    # Steps begin at the reference.
    assert blur.metrics[0]["forget/loss"] == pytest.approx(20 * np.log(2), rel=1e-4)


def test_the_plot_is_an_image(blur):
    pyplot = pytest.importorskip("matplotlib.image")
    image = pyplot.imread(blur.output / "quickstart.png")
    assert image.shape[0] > 300 and image.shape[1] > 800 and image.std() > 0.05


def test_the_model_folder_holds_the_unlearned_params(blur):
    _, params, tokenizer = hf.load(blur.output / "model")
    jax.tree.map(assert_array_equal, params, blur.after)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), params, blur.before)
    assert all(jax.tree.leaves(moved))
    assert tokenizer("The capital of France is")["input_ids"]


def test_ascent_reads_the_forget_stream_alone(folders, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("of an earlier run\n")
    done = run(folders / "trained", tmp_path, "--steps", "1", "--method", "ascent")
    check(done.written, "ascent", 1, 0)
    (entry,) = done.metrics
    losses = {name for name in entry if name.endswith("/loss")}
    assert losses == {"total/forget/loss", "total/loss"}
    for file in ("quickstart.png", "model/config.json", "model/tokenizer.json"):
        assert (tmp_path / file).is_file()
    out, err = capsys.readouterr()
    assert "Unlearning with ascent: 1 steps" in out
    final = out.split("Attack: finetuning")[1]  # the figures are the last lines
    assert "FORGET" in final and "RETAIN" in final and "after the attack" in final
    assert "1/1" in err  # the progress bar


@pytest.mark.parametrize("method", quickstart.METHODS)
def test_every_method_reads_its_streams(method):
    model, _ = tiny.tiny_model()
    recipe = quickstart.make_recipe(method, model, 1e-5)
    retain = set() if method == "ascent" else {"retain", "prose"}
    assert set(recipe.reads()) == {"forget"} | retain


def test_a_random_model_is_refused(folders, tmp_path):
    message = "at least 4 European and 4 other capitals, got 0 and 0"
    with pytest.raises(ValueError, match=message):
        run(folders / "random", tmp_path)
    assert not (tmp_path / "quickstart.json").exists()


@pytest.mark.parametrize(
    "flags", [("--steps", "0"), ("--seed", "-1"), ("--method", "magic")]
)
def test_wrong_flags_are_usage_errors(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        quickstart.main(["--output", str(tmp_path), *flags])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert "usage: python -m experiments.quickstart" in err and flags[0] in err


def test_a_model_that_does_not_load_is_one_line_of_error(folders, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for path in (tmp_path / "nowhere", empty, folders / "no_tokenizer", __file__):
        with pytest.raises(SystemExit) as caught:
            quickstart.main(["--model", str(path), "--output", str(tmp_path / "o")])
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and str(path) in line


def test_a_missing_package_is_one_line_of_error(tmp_path, monkeypatch, capsys):
    def missing():
        raise FileNotFoundError("smollm2_path needs the package. Install it.")

    monkeypatch.setattr(hf, "smollm2_path", missing)
    with pytest.raises(SystemExit) as caught:
        quickstart.main(["--output", str(tmp_path)])
    assert caught.value.code == 2
    expected = "error: smollm2_path needs the package. Install it.\n"
    assert capsys.readouterr().err == expected
