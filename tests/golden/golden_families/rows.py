# SPDX-License-Identifier: Apache-2.0
"""Texts to rows of tokens and labels, and rows to a padded table. On the host."""

import numpy as np

from golden_families import openunlearning, reading


class Characters:
    """One token per character, its code point; 1 begins a text, 2 ends it."""

    eos_token_id = 2

    def __call__(self, text, *, truncation=False, max_length=None):
        ids = [1, *map(ord, text)]
        return {"input_ids": ids[:max_length] if truncation else ids}


def chat(case, x):
    """The first turn, all turns, all turns as a prompt, the first turn truncated."""
    given = case["hyperparameters"]
    questions, answers = case["text"]["questions"], case["text"]["answers"]

    def row(questions, answers, **how):
        template = given["template"]
        tokenizer = Characters()
        return openunlearning.chat(
            tokenizer, questions, answers, template=template, **how
        )

    made = {
        "train": row(questions[:1], answers[:1]),
        "train_fewshot": row(questions, answers),
        "generate": row(questions, answers, generate=True),
        "truncated": row(
            questions[:1], answers[:1], length=given["truncated_max_length"]
        ),
    }
    return _outputs(made)


def pretraining(case, x):
    """One row for each entry of the hyperparameters."""
    made = {}
    for name, how in case["hyperparameters"].items():
        made[name] = openunlearning.document(
            Characters(),
            case["text"]["text"],
            prefix=how.get("prefix", case["text"]["prefix"]),
            length=how["max_length"],
            insert_space=how.get("insert_space", False),
            generate=how.get("predict_with_generate", False),
        )
    return _outputs(made)


def collator(case, x):
    """Padded on either side, with label -100 at padding."""
    count = sum(name.endswith("_input_ids") for name in x)
    rows = [
        {name: x[f"item{i}_{name}"] for name in ("input_ids", "labels")}
        for i in range(count)
    ]
    pad_id = case["hyperparameters"]["pad_token_id"]
    found = {}
    for side in openunlearning.PADS:
        table = openunlearning.collate(rows, pad_id=pad_id, pad=side, hide_pad_id=True)
        labels = np.where(table["answer"], table["tokens"], reading.IGNORE)
        found |= {
            f"{side}_input_ids": table["tokens"],
            f"{side}_attention_mask": table["mask"],
            f"{side}_labels": labels,
            f"{side}_index": np.arange(count),
        }
    return found


def _outputs(made):
    return {
        f"{name}_{part}": x for name, row in made.items() for part, x in row.items()
    }
