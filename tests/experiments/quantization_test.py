# SPDX-License-Identifier: Apache-2.0
"""Rounding unlearned models in a tiny world: what runs, and what the page says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from experiments.quantization import figures
from experiments.quantization import run as quantization
from experiments.shared import ledger
from experiments.small import methods, unlearn
from jaxunlearn import edits
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")
CONFIG = quantization.QuantizationConfig(
    rates=(1e-5, 1e-2),
    seeds=(0,),
    steps=12,
    batch_size=4,
    num_scored=dict(forget=8, retain=8),
    dtypes=("bfloat16",),
    group=32,
)
BUILDS = {name: quantization.RECIPES[name] for name in ("NPO + KL", "SURE NPO + KL")}


@pytest.fixture(scope="module")
def book(small_world, tmp_path_factory):
    """The ledger of a run in bfloat16, which includes what float32 does."""
    file = tmp_path_factory.mktemp("lines") / "quantization.jsonl"
    with jax.numpy_dtype_promotion("standard"):
        book = ledger.Ledger(file, ledger.head(CONFIG))
        quantization.run(small_world[1], book, CONFIG, BUILDS)
    return book


def test_every_method_runs_at_the_lowest_rate_that_forgets(book):
    for name in BUILDS:
        runs = [x for x in book.lines if x["method"] == name]
        assert {x["dtype"] for x in runs} == {"bfloat16"}
        swept = {x["rate"]: x for x in runs if not x["rounded"]}
        (rounded,) = [x for x in runs if x["rounded"]]
        rate, forgets = quantization.rate_of(book.lines, name, "bfloat16", CONFIG)
        assert rounded["rate"] == rate
        probability = {
            r: x["scores"]["full"]["forget_probability"] for r, x in swept.items()
        }
        assert probability[1e-5] > CONFIG.max_probability
        if forgets:
            assert probability[rate] <= CONFIG.max_probability
            assert rate == max(swept)  # no higher rate ran
        else:
            assert probability[rate] == min(probability.values())
        # The first seed gives what it gave in the sweep.
        again = rounded["scores"]["full"]["forget_probability"]
        assert_allclose(again, probability[rate], rtol=1e-5)
        assert list(rounded["scores"]) == list(figures.PRECISIONS)


def test_bfloat16_training_has_no_float32_masters(small_world):
    small = small_world[1]
    small = small._replace(params=quantization.cast(small.params, "bfloat16"))
    method = methods.of_recipe("x", BUILDS["NPO + KL"])
    tables = unlearn.tables(small)
    made = unlearn.runner(small, method, tables, steps=12, batch_size=4)
    params, _ = unlearn.run(made, rate=1e-2, seed=0)
    state = made.init(0)
    floats = [
        x.dtype
        for x in jax.tree.leaves((params, state.params, state.opt_state))
        if jnp.issubdtype(x.dtype, jnp.floating) and x.ndim
    ]
    assert set(floats) == {jnp.dtype(jnp.bfloat16)}
    # A step smaller than half the distance to the next number is lost.
    lost, _ = unlearn.run(made, rate=1e-7, seed=0)
    kernel = lost["blocks"]["mlp"]["up"]["kernel"]
    same = np.mean(kernel == small.params["blocks"]["mlp"]["up"]["kernel"])
    assert same > 0.99


def test_quantizers_are_those_of_the_library(small_world):
    small = small_world[1]
    found = quantization.quantizers(small, 32)
    assert list(found) == list(figures.PRECISIONS)
    kernel = ("blocks", "mlp", "down", "kernel")
    values = {name: function(small.params) for name, function in found.items()}
    for part in kernel:
        values = {name: tree[part] for name, tree in values.items()}
    assert values["full"] is small.params["blocks"]["mlp"]["down"]["kernel"]
    gaps = {
        name: float(jnp.linalg.norm(x - values["full"])) for name, x in values.items()
    }
    assert 0 < gaps["int8"] < gaps["int4"] < gaps["int4_tensor"] < gaps["int3"] * 2
    assert len(np.unique(values["int4_tensor"][0])) <= 16
    assert not np.array_equal(values["gptq4"], values["int4"])


def test_how_far_weights_moved_by_hand():
    w = jnp.arange(-7.0, 8.0)[:, None]  # steps of 1
    params = {"blocks": {"up": {"kernel": jnp.pad(w, ((0, 1), (0, 0)))[None]}}}
    shift = jnp.zeros((1, 16, 1)).at[0, :4, 0].set(jnp.array([0.4, 0.6, 1.0, -0.4]))
    after = jax.tree.map(lambda x: x + shift, params)
    found = quantization.moved(params, after, 16)
    assert_allclose([found["steps"], found["codes"]], [2.4 / 16, 2 / 16], rtol=1e-6)
    _, params = tiny.tiny_model()
    assert quantization.moved(params, params, 8) == {"steps": 0.0, "codes": 0.0}
    four = edits.quantize(params, "int4", group=8)
    assert quantization.moved(params, four, 8)["codes"] < 0.01


def line(method, dtype="float32", **rows):
    scores = {
        name: dict(forget_probability=np.mean(x), forget_exact=0.0, utility=0.5)
        for name, x in rows.items()
    }
    about = dict(rate=1e-3, finite=True, steps=0.1, codes=0.05, rounded=True)
    return about | dict(method=method, dtype=dtype, scores=scores, probabilities=rows)


def test_a_recovery_is_large_and_certain():
    before = [0.9] * 20
    full, small, lone = [0.0] * 20, [0.04] * 20, [0.0] * 19 + [1.0]
    large = np.linspace(0.1, 0.5, 20).tolist()
    lines = [line("original", **dict.fromkeys(("full", "int4"), before))]
    lines[0].pop("rounded")
    for values, recovered in (
        (large, True),
        (small, False),
        (lone, False),
        (full, False),
    ):
        row = figures.summarise([*lines, line("GA", full=full, int4=values)])[0]
        assert row["int4"]["recovered"] is recovered and row["forgets"]
        assert_allclose(row["int4"]["return"][0], np.mean(values), atol=1e-9)
        assert_allclose(row["int4"]["retained"], np.mean(values) / 0.9, atol=1e-9)


def test_the_page_says_what_sure_changes(book, small_world, tmp_path):
    about = ledger.plain(CONFIG._asdict()) | {"world": "w", "parameters": 1}
    figures.write(book.lines, about, tmp_path)
    assert (tmp_path / "results" / "small.png").stat().st_size > 5000
    text = (tmp_path / "README.md").read_text()
    assert "At 4 bits forgotten answers are recovered in" in text
    assert "- SURE NPO + KL, bfloat16" in text
