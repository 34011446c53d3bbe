# SPDX-License-Identifier: Apache-2.0
"""Data on the host: files to rows, rows to tables of NumPy columns, tables to batches.

A *row* is a dict, such as {"question": "...", "answer": "..."}. A *table* is a dict of
columns whose first axis counts rows: `tokens` [n, L] int32, `mask` [n, L] bool and
`answer` [n, L] bool, plus columns of your choice, such as `ref_logps` [n] float32.

    rows = data.read_rows("forget.jsonl", ("question", "answer"))
    forget = data.encode(tokenizer, *data.columns(rows, "question", "answer"))
    batches = data.streams({"forget": forget, "retain": retain}, 4, seed=0)

Tables and batches:

| module | what it does |
| --- | --- |
| `table` | texts to tables: `encode`, `encode_text` |
| | how prompts and answers are joined: `PromptFormat`, `render` |
| | tables to batches in a reproducible order: `streams`, `batches`, `eval_batches` |
| | `concat`, `select`, `with_columns`, `check_length` |
| `pairs` | `paired`: tables whose rows belong together, such as two answers |
| `source` | rows that are decoded and encoded only when they are read |
| `loader` | the streams of `table`, read ahead by grain (extra `data`) |
| `audit` | warnings: rows in both sets, rows that are too long |
| `images` | tables of images; forget and retain splits |

`readers`, for your own files:

| module | what it does |
| --- | --- |
| `files` | JSON lines, JSON, CSV, Parquet (extra `data`), `save_to_disk` folders |
| `jsonl` | JSON lines; also one row at a time, for files larger than memory |
| `prose` | general English text that every Python installation contains |

`benchmarks`, each with a `read` function that returns the rows of one table: `tofu`,
`muse`, `wmdp`, `mmlu`, `lume`, `rtt_facts`, `capitals`, `image_sets`. `official`
describes how they are read and checked. `builders` (extra `data`) converts them to
array_record; it registers tensorflow-datasets builders when it is imported, so import
it by name: `from jaxunlearn.data.benchmarks import builders`.

Everything but the two extras works with the core dependencies. Tokenizers come from
transformers (extra `hf`); any fast tokenizer that knows character offsets will do.
"""

from jaxunlearn.data import audit as audit
from jaxunlearn.data import images as images
from jaxunlearn.data import loader as loader
from jaxunlearn.data import pairs as pairs
from jaxunlearn.data import source as source
from jaxunlearn.data import table as table
from jaxunlearn.data.audit import drop_long as drop_long
from jaxunlearn.data.audit import overlap as overlap
from jaxunlearn.data.benchmarks import capitals as capitals
from jaxunlearn.data.benchmarks import image_sets as image_sets
from jaxunlearn.data.benchmarks import lume as lume
from jaxunlearn.data.benchmarks import mmlu as mmlu
from jaxunlearn.data.benchmarks import muse as muse
from jaxunlearn.data.benchmarks import official as official
from jaxunlearn.data.benchmarks import rtt_facts as rtt_facts
from jaxunlearn.data.benchmarks import tofu as tofu
from jaxunlearn.data.benchmarks import wmdp as wmdp
from jaxunlearn.data.pairs import paired as paired
from jaxunlearn.data.readers import files as files
from jaxunlearn.data.readers import jsonl as jsonl
from jaxunlearn.data.readers import prose as prose
from jaxunlearn.data.readers.files import columns as columns
from jaxunlearn.data.readers.files import read_rows as read_rows
from jaxunlearn.data.readers.jsonl import open_jsonl as open_jsonl
from jaxunlearn.data.readers.jsonl import read_jsonl as read_jsonl
from jaxunlearn.data.source import encoded as encoded
from jaxunlearn.data.source import mapped as mapped
from jaxunlearn.data.table import PromptFormat as PromptFormat
from jaxunlearn.data.table import Rendered as Rendered
from jaxunlearn.data.table import batches as batches
from jaxunlearn.data.table import check_length as check_length
from jaxunlearn.data.table import concat as concat
from jaxunlearn.data.table import encode as encode
from jaxunlearn.data.table import encode_text as encode_text
from jaxunlearn.data.table import eval_batches as eval_batches
from jaxunlearn.data.table import render as render
from jaxunlearn.data.table import streams as streams
