# SPDX-License-Identifier: Apache-2.0
"""Data on the host: files into facts, texts into tables of NumPy columns.

A *table* is a dict of columns, rows first: `tokens` [n, L] int32, `mask` [n, L] bool
and `answer` [n, L] bool, plus any column of your own such as `ref_logps` [n] float32.
Benchmarks have a file each (`tofu`, `lume`, `muse`, `wmdp`, `mmlu`, `rtt_facts`), whose
`read` gives the rows of one of their tables; `images` reads pictures. `data.loader`,
which reads ahead, imports grain, and `data.builders` tensorflow-datasets: both are
therefore imported by name.
"""

from jaxunlearn.data import audit as audit
from jaxunlearn.data import capitals as capitals
from jaxunlearn.data import files as files
from jaxunlearn.data import images as images
from jaxunlearn.data import jsonl as jsonl
from jaxunlearn.data import openunlearning as openunlearning
from jaxunlearn.data import prose as prose
from jaxunlearn.data import source as source
from jaxunlearn.data import table as table
from jaxunlearn.data.audit import drop_long as drop_long
from jaxunlearn.data.audit import overlap as overlap
from jaxunlearn.data.benchmarks import lume as lume
from jaxunlearn.data.benchmarks import mmlu as mmlu
from jaxunlearn.data.benchmarks import muse as muse
from jaxunlearn.data.benchmarks import official as official
from jaxunlearn.data.benchmarks import rtt_facts as rtt_facts
from jaxunlearn.data.benchmarks import tofu as tofu
from jaxunlearn.data.benchmarks import wmdp as wmdp
from jaxunlearn.data.capitals import Cloze as Cloze
from jaxunlearn.data.capitals import Fact as Fact
from jaxunlearn.data.files import columns as columns
from jaxunlearn.data.files import read_rows as read_rows
from jaxunlearn.data.jsonl import open_jsonl as open_jsonl
from jaxunlearn.data.jsonl import read_facts as read_facts
from jaxunlearn.data.jsonl import read_jsonl as read_jsonl
from jaxunlearn.data.source import encoded as encoded
from jaxunlearn.data.source import mapped as mapped
from jaxunlearn.data.table import batches as batches
from jaxunlearn.data.table import chat as chat
from jaxunlearn.data.table import check_length as check_length
from jaxunlearn.data.table import concat as concat
from jaxunlearn.data.table import encode as encode
from jaxunlearn.data.table import encode_text as encode_text
from jaxunlearn.data.table import eval_batches as eval_batches
from jaxunlearn.data.table import streams as streams
