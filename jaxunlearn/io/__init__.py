# SPDX-License-Identifier: Apache-2.0
"""Files: Hugging Face folders and GGUF in and out, logs."""

from jaxunlearn.io import hf as hf
from jaxunlearn.io import log as log
