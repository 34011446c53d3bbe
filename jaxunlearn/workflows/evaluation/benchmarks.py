# SPDX-License-Identifier: Apache-2.0
"""The tasks of benchmarks, by name: TOFU, MUSE, MMLU and WMDP.

    sources.read(benchmarks.tasks("tofu:05"), folder)

| name | tasks |
| --- | --- |
| `tofu:10`, `tofu:05`, `tofu:01` | TOFU's five tables; together they give its numbers |
| `muse:news`, `muse:books` | knowledge and verbatim memorisation, `rougeL_f1` |
| `mmlu` | accuracy by letters, plain and calibrated |
| `wmdp` | the same for bio, chem and cyber |

Files are read from the folder that holds `tofu/`, `muse/` and so on.
"""

from collections.abc import Mapping
from typing import Any

from jaxunlearn import _checks, data

MUSE_STOPS = ("\n\n", "\nQuestion", "Question:")
QUESTION = "Question: {question}\nAnswer:"
# Complete, so that nothing of another format remains.
QA_FORMAT = data.PromptFormat(prompt=QUESTION, end="eos").as_dict()
PASSAGE_FORMAT = data.PromptFormat(end="eos").as_dict()
LETTER_FORMAT = data.PromptFormat(end="").as_dict()


def tasks(
    name: str, prompt_format: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """The tasks of a benchmark, as evaluation.sources.read takes them.

    Args:
        name: "tofu", "muse", "mmlu" or "wmdp"; for the first two optionally with a
            part, such as "tofu:05". The parts "10" and "news" are the defaults.
        prompt_format: fields of data.PromptFormat that replace those of the benchmark's
            questions, if they are not the usual ones; passages and letters stay as they
            are. With a chat, wording and end are those of a chat.
    Raises:
        ValueError: for another name or part, with the nearest one.
    """
    benchmark, _, part = name.partition(":")
    _checks.one_of("An evaluation", sorted(PARTS), tasks=benchmark)
    parts = PARTS[benchmark]
    part = part or (parts[0] if parts else "")
    _checks.one_of(f"The benchmark {benchmark}", parts or ("",), part=part)
    found = _MAKERS[benchmark](part)
    usual = data.PromptFormat().as_dict()
    changed = {k: x for k, x in (prompt_format or {}).items() if x != usual[k]}
    for task in found.values():
        if changed and task["score"]["prompt_format"] == QA_FORMAT:
            base = usual if changed.get("chat") else QA_FORMAT
            task["score"]["prompt_format"] = base | changed
    return found


def _tofu(part: str) -> Mapping[str, Any]:
    tables = {
        "forget": f"forget{part}_perturbed",
        "retain": "retain_perturbed",
        "real_authors": "real_authors_perturbed",
        "world_facts": "world_facts_perturbed",
        "holdout": f"holdout{part}",
    }
    score = dict(prompt_format=QA_FORMAT, new_tokens=200)
    return {
        task: dict(source="benchmark", name="tofu", table=table, score=dict(score))
        for task, table in tables.items()
    }


def _muse(corpus: str) -> Mapping[str, Any]:
    """MUSE's questions and passages.

    Questions follow ten with answers; 32 tokens are generated and cut at a blank line
    or the next question. For passages, 128 tokens are compared with the continuation,
    as OpenUnlearning does. (MUSE's code truncates the continuation to 128 tokens and
    does not stem.)
    """
    muse = dict(source="benchmark", name="muse")
    score = dict(prompt_format=QA_FORMAT, new_tokens=32, stops=MUSE_STOPS)
    found = {
        f"{split}_knowmem": muse
        | dict(
            table=f"{corpus}/knowmem/{split}_qa",
            shots=f"{corpus}/knowmem/{split}_qa_icl",
            kind=split,
            score=dict(score),
        )
        for split in ("forget", "retain")
    }
    found["forget_verbmem"] = muse | dict(
        table=f"{corpus}/verbmem/forget",
        columns=dict(question="prompt", answer="gt"),
        kind="forget",
        score=dict(prompt_format=PASSAGE_FORMAT, new_tokens=128),
    )
    return found


def _mmlu(part: str) -> Mapping[str, Any]:
    """Zero-shot: the question, its choices behind letters, "Answer:"; the letter with
    the highest log-probability is the model's choice. Calibrated: each letter's mean
    over all questions is subtracted first."""
    return {"mmlu": _letters("mmlu", "test")}


def _wmdp(part: str) -> Mapping[str, Any]:
    subjects = ("bio", "chem", "cyber")
    return {f"wmdp_{subject}": _letters("wmdp", subject) for subject in subjects}


def _letters(name: str, table: str) -> dict[str, Any]:
    benchmark = dict(source="benchmark", name=name, table=table, letters=True)
    return benchmark | dict(score=dict(prompt_format=LETTER_FORMAT))


PARTS = {"tofu": ("10", "05", "01"), "muse": ("news", "books"), "mmlu": (), "wmdp": ()}
_MAKERS = {"tofu": _tofu, "muse": _muse, "mmlu": _mmlu, "wmdp": _wmdp}
