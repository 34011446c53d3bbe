# SPDX-License-Identifier: Apache-2.0
"""What the quickstart prints and plots."""

from pathlib import Path
from typing import Any

from experiments.quickstart import capitals
from experiments.shared import plot as plots
from jaxunlearn import evaluate
from jaxunlearn.data import capitals as facts

ROWS = (
    ("completion, seen wording", "greedy_seen"),
    ("completion, unseen wording", "greedy_unseen"),
    ("4-way choice, seen questions", "choice_seen"),
    ("4-way choice, unseen questions", "choice_unseen"),
)


def score_table(task: Any, before: dict, after: dict) -> str:
    """Accuracy before and after unlearning, over the facts that the model knew."""
    lines = ["", f"{'':34}{'before':>8}{'after':>8}"]
    titles = {"forget": "capitals of Europe", "retain": "other capitals"}
    for name, title in titles.items():
        lines.append(f"{name.upper()}: {len(task.facts[name])} {title}")
        lines += [
            f"  {label:32}{before[name][key]:8.2f}{after[name][key]:8.2f}"
            for label, key in ROWS
        ]
    first, second = before["prose_perplexity"], after["prose_perplexity"]
    lines += [f"{'perplexity of held-out prose':34}{first:8.2f}{second:8.2f}", ""]
    return "\n".join(lines)


def completions(model, params, tokenizer, task) -> list[tuple[str, str]]:
    """A few prompts with their greedy continuations."""
    phrasing = facts.phrasings("statement", "test")[0]
    chosen = [*task.facts["forget"][:3], *task.facts["retain"][:3]]
    prompts = [fact.prompt(phrasing) for fact in chosen]
    texts = evaluate.completions(  # with the program of capitals.completion_hits
        model,
        params,
        tokenizer,
        prompts,
        max_new_tokens=capitals.MAX_NEW_TOKENS,
        batch_size=capitals.BATCH_SIZE,
    )
    texts = [text.strip().replace("\n", " ") for text in texts]
    return list(zip(prompts, texts, strict=True))


def samples(rows: list[dict[str, str]]) -> str:
    """Each prompt with its continuation before and after unlearning."""
    lines = []
    for row in rows:
        lines += [f"{row['prompt']} ...", f"    before: {row['before']}"]
        lines.append(f"    after:  {row['after']}")
    return "\n".join([*lines, ""])


def attack(result: dict) -> str:
    """What relearning recovered, in two lines."""
    return (
        f"ATTACK: finetuning on {result['facts_trained']} forgotten capitals; "
        f"completion accuracy over the other {result['facts_evaluated']}:\n"
        f"  original {result['original']:.2f}, unlearned {result['unlearned']:.2f}, "
        f"after the attack {result['relearned']:.2f} "
        f"(over the trained half: {result['trained_half']:.2f})"
    )


def plot(result: dict, history: list[dict], path: Path) -> None:
    """Left: accuracy before and after unlearning. Right: the losses of every step."""
    colours = {
        "forget, before": "#f2b8b5",
        "forget, after": "#b3261e",
        "retain, before": "#a8c7fa",
        "retain, after": "#0b57d0",
    }
    series = {}
    for label in colours:
        name, when = label.split(", ")
        series[label] = [[result[when][name][key], 0.0] for _, key in ROWS]
    relearn, steps = result["relearn"], [entry["step"] for entry in history]
    with plots.saved(path, size=(11, 4.2), columns=2, dpi=130) as (_, grid):
        left, right = grid[0]
        names = [name.replace(", ", ",\n") for name, _ in ROWS]
        plots.bars(left, names, series, colours=list(colours.values()), rotation=0)
        for bars in left.containers[1::2]:
            left.bar_label(bars, fmt="%.2f", fontsize=7)
        left.set_ylim(0, 1.25)
        left.set_ylabel("accuracy over the known facts")
        left.legend(ncols=2, fontsize=8, loc="upper center", frameon=False)
        left.set_title(
            f"{result['method']}, seed {result['seed']}, {result['steps']} steps"
        )
        for key in history[0]:
            if key.endswith("/nll") or key == "forget/loss":
                right.plot(steps, [entry[key] for entry in history], label=key)
        right.set_xlabel("step")
        right.set_ylabel("nats")
        right.set_yscale("log")
        right.legend(fontsize=8, frameon=False)
        right.set_title(
            f"relearning: original {relearn['original']:.2f}, unlearned "
            f"{relearn['unlearned']:.2f}, after the attack {relearn['relearned']:.2f}",
            fontsize=9,
        )
