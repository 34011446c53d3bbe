# SPDX-License-Identifier: Apache-2.0
"""Files: Hugging Face folders and GGUF in and out, checkpoints of a run, logs."""

from jaxunlearn.io import checkpoint as checkpoint
from jaxunlearn.io import hf as hf
from jaxunlearn.io import log as log
from jaxunlearn.io import preempt as preempt
