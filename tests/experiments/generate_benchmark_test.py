# SPDX-License-Identifier: Apache-2.0
"""The benchmark of generation and scoring compares the same work, on a tiny model."""

import json

import numpy as np
import pytest

from experiments.benchmarks import generate
from jaxunlearn.data import prose
from jaxunlearn.io import hf
from tests import tiny


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The benchmark's rows, few and short, for a tiny model."""
    tokenizer = tiny.tiny_tokenizer([prose.prose()[1]], vocab=600)
    model, params = tiny.tiny_model(vocab=len(tokenizer), positions=400)
    hf.save(model, params, tmp_path / "tiny", tokenizer=tokenizer)
    for name, value in dict(
        PROMPTS=6, MAX_NEW_TOKENS=5, ANSWERS=11, BATCH_SIZE=4
    ).items():
        monkeypatch.setattr(generate, name, value)
    generate.prepare(tmp_path, str(tmp_path / "tiny"))
    return tmp_path


@pytest.mark.slow
def test_both_libraries_get_the_same_rows_and_give_the_same(folder, capsys):
    pytest.importorskip("torch")
    runs = {}
    for variant, measure in (
        ("jaxunlearn", generate._jax),
        ("transformers", generate._torch),
    ):
        measure(folder, 1)
        runs[variant] = [json.loads(capsys.readouterr().out.splitlines()[-1])]
    ours = {"generate", "score", "generate, float32", "score, float32"}
    assert set(runs["jaxunlearn"][0]) == ours
    assert len(runs["transformers"][0]) == 10
    pair = [generate.read(folder, variant) for variant in runs]
    assert pair[0]["generate"].shape == (6, 5) and pair[0]["score"].shape == (11,)
    np.testing.assert_allclose(pair[0]["score"], pair[1]["score"], rtol=1e-4)
    found = generate.summary(runs, *pair)
    assert found["same"]["positions"] == 1.0
    assert found["same"]["largest_gap_of_answer_logps_nats"] < 1e-2
    assert 0 < found["auto"]["until_first_difference"] <= found["auto"]["positions"]
    assert found["auto"]["median_gap_of_answer_logps_nats"] < 0.1


def test_rows_have_the_lengths_of_the_docstring(folder, monkeypatch):
    found = generate.shapes(folder)
    assert found["prompts"] == 6 and found["answers"] == 11
    assert generate.MIN_LENGTH <= found["prompt_tokens"][0]
    assert found["prompt_tokens"][2] <= generate.MAX_LENGTH
    saved = np.load(folder / "rows.npz")
    assert saved["prompt_mask"][:, -1].all()  # padded on the left
    assert saved["row_mask"][:, 0].all() and not saved["row_answer"][:, 0].any()
    assert found["answer_tokens"] == saved["row_answer"].sum()
    monkeypatch.setattr(generate, "PROMPTS", 10**6)
    with pytest.raises(ValueError, match="1000000 prompts"):
        generate.prepare(folder, str(folder / "tiny"))


def test_medians_are_compared_with_the_fastest_and_differences_counted():
    def times(*seconds):
        return {"first_seconds": 9.0, "seconds": list(seconds)}

    runs = {
        "jaxunlearn": [
            {"generate": times(1.0, 2.0), "score": times(2.0)},
            {"generate": times(3.0), "score": times(4.0)},
        ],
        "transformers": [
            {
                "generate, 4 at a time": times(8.0),
                "generate, 2 at a time": times(5.0),
                "score, 2 at a time": times(6.0),
            }
        ],
    }
    ours = {"generate": np.arange(8).reshape(2, 4), "score": np.array([-1.0, -2.0])}
    theirs = {"generate": ours["generate"].copy(), "score": np.array([-1.0, -2.5])}
    theirs["generate"][1, 2] = 99
    found = generate.summary(runs, ours, theirs)
    assert found["ratios"]["generate"]["ratio"] == 2.5
    assert found["ratios"]["generate"]["compared_with"].endswith(
        "generate, 2 at a time"
    )
    assert found["ratios"]["score"]["ratio"] == 2.0
    assert found["same"] == {
        "positions": 7 / 8,
        "rows": 0.5,
        "until_first_difference": 6 / 8,
        "largest_gap_of_answer_logps_nats": 0.5,
    }
    met = {name: bar["met"] for name, bar in found["bars"].items()}
    assert met == {"generate": True, "score": True, "same": False}
    assert found["tokens_per_second"]["jaxunlearn: generate"] == 4.0
    rows = dict(prompts=2, prompt_tokens=[1, 2, 3], new_tokens=4, answers=2)
    rows |= dict(row_tokens=[1, 2, 3], answer_tokens=60)
    about = {"rows": rows, "model": "tiny", "cores": 2, "versions": {}, "command": "x"}
    text = "\n".join(generate.in_words(found | about))
    assert "| jaxunlearn: score | 3.00 | 2 | 9.00 | 20 |" in text
    assert "of all positions | 0.99 | 0.8750 | not met |" in text
    assert "compared with ours in float32" not in text
