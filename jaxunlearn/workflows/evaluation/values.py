# SPDX-License-Identifier: Apache-2.0
"""What one model says of one task: one pass over all answers, one generation.

Every value is of a row; what could not be measured is NaN. Keys of a row:

* id, prompt, answer, tokens (of the answer);
* nll (nats a token), probability, perplexity; exact_memorization,
  extraction_strength;
* paraphrased_nll, wrong_nll (a list), truth_ratio, truth_score (`truth_score` of the
  kind), normalised_probability: where there are wrong answers;
* accuracy: where there are choices, by log-probability a token; calibrated_accuracy:
  the same less each choice's mean, where all rows have the same, such as letters;
* completion, rouge1_recall, rougeL_recall, rougeL_f1, and what judges say of the
  completion: where answers are generated;
* mia_loss, mia_zlib, mia_min_k, mia_min_k_plus_plus, mia_gradnorm: of rows to forget
  and of the holdout. Reference, the sixth attack, compares nll with another model's and
  is worked out in `summary`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxunlearn import evaluate, metrics, terms, trees
from jaxunlearn.data import table
from jaxunlearn.evaluate import TokenScores
from jaxunlearn.typing import Model, Params
from jaxunlearn.workflows.evaluation import tasks

WIDTHS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024)
ATTACKED = ("forget", "holdout")
EPS = {"": 0.0, "openunlearning": 1e-10}
SHOWN = 20  # rows whose tokens are kept

Judge = Callable[[Sequence[str]], Sequence[float]]  # generated texts to numbers


def of_task(
    model: Model,
    params: Params,
    tokenizer: Any,
    task: tasks.Task,
    kept: tasks.Kept,
    settings: tasks.Settings,
    *,
    judges: Mapping[str, Judge] | None = None,
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a dict of values for every kept row, the tokens of the first to forget).

    Args:
        model, params: who is asked.
        tokenizer: the model's.
        task: whose questions.
        kept: `tasks.fit` of it.
        settings: as there.
        judges: column -> a function of all generated texts that gives a number each,
            such as a classifier's probability that a text is no gibberish.
        batch_size: rows at a time.
        mesh: where the params lie, if they do on one.
    Returns:
        Rows in the order of `kept`, as this module describes them; and, for a task to
        forget, {"id", "prompt", "tokens", "logps"} of SHOWN rows at most.
    """
    scores = column_scores(model, params, kept.tables, batch_size, mesh)
    right = scores["answer"]
    found = _of_answer(right, settings)
    found |= _of_others(scores, found["nll"], task.kind, settings)
    if "choices/0" in scores:
        found |= _accuracy(scores, kept.rows)
    if task.kind in ATTACKED:
        found |= _attacks(right, found["nll"], kept.rows, settings)
        if settings.gradnorm:
            own = kept.tables["answer"]
            found["mia_gradnorm"] = gradnorms(model, params, own, settings)
    prompts = tasks.prompts(kept.rows, tokenizer, settings)
    found = {name: np.asarray(x, np.float64).tolist() for name, x in found.items()}
    found["tokens"] = right.where.sum(1).tolist()
    if tasks.generates(task, settings):
        found |= _generated(
            model, params, tokenizer, prompts, kept.rows, settings, batch_size, mesh
        )
        for name, judge in (judges or {}).items():
            found[name] = _judged(name, judge, found["completion"])
    rows = [
        {"id": row["id"], "prompt": prompt, "answer": row["answer"]}
        | {name: values[i] for name, values in found.items()}
        for i, (row, prompt) in enumerate(zip(kept.rows, prompts, strict=True))
    ]
    shown = _shown(tokenizer, kept, right, prompts) if task.kind == "forget" else []
    return rows, shown


def gradnorms(
    model: Model, params: Params, rows: table.Table, settings: tasks.Settings
) -> np.ndarray:
    """[n] float32, `mia_gradnorm` of every row, one gradient in memory at a time."""
    stacked = r"blocks/.*"
    if not any(path.startswith("blocks/") for path in trees.paths(params)):
        stacked = None  # no layers in one leaf
    last = settings.compat == "openunlearning"
    found = np.zeros(len(rows["tokens"]), np.float32)
    for index, width in _buckets(rows["mask"].sum(1), 1, rows["mask"].shape[1]):
        cut = {name: np.asarray(x)[index, None, :width] for name, x in rows.items()}
        found[index] = np.asarray(_gradnorms(params, cut, model, stacked, last))
    return found


@partial(jax.jit, static_argnums=(2, 3, 4))
def _gradnorms(params, batch, model, stacked, last):
    def loss(params, row):
        logps, where = terms.target_logps(model, params, row)
        where = metrics.drop_last(where) if last else where
        return metrics.mean_nll(logps, where=where)[0]

    def one(row):
        return metrics.mia_gradnorm(jax.grad(loss)(params, row), stacked=stacked)

    return jax.lax.map(one, batch)


def column_scores(
    model: Model,
    params: Params,
    tables: Mapping[str, table.Table],
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> dict[str, TokenScores]:
    """`evaluate.token_scores` of every column, rows of like length together.

    Args:
        model, params: who is asked.
        tables: column -> table, all of one shape.
        batch_size: rows at a time.
        mesh: where the params lie, if they do on one.
    """
    joined = table.concat(list(tables.values()))
    count, length = joined["tokens"].shape
    out = [np.zeros((count, length - 1), x) for x in (float, bool, float, bool)]
    for index, width in _buckets(joined["mask"].sum(1), batch_size, length):
        cut = {name: x[index, :width] for name, x in joined.items()}
        found = evaluate.token_scores(
            model, params, cut, batch_size=batch_size, mesh=mesh
        )
        for whole, part in zip(out, found, strict=True):
            whole[index, : width - 1] = part
    parts = zip(*(np.split(x, len(tables)) for x in out), strict=True)
    return {name: TokenScores(*part) for name, part in zip(tables, parts, strict=True)}


def _buckets(lengths, batch: int, most: int):
    """(rows, width) of rows of like length: whole batches of the sorted rows, so that
    only the last one of all is filled up; few widths, so that little is compiled."""
    order = np.argsort(lengths, kind="stable")
    widths = [*(width for width in WIDTHS if width < most), most]
    found: dict[int, list[np.ndarray]] = {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        width = widths[int(np.searchsorted(widths, lengths[rows[-1]]))]
        found.setdefault(width, []).append(rows)
    return [(np.concatenate(rows), width) for width, rows in found.items()]


def _of_answer(right: TokenScores, settings) -> dict[str, Any]:
    compat = settings.compat or None
    where = _counted(right, settings)
    nll = metrics.mean_nll(right.logps, where=right.where)
    return {
        "nll": nll,
        "probability": metrics.probability(right.logps, where=right.where),
        "perplexity": np.exp(np.asarray(nll, np.float64)),
        "exact_memorization": metrics.exact_memorization(right.hits, where=where),
        "extraction_strength": metrics.extraction_strength(
            right.hits, where=where, compat=compat
        ),
    }


def _of_others(scores, nll, kind, settings) -> dict[str, Any]:
    """What the paraphrase and the wrong answers say."""
    each = {
        name: metrics.mean_nll(x.logps, where=x.where) for name, x in scores.items()
    }
    other = each.get("paraphrased_answer", nll)
    found = {"paraphrased_nll": other} if "paraphrased_answer" in each else {}
    wrong = [x for name, x in each.items() if name.startswith("perturbed_answer/")]
    if not wrong:
        return found
    eps = EPS[settings.compat]
    better = "closer_to_1_better" if kind == "forget" else "true_better"
    with jax.enable_x64(True):
        wrong = np.stack(wrong, -1).astype(np.float64)
        ratio = metrics.truth_ratio(np.asarray(other, np.float64), wrong, eps=eps)
        return found | {
            "wrong_nll": wrong,
            "truth_ratio": np.asarray(ratio),
            "truth_score": np.asarray(
                metrics.truth_score(ratio, better=better, eps=eps)
            ),
            "normalised_probability": np.asarray(
                metrics.probability_with_options(
                    np.asarray(nll, np.float64), wrong, eps=eps
                )
            ),
        }


def _judged(name: str, judge: Judge, texts: Sequence[str]) -> list[float]:
    said = np.asarray(judge(list(texts)), np.float64)
    if said.shape != (len(texts),):
        raise ValueError(
            f"The judge {name!r} needs to give a number a text, got shape {said.shape} "
            f"for {len(texts)} texts."
        )
    return said.tolist()


def _accuracy(scores, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    options = [x for name, x in scores.items() if name.startswith("choices/")]
    mean = np.stack(
        [-np.asarray(metrics.mean_nll(x.logps, where=x.where)) for x in options], -1
    )
    labels = np.asarray([row["choices"].index(row["answer"]) for row in rows])
    found = {"accuracy": metrics.choice_accuracy(mean, labels)}
    if all(row["choices"] == rows[0]["choices"] for row in rows):
        calibrated = metrics.choice_accuracy(mean, labels, calibrated=True)
        found["calibrated_accuracy"] = calibrated
    return found


def _attacks(right: TokenScores, nll, rows, settings) -> dict[str, Any]:
    where = _counted(right, settings)
    lengths = metrics.zlib_lengths([row["answer"] for row in rows])
    return {
        "mia_loss": metrics.mia_loss(right.logps, where=right.where),
        "mia_zlib": metrics.mia_zlib(nll, lengths),
        "mia_min_k": metrics.mia_min_k(right.logps, where=where),
        "mia_min_k_plus_plus": metrics.mia_min_k(right.standardised, where=where),
    }


def _counted(right: TokenScores, settings):
    if settings.compat == "openunlearning":
        return np.asarray(metrics.drop_last(right.where))
    return right.where


def _generated(model, params, tokenizer, prompts, rows, settings, batch_size, mesh):
    texts = evaluate.completions(
        model,
        params,
        tokenizer,
        prompts,
        max_new_tokens=settings.new_tokens,
        batch_size=batch_size,
        mesh=mesh,
    )
    texts = [metrics.truncate_at_stop(text, settings.stops) for text in texts]
    rouge = metrics.rouge(texts, [row["answer"] for row in rows])
    kinds = ("rouge1_recall", "rougeL_recall", "rougeL_f1")
    return {"completion": texts} | {kind: rouge[kind].tolist() for kind in kinds}


def _shown(tokenizer, kept, right: TokenScores, prompts) -> list[dict[str, Any]]:
    """Tokens of the first answers with what each is worth."""
    found = []
    for i in range(min(SHOWN, len(kept.rows))):
        where = right.where[i]
        ids = np.asarray(kept.tables["answer"]["tokens"][i])
        ids = np.pad(ids, (0, max(0, len(where) + 1 - len(ids))))[1 : len(where) + 1]
        found.append(
            {
                "id": kept.rows[i]["id"],
                "prompt": prompts[i],
                "tokens": [tokenizer.decode([int(x)]) for x in ids[where]],
                "logps": right.logps[i][where].tolist(),
            }
        )
    return found
