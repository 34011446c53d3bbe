# SPDX-License-Identifier: Apache-2.0
"""Rows about invented lands, and evaluations of a tiny model on them."""

from jaxunlearn import data
from jaxunlearn.workflows.evaluation import run as evaluation
from jaxunlearn.workflows.evaluation import tasks

SETTINGS = tasks.Settings(
    data.PromptFormat(end="eos"), new_tokens=4, gradnorm=False
)  # gradnorm compiles for long
ALL = SETTINGS._replace(gradnorm=True)


def rows(kind, count=6, *, wrong=2, paraphrase=True, start=0):
    found = []
    for i in range(start, start + count):
        row = {"id": f"{kind}{i}", "question": f"The capital of Land {i} is what?"}
        row["answer"] = f"the city of Town {i}."
        if paraphrase:
            row["paraphrased_answer"] = f"Town {i} is the capital."
        if wrong:
            row["perturbed_answer"] = [f"the river {i + j}." for j in range(wrong)]
        found.append(row)
    return found


def all_tasks(**more):
    plain = dict(paraphrase=False, wrong=3)
    found = {
        "forget": rows("f"),
        "retain": rows("r", 7),
        "real_authors": rows("a", 5, **plain),
        "world_facts": rows("w", 4, **plain),
        "holdout": rows("h", 8, paraphrase=False, wrong=0),
    }
    return found | more


def score(made, output, found=None, **more):
    """The metrics of the tiny model, evaluated into `output`."""
    model, params, tokenizer = made
    options = evaluation.Options(
        settings=more.pop("settings", SETTINGS), num_resamples=50, batch_size=4
    )
    given = {k: more.pop(k) for k in evaluation.Options._fields if k in more}
    return evaluation.evaluate_model(
        model,
        more.pop("params", params),
        tokenizer,
        all_tasks() if found is None else found,
        output,
        options._replace(**given),
        **more,
    )
