# SPDX-License-Identifier: Apache-2.0
"""MUSE's knowledge and verbatim memorisation of a model: rougeL_f1 of three tasks.

python -m jaxunlearn.workflows.evaluation.run --config=experiments/configs/muse.py:books \\
    --config.model=PATH --config.output=EVAL

Needs MUSE's files in the folder that --config.folder or JAXUNLEARN_DATA names.
Questions stand behind ten that are answered, 32 tokens are generated and cut at a blank
line or the next question; of passages 128 tokens are compared with the whole
continuation, as OpenUnlearning does (MUSE's own code cuts that to 128 tokens and does
not stem).
PrivLeak reads the texts in privleak/: metrics.mia_min_k of evaluate.token_scores.
"""

from jaxunlearn import _checks
from jaxunlearn.workflows.evaluation import run as evaluate

STOPS = ("\n\n", "\nQuestion", "Question:")


def get_config(corpus: str = "news"):
    c = evaluate.defaults()
    _checks.one_of("muse.py", ("news", "books"), corpus=corpus)
    muse = dict(source="benchmark", name="muse")
    score = dict(prompt="Question: {question}\nAnswer:", new_tokens=32, stops=STOPS)
    c.tasks = {
        f"{split}_knowmem": muse
        | dict(
            table=f"{corpus}/knowmem/{split}_qa",
            shots=f"{corpus}/knowmem/{split}_qa_icl",
            kind=split,
            score=score,
        )
        for split in ("forget", "retain")
    }
    c.tasks.forget_verbmem = muse | dict(
        table=f"{corpus}/verbmem/forget",
        columns=dict(question="prompt", answer="gt"),
        kind="forget",
        score=dict(new_tokens=128),
    )
    return c
