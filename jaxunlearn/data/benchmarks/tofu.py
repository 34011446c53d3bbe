# SPDX-License-Identifier: Apache-2.0
"""TOFU: 200 fictitious authors with 20 questions each.

    forget = tofu.read("forget10_perturbed", folder)     # FOLDER/tofu/...

forget01/05/10 are the last 40/200/400 rows of `full`, and retain99/95/90 the rows
before them. A perturbed table has the same rows with a paraphrased answer and wrong
answers: five, or three for real authors and world facts. The holdout tables are about
further authors, who occur in no other table. `idontknow` has one column, `text`, with
answers that refuse. `BENCHMARK.tables` lists all tables.
"""

from functools import partial

from jaxunlearn.data.benchmarks import official
from jaxunlearn.data.readers import files

_BARE = {"question": "text", "answer": "text"}
_SHORT = _BARE | {"perturbed_answer": "texts"}
_FULL = _BARE | {
    "paraphrased_answer": "text",
    "perturbed_answer": "texts",
    "paraphrased_question": "text",
}
_OPTIONS = (
    {"question": "text"} | {f"option{i}": "text" for i in (1, 2, 3, 4)}
) | {"answer": "text"}  # fmt: skip

_HUB = "https://huggingface.co/datasets/locuslab/TOFU/resolve/main/{}.json"
_SIZES = {"01": 40, "05": 200, "10": 400}


def _table(name: str, columns: dict[str, str], rows: int) -> official.Table:
    names = (f"{name}.json", f"{name}.jsonl")
    return official.Table(names, columns, rows, url=_HUB.format(name))


_TABLES = {"full": _table("full", _BARE, 4000)}
for _part, _count in _SIZES.items():
    for _name, _columns, _rows in (
        (f"forget{_part}", _BARE, _count),
        (f"forget{_part}_perturbed", _FULL, _count),
        (f"retain{100 - int(_part)}", _BARE, 4000 - _count),
        (f"holdout{_part}", _BARE, _count),
    ):
        _TABLES[_name] = _table(_name, _columns, _rows)
_TABLES |= {
    "retain_perturbed": _table("retain_perturbed", _FULL, 400),
    "real_authors": _table("real_authors", _OPTIONS, 100),
    "real_authors_perturbed": _table("real_authors_perturbed", _SHORT, 100),
    "world_facts": _table("world_facts", _OPTIONS, 117),
    "world_facts_perturbed": _table("world_facts_perturbed", _SHORT, 117),
    "idontknow": official.Table(
        ("idontknow.jsonl",),  # plain lines, despite the name
        {"text": "text"},
        100,
        parse=partial(files.read_texts, lines=True),
        url="https://raw.githubusercontent.com/locuslab/tofu/"
        "8c49eee7da2b96b2b718c41c66f4e21331c89189/data/idontknow.jsonl",
    ),
}

BENCHMARK = official.Benchmark(
    name="tofu",
    tables=_TABLES,
    home="https://huggingface.co/datasets/locuslab/TOFU",
    licence="MIT",
    citation="P. Maini, Z. Feng, A. Schwarzschild, Z. C. Lipton, J. Z. Kolter. TOFU: "
    "A Task of Fictitious Unlearning for LLMs. 2024. https://arxiv.org/abs/2401.06121",
)

read = BENCHMARK.read
