# SPDX-License-Identifier: Apache-2.0
"""SemEval-2025 Task 4 in the small world: memorise LUME, unlearn, the official score.

    python -m experiments.semeval.run --config=experiments/semeval/config.py

A small decoder memorises a few documents of every task of LUME, and a question of each
subject of MMLU. Each method then forgets the documents of the forget file, and the
official scorer judges it: regurgitation by ROUGE-L recall of what greedy decoding gives
for a cut text, knowledge by exact match, the harmonic mean of the twelve terms; the
area under the ROC curve of the whole documents' loss, forgotten ones against others
never seen; and MMLU. All three parts are always shown.

A decoder of this size knows nothing of MMLU, so its questions are memorised too and are
in no stream of any method: what is left of them says what else a method destroys, from
1 down to 1/4 by chance. The floor is three quarters of the score before unlearning, as
in the task. The completions' inputs are their last words (see the config).

Methods are those of the family that changes all weights (2503.04795 and the task's
baselines), and BLUR. Each runs at every rate of RATES on the first seed, then on all
seeds at the rate of the best final score above the floor, or of the best MMLU if none
is above it. `untouched`, `retrained` (never saw the forget file) and `collapsed` (all
logits equal) stand beside them.

One line of JSON a run, in `<output>/<world>.lume.jsonl`: stopped at any time, the same
command goes on. Writes results/lume_small.json, .md and .png; --draw only that.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

from experiments.comparison import run as compare
from experiments.semeval import figures as lume_figures
from experiments.small import methods, questions, score, unlearn, world
from jaxunlearn import combine, evaluate, losses, metrics, recipes, terms, trees
from jaxunlearn.data import table
from jaxunlearn.typing import Model, Params

RATES = (5e-4, 2e-3)
FLOOR = 0.75  # of MMLU before
RESULTS = Path(__file__).resolve().parent / "results" / "small"

OU, BLUR = recipes.openunlearning, recipes.blur
Build = Callable[..., recipes.Recipe]


class Plan(NamedTuple):
    """What is run, and how large; `new_tokens` are generated at most."""

    rates: Sequence[float] = RATES
    seeds: Sequence[int] = (0, 1, 2)
    steps: int = 30
    rows: int = 8
    new_tokens: int = 64


def in_turns(model: Model, *, learning_rate: Any, forget: int = 1, retain: int = 1):
    """`forget` steps of ascent, then `retain` steps on the rows to keep, again and
    again; one optimizer for both."""

    def now(step):
        return step % (forget + retain) < forget

    return _switched(model, learning_rate, now)


def in_sequence(model: Model, *, learning_rate: Any, first: int):
    """`first` steps of ascent, then steps on the rows to keep alone."""
    return _switched(model, learning_rate, lambda step: step < first)


def _switched(model, learning_rate, forgets):
    weights = {
        "forget": lambda step: jnp.where(forgets(step), 1.0, 0.0),
        "retain": lambda step: jnp.where(forgets(step), 0.0, 1.0),
    }
    parts = {
        name: terms.on_logps(loss, model, name, reduce="token")
        for name, loss in (("forget", losses.ascent), ("retain", losses.nll))
    }
    clip, adamw = (
        optax.clip_by_global_norm(1.0),
        optax.adamw(learning_rate, weight_decay=0.0),
    )
    tx = optax.chain(combine.weighted_sum(weights), clip, adamw)
    return recipes.Recipe(parts, tx)


def known(steps: int) -> Mapping[str, Build]:
    """Name -> recipe of (model, learning_rate=), for runs of so many steps."""
    return MappingProxyType(
        {
            "gradient ascent": OU.ascent,
            "gradient difference": OU.graddiff,
            "KL minimisation": partial(OU.graddiff, retain_loss="kl"),
            "NPO + NLL": OU.npo,
            "in turns, 1 and 1": in_turns,
            "in sequence, a third ascent": partial(in_sequence, first=steps // 3),
            "BLUR-NPO": BLUR.npo,
            "BLUR-GradDiff": BLUR.graddiff,
        }
    )


class Scorer(NamedTuple):
    """What is asked of every model.

    Attributes:
        small: the world.
        documents: kind -> whole completions, every token counted.
        mmlu: four answers of each question, one after another.
        right: [questions] which of the four is right.
        new_tokens: generated at most.
        floor: MMLU below which a model is not ranked.
    """

    small: world.World
    documents: Mapping[str, table.Table]
    mmlu: table.Table
    right: np.ndarray
    new_tokens: int
    floor: float


def scorer(small: world.World, new_tokens: int) -> Scorer:
    """The scorer of a world; the floor comes from its model before unlearning.

    Raises:
        ValueError: if the world is not of LUME.
    """
    if small.about["config"]["facts"]["source"] != "lume":
        raise ValueError(
            "small.lume needs a world of LUME, got "
            f"{small.about['config']['facts']['source']!r}. Take "
            "experiments/semeval/config.py."
        )
    length = small.about["length"]
    documents = {}
    for kind in ("forget", "holdout"):
        rows = [row for row in small.questions[kind] if row["kind"] == "sc"]
        whole = questions.encode(small.tokenizer, rows, length=length)
        documents[kind] = {**whole, "answer": whole["mask"]}
    asked, answers, right = [], [], []
    for index, row in enumerate(small.questions["other"]):
        options = list(row["perturbed_answer"])
        right.append(index % 4)
        options.insert(index % 4, row["answer"])
        asked += [row] * 4
        answers += options
    mmlu = questions.encode(small.tokenizer, asked, answers, length=length)
    made = Scorer(small, documents, mmlu, np.array(right), new_tokens, 0.0)
    return made._replace(floor=FLOOR * _mmlu(made, small.params))


def judge(made: Scorer, params: Params) -> metrics.SemEval:
    """All parts of the official score."""
    small, values, rows = made.small, [], []
    for split in ("forget", "retain"):
        own = small.questions[split]
        texts = evaluate.completions(
            small.model,
            params,
            small.tokenizer,
            [row["question"] for row in own],
            max_new_tokens=made.new_tokens,
        )
        texts, answers = [x.strip() for x in texts], [row["answer"] for row in own]
        recall = metrics.rouge(texts, answers, kinds="rougeL")["rougeL_recall"]
        exact = metrics.exact_match(texts, answers)
        kinds = np.array([row["kind"] for row in own])
        values.append(np.where(kinds == "sc", recall, exact))
        rows += [(split, row["task"], row["kind"]) for row in own]
    found = metrics.semeval_terms(np.concatenate(values), *zip(*rows, strict=True))
    seen, unseen = (
        _loss(small.model, params, made.documents[kind])
        for kind in ("forget", "holdout")
    )
    auc = metrics.auc(seen, unseen)
    return metrics.semeval(found, auc, _mmlu(made, params), floor=made.floor)


def _loss(model, params, rows) -> np.ndarray:
    """Mean loss of a token of each document, in nats to five digits, so that rounding
    in floats does not rank equal ones; NaN is the largest."""
    scores = evaluate.token_scores(model, params, rows, batch_size=score.BATCH)
    nll = np.asarray(metrics.mean_nll(scores.logps, where=scores.where), np.float64)
    return np.nan_to_num(nll.round(5), nan=1e9, posinf=1e9)


def _mmlu(made: Scorer, params: Params) -> float:
    chosen = score.chosen_options(made.small.model, params, made.mmlu, 4)
    return float((chosen == made.right).mean())


def collapsed(params: Params) -> Params:
    """Params whose every logit is 0, so that all tokens are as likely."""
    return trees.map_with_path(
        lambda path, x: jnp.zeros_like(x) if path == "final_norm/scale" else x, params
    )


def run(
    small: world.World, file: Path, *, plan: Plan | None = None, progress: bool = False
) -> list[compare.Line]:
    """All lines of the experiment, those that `file` lacks run now and added to it.

    Raises:
        ValueError: if the file is of another world or plan, or the world not of LUME.
    """
    plan = Plan() if plan is None else plan
    lines = compare.read(file, compare.sizes(small, plan))
    made, streams = scorer(small, plan.new_tokens), unlearn.forget_and_retain(small)
    if not file.exists():
        compare.add(file, compare.sizes(small, plan))
    bar = tqdm(disable=not progress, unit="run", dynamic_ncols=True, file=sys.stderr)

    def add(key, params, **about):
        lines.append({"key": key, **about, **plain(judge(made, params))})
        compare.add(file, lines[-1])
        bar.update()

    def lacks(key):
        bar.set_postfix_str(key)
        return all(line["key"] != key for line in lines)

    for name, params in (
        ("untouched", small.params),
        ("retrained", small.retrained),
        ("collapsed", collapsed(small.params)),
    ):
        if lacks(name):
            add(name, params, method=name)
    runners: dict[str, unlearn.Runner] = {}
    for seed in plan.seeds:
        for name, build in known(plan.steps).items():
            rates = plan.rates if seed == plan.seeds[0] else (best(lines, name, plan),)
            for rate in rates:
                key = f"{name} {rate:.3g} {seed}"
                if not lacks(key):
                    continue
                if name not in runners:
                    method = methods.Method(name, 0.0, compare.at_rate(build))
                    sizes = dict(steps=plan.steps, batch_size=plan.rows)
                    runners[name] = unlearn.runner(small, method, streams, **sizes)
                params, about = unlearn.run(runners[name], rate=rate, seed=seed)
                add(key, params, method=name, rate=rate, seed=seed, **about)
    bar.close()
    return lines


def plain(found: metrics.SemEval) -> dict[str, Any]:
    """For JSON: the twelve terms by "split task kind"."""
    whole = found._asdict()
    return whole | {"terms": {" ".join(key): x for key, x in found.terms.items()}}


def best(lines: Sequence[compare.Line], name: str, plan: Plan) -> float:
    """The rate of the best final score above the floor on the first seed, or of the
    best MMLU if none is; the lower of equals."""
    own = [
        line
        for line in lines
        if line["method"] == name and line.get("seed") == plan.seeds[0]
    ]
    ranked = [line for line in own if not line["below_floor"]]
    measure = "final" if ranked else "mmlu"
    own = sorted(ranked or own, key=lambda line: line["rate"])
    return max(own, key=lambda line: line[measure])["rate"]


def main(argv: list[str]) -> None:
    """Runs what is missing, then writes lume_small.json, .md and .png."""
    del argv
    config, plan = flags.FLAGS.config, Plan()
    try:
        small = world.make(config, progress=True)
        file = Path(config.output).expanduser() / f"{small.digest}.lume.jsonl"
        if flags.FLAGS.draw:
            lines = compare.read(file, compare.sizes(small, plan))
        else:
            lines = run(small, file, plan=plan, progress=True)
        about = compare.sizes(small, plan) | compare.provenance(small)
        counts = {kind: len(rows) for kind, rows in small.questions.items()}
        about |= {"questions": counts, "facts": small.about["config"]["facts"]}
        lume_figures.write(lines, about, RESULTS)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"Wrote {RESULTS}.json, .md and .png")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a file of configs/small")
    flags.DEFINE_bool("draw", False, "only write the figures")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
