# SPDX-License-Identifier: Apache-2.0
"""Data on the host: files into facts, texts into tables of NumPy columns.

A *table* is a dict of columns, rows first: `tokens` [n, L] int32, `mask` [n, L] bool
and `answer` [n, L] bool, plus any column of your own such as `ref_logps` [n] float32.
`data.loader`, which reads ahead, imports grain and is therefore imported by name.
"""

from jaxunlearn.data import facts as facts
from jaxunlearn.data import jsonl as jsonl
from jaxunlearn.data import openunlearning as openunlearning
from jaxunlearn.data import prose as prose
from jaxunlearn.data import source as source
from jaxunlearn.data import table as table
from jaxunlearn.data.facts import Cloze as Cloze
from jaxunlearn.data.facts import Fact as Fact
from jaxunlearn.data.jsonl import open_jsonl as open_jsonl
from jaxunlearn.data.jsonl import read_facts as read_facts
from jaxunlearn.data.jsonl import read_jsonl as read_jsonl
from jaxunlearn.data.source import encoded as encoded
from jaxunlearn.data.source import mapped as mapped
from jaxunlearn.data.table import batches as batches
from jaxunlearn.data.table import check_length as check_length
from jaxunlearn.data.table import concat as concat
from jaxunlearn.data.table import encode as encode
from jaxunlearn.data.table import encode_text as encode_text
from jaxunlearn.data.table import padded as padded
from jaxunlearn.data.table import streams as streams
