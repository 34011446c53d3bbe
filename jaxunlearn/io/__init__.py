# SPDX-License-Identifier: Apache-2.0
"""Files: Hugging Face folders and GGUF in and out, checkpoints of a run, logs.

| module | what it does | extra |
| --- | --- | --- |
| `hf` | loads and saves decoders in the formats of transformers and llama.cpp | `hf` |
| `checkpoint` | asynchronous, sharded checkpoints of a run | `checkpoint` |
| `preempt` | saves once and exits after Ctrl-C or SIGTERM | |
| `log` | one line of JSON per step | |
"""

from jaxunlearn.io import checkpoint as checkpoint
from jaxunlearn.io import hf as hf
from jaxunlearn.io import log as log
from jaxunlearn.io import preempt as preempt
