# SPDX-License-Identifier: Apache-2.0
"""Runs a golden case through jaxunlearn: its manifest entry and inputs to outputs.

Hyperparameters come from the entry, sizes from the arrays. To cover more cases, write a
function in `golden_families/` and add a row to FAMILIES, or to ON_HOST where it cannot
be traced (texts, whole-set statistics).
"""

import functools
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

# The families are in the folder of this file, wherever it is imported from.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from golden_families import (  # noqa: E402
    aggregates,
    constrained,
    directions,
    edited,
    hidden,
    likelihood,
    membership,
    memory,
    muse,
    preference,
    rows,
    tokens,
)

Case = Mapping[str, Any]
Family = Callable[[Case, Mapping[str, jax.Array]], Mapping[str, jax.Array]]

# The first pattern that matches the whole name of a case applies.
FAMILIES: dict[str, Family] = {
    r"batch_nll.*": likelihood.batch_nll,
    r"kl_retain.*": likelihood.kl_retain,
    r"grad_ascent.*|grad_diff.*": likelihood.grad_diff,
    r"npo.*": preference.npo,
    r"simnpo.*": preference.simnpo,
    r"dpo.*": preference.dpo,
    r"wga.*|satimp.*": tokens.weighted,
    r"undial.*": tokens.undial,
    r"ceu.*": tokens.ce_u,
    r"pdu.*": constrained.pdu,
    r"rmu_activation_loss.*": hidden.activation,
    r"rmu.*": hidden.rmu,
    r"muse_(ga|npo)(_.*)?": muse.loss,
    r"blur_muse_loss.*": muse.two_losses,
    r"muse_task_vector.*": edited.task_vector,
    r"tofu_(grad.*|kl)": likelihood.tofu,
    r"blur_muse_.*": directions.muse,
    r"blur_tofu.*": directions.tofu,
    r"blur_wmdp.*": directions.wmdp,
    r"probability(_no_labels.*)?": memory.probability,
    r"probability_multi.*": memory.several,
    r"probability_w_options.*": memory.with_options,
    r"exact_memorization.*": memory.exact,
    r"extraction_strength.*": memory.extraction,
    r"truth_ratio.*": memory.truth_ratio,
    r"classifier_prob.*": memory.classifier,
}
ON_HOST: dict[str, Family] = {
    r"tokenwise_logprobs.*": memory.tokenwise,
    r"mia_.*": membership.attack,
    r"privleak.*": membership.privleak,
    r"rel_diff.*": membership.relative,
    r"muse_privleak.*": membership.muse,
    r"forget_quality_inverse.*": aggregates.inverse,
    r"forget_quality.*": aggregates.forget_quality,
    r"model_utility.*": aggregates.harmonic,
    r"tofu_model_utility.*": aggregates.tofu_utility,
    r"tofu_forget_quality.*": aggregates.tofu_forget_quality,
    r"rouge_muse.*": aggregates.rouge_muse,
    r"rouge.*": aggregates.rouge_openunlearning,
    r"preprocess_chat.*": rows.chat,
    r"preprocess_pretraining.*": rows.pretraining,
    r"collator.*": rows.collator,
}


def covered(name: str) -> bool:
    """Whether a family covers the case."""
    return _family(name) is not None


def traced(name: str) -> bool:
    """Whether the case runs under jit, and not on the host."""
    return _family(name) not in ON_HOST.values()


def run_case(case: Case, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a case as jaxunlearn computes them, by role.

    Args:
        case: an entry of the manifest's `cases`.
        inputs: role -> array. Float64 arrays are computed with in float64.
    Returns:
        role -> array, the roles of the entry's `outputs`.
    Raises:
        NotImplementedError: if no family covers the case.
        KeyError: if the family does not give an output that the entry asks for.
    """
    name = case["name"]
    family = _family(name)
    if family is None:
        raise NotImplementedError(
            f"No family of golden cases covers {name!r}; there are "
            f"{[*FAMILIES, *ON_HOST]}. Write one in tests/golden/golden_families and "
            "add it to FAMILIES."
        )
    wide = any(np.asarray(x).dtype == np.float64 for x in inputs.values())
    with jax.enable_x64(wide):
        arrays = {role: jax.numpy.asarray(x) for role, x in inputs.items()}
        run = functools.partial(family, case)
        outputs = (run if family in ON_HOST.values() else jax.jit(run))(arrays)
        outputs = {role: np.asarray(x) for role, x in outputs.items()}
    missing = sorted(set(case["outputs"]) - set(outputs))
    if missing:
        raise KeyError(f"The family of {name!r} does not give {missing}.")
    return {role: outputs[role] for role in case["outputs"]}


def _family(name: str) -> Family | None:
    tables = {**FAMILIES, **ON_HOST}.items()
    return next((f for pattern, f in tables if re.fullmatch(pattern, name)), None)
