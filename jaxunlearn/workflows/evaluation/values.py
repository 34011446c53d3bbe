# SPDX-License-Identifier: Apache-2.0
"""The values of every row of a task: one teacher-forced pass over all answers, and one
generation.

A value that could not be measured is NaN. The keys of a row are:

* id, prompt, answer, and tokens (number of tokens of the answer);
* end_nll (nats, summed over the tokens of the end that the format puts after an
  answer), if it puts one;
* nll (nats for each token, the end included), probability, perplexity,
  exact_memorization, extraction_strength;
* paraphrased_nll, wrong_nll (a list), truth_ratio, truth_score (`truth_score` for the
  task's kind), normalised_probability, if the row has wrong answers;
* accuracy, if the row has choices: by the mean log-probability of a token;
  calibrated_accuracy, if all rows have the same choices, such as letters: each choice's
  mean over the rows is subtracted first;
* completion, rouge1_recall, rougeL_recall, rougeL_f1, and the scores of judges, if
  answers are generated;
* mia_loss, mia_zlib, mia_min_k, mia_min_k_plus_plus, mia_gradnorm, for forget and
  holdout rows. The sixth attack, Reference, compares nll with that of another model and
  is computed in `summary`.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxunlearn import _checks, _packed, data, evaluate, metrics, terms, trees
from jaxunlearn._ahead import one_behind
from jaxunlearn.data import table
from jaxunlearn.evaluate import TokenScores
from jaxunlearn.typing import Model, Params
from jaxunlearn.workflows.evaluation import tasks

WIDTHS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024)
ATTACKED = ("forget", "holdout")
EPS = {"": 0.0, "openunlearning": 1e-10}
MAX_END_NLL = 3.0  # nats; a larger mean gives a warning
MAX_TOKEN_ROWS = 20  # rows whose tokens are stored

Judge = Callable[[Sequence[str]], Sequence[float]]  # generated texts to numbers


def of_task(
    model: Model,
    params: Params,
    tokenizer: Any,
    task: tasks.Task,
    encoded: tasks.EncodedTask,
    settings: tasks.Settings,
    *,
    judges: Mapping[str, Judge] | None = None,
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the values of every row, the tokens of the first rows of a forget task).

    Args:
        model, params: the model to evaluate.
        tokenizer: its tokenizer.
        task: the task.
        encoded: `tasks.encode` of it.
        settings: the task's settings.
        judges: column -> a function from all generated texts to one number each, such
            as a classifier's probability that a text is fluent.
        batch_size: number of rows in a batch.
        mesh: the mesh of the params, if they are on one.
    Returns:
        The rows in order, with the keys of this module's description; and, for a forget
        task, {"id", "prompt", "tokens", "logps"} of at most MAX_TOKEN_ROWS rows.
    """
    scores = column_scores(model, params, encoded.tables, batch_size, mesh)
    right = scores["answer"]
    found = _answer_values(right, settings)
    found |= _end_values(right, encoded.end, task.name)
    found |= _alternative_values(scores, found["nll"], task.kind, settings)
    if "choices/0" in scores:
        found |= _accuracy(scores, encoded.rows)
    if task.kind in ATTACKED:
        found |= _membership(right, found["nll"], encoded.rows, settings)
        if settings.gradnorm:
            table_ = encoded.tables["answer"]
            found["mia_gradnorm"] = gradnorms(model, params, table_, settings)
    questions = [row["question"] for row in encoded.rows]
    rendered = data.render(tokenizer, questions, prompt_format=settings.prompt_format)
    prompts = [row.prompt for row in rendered]
    found = {name: np.asarray(x, np.float64).tolist() for name, x in found.items()}
    found["tokens"] = right.where.sum(1).tolist()
    if tasks.generates(task, settings):
        found |= _generated(
            model, params, tokenizer, encoded.rows, settings, batch_size, mesh
        )
        for name, judge in (judges or {}).items():
            found[name] = _judged(name, judge, found["completion"])
    rows = [
        {"id": row["id"], "prompt": prompt, "answer": row["answer"]}
        | {name: values[i] for name, values in found.items()}
        for i, (row, prompt) in enumerate(zip(encoded.rows, prompts, strict=True))
    ]
    if task.kind != "forget":
        return rows, []
    return rows, _answer_tokens(tokenizer, encoded, right, prompts)


def gradnorms(
    model: Model, params: Params, rows: table.Table, settings: tasks.Settings
) -> np.ndarray:
    """`mia_gradnorm` of every row, [n] float32; one gradient is in memory at a time."""
    stacked = r"blocks/.*"
    if not any(path.startswith("blocks/") for path in trees.paths(params)):
        stacked = None  # the model's layers are not stacked in one leaf
    drop_last = settings.compat == "openunlearning"
    found = np.zeros(len(rows["tokens"]), np.float32)

    def started(place):
        i, width = place
        row = {name: np.asarray(x)[i : i + 1, :width] for name, x in rows.items()}
        return i, _gradnorm(params, row, model, stacked, drop_last)

    buckets = _buckets(rows["mask"].sum(1), 1, rows["mask"].shape[1])
    places = [(i, width) for index, width in buckets for i in index]
    for i, norm in one_behind(map(started, places)):
        found[i] = norm
    return found


@partial(jax.jit, static_argnums=(2, 3, 4))
def _gradnorm(params, row, model, stacked, drop_last):
    def loss(params):
        logps, where = terms.target_logps(model, params, row)
        where = metrics.drop_last(where) if drop_last else where
        return metrics.mean_nll(logps, where=where)[0]

    return metrics.mia_gradnorm(jax.grad(loss)(params), stacked=stacked)


def column_scores(
    model: Model,
    params: Params,
    tables: Mapping[str, table.Table],
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> dict[str, TokenScores]:
    """`evaluate.token_scores` of every column; answers to one prompt share its tokens.

    Rows that cannot be packed are run in batches of similar length.

    Args:
        model, params: the model to evaluate.
        tables: column -> table, all of one shape.
        batch_size: number of rows in a batch.
        mesh: the mesh of the params, if they are on one.
    Raises:
        ValueError: naming the column and its row, for token ids outside the model's
            vocabulary.
    """
    for name, each in tables.items():  # before the rows are sorted
        _checks.token_ids(f"The column {name!r}", model, each)
    joined = table.concat(list(tables.values()))
    settings = dict(batch_size=batch_size, mesh=mesh)
    if mesh is None and _packed.supports(model, joined):
        whole = evaluate.token_scores(model, params, joined, **settings)
        parts = zip(*(np.split(x, len(tables)) for x in whole), strict=True)
        return {
            name: TokenScores(*part) for name, part in zip(tables, parts, strict=True)
        }
    count, length = joined["tokens"].shape
    out = [np.zeros((count, length - 1), x) for x in (float, bool, float, bool)]
    for index, width in _buckets(joined["mask"].sum(1), batch_size, length):
        part = {name: x[index, :width] for name, x in joined.items()}
        found = evaluate.token_scores(
            model, params, part, batch_size=batch_size, mesh=mesh
        )
        for all_rows, values in zip(out, found, strict=True):
            all_rows[index, : width - 1] = values
    parts = zip(*(np.split(x, len(tables)) for x in out), strict=True)
    return {name: TokenScores(*part) for name, part in zip(tables, parts, strict=True)}


def _buckets(lengths, batch_size: int, max_width: int):
    """(rows, width) pairs: rows sorted by length, in full batches of few widths.

    Only the last batch is padded with rows. Few widths mean few compilations.
    """
    order = np.argsort(lengths, kind="stable")
    widths = [*(width for width in WIDTHS if width < max_width), max_width]
    found: dict[int, list[np.ndarray]] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = widths[int(np.searchsorted(widths, lengths[rows[-1]]))]
        found.setdefault(width, []).append(rows)
    return [(np.concatenate(rows), width) for width, rows in found.items()]


def _answer_values(right: TokenScores, settings) -> dict[str, Any]:
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


def _end_values(right: TokenScores, end, task: str) -> dict[str, Any]:
    """The negative log-probability of the end of each answer, if there is one.

    Warns:
        UserWarning: if the ends alone cost several nats; the model was then not trained
            to write them.
    """
    counted = right.where & end[:, 1:]
    if not counted.any():
        return {}
    nll = -np.where(counted, right.logps, 0.0).sum(1)
    if nll.mean() > MAX_END_NLL:
        total = -np.where(right.where, right.logps, 0.0).sum(1).mean()
        warnings.warn(
            f"The task {task!r}: the end token alone costs {nll.mean():.1f} nats, of "
            f"{total:.1f} for the answer with its end (means over the rows). The model "
            "was not trained with this end. Set `end` of the prompt format to the end "
            "of its training, or to '' to score answers without one.",
            stacklevel=3,
        )
    return {"end_nll": nll}


def _alternative_values(scores, nll, kind, settings) -> dict[str, Any]:
    """Values that need the paraphrased and the wrong answers."""
    nlls = {
        name: metrics.mean_nll(x.logps, where=x.where) for name, x in scores.items()
    }
    other = nlls.get("paraphrased_answer", nll)
    found = {"paraphrased_nll": other} if "paraphrased_answer" in nlls else {}
    wrong = [x for name, x in nlls.items() if name.startswith("perturbed_answer/")]
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
    scores = np.asarray(judge(list(texts)), np.float64)
    if scores.shape != (len(texts),):
        raise ValueError(
            f"The judge {name!r} needs to return one number for each text, got shape "
            f"{scores.shape} for {len(texts)} texts."
        )
    return scores.tolist()


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


def _membership(right: TokenScores, nll, rows, settings) -> dict[str, Any]:
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


def _generated(model, params, tokenizer, rows, settings, batch_size, mesh):
    metrics.truncate_at_stop("", settings.stops)  # refuses them before the generation
    texts = evaluate.completions(
        model,
        params,
        tokenizer,
        [row["question"] for row in rows],
        prompt_format=settings.prompt_format,
        max_new_tokens=settings.new_tokens,
        batch_size=batch_size,
        mesh=mesh,
    )
    texts = [metrics.truncate_at_stop(text, settings.stops) for text in texts]
    rouge = metrics.rouge(
        texts,
        [row["answer"] for row in rows],
        tokenizer="ascii" if settings.compat == "openunlearning" else "unicode",
    )
    kinds = ("rouge1_recall", "rougeL_recall", "rougeL_f1")
    return {"completion": texts} | {kind: rouge[kind].tolist() for kind in kinds}


def _answer_tokens(tokenizer, encoded, right: TokenScores, prompts):
    """The tokens of the first answers with their log-probabilities."""
    found = []
    for i in range(min(MAX_TOKEN_ROWS, len(encoded.rows))):
        where = right.where[i]
        ids = np.asarray(encoded.tables["answer"]["tokens"][i])
        ids = np.pad(ids, (0, max(0, len(where) + 1 - len(ids))))[1 : len(where) + 1]
        found.append(
            {
                "id": encoded.rows[i]["id"],
                "prompt": prompts[i],
                "tokens": token_texts(tokenizer, ids[where].tolist()),
                "logps": right.logps[i][where].tolist(),
            }
        )
    return found


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds; together they are the text of all.

    A character may be split over several tokens, as in byte-level tokenizers. Its last
    token then has the character, and the others have no text.
    """
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        complete = end == len(ids) or not text.endswith("\ufffd")
        found.append(text[len(before) :] if complete else "")
        before = text if complete else before
    return found
